"""Policy `s3fifo`: three first-in-first-out queues. O(log n), O(1) while nothing is pinned.

Newcomers enter a small queue, a tenth of the capacity. At its end an entry that was used meanwhile moves to the main
queue, any other is evicted, and its name is remembered; if it comes back while it is, it enters the main queue at once.
At the end of the main queue an entry that was used goes round again, up to three times. So what is asked for once only
passes through a tenth of the cache.

Source: J. Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. One use in the small queue is
enough here, since K/V blocks come back seldom and then whole conversations long.
"""

from __future__ import annotations

from collections.abc import Container, Hashable
from typing import Generic

from kvstore.eviction.order import Ghosts, Hint, Key, Ranking, name_of

_SMALL_SHARE = 0.1
_MOST_USES = 3


class S3FifoOrder(Generic[Key]):
    """A small queue, a main queue and a memory of evicted names."""

    def __init__(self, capacity: int) -> None:
        self._small_limit = max(1, int(_SMALL_SHARE * capacity))
        self._ghosts = Ghosts(capacity)
        self._small: Ranking[Key] = Ranking()  # those that are offered; so is `_main`
        self._main: Ranking[Key] = Ranking()
        self._in_small: set[Key] = set()  # all that are held in the small queue
        self._waiting: set[Key] = set()  # of them, those that are bound for the main queue, but not offered now
        self._places: dict[Key, int] = {}  # when it entered its queue
        self._uses: dict[Key, int] = {}  # since then
        self._names: dict[Key, Hashable] = {}
        self._time = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._small or key in self._main

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`."""
        name = self._names[key] = name_of(key, hint)
        if not self._ghosts.pop(name):
            self._in_small.add(key)
        self._enter(key, uses=0)

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`: no queue is touched."""
        self._uses[key] = min(_MOST_USES, self._uses[key] + again)
        self._wait(key)

    def offer(self, key: Key) -> None:
        """As `Order.offer`: at the place that it had."""
        self._waiting.discard(key)
        self._queue(key).set(key, (self._places[key],))

    def withdraw(self, key: Key) -> None:
        """As `Order.withdraw`."""
        self._queue(key).discard(key)
        self._wait(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """As `Order.remove`."""
        self.withdraw(key)
        if evicted and key in self._in_small:
            self._ghosts.add(self._names[key])
        self._waiting.discard(key)
        self._in_small.discard(key)
        del self._places[key], self._uses[key], self._names[key]

    def first(self, kept: Container[Key], root: Hashable | None) -> Key | None:
        """As `Order.first`. Entries with uses pass on to the main queue's end first, each at most four times."""
        while True:
            small, main = self._small.first(kept), self._main.first(kept)
            size = len(self._in_small) - len(self._waiting)
            from_small = small is not None and (main is None or size > self._small_limit)
            key = small if from_small else main
            if key is None or self._uses[key] == 0:
                return key
            self._queue(key).discard(key)
            self._in_small.discard(key)
            self._enter(key, uses=0 if from_small else self._uses[key] - 1)
            self.offer(key)

    def _queue(self, key: Key) -> Ranking[Key]:
        return self._small if key in self._in_small else self._main

    def _wait(self, key: Key) -> None:
        """Count it out of the small queue if it will leave that for the main one, but cannot while it is kept back.

        Else the used blocks inside long chains would fill the small queue, and new tails could not stay in it.
        """
        if key in self._in_small and self._uses[key] > 0 and key not in self._small:
            self._waiting.add(key)

    def _enter(self, key: Key, *, uses: int) -> None:
        self._time += 1
        self._places[key], self._uses[key] = self._time, uses
