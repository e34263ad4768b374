"""Tiles of K and V, and the running softmax that takes them in: what decode and prefill share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """Of the exponential that the hardware has; the absolute error is that of float32 at 1."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def load_tile(
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
def load_factors(scales, head, table, positions, loaded, block_size: tl.constexpr, masked: tl.constexpr):
    """[positions] float32: the scales of one head's rows, zeros where it is not to be loaded.

    Args:
        head: of K/V. table, positions, loaded: as in `load_tile`.
    """
    if masked:
        block = tl.load(table + positions // block_size, mask=loaded, other=0).to(tl.int64)
    else:
        block = tl.load(table + positions // block_size).to(tl.int64)
    places = scales[0] + block * scales[1] + (positions % block_size) * scales[2] + head * scales[3]
    found = tl.load(places, mask=loaded, other=0.0) if masked else tl.load(places)
    return found.to(tl.float32)


@triton.jit
def dot(left, right, total, precision: tl.constexpr, widen: tl.constexpr):
    """`right`: numbers or codes. `widen`: only for the interpreter, which cannot multiply bfloat16; exact, since the
    products are."""
    if widen:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right.to(left.dtype), total, input_precision=precision)


@triton.jit
def absorb(
    query,
    keys,
    values,
    key_factors,
    value_factors,
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
        key_factors, value_factors: [keys], what keys and values are codes of; None: they are numbers.
        top: [rows], the largest scaled score so far. total: [rows], sum of the weights. gathered: [rows, v_pad].
        factor: from what `seen` hides to exponents. inner: from products to what tanh takes, read where `capped`.
    """
    nothing = tl.zeros([query.shape[0], keys.shape[0]], tl.float32)
    scores = dot(query, tl.trans(keys), nothing, precision, widen)
    if key_factors is not None:
        scores = scores * key_factors[None, :]
    if capped:
        scores = tanh(scores * inner)
    if masked:
        scores = tl.where(seen, scores, -float("inf"))
    highest = tl.maximum(top, tl.max(scores, 1) * factor)
    # A row that has seen nothing yet: infinity minus infinity would be NaN.
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2(scores * factor - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    if value_factors is not None:
        if query.dtype == tl.float16:
            values = values.to(tl.float32) * value_factors[:, None]
        else:
            weights = weights * value_factors[None, :]
    gathered = dot(weights.to(query.dtype), values, gathered * fade[:, None], precision, widen)
    return highest, total, gathered


@triton.jit
def take_tile(
    query,
    paged,
    positions,
    loaded,
    seen,
    top,
    total,
    gathered,
    scoring,
    sizes: tl.constexpr,
    capped: tl.constexpr,
    masked: tl.constexpr,
    precision: tl.constexpr,
    widen: tl.constexpr,
):
    """Load the K and V of these positions and `absorb` them.

    Args:
        paged: K, V, the K/V head, the sequence's block table. K and V: that head's in block 0, the strides of a block
        and of a token, and the scales. scoring: `factor`, `inner`. sizes: `k_dim`, `v_dim`, `block_size`.
        The others: as in `load_tile` and `absorb`.
    """
    keys, values, head, table = paged
    size: tl.constexpr = sizes[2]
    key_rows = load_tile(keys[0], table, positions, loaded, keys[1], keys[2], sizes[0], query.shape[1], size, masked)
    value_rows = load_tile(
        values[0], table, positions, loaded, values[1], values[2], sizes[1], gathered.shape[1], size, masked
    )
    key_factors = None
    value_factors = None
    if keys[3] is not None:
        key_factors = load_factors(keys[3], head, table, positions, loaded, size, masked)
        value_factors = load_factors(values[3], head, table, positions, loaded, size, masked)
    return absorb(
        query,
        key_rows,
        value_rows,
        key_factors,
        value_factors,
        seen,
        top,
        total,
        gathered,
        scoring[0],
        scoring[1],
        capped,
        masked,
        precision,
        widen,
    )
