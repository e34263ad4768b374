"""Which entry goes next: LRU with a sliding time to live per entry. Pure, on an injected clock; knows no bytes.

Structure: an ordered dict holds the entries that may be evicted, oldest use first; pinned ones stand outside of it, so
the victim is its head, O(1). Deadlines stand in a binary heap with lazy deletion: an entry has at most one live heap
item, whose time is never later than the entry's deadline, so a use only writes the new deadline and leaves the heap
alone; the item moves on when it reaches the top. Uses are O(1), expiry is O(log n) an item, amortised. Heap items of
removed entries are dropped when they surface, or together when they outnumber the live ones.

Evicting a suffix before its prefix is the caller's part: use a chain from its last block to its first, so that the last
one is the oldest.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvstore.errors import InvariantError
from kvstore.tier import Clock

Key = TypeVar("Key", bound=Hashable)

_SPARE_ITEMS = 64  # below this many, dead heap items are not worth a rebuild


@dataclass(slots=True, eq=False)
class _Entry(Generic[Key]):
    key: Key
    ttl_s: float | None
    deadline: float | None = None  # None: never, or not while it is pinned
    scheduled: float | None = None  # time of its live heap item
    pins: int = 0


class LRU(Generic[Key]):
    """Least recently used first, with a sliding TTL for each entry.

    A pinned entry is in use: it is neither evicted nor expired, and its TTL starts again when the last pin goes.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: dict[Key, _Entry[Key]] = {}
        self._evictable: OrderedDict[Key, None] = OrderedDict()
        self._heap: list[tuple[float, int, _Entry[Key]]] = []
        self._serial = 0  # breaks ties in the heap: entries themselves do not compare

    def __contains__(self, key: Key) -> bool:
        """Whether it is held, expired or not."""
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    @property
    def evictable(self) -> int:
        """Entries that are not pinned."""
        return len(self._evictable)

    def add(self, key: Key, ttl_s: float | None) -> None:
        """Hold a new entry as the most recently used one.

        Raises:
            InvariantError: it is already held.
        """
        if key in self._entries:
            raise InvariantError(f"{key!r} is already held")
        entry = self._entries[key] = _Entry(key, ttl_s)
        self._evictable[key] = None
        self._renew(entry)

    def use(self, key: Key) -> None:
        """Make it the most recently used one and start its TTL again."""
        entry = self._entries[key]
        if entry.pins == 0:
            self._evictable.move_to_end(key)
            self._renew(entry)

    def prolong(self, key: Key, ttl_s: float | None) -> None:
        """Use it, and from now on give it the longer one of its own TTL and `ttl_s`."""
        entry = self._entries[key]
        if entry.ttl_s is not None:
            entry.ttl_s = None if ttl_s is None else max(ttl_s, entry.ttl_s)
        self.use(key)

    def ttl_s(self, key: Key) -> float | None:
        """Its time to live after a use; None: until it is evicted."""
        return self._entries[key].ttl_s

    def remaining_s(self, key: Key) -> float | None:
        """Seconds until it expires, negative when it is overdue; None: never, or it is pinned."""
        deadline = self._entries[key].deadline
        return None if deadline is None else deadline - self._clock()

    def expired(self, key: Key) -> bool:
        """Whether its TTL has passed since its last use."""
        deadline = self._entries[key].deadline
        return deadline is not None and deadline <= self._clock()

    def pin(self, key: Key) -> None:
        """Keep it until as many `unpin`."""
        entry = self._entries[key]
        if entry.pins == 0:
            del self._evictable[key]
            entry.deadline = None
        entry.pins += 1

    def unpin(self, key: Key) -> None:
        """Undo one `pin`; the last one is a use.

        Raises:
            InvariantError: it was not pinned.
        """
        entry = self._entries[key]
        if entry.pins == 0:
            raise InvariantError(f"{key!r} is not pinned")
        entry.pins -= 1
        if entry.pins == 0:
            self._evictable[key] = None
            self._renew(entry)

    def pins(self, key: Key) -> int:
        """How often it is pinned."""
        return self._entries[key].pins

    def remove(self, key: Key) -> None:
        """Forget it, pinned or not."""
        entry = self._entries.pop(key)
        self._evictable.pop(key, None)
        entry.scheduled = entry.deadline = None
        self._drop_dead_items()

    def victim(self, kept: Container[Key] = ()) -> Key | None:
        """The entry to evict next, passing over the `kept` ones (O(1) for each); None: there is none. Not removed."""
        return next((key for key in self._evictable if key not in kept), None)

    def oldest_first(self) -> Iterator[Key]:
        """The entries that are not pinned, in the order of eviction."""
        return iter(self._evictable)

    def pop_expired(self) -> list[Key]:
        """Forget what has expired and return it, soonest deadline first."""
        now, gone = self._clock(), []
        while (top := self._top()) is not None and top[0] <= now:
            heapq.heappop(self._heap)
            top[2].scheduled = None
            self.remove(top[2].key)
            gone.append(top[2].key)
        return gone

    def next_expiry_s(self) -> float | None:
        """Seconds until the next entry expires, not negative; None when none will."""
        top = self._top()
        return None if top is None else max(0.0, top[0] - self._clock())

    def check(self) -> None:
        """Audit the structure.

        Raises:
            InvariantError: its parts disagree.
        """
        unpinned = {key for key, entry in self._entries.items() if entry.pins == 0}
        if unpinned != set(self._evictable):
            raise InvariantError("evictable entries are not those without pins")
        live = {id(item[2]): item[0] for item in self._heap if item[2].scheduled == item[0]}
        for entry in self._entries.values():
            if entry.deadline is not None and live.get(id(entry), float("inf")) > entry.deadline:
                raise InvariantError(f"nothing will expire {entry.key!r} in time")

    def _renew(self, entry: _Entry[Key]) -> None:
        if entry.ttl_s is None:
            entry.deadline = None
            return
        entry.deadline = self._clock() + entry.ttl_s
        if entry.scheduled is None or entry.scheduled > entry.deadline:
            self._schedule(entry, entry.deadline)

    def _schedule(self, entry: _Entry[Key], time: float) -> None:
        entry.scheduled = time
        self._serial += 1
        heapq.heappush(self._heap, (time, self._serial, entry))

    def _top(self) -> tuple[float, int, _Entry[Key]] | None:
        """The heap's first item, after moving on those whose entry lives longer than they say."""
        while self._heap:
            time, _, entry = self._heap[0]
            if entry.scheduled == time and entry.deadline == time:
                return self._heap[0]
            heapq.heappop(self._heap)
            if entry.scheduled == time:
                entry.scheduled = None
                if entry.deadline is not None:
                    self._schedule(entry, entry.deadline)
        return None

    def _drop_dead_items(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + _SPARE_ITEMS:
            self._heap = [item for item in self._heap if item[2].scheduled == item[0]]
            heapq.heapify(self._heap)
