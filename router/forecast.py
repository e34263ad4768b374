"""How long a request would wait here, how well that is known, and whether a deadline can still be met. Pure.

Covers: the measured rate at which the queue drains, the measured error of past forecasts, the margin that follows.
Does not cover: the order of the queue (`fair_queue`) or what a worker will take (`cost`).

The margin. Of the last `_SAMPLES` requests of two minutes the forecast that was made at their admission is held
against what came. A request is hopeless when it would be late even if its forecast were as far too high as one in ten
forecasts was (the tenth percentile of real to predicted time, real times 50 ms longer, which is what small predictions
miss by). With fewer than `_LEAST_SAMPLES` of them nothing is hopeless: so a forecast that is so wrong that it refuses
everybody is soon held against what comes again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

_MEMORY_S = 10.0  # of time with a queue: some dozens of requests, and shorter than swings of load
_LEAST_BUSY_S = 0.5
_LEAST_SERVED = 4
_FORGOTTEN_S = 3 * _MEMORY_S  # a rate measured before so long a time without a queue says nothing of this one
_SAMPLES = 256
_SAMPLES_S = 120.0
_LEAST_SAMPLES = 8
_BEST_TENTH = 0.1
_SLACK_MS = 50.0


class DrainRate:
    """Tokens of work a second that leave the queue while there is one; forgets exponentially, in such time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: float | None = None  # None: there is no queue
        self._ended_at = -math.inf
        self._cost = 0.0
        self._busy_s = 0.0
        self._served = 0

    def began(self) -> None:
        """There is a queue now."""
        if self._since is not None:
            return
        self._since = self._clock()
        if self._since - self._ended_at > _FORGOTTEN_S:
            self._cost, self._busy_s, self._served = 0.0, 0.0, 0

    def ended(self) -> None:
        """It is empty."""
        self._cost, self._busy_s = self._now()
        self._since, self._ended_at = None, self._clock()

    def served(self, cost: float) -> None:
        """So much has left it."""
        cost_before, self._busy_s = self._now()
        self._cost = cost_before + cost
        self._served += 1
        if self._since is not None:
            self._since = self._clock()

    def per_second(self) -> float | None:
        """None: not known yet."""
        cost, busy_s = self._now()
        if self._served < _LEAST_SERVED or busy_s < _LEAST_BUSY_S or cost <= 0.0:
            return None
        return cost / busy_s

    def _now(self) -> tuple[float, float]:
        if self._since is None:
            return self._cost, self._busy_s
        kept = math.exp(-max(0.0, self._clock() - self._since) / _MEMORY_S)
        return self._cost * kept, self._busy_s * kept + _MEMORY_S * (1.0 - kept)


class Forecast:
    """Waits and deadlines. `rate` is told of the queue by its owner."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.rate = DrainRate(clock)
        self._clock = clock
        self._ratios: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)  # (when, ratio)
        self._tenth: float | None = None

    def wait_ms(self, ahead: float) -> float:
        """Until so many tokens of work have left the queue; zero while its rate is not known."""
        rate = self.rate.per_second()
        return ahead / rate * 1000.0 if rate else 0.0

    def came(self, predicted_ms: float, real_ms: float) -> None:
        """A first token came after `real_ms`; at its admission `predicted_ms` were forecast."""
        if predicted_ms > 0.0:
            self._ratios.append((self._clock(), (real_ms + _SLACK_MS) / predicted_ms))
            self._tenth = None

    def at_least_ms(self, predicted_ms: float) -> float:
        """What a forecast comes to at its best; zero: nothing can be said yet."""
        self._forget()
        if len(self._ratios) < _LEAST_SAMPLES:
            return 0.0
        if self._tenth is None:
            self._tenth = sorted(ratio for _, ratio in self._ratios)[int(len(self._ratios) * _BEST_TENTH)]
        return max(0.0, predicted_ms * min(1.0, self._tenth) - _SLACK_MS)

    def _forget(self) -> None:
        oldest = self._clock() - _SAMPLES_S
        while self._ratios and self._ratios[0][0] < oldest:
            self._ratios.popleft()
            self._tenth = None
