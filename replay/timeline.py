"""A virtual clock and what happens on it. Nothing here waits, and equal times keep the order in which they were set."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class Timeline:
    """Actions by time.

    Attributes:
        now: seconds since the start.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Action]] = []
        self._order = count()

    def clock(self) -> float:
        """The time now, for whoever wants an injected clock."""
        return self.now

    def at(self, time_s: float, action: Action) -> None:
        """Do it then; a time that has passed means now."""
        heapq.heappush(self._due, (max(time_s, self.now), next(self._order), action))

    def after(self, delay_s: float, action: Action) -> None:
        """Do it later, or at once and before this returns when there is nothing to wait for."""
        if delay_s <= 0:
            action()
        else:
            self.at(self.now + delay_s, action)

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._due:
            self.now, _, action = heapq.heappop(self._due)
            action()
