"""Prefill: chunks of rows over their paged context."""

import triton
import triton.language as tl

from workers.attention.kernels.absorb import LOG2_E, take_tile


@triton.jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=["members"])
def prefill_rows(
    query,  # [heads, T, k_dim]
    key_pool,
    value_pool,
    key_scales,
    value_scales,
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
    kv_head = head // group
    context = tl.load(contexts + sequence)
    cached = tl.maximum(context - length, 0)
    rows = start + tl.arange(0, rows_tile)
    k_lanes = tl.arange(0, k_pad)
    v_lanes = tl.arange(0, v_pad)
    at = (first_row + rows).to(tl.int64)
    own = query + head * query_head + at[:, None] * query_row + k_lanes[None, :]
    asked = tl.load(own, mask=(rows < length)[:, None] & (k_lanes < k_dim)[None, :], other=0.0)
    table = block_tables + sequence * table_row
    keys = (key_pool + kv_head * key_pool_head, key_block, key_token, key_scales)
    values = (value_pool + kv_head * value_pool_head, value_block, value_token, value_scales)
    paged = (keys, values, kv_head, table)
    scoring = (factor, inner)
    sizes: tl.constexpr = (k_dim, v_dim, block_size)

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
            seen = positions[None, :] > stands - window
            top, total, gathered = take_tile(
                asked,
                paged,
                positions,
                loaded,
                seen,
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
        begin = tl.maximum(begin, cut)
    for tile in range(begin, whole, keys_tile):
        positions = tile + tl.arange(0, keys_tile)
        loaded = positions >= 0
        top, total, gathered = take_tile(
            asked,
            paged,
            positions,
            loaded,
            loaded,
            top,
            total,
            gathered,
            scoring,
            sizes,
            capped,
            False,
            precision,
            widen,
        )
    for tile in range(tl.maximum(begin, whole), stop, keys_tile):
        positions = tile + tl.arange(0, keys_tile)
        loaded = (positions >= left) & (positions < stop)
        seen = (positions[None, :] <= stands) & loaded[None, :]
        if window > 0:
            seen = seen & (positions[None, :] > stands - window)
        top, total, gathered = take_tile(
            asked, paged, positions, loaded, seen, top, total, gathered, scoring, sizes, capped, True, precision, widen
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
