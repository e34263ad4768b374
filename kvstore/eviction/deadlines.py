"""Times at which something is due, earliest first, that mostly move later.

A binary heap with lazy deletion: a key has at most one live heap item, whose time is never later than the key's own, so
moving a time later only writes it down and leaves the heap alone; the item moves on when it reaches the top. Moving
later is O(1), all else O(log n) amortised. Items of forgotten keys are dropped when they surface, or together when they
outnumber the live ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from kvstore.errors import InvariantError

Key = TypeVar("Key", bound=Hashable)

_SPARE_ITEMS = 64  # below this many, dead heap items are not worth a rebuild


class Deadlines(Generic[Key]):
    """A time, in seconds, for each key. Knows no clock."""

    def __init__(self) -> None:
        self._times: dict[Key, float] = {}
        self._scheduled: dict[Key, float] = {}  # time of the key's live heap item
        self._heap: list[tuple[float, int, Key]] = []
        self._serial = 0  # breaks ties in the heap: keys need not compare

    def __len__(self) -> int:
        return len(self._times)

    def get(self, key: Key) -> float | None:
        """Its time; None when it has none."""
        return self._times.get(key)

    def set(self, key: Key, time: float) -> None:
        """Give it that time instead of the one that it has."""
        self._times[key] = time
        scheduled = self._scheduled.get(key)
        if scheduled is None or scheduled > time:
            self._schedule(key, time)

    def discard(self, key: Key) -> None:
        """Forget it, if it is held."""
        if self._times.pop(key, None) is not None and len(self._heap) > 2 * len(self._times) + _SPARE_ITEMS:
            self._rebuild()

    def first(self) -> float | None:
        """The earliest time; None when there is none."""
        top = self._top()
        return None if top is None else top[0]

    def pop_due(self, now: float) -> Iterator[Key]:
        """Forget the keys whose time has come and yield them, earliest first."""
        while (top := self._top()) is not None and top[0] <= now:
            heapq.heappop(self._heap)
            del self._scheduled[top[2]], self._times[top[2]]
            yield top[2]

    def check(self) -> None:
        """Audit it. O(n).

        Raises:
            InvariantError: a key would not come up in time.
        """
        live = {(time, key) for time, _, key in self._heap}
        for key, time in self._times.items():
            scheduled = self._scheduled.get(key)
            if scheduled is None or scheduled > time or (scheduled, key) not in live:
                raise InvariantError(f"nothing will bring {key!r} up in time")

    def _schedule(self, key: Key, time: float) -> None:
        self._scheduled[key] = time
        self._serial += 1
        heapq.heappush(self._heap, (time, self._serial, key))

    def _top(self) -> tuple[float, int, Key] | None:
        """The heap's first item, after moving on those whose time is later than they say."""
        while self._heap:
            time, _, key = self._heap[0]
            live = self._scheduled.get(key) == time
            if live and self._times.get(key) == time:
                return self._heap[0]
            heapq.heappop(self._heap)
            if live:
                del self._scheduled[key]
                if key in self._times:
                    self._schedule(key, self._times[key])
        return None

    def _rebuild(self) -> None:
        self._scheduled = dict(self._times)
        self._heap = [(time, number, key) for number, (key, time) in enumerate(self._times.items())]
        self._serial = len(self._heap)
        heapq.heapify(self._heap)
