"""What a shared tier is known to hold: short names with their expiry, at most so many of them. No torch, no I/O.

Knowledge, not truth: the server may have evicted a block, or another worker may have written one that is not known
here. Names beyond the bound are forgotten, the one heard of longest ago first. An expired name is forgotten when it is
next looked at; the bound keeps those that nobody looks at few.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvstore.chains import tree_runs
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, TierName


@dataclass(frozen=True, slots=True)
class _Entry:
    parent: bytes | None
    deadline: float | None  # None: until it is evicted


class Directory:
    """Short names that a tier is believed to hold. O(1) a name. Not thread-safe."""

    def __init__(self, tier: TierName, capacity: int, *, clock: Callable[[], float]) -> None:
        """Know at most `capacity` names of `tier`; `clock` in seconds."""
        self.tier = tier
        self._capacity = capacity
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: bytes) -> bool:
        """Whether the tier is believed to hold this short name now."""
        entry = self._entries.get(name)
        return entry is not None and (entry.deadline is None or entry.deadline > self._clock())

    def match(self, names: Sequence[bytes]) -> int:
        """How many leading short names the tier is believed to hold."""
        for count, name in enumerate(names):
            if name not in self:
                return count
        return len(names)

    def add(self, names: Sequence[bytes], parent: bytes | None, ttl_s: float | None) -> None:
        """Consecutive short names of one chain are held, from now on for `ttl_s` (None: until evicted)."""
        deadline = None if ttl_s is None else self._clock() + ttl_s
        parents = [parent, *names[:-1]]
        # Last first: of one chain, the bound forgets the tail before the head.
        for name, before in zip(reversed(names), reversed(parents), strict=True):
            self._entries[name] = _Entry(before, deadline)
            self._entries.move_to_end(name)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)

    def remove(self, names: Iterable[bytes]) -> int:
        """These are not held any more; how many of them were known."""
        return sum(self._entries.pop(name, None) is not None for name in names)

    def retain(self, names: set[bytes]) -> None:
        """Of the others it is not known any more whether they are held."""
        self.remove([name for name in self._entries if name not in names])

    def clear(self) -> None:
        """Nothing is held any more."""
        self._entries.clear()

    def apply(self, event: KvEvent) -> None:
        """Learn from an event of its tier; events of other tiers say nothing here."""
        if event.tier is not self.tier:
            return
        if isinstance(event, BlockStored):
            self.add(event.hashes, event.parent, event.ttl_s)
        elif isinstance(event, BlockRemoved):
            self.remove(event.hashes)
        elif isinstance(event, AllBlocksCleared):
            self.clear()

    def snapshot(self) -> list[BlockStored]:
        """All that is known, as events; `ttl_s` is what is left, the least of each run. Forgets what has expired."""
        now = self._clock()
        for name in [name for name in self._entries if name not in self]:
            del self._entries[name]
        events = []
        for parent, names in tree_runs({name: entry.parent for name, entry in self._entries.items()}):
            deadlines = [at for name in names if (at := self._entries[name].deadline) is not None]
            left = min(deadlines) - now if deadlines else None
            events.append(BlockStored(self.tier, tuple(names), parent, left))
        return events
