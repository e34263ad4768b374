"""Policy `arc`: adaptive replacement, between recency and frequency. O(log n), O(1) while nothing is pinned.

Entries used once stand in one list, those used more often in another, both by the last use. Names evicted from either
are remembered. When a forgotten entry of the first kind comes back, the first list should have been longer, and its
aim grows; one of the second kind lets it shrink. The victim comes from the first list while that exceeds its aim.

Source: N. Megiddo and D. Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003. Here the victim is
chosen before the newcomer is known, hence with the aim that was, and without the paper's rule for a tie.
"""

from __future__ import annotations

from collections.abc import Container, Hashable
from typing import Generic

from kvstore.eviction.order import Ghosts, Hint, Key, Ranking, name_of


class ArcOrder(Generic[Key]):
    """Two lists by the last use, two memories of evicted names, and how long the first list should be."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._aim = 0.0
        self._once: Ranking[Key] = Ranking()  # those that are offered; so is `_often`
        self._often: Ranking[Key] = Ranking()
        self._in_once: set[Key] = set()  # all that are held in the first list
        self._used: dict[Key, int] = {}  # when it was used last
        self._names: dict[Key, Hashable] = {}
        self._was_once, self._was_often = Ghosts(capacity), Ghosts(capacity)
        self._time = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._once or key in self._often

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`."""
        name = self._names[key] = name_of(key, hint)
        once, often = len(self._was_once), len(self._was_often)
        if self._was_once.pop(name):
            self._aim = min(self._capacity, self._aim + max(1.0, often / once))
        elif self._was_often.pop(name):
            self._aim = max(0.0, self._aim - max(1.0, once / often))
        else:
            self._in_once.add(key)
            self._was_once.shrink(self._capacity - len(self._in_once))
        self._stamp(key)

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`."""
        offered = key in self
        self.withdraw(key)
        if again:
            self._in_once.discard(key)
        self._stamp(key)
        if offered:
            self.offer(key)

    def offer(self, key: Key) -> None:
        """As `Order.offer`: at the place of its last use."""
        self._list(key).set(key, (self._used[key],))

    def withdraw(self, key: Key) -> None:
        """As `Order.withdraw`."""
        self._list(key).discard(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """As `Order.remove`. The memories together hold at most as many names as fit, the first one no more than fit
        beside the first list.
        """
        self.withdraw(key)
        if evicted:
            (self._was_once if key in self._in_once else self._was_often).add(self._names[key])
        self._in_once.discard(key)
        del self._used[key], self._names[key]
        self._was_once.shrink(self._capacity - len(self._in_once))
        self._was_often.shrink(self._capacity - len(self._was_once))

    def first(self, kept: Container[Key], root: Hashable | None) -> Key | None:
        """As `Order.first`."""
        once, often = self._once.first(kept), self._often.first(kept)
        if once is not None and (often is None or len(self._in_once) > self._aim):
            return once
        return often

    def _list(self, key: Key) -> Ranking[Key]:
        return self._once if key in self._in_once else self._often

    def _stamp(self, key: Key) -> None:
        self._time += 1
        self._used[key] = self._time
