"""Does the promise of the canonical mode hold for this model on this machine? Tried at start, never assumed.

One sequence is computed in forwards of the anchor's size: the reference. Then its end again, in forwards of each other
size, and with the cuts moved, so that rows lie at other places of a forward and of an attention block. A size whose
logits or K/V differ in one bit is not used; if the place of a row in a forward makes a difference, the mode is refused.

This sees which kernels the libraries choose, since that follows from the sizes, which are those that are used later.
What half precision would hide of it is seen by `products` and `attention`; what kinds of operations there are, by
`audit`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kvstore.layout import KVLayout
from workers.attention.exact_backend import KEYS, ROWS, ExactBackend
from workers.attention.step import KVViews, Span
from workers.canonical.attention import rows_agree
from workers.canonical.audit import Audit
from workers.canonical.products import Shape, agree

BLOCK_SIZE = 16
FEW = 32  # tokens that are computed in forwards of few rows, and that reach into a second tile of keys
SHIFT = 5  # rows by which cuts are moved

log = logging.getLogger(__name__)


class NotDeterministic(ValueError):
    """The canonical mode cannot keep its promise here. Says why and what to do."""


class Runner(Protocol):
    """What is tried; its sizes are changed meanwhile."""

    layout: KVLayout
    context_length: int | None
    vocab_size: int
    device: torch.device
    sizes: Sequence[int]

    def forward(
        self,
        kv: KVViews,
        spans: Sequence[Span],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int],
    ) -> Tensor:
        """See `ModelRunner.forward`."""
        ...


def refuse_mixed_rows(forward: Callable[[], Any]) -> None:
    """Watch a forward.

    Raises:
        NotDeterministic: an operation may make a row depend on the others.
    """
    with Audit() as audit:
        forward()
    if audit.doubtful:
        raise NotDeterministic(
            f"a token's numbers may depend on other requests' in this model (by {', '.join(sorted(audit.doubtful))}; "
            "a mixture of experts is such a one); set engine.deterministic to false, or choose a dense model"
        )


def find_sizes(
    runner: Runner, backend: ExactBackend, anchor: int, candidates: Sequence[int], shapes: Collection[Shape]
) -> tuple[tuple[int, ...], bytes]:
    """The sizes at which rows have the bits that they have at the anchor, and SHA-256 of these bits.

    Args:
        runner: the model. backend: its attention, whose blocks are set as they agree.
        anchor: the size to compare with. candidates: sizes to try, ascending, the anchor among them.
        shapes: of the model's products.

    Raises:
        NotDeterministic: rows differ by where they lie in a forward even at the anchor.
    """
    if not rows_agree(backend, runner.layout, runner.device):
        backend.block = ROWS
        log.warning("deterministic mode: attention of few rows rounds differently on this machine, and is filled up")
    trial = Trial(runner, max(candidates[-1], anchor, KEYS) + FEW)
    runner.sizes = (anchor,)
    trial.compute_reference(anchor)
    if not trial.agrees(2 * anchor + SHIFT, anchor):
        raise NotDeterministic(
            "a token's numbers depend on its place in a step on this machine; set engine.deterministic to false, or "
            "try another number of workers.threads"
        )
    backend.small_block = runner.layout.dtype == "float32"  # half precision could hide a difference
    backend.small_block = backend.small_block and trial.agrees(FEW, 1)
    dtype, sizes = getattr(torch, runner.layout.dtype), list[int]()
    for size in candidates:
        runner.sizes = (size,)
        fits = size <= trial.tokens and agree(shapes, size, anchor, dtype, runner.device)
        if size == anchor or (fits and trial.agrees(max(size, FEW), size)):
            sizes.append(size)
    log.info("deterministic mode: rows of a forward", extra={"sizes": sizes, "small_block": backend.small_block})
    return tuple(sizes), trial.digest()


class Trial:
    """One sequence of its own, over a pool of its own."""

    def __init__(self, runner: Runner, tokens: int) -> None:
        """A sequence of that many tokens, or of as many as the model was made for."""
        self._runner = runner
        self.tokens = min(tokens, runner.context_length or tokens)
        self._ids = [(7919 * n + 13) % runner.vocab_size for n in range(self.tokens)]
        layout, blocks = runner.layout, -(-self.tokens // BLOCK_SIZE)
        shape = (blocks, BLOCK_SIZE, layout.layers, layout.kv_heads, layout.k_dim + layout.v_dim)
        self._pool = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=runner.device)
        layers = [self._pool[:, :, layer] for layer in range(layout.layers)]
        self._kv = [(each[..., : layout.k_dim], each[..., layout.k_dim :]) for each in layers]
        self._table = list(reversed(range(blocks)))

    def compute_reference(self, rows: int) -> None:
        """The whole sequence, so many rows at a time."""
        self._logits = self._compute(0, rows)
        self._held = self._pool.clone()

    def agrees(self, count: int, rows: int) -> bool:
        """Whether the last `count` tokens, so many rows at a time, have the reference's bits."""
        start = max(0, self.tokens - count)
        self._pool.copy_(self._held)
        logits = self._compute(start, rows)
        return torch.equal(logits, self._logits[start:]) and torch.equal(self._pool, self._held)

    def digest(self) -> bytes:
        """SHA-256 of the reference's bits."""
        floats = (self._logits, self._held)
        parts = [each.contiguous().cpu().flatten().view(torch.uint8).numpy() for each in floats]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()

    def _compute(self, start: int, rows: int) -> Tensor:
        """[tokens from `start` on, vocab]"""
        found = []
        for first in range(start, self.tokens, rows):
            last = min(first + rows, self.tokens)
            span = Span(0, last - first, last, self._table[: -(-last // BLOCK_SIZE)])
            places = range(first, last)
            found.append(self._runner.forward(self._kv, [span], self._ids[first:last], places, range(last - first)))
        return torch.cat(found)
