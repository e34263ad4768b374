"""Paged attention that reads `PagedInputs` and nothing else: plain and slow, to prove padded steps with on a CPU.

As a captured graph does, it takes slots, contexts and block tables from tensors that may have changed since the step
was made; the spans of the step are not looked at. Each sequence is gathered and attended alone, in float32, so that
a row's result depends on its own sequence only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.quantised import Rows, read_blocks, write_rows
from workers.attention.paged_inputs import PagedInputs, from_spans
from workers.attention.step import Step

_PLAN = "gathered"


class GatherBackend:
    """See the module."""

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
        inputs: PagedInputs | None = step.plan.get(_PLAN)
        if inputs is None:
            inputs = step.plan[_PLAN] = from_spans(step.spans, step.block_size, keys.device)
        return self.attend_paged(
            inputs, keys, values, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks
        )

    def attend_paged(
        self,
        inputs: PagedInputs,
        key_pool: Rows,
        value_pool: Rows,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `PagedBackend.attend_paged`; rows of no sequence come out as zeros."""
        _write(key_pool, inputs.slots, key.transpose(0, 1))
        _write(value_pool, inputs.slots, value.transpose(0, 1))
        out = query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])
        starts, contexts, size = inputs.row_starts.tolist(), inputs.contexts.tolist(), key_pool.shape[1]
        for number, context in enumerate(contexts):
            rows = slice(starts[number], starts[number + 1])
            if context == 0 or rows.start == rows.stop:
                continue
            table = inputs.block_tables[number, : -(-context // size)].long()
            k = read_blocks(key_pool, table)[:context].transpose(0, 1)
            v = read_blocks(value_pool, table)[:context].transpose(0, 1)
            out[rows] = _attend(query[:, rows], k, v, scale, window, softcap, sinks).transpose(0, 1).to(out.dtype)
        return out


def _write(pool: Rows, slots: Tensor, rows: Tensor) -> None:
    real = slots >= 0
    chosen = slots[real]
    write_rows(pool, chosen // pool.shape[1], chosen % pool.shape[1], rows[real])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q [heads, rows, k_dim] over k [kv_heads, context, k_dim]: [heads, rows, v_dim], float32."""
    groups = len(q) // len(k)
    scores = q.float() @ k.float().repeat_interleave(groups, 0).transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    context = k.shape[1]
    rows = torch.arange(context - q.shape[1], context)[:, None]
    columns = torch.arange(context)[None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., :context]
    return weights @ v.float().repeat_interleave(groups, 0)
