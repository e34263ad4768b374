"""Paged attention in Triton: write new K/V, decode in splits and combine them, prefill chunks over paged K/V.

Everything a result depends on is the row's own: where it stands, what its blocks hold. So a row gives the same bits
alone, in any batch, in any cut of its prompt and on any grid:

- Splits and tiles lie at fixed positions of the context, never at a share of it.
- A tile that a row does not see leaves the row's sums as they are, to the bit: its weights are 0, its fade is 1. That
  is why the running maximum is kept scaled, so that no multiplication stands between it and the fade, and why a score
  is hidden before it is scaled, so that masked and unmasked tiles compile to the same arithmetic.
- A grid only says which program computes what.

What lies beyond a context, left of a window or in blocks of others is never loaded, because zero times NaN is NaN.

Quantised pools (`kvstore.quantised`): codes are loaded as they lie and become numbers of the query's dtype, which is
exact. A row's scale multiplies what its codes were multiplied with, in float32: the score for K, the weight for V. So
nothing is rounded between a code and a sum that `code * scale`, rounded once, would not have been; in float16, whose
range is too small for a weight times a scale, values are scaled themselves.

Sources: online softmax and tiles from FlashAttention-2 (Dao, 2023); splits and their combination from Flash-Decoding
(Dao et al., 2023), with splits of a fixed size where that has a fixed number of them; block tables from PagedAttention
(Kwon et al., 2023).

Numbers that change from step to step, and whether a list of members is aligned, are not specialised on: each variant
would be compiled in the middle of somebody's stream.

Names that all kernels share: `*_row`, `*_head`, `*_block`, `*_token` are strides in elements; `*_pad` is the next power
of two, which tiles must have. Exponents are of base 2: `factor` holds log2(e). `*_scales` is None, or the scales of a
quantised pool, [blocks, block_size, kv_heads] bfloat16, and their three strides.
"""
