"""Paged attention in Triton: write new K/V, decode in splits and combine them, prefill chunks over paged K/V.

Everything a result depends on is the row's own: where it stands, what its blocks hold. So a row gives the same bits
alone, in any batch, in any cut of its prompt and on any grid:

- Splits and tiles lie at fixed positions of the context, never at a share of it.
- A tile that a row does not see leaves the row's sums as they are, to the bit: its weights are 0, its fade is 1. That
  is why the running maximum is kept scaled, so that no multiplication stands between it and the fade, and why a score
  is hidden before it is scaled, so that masked and unmasked tiles compile to the same arithmetic.
- A grid only says which program computes what.

What lies beyond a context, left of a window or in blocks of others is never loaded, because zero times NaN is NaN.

Sources: online softmax and tiles from FlashAttention-2 (Dao, 2023); splits and their combination from Flash-Decoding
(Dao et al., 2023), with splits of a fixed size where that has a fixed number of them; block tables from PagedAttention
(Kwon et al., 2023).

Numbers that change from step to step, and whether a list of members is aligned, are not specialised on: each variant
would be compiled in the middle of somebody's stream.

Names that all kernels share: `*_row`, `*_head`, `*_block`, `*_token` are strides in elements; `*_pad` is the next power
of two, which tiles must have. Exponents are of base 2: `factor` holds log2(e).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def write_rows(
    key,  # [kv_heads, T, k_dim]
    value,  # [kv_heads, T, v_dim]
    key_pool,  # [blocks, block_size, kv_heads, k_dim]
    value_pool,
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
    """Program (row): put its K/V into its slot; a padding row's output becomes zero instead."""
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
    seen = (heads < kv_heads) & (k_lanes < k_dim)
    new = tl.load(key + heads * key_head + row * key_row + k_lanes, mask=seen)
    tl.store(key_pool + block * key_block + token * key_token + heads * key_pool_head + k_lanes, new, mask=seen)
    v_lanes = tl.arange(0, v_pad)[None, :]
    seen = (heads < kv_heads) & (v_lanes < v_dim)
    new = tl.load(value + heads * value_head + row * value_row + v_lanes, mask=seen)
    tl.store(value_pool + block * value_block + token * value_token + heads * value_pool_head + v_lanes, new, mask=seen)


