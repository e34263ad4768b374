"""Gathered K/V of decode rows, kept from step to step: a step then copies one row a sequence, and not all of them.

Covers: which groups of rows go on where the step before left off, and the memory that their K/V lie in. Does not cover:
which rows make a group, and attention (`torch_backend`).

A block-major pool shows a sequence's K/V block by block, never as one tensor, so attention gathers them first. On a CPU
that costs about as much as the attention itself, for numbers that were gathered one token ago. A group is known again
by who holds its blocks: the same holders, each with one token more. Whatever else happens between two steps (a sequence
joins, ends, is preempted, a step fails and is tried again) makes another group, and that is gathered from the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.attention.step import KVViews, Span

KEPT_NBYTES = 128 << 20  # of all groups and layers; a group that does not fit is gathered in every step
SPARE_TOKENS = 64  # room to grow, at least; a quarter of the context where that is more

Gather = Callable[
    [Tensor], Tensor
]  # K or V of a layer of the pool -> [B, kv_heads, length, dim], zeros behind contexts


class KeptGroup:
    """K and V of B decode rows in this step, of as many layers as were asked for.

    Attributes:
        nbytes: what all layers take, or will take.
    """

    def __init__(self, spans: Sequence[Span], length: int, kv: KVViews) -> None:
        """Hold nothing yet; `length`: keys of each row after padding."""
        self._capacity = length + max(SPARE_TOKENS, length // 4)
        token_nbytes = sum(rows.shape[2] * rows.shape[3] * rows.element_size() for rows in kv[0])
        self.nbytes = len(spans) * self._capacity * token_nbytes * len(kv)
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}
        self._spans = spans
        self._is_filled = False

    def goes_on(self, spans: Sequence[Span], length: int) -> bool:
        """Whether these are the next rows of the same sequences, and there is room for them."""
        return (
            length <= self._capacity
            and len(spans) == len(self._spans)
            and all(_follows(span, before) for span, before in zip(spans, self._spans, strict=True))
        )

    def go_on(self, spans: Sequence[Span]) -> None:
        """Take the next rows of the same sequences."""
        self._spans, self._is_filled = spans, True
        last = [span.context - 1 for span in spans]
        self._position = last[0] if min(last) == max(last) else None
        self._places = (torch.arange(len(last)), slice(None), torch.tensor(last))

    def rows(
        self, layer: int, pool: tuple[Tensor, Tensor], fresh: tuple[Tensor, Tensor], gather: Gather
    ) -> tuple[Tensor, Tensor]:
        """K and V of a layer, [B, kv_heads, more than `length`, dim] each, zeros behind the contexts.

        Valid until the next step.

        Args:
            pool: of this layer, the new rows included. fresh: the new rows, [kv_heads, B, dim] each.
            gather: reads the pool.
        """
        if self._is_filled:
            parts = self._parts[layer]
            self._put(parts[0], fresh[0])
            self._put(parts[1], fresh[1])
        else:
            parts = self._parts[layer] = self._filled(gather(pool[0])), self._filled(gather(pool[1]))
        return parts

    def _put(self, part: Tensor, fresh: Tensor) -> None:
        if self._position is not None:
            part.select(2, self._position).copy_(fresh.transpose(0, 1))
        else:
            part[self._places] = fresh.transpose(0, 1)

    def _filled(self, gathered: Tensor) -> Tensor:
        batch, kv_heads, length, dim = gathered.shape
        part = gathered.new_empty(batch, kv_heads, self._capacity, dim)
        part[:, :, :length] = gathered
        part[:, :, length:] = 0
        return part


class KeptGroups:
    """The groups of the last step that was computed."""

    def __init__(self, nbytes: int = KEPT_NBYTES) -> None:
        """Keep at most so many bytes."""
        self._nbytes = nbytes
        self._groups: list[KeptGroup] = []

    def of(self, groups: Sequence[tuple[Sequence[Span], int]], kv: KVViews) -> list[KeptGroup | None]:
        """What is kept of each of a step's groups (its spans, and keys after padding); None: nothing is.

        All others are forgotten. `kv` is what the next step must be computed over, too.
        """
        found: list[KeptGroup | None] = []
        left = self._nbytes
        for spans, length in groups:
            kept = self._next(spans, length, kv)
            kept = None if kept is None or kept.nbytes > left else kept
            left -= 0 if kept is None else kept.nbytes
            found.append(kept)
        self._groups = [kept for kept in found if kept is not None]
        return found

    def _next(self, spans: Sequence[Span], length: int, kv: KVViews) -> KeptGroup | None:
        if any(span.holder is None for span in spans):
            return None
        for kept in self._groups:
            if kept.goes_on(spans, length):
                kept.go_on(spans)
                return kept
        return KeptGroup(spans, length, kv)


def _follows(span: Span, before: Span) -> bool:
    return span.holder is before.holder and span.context == before.context + 1
