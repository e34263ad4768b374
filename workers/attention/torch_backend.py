"""Paged attention with plain PyTorch: gather blocks, then SDPA. The CPU's backend and the reference of all others.

Decode rows of sequences with short contexts are gathered and attended together (one call instead of one for each
sequence); long ones alone, because a gathered context that fits the CPU's cache is read faster than a batch that does
not. The query heads of a K/V head are packed into the query dimension where rows are few. A prefill chunk goes
in slices of rows, each over only the keys that it can see, so a mask stays small.

What was gathered for decode rows stays for their next step (`kept`).

Whatever lies in the pool beyond a context (freed blocks, the rest of the last) never reaches a result, NaN included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvstore.quantised import Rows, read_blocks, write_rows
from workers.attention.kept import KeptGroup, KeptGroups
from workers.attention.step import Span, Step

GROUP_NBYTES = 1 << 20  # gathered keys of one group: about a core's cache
PREFILL_ROWS = 512  # rows of one masked call
PACKED_ROWS = 64  # up to so many the heads of a group are packed: a quarter faster for 16 rows, no gain for 512


@dataclass(slots=True)
class DecodeGroup:
    """Decode rows that are attended in one call, B of them, padded to n blocks each.

    Attributes:
        spans: of the rows, in their order. is_whole_step: whether the step has no other rows.
        rows: B of them, as an index: neighbours are a slice, which costs less to read by.
        blocks: [B * n]. length: keys of each row after padding.
        padding: flat indices into [B * length] that hold nothing; None when all contexts are equal.
        contexts: [B]. kept: their K/V from the step before; None: they are gathered anew.
        masks: by window, [B, 1, 1, length], zero or -inf; None where all is seen.
    """

    spans: Sequence[Span]
    is_whole_step: bool
    rows: Tensor | slice
    blocks: Tensor
    length: int
    contexts: Tensor
    padding: Tensor | None
    kept: KeptGroup | None = None
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores become weights; the same for all rows of a layer."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether SDPA can do it."""
        return self.softcap is None and self.sinks is None


