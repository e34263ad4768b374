"""Decode: one row of each sequence over the splits of its paged context, and the combination of those."""

import triton
import triton.language as tl

from workers.attention.kernels.absorb import LOG2_E, take_tile


@triton.jit(do_not_specialize=["table_row", "width"], do_not_specialize_on_alignment=["members"])
def decode_splits(
    query,  # [heads, T, k_dim]
    key_pool,
    value_pool,
    key_scales,
    value_scales,
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
    keys = (key_pool + kv_head * key_pool_head, key_block, key_token, key_scales)
    values = (value_pool + kv_head * value_pool_head, value_block, value_token, value_scales)
    paged = (keys, values, kv_head, table)
    scoring = (factor, inner)
    sizes: tl.constexpr = (k_dim, v_dim, block_size)
    for number in range(first_split + tl.program_id(2), tl.cdiv(context, split), tl.num_programs(2)):
        start = tl.maximum(number * split, left)
        stop = tl.minimum(number * split + split, context)
        top = tl.full([group_pad], -float("inf"), tl.float32)
        total = tl.zeros([group_pad], tl.float32)
        gathered = tl.zeros([group_pad, v_pad], tl.float32)
        for tile in range(start // keys_tile * keys_tile, stop, keys_tile):
            positions = tile + tl.arange(0, keys_tile)
            loaded = (positions >= start) & (positions < stop)
            top, total, gathered = take_tile(
                asked,
                paged,
                positions,
                loaded,
                loaded[None, :],
                top,
                total,
                gathered,
                scoring,
                sizes,
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
