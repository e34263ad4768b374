"""How long steps take, learnt from each one: what load-or-compute and the router's cost model go by. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from kvstore.estimate import PrefillCost, PrefillFit

_FADE = 0.1
_SHARE_MEMORY_S = 30.0  # as long as routers remember what they sent


class BusyShare:
    """Which share of the time some work took, forgetting exponentially: a mean over about the last half minute."""

    def __init__(self) -> None:
        self._share = self._at = 0.0

    def add(self, seconds: float, now: float) -> None:
        """Work of so many seconds ended now."""
        self._share = self.value(now) + 1.0 - math.exp(-seconds / _SHARE_MEMORY_S)
        self._at = now

    def value(self, now: float) -> float:
        """The share now; zero before anything was added."""
        return self._share * math.exp(-max(0.0, now - self._at) / _SHARE_MEMORY_S)


class Answers:
    """What the answers were like that ended lately: what those bring to prompts that wait for room. Means that fade.

    Attributes:
        ms: from the first token to the end. blocks: that the end gave back and nobody else used.
    """

    def __init__(self, block_size: int) -> None:
        """Of a model with blocks of so many tokens. All are zero before the first answer ended."""
        self._block_size = block_size
        self._tokens = self.ms = self.blocks = 0.0
        self._share = 1.0

    def ended(self, ms: float, tokens: int, freed_blocks: float) -> None:
        """An answer of so many tokens ended."""
        share, self._share = self._share, _FADE
        self.ms += share * (ms - self.ms)
        self._tokens += share * (tokens - self._tokens)
        self.blocks += share * (freed_blocks - self.blocks)

    @property
    def growth_blocks(self) -> int:
        """Blocks that those under way take together until one of them ends: n grow for an n-th of an answer's time."""
        return math.ceil(self._tokens / self._block_size)


class StepTimes:
    """Prefill cost and decode step time, fitted online.

    Attributes:
        prefill_error: mean of |measured - predicted| / measured, each predicted before it was learnt from; fades.


    A step that prefills counts as one prefill of all its tokens, decodes included: the same price a token, and after
    as many cached tokens as make up its attention work.
    """

    def __init__(self, block_size: int, *, on_prefill: Callable[[PrefillCost], None] | None = None) -> None:
        """Of a model with blocks of so many tokens; `on_prefill` is told the fit after each prefill."""
        self._block_size = block_size
        self._on_prefill = on_prefill
        self._prefill = PrefillFit()
        self.decode_step_ms = self.prefill_error = 0.0

    @property
    def prefill(self) -> PrefillCost:
        """The fit; zeros before the first measurement."""
        return self._prefill.cost or PrefillCost(0.0, 0.0, 0.0)

    def observe(self, chunks: Iterable[tuple[int, int]], ms: float) -> None:
        """Learn from a step of chunks (new tokens, tokens before them)."""
        chunks = list(chunks)
        tokens = sum(new for new, _ in chunks)
        if tokens == len(chunks):
            share = _FADE if self.decode_step_ms else 1.0
            self.decode_step_ms += share * (ms - self.decode_step_ms)
            return
        pairs = sum(new * (cached + new / 2) for new, cached in chunks)
        cached = round(pairs / tokens - tokens / 2)
        self._judge(self._prefill.predict_ms(tokens, cached), ms)
        self._prefill.observe(tokens, cached, ms)
        if self._on_prefill is not None:
            self._on_prefill(self.prefill)

    def _judge(self, predicted_ms: float | None, ms: float) -> None:
        if predicted_ms is not None and ms > 0:
            self.prefill_error += _FADE * (abs(ms - predicted_ms) / ms - self.prefill_error)

    def compute_ms(self, first: int, count: int) -> float:
        """Time to compute `count` blocks after `first` ones, besides the step's own; infinite before it is known."""
        cost = self._prefill.cost
        if cost is None:
            return math.inf
        size = self._block_size
        return cost.predict_ms(count * size, first * size) - cost.fixed_ms
