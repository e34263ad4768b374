"""A sum that forgets: how much of something came lately. Pure; the time is an argument."""

from __future__ import annotations

import math

# The memory of work that was given to a worker, in seconds: longer than a prefill, shorter than swings of load. Workers
# and routers count with the same one, so that their sums agree.
WORK_MEMORY_S = 30.0


class FadingSum:
    """Forgets exponentially: after `memory_s` seconds a contribution counts 1/e."""

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
