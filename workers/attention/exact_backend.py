"""Paged attention whose every row is computed in one fixed way: the canonical mode's.

A row's result must not hang on how its prompt was cut or on what else is in the step. So each span is attended on its
own, over keys read back from the pool (never from the step's own tensors), cut into tiles of KEYS at positions 0, KEYS,
2 KEYS, ... and filled up with zeros; queries come in blocks of BLOCK rows, filled up with zeros, too; what a row must
not see is masked, never left out. Then every matrix product inside has one shape, sums run over a row's tiles in the
order of positions, and a tile that is masked as a whole changes nothing (it adds exact zeros, scales by exactly one).

KEYS and BLOCK are the tiles of PyTorch's CPU flash attention for up to 191 query rows, so the library can do it where
there is neither softcap nor sinks (Dao et al., "FlashAttention-2", 2023, for the algorithm). `workers.canonical.check`
tries on the machine at hand whether all this holds there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kvstore.quantised import unquantised
from workers.attention.step import Span, Step
from workers.attention.torch_backend import Scores

KEYS = 512
BLOCK = 32
SMALL_BLOCK = 8
ROWS = 128  # packed query rows of one call; below the 192 from which PyTorch takes other tiles


class ExactBackend:
    """See the module.

    Attributes:
        block: rows of a call are filled up to a multiple of it; ROWS where calls of fewer give other bits.
        small_block: whether few rows come in a block of SMALL_BLOCK; set once it is known to give the same bits.
    """

    def __init__(self) -> None:
        """Start with blocks of one size."""
        self.block, self.small_block = BLOCK, False

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
        """See `AttentionBackend.attend`; rows behind the last span are padding, are not stored and get zeros."""
        keys, values = map(unquantised, step.kv[layer])
        count = len(step.blocks)
        keys[step.blocks, step.offsets] = key[:, :count].transpose(0, 1)
        values[step.blocks, step.offsets] = value[:, :count].transpose(0, 1)
        scores = Scores(scale, window, softcap, sinks)
        out = query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
        for span in step.spans:
            k, v = _gather(step, span, keys), _gather(step, span, values)
            for start, stop in _tiles(span, len(query) // len(k)):
                rows = slice(span.row + start, span.row + stop)
                first = _first_key(span, start, window)
                mask = self._mask(step, span, (start, stop), first, window, query)
                q = _packed(query[:, rows], len(k), mask.shape[0])
                last = first + mask.shape[1]
                result = _weigh(q, k[:, first:last], v[:, first:last], mask, scores, stop - start)
                out[rows] = _unpacked(result, len(query), stop - start)
        return out

    def _mask(
        self, step: Step, span: Span, part: tuple[int, int], first: int, window: int | None, query: Tensor
    ) -> Tensor:
        """[packed rows, keys] for rows `part` of a span, keys from `first` on; made once for all layers."""
        name = ("exact", span.row, part, first, window)
        mask: Tensor | None = step.plan.get(name)
        if mask is None:
            group = query.shape[0] // step.kv[0][0].shape[2]
            mask = _visible(span, part, first, window, query).repeat(group, 1)
            missing = self._block_rows(len(mask)) - len(mask)
            mask = step.plan[name] = pad(mask, (0, 0, 0, missing))
        return mask

    def _block_rows(self, packed: int) -> int:
        if self.small_block and packed <= SMALL_BLOCK:
            return SMALL_BLOCK
        return -(-packed // self.block) * self.block


def _tiles(span: Span, group: int) -> Iterator[tuple[int, int]]:
    tokens = max(1, ROWS // group)
    for start in range(0, span.length, tokens):
        yield start, min(start + tokens, span.length)


def _first_key(span: Span, start: int, window: int | None) -> int:
    """Where the first tile begins of which row `start` of the span sees anything."""
    if window is None:
        return 0
    return max(0, span.context - span.length + start + 1 - window) // KEYS * KEYS


def _visible(span: Span, part: tuple[int, int], first: int, window: int | None, query: Tensor) -> Tensor:
    """[rows, keys] zero or -inf, for the rows' last tile to end with."""
    cached = span.context - span.length
    rows = torch.arange(cached + part[0], cached + part[1], device=query.device)[:, None]
    end = -(-(cached + part[1]) // KEYS) * KEYS
    columns = torch.arange(first, end, device=query.device)[None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))


