"""New K and V into their slots of the pool, rounded to codes where the pool is quantised.

Rounding is that of `kvstore.quantised.quantise`, to the bit, and is done by arithmetic on float32: what is then
converted to a narrower type is exact in it, so no conversion's way of rounding matters.
"""

import triton
import triton.language as tl


@triton.jit
def write_rows(
    key,  # [kv_heads, T, k_dim]
    value,  # [kv_heads, T, v_dim]
    key_pool,  # [blocks, block_size, kv_heads, k_dim]
    value_pool,
    key_scales,
    value_scales,
    slots,  # [T] int64
    out,  # [T, out_size], of the attention that follows
    key_head,
    key_row,
    value_head,
    value_row,
    key_block,
    key_token,
    key_pool_head,
    value_block,
    value_token,
    value_pool_head,
    largest: tl.constexpr,
    out_size: tl.constexpr,
    out_pad: tl.constexpr,
    block_size: tl.constexpr,
    kv_heads: tl.constexpr,
    heads_pad: tl.constexpr,
    k_dim: tl.constexpr,
    k_pad: tl.constexpr,
    v_dim: tl.constexpr,
    v_pad: tl.constexpr,
):
    """Program (row): put its K/V into its slot; a padding row's output becomes zero instead.

    `largest`: the largest code of a quantised pool.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        lanes = tl.arange(0, out_pad)
        nothing = tl.zeros([out_pad], out.dtype.element_ty)
        tl.store(out + row * out_size + lanes, nothing, mask=lanes < out_size)
        return
    block, token = slot // block_size, slot % block_size
    heads = tl.arange(0, heads_pad)[:, None]
    k_lanes = tl.arange(0, k_pad)[None, :]
    places = key_pool + block * key_block + token * key_token + heads * key_pool_head + k_lanes
    seen = (heads < kv_heads) & (k_lanes < k_dim)
    new = tl.load(key + heads * key_head + row * key_row + k_lanes, mask=seen, other=0.0)
    _store(new, places, seen, key_scales, block, token, kv_heads, heads_pad, largest)
    v_lanes = tl.arange(0, v_pad)[None, :]
    places = value_pool + block * value_block + token * value_token + heads * value_pool_head + v_lanes
    seen = (heads < kv_heads) & (v_lanes < v_dim)
    new = tl.load(value + heads * value_head + row * value_row + v_lanes, mask=seen, other=0.0)
    _store(new, places, seen, value_scales, block, token, kv_heads, heads_pad, largest)


@triton.jit
def _store(
    rows, places, seen, scales, block, token, kv_heads: tl.constexpr, heads_pad: tl.constexpr, largest: tl.constexpr
):
    """One token's rows [heads, dim], zeros beyond what is `seen`, as numbers or as codes with their scales."""
    if scales is None:
        tl.store(places, rows, mask=seen)
    else:
        numbers = rows.to(tl.float32)
        factors = _scales(numbers, largest)
        codes = _codes(numbers, factors, largest, places.dtype.element_ty)
        tl.store(places, codes, mask=seen)
        heads = tl.arange(0, heads_pad)
        spots = scales[0] + block * scales[1] + token * scales[2] + heads * scales[3]
        halves = (factors.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
        tl.store(spots, halves.to(tl.bfloat16, bitcast=True), mask=heads < kv_heads)


@triton.jit
def _scales(numbers, largest: tl.constexpr):
    """[heads] float32 of numbers [heads, dim], each one that bfloat16 has; NaN where a row has one."""
    scales = tl.div_rn(tl.max(tl.abs(numbers), 1), largest)
    bits = scales.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    broken = tl.max((numbers != numbers).to(tl.int32), 1) > 0  # a maximum passes NaN over
    return tl.where(broken, float("nan"), nearest.to(tl.float32, bitcast=True))


@triton.jit
def _codes(numbers, scales, largest: tl.constexpr, kind: tl.constexpr):
    """[heads, dim] of the type `kind`: int8 or float8e4nv."""
    codes = tl.div_rn(numbers, tl.broadcast_to(scales[:, None], numbers.shape))
    codes = tl.where(codes == codes, codes, 0.0)
    sizes = tl.minimum(tl.abs(codes), largest)
    bits = codes.to(tl.int32, bitcast=True)
    if kind == tl.int8:
        step = tl.full(sizes.shape, 12582912.0, tl.float32)
    else:
        # A float whose last bit is worth as much as that of an e4m3 of this size, of which the least exponent is -6.
        step = tl.maximum(sizes.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23) + ((20 << 23) | 0x400000)
        step = step.to(tl.float32, bitcast=True)
    nearest = (sizes + step) - step  # what is added last decides where the sum is rounded, to even on a tie
    signed = nearest.to(tl.int32, bitcast=True) | (bits & -0x80000000)
    return signed.to(tl.float32, bitcast=True).to(kind)
