"""What one packed step tells the attention function: where new K/V go and what each sequence may see.

A step packs rows of several sequences: decode rows (one new token) and prefill chunks (several). The same metadata
serves all layers. Backends read it; `plan` is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kvstore.quantised import Rows

KVViews = Sequence[tuple[Rows, Rows]]  # per layer: K and V, each [blocks, block_size, kv_heads, dim], any stride


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's rows in a packed step.

    Attributes:
        row: its first row. length: new tokens. context: tokens that the last row sees, the new ones included.
        block_table: device blocks of the context, `ceil(context / block_size)` of them.
        holder: who holds these blocks: the same object in another step says that they are the same blocks, with the
        same K/V in them, and perhaps more of them. None: nobody says so.
    """

    row: int
    length: int
    context: int
    block_table: Sequence[int]
    holder: object | None = field(default=None, repr=False, compare=False)


@dataclass(slots=True)
class Step:
    """Metadata of one packed step of T rows.

    Attributes:
        kv: the pool, layer by layer. blocks, offsets: [T] int64, where each new token's K/V go.
        plan: what the backend worked out once for all layers.
    """

    kv: KVViews
    block_size: int
    spans: Sequence[Span]
    blocks: Tensor
    offsets: Tensor
    backend: AttentionBackend
    plan: dict[Any, Any] = field(default_factory=dict)


class AttentionBackend(Protocol):
    """Writes new K/V into the pool and attends over it, for one device kind."""

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
        """Causal attention of each span over its own context.

        Args:
            query: [heads, T, k_dim]. key: [kv_heads, T, k_dim]. value: [kv_heads, T, v_dim].
            window: how many last tokens a row sees, itself included; None: all.
            softcap: scores become `softcap * tanh(score / softcap)`. sinks: [heads], one extra logit a head.

        Returns:
            [T, heads, v_dim].
        """
        ...


def make_step(kv: KVViews, spans: Sequence[Span], backend: AttentionBackend) -> Step:
    """Metadata of these spans, which lie one after the other from row 0."""
    keys = kv[0][0]
    block_size = keys.shape[1]
    blocks: list[int] = []
    offsets: list[int] = []
    for span in spans:
        positions = range(span.context - span.length, span.context)
        blocks += [span.block_table[position // block_size] for position in positions]
        offsets += [position % block_size for position in positions]
    return Step(
        kv=kv,
        block_size=block_size,
        spans=spans,
        blocks=torch.tensor(blocks, device=keys.device),
        offsets=torch.tensor(offsets, device=keys.device),
        backend=backend,
    )