class TorchBackend:
    """See the module."""

    def __init__(self) -> None:
        """Start with nothing kept."""
        self._kept = KeptGroups()

    def attend(
        self,
        step: Step,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        keys, values = step.kv[layer]
        _write(step, keys, key)
        _write(step, values, value)
        scores, groups = Scores(scale, window, softcap, sinks), self._decode_groups(step)
        if len(groups) == 1 and groups[0].is_whole_step:
            return _decode(groups[0], layer, query, (keys, values), (key, value), scores)  # nothing to put together
        as_given = isinstance(keys, Tensor)  # else even a new row must be seen as it was stored
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        for group in groups:
            fresh = key[:, group.rows], value[:, group.rows]
            out[group.rows] = _decode(group, layer, query[:, group.rows], (keys, values), fresh, scores)
        for span in step.spans:
            if span.length > 1:
                rows = slice(span.row, span.row + span.length)
                given = as_given and span.length == span.context
                k = key[:, rows] if given else _gather(step, span, keys)
                v = value[:, rows] if given else _gather(step, span, values)
                _prefill(step, span, query[:, rows], k, v, scores, out[rows])
        return out

    def _decode_groups(self, step: Step) -> list[DecodeGroup]:
        groups: list[DecodeGroup] | None = step.plan.get("decode")
        if groups is None:
            groups = step.plan["decode"] = _groups(step)
            if isinstance(keys := step.kv[0][0], Tensor) and keys.device.type == "cpu":
                kept = self._kept.of([(group.spans, group.length) for group in groups], step.kv)
                for group, of_group in zip(groups, kept, strict=True):
                    group.kept = of_group
        return groups


def _write(step: Step, pool: Rows, fresh: Tensor) -> None:
    """Put the step's [kv_heads, T, dim] into the pool. One row, as a lone decode has, is cheaper without an index."""
    if isinstance(pool, Tensor) and len(step.spans) == 1 and step.spans[0].length == 1:
        block, offset = divmod(step.spans[0].context - 1, step.block_size)
        pool[step.spans[0].block_table[block], offset] = fresh.squeeze(1)
    else:
        write_rows(pool, step.blocks, step.offsets, fresh.transpose(0, 1))


def _groups(step: Step) -> list[DecodeGroup]:
    keys = step.kv[0][0]
    token_nbytes = keys.shape[2] * keys.shape[3] * keys.element_size()
    limit = max(1, GROUP_NBYTES // (token_nbytes * step.block_size))
    return [_group(part, step) for part in partition([span for span in step.spans if span.length == 1], limit)]


def partition(spans: Sequence[Span], limit: int) -> list[list[Span]]:
    """Decode spans in groups of similar context: at most `limit` blocks after padding, half of them padding."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: -span.context):
        if groups:
            longest = len(groups[-1][0].block_table)
            if longest * (len(groups[-1]) + 1) <= limit and len(span.block_table) * 2 >= longest:
                groups[-1].append(span)
                continue
        groups.append([span])
    return groups


def _group(spans: Sequence[Span], step: Step) -> DecodeGroup:
    spans = sorted(spans, key=lambda span: span.row)
    device, width = step.blocks.device, max(len(span.block_table) for span in spans)
    first, last = spans[0].row, spans[-1].row
    rows = [span.row for span in spans]
    tables = [[*span.block_table, *[span.block_table[0]] * (width - len(span.block_table))] for span in spans]
    contexts = torch.tensor([span.context for span in spans], device=device)
    if all(span.context == spans[0].context for span in spans):
        length, padding = spans[0].context, None
    else:
        length = width * step.block_size
        hidden = torch.arange(length, device=device)[None] >= contexts[:, None]
        padding = hidden.flatten().nonzero().flatten()
    return DecodeGroup(
        spans=spans,
        is_whole_step=len(spans) == len(step.spans),
        rows=slice(first, last + 1) if last - first + 1 == len(rows) else torch.tensor(rows, device=device),
        blocks=torch.tensor(tables, device=device).flatten(),
        length=length,
        contexts=contexts,
        padding=padding,
    )


def _decode(
    group: DecodeGroup,
    layer: int,
    query: Tensor,
    pool: tuple[Rows, Rows],
    fresh: tuple[Tensor, Tensor],
    scores: Scores,
) -> Tensor:
    """query [heads, B, k_dim], `pool` of the layer, its new rows [kv_heads, B, dim] -> [B, heads, v_dim]."""
    heads, batch, dim = query.shape
    kv_heads = pool[0].shape[2]
    by_row = query if batch == 1 else query.transpose(0, 1)  # a lone row lies the same either way
    q = by_row.reshape(batch, kv_heads, heads // kv_heads, dim)
    k, v = _decode_rows(group, layer, pool, fresh)
    mask = _decode_mask(group, scores.window, query.dtype)
    if scores.plain:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale)
    else:
        sinks = None if scores.sinks is None else scores.sinks.view(1, kv_heads, -1, 1)
        out = _weigh(q, k, v, mask, scores, sinks)
    return out.reshape(batch, heads, -1)


def _decode_rows(
    group: DecodeGroup, layer: int, pool: tuple[Rows, Rows], fresh: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """K and V, [B, kv_heads, length, dim] each."""
    keys, values = pool
    if group.kept is None or not isinstance(keys, Tensor) or not isinstance(values, Tensor):
        return _gather_group(group, keys), _gather_group(group, values)
    k, v = group.kept.rows(layer, (keys, values), fresh, partial(_gather_group, group))
    return k.narrow(2, 0, group.length), v.narrow(2, 0, group.length)


def _gather_group(group: DecodeGroup, pool: Rows) -> Tensor:
    """[B, kv_heads, length, dim], zeros where there is nothing: zero weight times NaN would still be NaN."""
    flat = read_blocks(pool, group.blocks)
    if group.padding is not None:
        flat.index_fill_(0, group.padding, 0)
    rows = flat.view(len(group.contexts), -1, *flat.shape[1:])
    return rows[:, : group.length].transpose(1, 2)


def _decode_mask(group: DecodeGroup, window: int | None, dtype: torch.dtype) -> Tensor | None:
    if window is not None and group.length <= window:
        window = None
    if window not in group.masks:
        positions = torch.arange(group.length, device=group.contexts.device)[None]
        contexts = group.contexts[:, None]
        hidden = positions >= contexts
        if window is not None:
            hidden |= positions < contexts - window
        nothing = window is None and group.padding is None
        group.masks[window] = None if nothing else _additive(hidden, dtype)[:, None, None]
    return group.masks[window]


def _gather(step: Step, span: Span, pool: Rows) -> Tensor:
    """[kv_heads, context, dim]."""
    table = step.plan.get(span.row)
    if table is None:
        table = step.plan[span.row] = torch.tensor(span.block_table, device=pool.device)
    return read_blocks(pool, table)[: span.context].transpose(0, 1)


def _prefill(step: Step, span: Span, query: Tensor, k: Tensor, v: Tensor, scores: Scores, out: Tensor) -> None:
    """Attend a chunk; query [heads, length, k_dim], k and v [kv_heads, context, dim], out [length, heads, v_dim]."""
    unwindowed = scores.window is None or span.context <= scores.window
    if scores.plain and unwindowed and span.length == span.context:
        result = scaled_dot_product_attention(
            query[None], k[None], v[None], is_causal=True, scale=scores.scale, enable_gqa=len(query) != len(k)
        )
        out.copy_(result[0].transpose(0, 1))
        return
    cached = span.context - span.length
    for start in range(0, span.length, PREFILL_ROWS):
        stop = min(start + PREFILL_ROWS, span.length)
        first = 0 if unwindowed or scores.window is None else max(0, cached + start + 1 - scores.window)
        last = cached + stop
        mask = _prefill_mask(step, span.row + start, (cached + start, last), first, scores.window, query)
        result = _masked(query[:, start:stop], k[:, first:last], v[:, first:last], mask, scores)
        out[start:stop] = result.transpose(0, 1)


def _prefill_mask(
    step: Step, row: int, positions: tuple[int, int], first: int, window: int | None, query: Tensor
) -> Tensor:
    """[rows, keys] for rows at these positions over keys `first` to the last position; made once for all layers."""
    key = ("prefill", row, first, window)
    mask: Tensor | None = step.plan.get(key)
    if mask is None:
        rows = torch.arange(*positions, device=query.device)[:, None]
        columns = torch.arange(first, positions[1], device=query.device)[None]
        hidden = columns > rows
        if window is not None:
            hidden |= columns <= rows - window
        mask = step.plan[key] = _additive(hidden, query.dtype)
    return mask


def _masked(query: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """[heads, rows, v_dim]."""
    heads, rows, dim = query.shape
    kv_heads = len(k)
    if scores.plain and rows > PACKED_ROWS:
        return scaled_dot_product_attention(
            query[None], k[None], v[None], attn_mask=mask, scale=scores.scale, enable_gqa=heads != kv_heads
        )[0]
    q = query.reshape(1, kv_heads, -1, dim)
    packed = mask.repeat(heads // kv_heads, 1)
    if scores.plain:
        out = scaled_dot_product_attention(q, k[None], v[None], attn_mask=packed, scale=scores.scale)
    else:
        sinks = None if scores.sinks is None else scores.sinks.repeat_interleave(rows).view(1, kv_heads, -1, 1)
        out = _weigh(q, k[None], v[None], packed, scores, sinks)
    return out.reshape(heads, rows, -1)


def _weigh(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores, sinks: Tensor | None) -> Tensor:
    """Attention written out, for what SDPA cannot do: softcap (Gemma 2) and sinks (GPT-OSS).

    q [B, kv_heads, rows, k_dim]; sinks [1, kv_heads, rows, 1]: a logit that takes weight and gives nothing.
    """
    logits = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scores.scale
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    if mask is not None:
        logits = logits + mask
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().expand(*logits.shape[:-1], 1)], -1)
    weights = torch.softmax(logits, -1)[..., : k.shape[-2]]
    return torch.matmul(weights, v.float()).to(q.dtype)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
