"""Policy `priority`: the lowest priority first (0 to 100), of equal ones the least recently used. O(log n).

An entry's priority is that of its hint; to keep it for a time only, give it a TTL or a lease. Entries that others
continue are never evicted, so a chain is worth what its last entry is worth, until that has gone.

Source: the retention priorities of TensorRT-LLM's K/V cache reuse (public documentation).
"""

from __future__ import annotations

from kvstore.eviction.order import Hint, Key, Ranked


class PriorityOrder(Ranked[Key]):
    """By priority, then by the last use."""

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`."""
        self._place(key, (hint.priority, self._tick()))

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`."""
        self._place(key, (self._ranks[key][0], self._tick()))
