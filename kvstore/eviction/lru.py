"""Policy `lru`: least recently used first. O(1) while entries are used in the order in which they may go."""

from __future__ import annotations

from kvstore.eviction.order import Hint, Key, Ranked


class LruOrder(Ranked[Key]):
    """By the last use."""

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`: a new entry is the most recently used one."""
        self._place(key, (self._tick(),))

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`."""
        self._place(key, (self._tick(),))