@triton.jit
def _tanh(x):
    """Of the exponential that the hardware has; the absolute error is that of float32 at 1."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def _load_tile(
    pool,
    table,
    positions,
    loaded,
    block_stride,
    token_stride,
    size: tl.constexpr,
    pad: tl.constexpr,
    block_size: tl.constexpr,
    masked: tl.constexpr,
):
    """[positions, pad] of one head's K or V; zeros where it is not to be loaded and beyond `size`.

    Args:
        pool: that head's in block 0. table: the sequence's block table. loaded: [positions], read only where `masked`.
    """
    lanes = tl.arange(0, pad)
    if masked:
        block = tl.load(table + positions // block_size, mask=loaded, other=0).to(tl.int64)
    else:
        block = tl.load(table + positions // block_size).to(tl.int64)
    places = pool + (block * block_stride + (positions % block_size) * token_stride)[:, None] + lanes[None, :]
    if masked:
        if size == pad:
            tile = tl.load(places, mask=loaded[:, None], other=0.0)
        else:
            tile = tl.load(places, mask=loaded[:, None] & (lanes < size)[None, :], other=0.0)
    elif size == pad:
        tile = tl.load(places)
    else:
        tile = tl.load(places, mask=(lanes < size)[None, :], other=0.0)
    return tile


@triton.jit
def _dot(left, right, total, precision: tl.constexpr, widen: tl.constexpr):
    """`widen`: only for the interpreter, which cannot multiply bfloat16; exact, since the products are."""
    if widen:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=precision)


@triton.jit
def _absorb(
    query,
    keys,
    values,
    seen,
    top,
    total,
    gathered,
    factor,
    inner,
    capped: tl.constexpr,
    masked: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
):
    """Take one tile of keys into the running softmax.

    Args:
        query: [rows, k_pad]. keys: [keys, k_pad]. values: [keys, v_pad]. seen: [rows, keys], read only where `masked`.
        top: [rows], the largest scaled score so far. total: [rows], sum of the weights. gathered: [rows, v_pad].
        factor: from what `seen` hides to exponents. inner: from products to what tanh takes, read where `capped`.
    """
    nothing = tl.zeros([query.shape[0], keys.shape[0]], tl.float32)
    scores = _dot(query, tl.trans(keys), nothing, precision, widen)
    if capped:
        scores = _tanh(scores * inner)
    if masked:
        scores = tl.where(seen, scores, -float("inf"))
    highest = tl.maximum(top, tl.max(scores, 1) * factor)
    # A row that has seen nothing yet: infinity minus infinity would be NaN.
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2(scores * factor - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    gathered = _dot(weights.to(values.dtype), values, gathered * fade[:, None], precision, widen)
    return highest, total, gathered


@triton.jit(do_not_specialize=["table_row", "width"], do_not_specialize_on_alignment=["members"])
def decode_splits(
    query,  # [heads, T, k_dim]
    key_pool,
    value_pool,
    row_starts,  # [S + 1] int32
    contexts,  # [S] int32
    block_tables,  # [S, W] int32
    members,  # [N] int32: which sequences; read where `chosen`
    partial,  # [N, kv_heads, width, group, v_dim] float32
    statistics,  # [N, kv_heads, width, group, 2] float32: largest scaled score, sum of the weights
    factor,
    inner,
    query_head,
    query_row,
    key_block,
    key_token,
    key_pool_head,
    value_block,
    value_token,
    value_pool_head,
    table_row,
    width,
    chosen: tl.constexpr,
    group: tl.constexpr,
    group_pad: tl.constexpr,
    k_dim: tl.constexpr,
    k_pad: tl.constexpr,
    v_dim: tl.constexpr,
    v_pad: tl.constexpr,
    block_size: tl.constexpr,
    split: tl.constexpr,
    keys_tile: tl.constexpr,
    window: tl.constexpr,
    capped: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
):
    """Program (sequence of one row, K/V head, p): attend over the splits p, p + P, ... of what the row sees.

    P is the grid's last dimension. `width` is the room for splits of one row, counted from the first that its window
    reaches. The query heads of a K/V head are the rows of a tile, so that K/V are read once.
    """
    at = tl.program_id(0).to(tl.int64)
    sequence = at
    if chosen:
        sequence = tl.load(members + at).to(tl.int64)
    kv_head = tl.program_id(1)
    row = tl.load(row_starts + sequence).to(tl.int64)
    if tl.load(row_starts + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    left = context * 0
    if window > 0:
        left = tl.maximum(context - window, 0)
    first_split = left // split
    lanes = tl.arange(0, group_pad)
    k_lanes = tl.arange(0, k_pad)
    v_lanes = tl.arange(0, v_pad)
    own = query + (kv_head * group + lanes)[:, None] * query_head + row * query_row + k_lanes[None, :]
    asked = tl.load(own, mask=(lanes < group)[:, None] & (k_lanes < k_dim)[None, :], other=0.0)
    table = block_tables + sequence * table_row
    key_base = key_pool + kv_head * key_pool_head
    value_base = value_pool + kv_head * value_pool_head
    for number in range(first_split + tl.program_id(2), tl.cdiv(context, split), tl.num_programs(2)):
        start = tl.maximum(number * split, left)
        stop = tl.minimum(number * split + split, context)
        top = tl.full([group_pad], -float("inf"), tl.float32)
        total = tl.zeros([group_pad], tl.float32)
        gathered = tl.zeros([group_pad, v_pad], tl.float32)
        for tile in range(start // keys_tile * keys_tile, stop, keys_tile):
            positions = tile + tl.arange(0, keys_tile)
            loaded = (positions >= start) & (positions < stop)
            keys = _load_tile(key_base, table, positions, loaded, key_block, key_token, k_dim, k_pad, block_size, True)
            values = _load_tile(
                value_base, table, positions, loaded, value_block, value_token, v_dim, v_pad, block_size, True
            )
            top, total, gathered = _absorb(
                asked,
                keys,
                values,
                loaded[None, :],
                top,
                total,
                gathered,
                factor,
                inner,
                capped,
                True,
                precision,
                widen,
            )
        place = ((at * tl.num_programs(1) + kv_head) * width + number - first_split) * group
        spots = partial + place * v_dim + (lanes[:, None] * v_dim + v_lanes[None, :])
        tl.store(spots, gathered, mask=(lanes < group)[:, None] & (v_lanes < v_dim)[None, :])
        tl.store(statistics + place * 2 + lanes * 2, top, mask=lanes < group)
        tl.store(statistics + place * 2 + 1 + lanes * 2, total, mask=lanes < group)


@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["members"])
def combine_splits(
    partial,
    statistics,
    row_starts,
    contexts,
    members,
    sinks,  # [heads], read where `sunk`
    out,  # [T, heads, v_dim]
    out_row,
    out_head,
    width,
    chosen: tl.constexpr,
    group: tl.constexpr,
    v_dim: tl.constexpr,
    v_pad: tl.constexpr,
    split: tl.constexpr,
    splits_tile: tl.constexpr,
    window: tl.constexpr,
    sunk: tl.constexpr,
):
    """Program (sequence of one row, head): the softmax over its splits; zeros for a context of 0."""
    at = tl.program_id(0).to(tl.int64)
    sequence = at
    if chosen:
        sequence = tl.load(members + at).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(row_starts + sequence).to(tl.int64)
    if tl.load(row_starts + sequence + 1) - row != 1:
        return
    context = tl.load(contexts + sequence)
    left = context * 0
    if window > 0:
        left = tl.maximum(context - window, 0)
    count = tl.cdiv(context, split) - left // split
    v_lanes = tl.arange(0, v_pad)
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    gathered = tl.zeros([v_pad], tl.float32)
    if sunk:
        top = tl.zeros([1], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
        total += 1.0
    for tile in range(0, count, splits_tile):
        numbers = tile + tl.arange(0, splits_tile)
        there = numbers < count
        # Heads of a group lie side by side, since one program of `decode_splits` writes them all.
        places = ((at * (tl.num_programs(1) // group) + head // group) * width + numbers) * group + head % group
        tops = tl.load(statistics + places * 2, mask=there, other=-float("inf"))
        totals = tl.load(statistics + places * 2 + 1, mask=there, other=0.0)
        spots = partial + places[:, None] * v_dim + v_lanes[None, :]
        parts = tl.load(spots, mask=there[:, None] & (v_lanes < v_dim)[None, :], other=0.0)
        highest = tl.maximum(top, tl.max(tops, 0))
        fade = tl.exp2(top - highest)
        weights = tl.exp2(tops - highest)
        total = total * fade + tl.sum(totals * weights, 0)
        gathered = gathered * fade + tl.sum(parts * weights[:, None], 0)
        top = highest
    result = gathered / tl.where(total == 0.0, 1.0, total)
    spots = out + row * out_row + head * out_head + v_lanes
    tl.store(spots, result.to(out.dtype.element_ty), mask=v_lanes < v_dim)


@triton.jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=["members"])
def prefill_rows(
    query,  # [heads, T, k_dim]
    key_pool,
    value_pool,
    row_starts,
    contexts,
    block_tables,
    members,
    sinks,
    out,  # [T, heads, v_dim]
    factor,
    inner,
    query_head,
    query_row,
    key_block,
    key_token,
    key_pool_head,
    value_block,
    value_token,
    value_pool_head,
    out_row,
    out_head,
    table_row,
    chosen: tl.constexpr,
    group: tl.constexpr,
    k_dim: tl.constexpr,
    k_pad: tl.constexpr,
    v_dim: tl.constexpr,
    v_pad: tl.constexpr,
    block_size: tl.constexpr,
    rows_tile: tl.constexpr,
    keys_tile: tl.constexpr,
    window: tl.constexpr,
    capped: tl.constexpr,
    sunk: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
):
    """Program (tile of rows, head, sequence of several rows): causal attention of those rows over their paged context.

    Keys come in three runs of tiles: those that the window cuts, those that every row sees, those on the diagonal.
    """
    sequence = tl.program_id(2).to(tl.int64)
    if chosen:
        sequence = tl.load(members + sequence).to(tl.int64)
    first_row = tl.load(row_starts + sequence)
    length = tl.load(row_starts + sequence + 1) - first_row
    # The last tile sees most and so takes longest: it starts first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * rows_tile
    if (length < 2) | (start >= length):
        return
    head = tl.program_id(1)
    context = tl.load(contexts + sequence)
    cached = tl.maximum(context - length, 0)
    rows = start + tl.arange(0, rows_tile)
    k_lanes = tl.arange(0, k_pad)
    v_lanes = tl.arange(0, v_pad)
    at = (first_row + rows).to(tl.int64)
    own = query + head * query_head + at[:, None] * query_row + k_lanes[None, :]
    asked = tl.load(own, mask=(rows < length)[:, None] & (k_lanes < k_dim)[None, :], other=0.0)
    table = block_tables + sequence * table_row
    key_base = key_pool + head // group * key_pool_head
    value_base = value_pool + head // group * value_pool_head

    stands = (cached + rows)[:, None]  # a row's own position
    left = context * 0  # first key that a row of this tile sees
    cut = context * 0  # from this tile on the window hides nothing
    stop = tl.minimum(cached + start + rows_tile, context)
    whole = tl.minimum((cached + start + 1) // keys_tile * keys_tile, stop // keys_tile * keys_tile)
    if window > 0:
        left = tl.maximum(cached + start + 1 - window, 0)
        cut = tl.cdiv(tl.maximum(cached + start + rows_tile - window, 0), keys_tile) * keys_tile
        cut = tl.minimum(cut, whole)
    begin = left // keys_tile * keys_tile

    top = tl.full([rows_tile], -float("inf"), tl.float32)
    total = tl.zeros([rows_tile], tl.float32)
    gathered = tl.zeros([rows_tile, v_pad], tl.float32)
    if window > 0:
        for tile in range(begin, cut, keys_tile):
            positions = tile + tl.arange(0, keys_tile)
            loaded = positions >= left
            keys = _load_tile(key_base, table, positions, loaded, key_block, key_token, k_dim, k_pad, block_size, True)
            values = _load_tile(
                value_base, table, positions, loaded, value_block, value_token, v_dim, v_pad, block_size, True
            )
            seen = positions[None, :] > stands - window
            top, total, gathered = _absorb(
                asked, keys, values, seen, top, total, gathered, factor, inner, capped, True, precision, widen
            )
        begin = tl.maximum(begin, cut)
    for tile in range(begin, whole, keys_tile):
        positions = tile + tl.arange(0, keys_tile)
        loaded = positions >= 0
        keys = _load_tile(key_base, table, positions, loaded, key_block, key_token, k_dim, k_pad, block_size, False)
        values = _load_tile(
            value_base, table, positions, loaded, value_block, value_token, v_dim, v_pad, block_size, False
        )
        top, total, gathered = _absorb(
            asked, keys, values, loaded, top, total, gathered, factor, inner, capped, False, precision, widen
        )
    for tile in range(tl.maximum(begin, whole), stop, keys_tile):
        positions = tile + tl.arange(0, keys_tile)
        loaded = (positions >= left) & (positions < stop)
        keys = _load_tile(key_base, table, positions, loaded, key_block, key_token, k_dim, k_pad, block_size, True)
        values = _load_tile(
            value_base, table, positions, loaded, value_block, value_token, v_dim, v_pad, block_size, True
        )
        seen = (positions[None, :] <= stands) & loaded[None, :]
        if window > 0:
            seen = seen & (positions[None, :] > stands - window)
        top, total, gathered = _absorb(
            asked, keys, values, seen, top, total, gathered, factor, inner, capped, True, precision, widen
        )

    if sunk:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        highest = tl.maximum(top, sink)
        fade = tl.exp2(top - highest)
        total = total * fade + tl.exp2(sink - highest)
        gathered = gathered * fade[:, None]
    result = gathered / tl.where(total == 0.0, 1.0, total)[:, None]
    spots = out + at[:, None] * out_row + head * out_head + v_lanes[None, :]
    tl.store(spots, result.to(out.dtype.element_ty), mask=(rows < length)[:, None] & (v_lanes < v_dim)[None, :])
