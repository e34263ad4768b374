"""Attention in a step that was captured or compiled: what it reads, and how a compiled model reaches it.

A captured step carries its `PagedInputs` in its plan: a backend that can attend by those alone (`PagedBackend`) can be
captured, as replays change nothing but what lies in them.

To a compiler attention is one opaque operator. The pool is no argument of it, as an argument that is written to through
an alias would be copied; the operator takes the step from `CURRENT`, where whoever runs the model has put it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, library

from kvstore.quantised import Rows
from workers.attention.paged_inputs import PagedInputs
from workers.attention.step import Step

INPUTS = "inputs"  # where the plan of a captured step holds its PagedInputs
CURRENT: list[Step] = []  # the step that is being computed, last; one thread computes


@runtime_checkable
class PagedBackend(Protocol):
    """Attends by tensors alone."""

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
        """As `AttentionBackend.attend` for one layer's pool, `[blocks, block_size, kv_heads, dim]` each.

        Asks the host nothing of what the inputs hold.
        """
        ...


def attend(
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
    """As `AttentionBackend.attend` of the step's backend, by its tensors alone where it carries some."""
    inputs: PagedInputs | None = step.plan.get(INPUTS)
    if inputs is not None and isinstance(step.backend, PagedBackend):
        return step.backend.attend_paged(
            inputs, *step.kv[layer], query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    return step.backend.attend(step, layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks)


@library.custom_op(
    "warmkv::paged_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, int layer, float scale, int? window, float? softcap, "
    "Tensor? sinks) -> Tensor",
)
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`attend` of the step in CURRENT; query [heads, T, k_dim] and so on, [T, heads, v_dim] comes out."""
    return attend(CURRENT[-1], layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks)


@paged_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
