"""Policy `lfu_da`: least frequently used, with dynamic ageing. O(log n).

An entry's value is its number of uses plus the cache's age when it was last used; the age is the value of the entry
that was evicted last. So a newcomer starts level with those that are about to go, and what was hot once cannot stay
for ever.

Source: M. Arlitt et al., "Evaluating content management techniques for Web proxy caches", HP Labs HPL-98-173, 1999.
"""

from __future__ import annotations

from kvstore.eviction.order import Hint, Key, Ranked


class LfuDaOrder(Ranked[Key]):
    """By uses and age; of equal ones the least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self._age = 0.0
        self._uses: dict[Key, int] = {}

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`."""
        self._uses[key] = 1
        self._value(key)

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`."""
        self._uses[key] += again
        self._value(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """As `Order.remove`."""
        if evicted:
            self._age = max(self._age, self._ranks[key][0])
        del self._uses[key]
        super().remove(key, evicted=evicted)

    def _value(self, key: Key) -> None:
        self._place(key, (self._age + self._uses[key], self._tick()))
