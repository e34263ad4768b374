"""How much work came lately: a sum that forgets. Workers and routers count with one memory, so that theirs agree."""

from __future__ import annotations

import math

# Longer than a prefill, shorter than swings of load; seconds.
WORK_MEMORY_S = 30.0


class RecentWork:
    """A sum that forgets exponentially: after `memory_s` seconds a contribution counts 1/e."""

    __slots__ = ("_at", "_memory_s", "_sum")

    def __init__(self, memory_s: float = WORK_MEMORY_S) -> None:
        self._memory_s = memory_s
        self._sum = 0.0
        self._at = 0.0

    def add(self, amount: float, now: float) -> None:
        """Count an amount."""
        self._sum = self.value(now) + amount
        self._at = now

    def value(self, now: float) -> float:
        """The sum now."""
        return self._sum * math.exp((self._at - now) / self._memory_s) if now > self._at else self._sum
