"""How fast a queue drains while there is one, by what has left it. Pure, on an injected clock.

Time without a queue does not count: nothing to do says nothing of how fast it is done. Forgets exponentially, in time
with a queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_MEMORY_S = 10.0  # of time with a queue: some dozens of requests, and shorter than swings of load
_LEAST_BUSY_S = 0.5
_LEAST_SERVED = 4
_FORGOTTEN_S = 3 * _MEMORY_S  # a rate measured before so long a time without a queue says nothing of this one


class DrainRate:
    """Work a second; the unit is its owner's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: float | None = None  # None: there is no queue
        self._ended_at = -math.inf
        self._work = 0.0
        self._busy_s = 0.0
        self._served = 0

    def began(self) -> None:
        """There is a queue now."""
        if self._since is not None:
            return
        self._since = self._clock()
        if self._since - self._ended_at > _FORGOTTEN_S:
            self._work, self._busy_s, self._served = 0.0, 0.0, 0

    def ended(self) -> None:
        """It is empty."""
        self._work, self._busy_s = self._now()
        self._since, self._ended_at = None, self._clock()

    def served(self, work: float) -> None:
        """So much has left it."""
        before, self._busy_s = self._now()
        self._work = before + work
        self._served += 1
        if self._since is not None:
            self._since = self._clock()

    def per_second(self) -> float | None:
        """None: not known yet."""
        work, busy_s = self._now()
        if self._served < _LEAST_SERVED or busy_s < _LEAST_BUSY_S or work <= 0.0:
            return None
        return work / busy_s

    def _now(self) -> tuple[float, float]:
        if self._since is None:
            return self._work, self._busy_s
        kept = math.exp(-max(0.0, self._clock() - self._since) / _MEMORY_S)
        return self._work * kept, self._busy_s * kept + _MEMORY_S * (1.0 - kept)