def _gather(step: Step, span: Span, pool: Tensor) -> Tensor:
    """[kv_heads, context filled up with zeros to whole tiles, dim]."""
    name = ("exact", span.row)
    table = step.plan.get(name)
    if table is None:
        table = step.plan[name] = torch.tensor(span.block_table, device=pool.device)
    held = pool.index_select(0, table).flatten(0, 1)[: span.context]
    return pad(held, (0, 0, 0, 0, 0, -span.context % KEYS)).transpose(0, 1)


def _packed(query: Tensor, kv_heads: int, rows: int) -> Tensor:
    """query [heads, T, k_dim] -> [kv_heads, rows, k_dim]: the group's heads one after the other, then zeros."""
    packed = query.reshape(kv_heads, -1, query.shape[-1])
    return pad(packed, (0, 0, 0, rows - packed.shape[1]))


def _unpacked(result: Tensor, heads: int, count: int) -> Tensor:
    """[kv_heads, rows, v_dim] -> [count, heads, v_dim]."""
    group = heads // len(result)
    return result[:, : group * count].reshape(heads, count, -1).transpose(0, 1)


def _weigh(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores, count: int) -> Tensor:
    """[kv_heads, rows, v_dim]; `count` is how many tokens the rows are of."""
    if scores.plain and k.shape[-1] == v.shape[-1]:
        return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scores.scale)[0]
    return _weigh_in_tiles(q, k, v, mask, scores, count)


def _weigh_in_tiles(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores, count: int) -> Tensor:
    """The same algorithm written out, for what the library's has not: softcap, sinks, keys wider than values.

    A running maximum, sum and result go from tile to tile; a sink is where they start from.
    """
    kv_heads, rows, _ = q.shape
    block = min(rows, BLOCK)
    blocks = q.float().view(kv_heads, -1, block, q.shape[-1])
    hidden = mask.float().view(-1, block, mask.shape[-1])
    top, total = _start(q, scores.sinks, count)
    result = torch.zeros(*blocks.shape[:3], v.shape[-1], device=q.device)
    for first in range(0, k.shape[1], KEYS):
        tile = slice(first, first + KEYS)
        logits = torch.matmul(blocks, k[:, None, tile].float().transpose(-1, -2)) * scores.scale
        if scores.softcap is not None:
            logits = torch.tanh(logits / scores.softcap) * scores.softcap
        logits = logits + hidden[..., tile]
        above = torch.maximum(top, logits.amax(-1, keepdim=True))
        shift = above.masked_fill(above == float("-inf"), 0.0)  # a row that has seen nothing yet
        weights, before = torch.exp(logits - shift), torch.exp(top - shift)
        total = total * before + weights.sum(-1, keepdim=True)
        result = result * before + torch.matmul(weights, v[:, None, tile].float())
        top = above
    return (result / total).view(kv_heads, rows, -1).to(q.dtype)


def _start(q: Tensor, sinks: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Maximum and sum before the first tile, each [kv_heads, blocks, rows, 1]."""
    kv_heads, rows, _ = q.shape
    block = min(rows, BLOCK)
    shape = (kv_heads, -1, block, 1)
    if sinks is None:
        nothing = torch.full((kv_heads, rows), float("-inf"), device=q.device)
        return nothing.view(shape), torch.zeros_like(nothing).view(shape)
    of_rows = sinks.float().view(kv_heads, -1).repeat_interleave(count, 1)
    top = pad(of_rows, (0, rows - of_rows.shape[1]))
    return top.view(shape), torch.ones_like(top).view(shape)
