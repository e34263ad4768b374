"""What the store knows of a slow tier's contents, and the events that it tells of them.

A shared tier changes behind our back: what is known of it is a memory (`directory`), corrected by every answer. A local
tier knows what it holds, and is asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, stored_events
from kvstore.directory import Directory
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause
from kvstore.lifetime import shortest
from kvstore.tier import BlockMeta, Clock, LocalTier, SharedTier


class Known(Protocol):
    """What is known of one tier. Owned by the engine's thread."""

    def holds(self, name: BlockHash) -> bool:
        """Whether the tier is thought to hold a block now."""
        ...

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which it holds it, as far as known. Any thread may ask."""
        ...

    def learn(self, metas: Sequence[BlockMeta]) -> None:
        """It holds these."""
        ...

    def lost(self, names: Sequence[BlockHash]) -> None:
        """It does not hold these."""
        ...

    def forget(self, names: Sequence[BlockHash], root: BlockHash | None, prefix: BlockHash | None) -> set[BlockHash]:
        """Nothing is known any more of a cleared scope, `names` among it; what is still thought to be held."""
        ...

    def drain_events(self) -> list[KvEvent]:
        """The events since the last call, in order."""
        ...

    def snapshot(self) -> list[BlockStored]:
        """All that it is thought to hold, as events."""
        ...

    def metas(self) -> list[BlockMeta]:
        """Of what lies there and is ours alone."""
        ...

    def take_emptied(self) -> bool:
        """Whether somebody emptied the tier since the last call."""
        ...


class KnownLocal:
    """Of a local tier, which is asked."""

    def __init__(self, tier: LocalTier) -> None:
        self._tier = tier

    def holds(self, name: BlockHash) -> bool:
        """As `Known.holds`."""
        return self._tier.find(name) is not None

    def find(self, name: BlockHash) -> BlockMeta | None:
        """As `Known.find`."""
        return self._tier.find(name)

    def learn(self, metas: Sequence[BlockMeta]) -> None:
        """It knows by itself."""

    def lost(self, names: Sequence[BlockHash]) -> None:
        """It knows by itself."""

    def forget(self, names: Sequence[BlockHash], root: BlockHash | None, prefix: BlockHash | None) -> set[BlockHash]:
        """As `Known.forget`."""
        return {meta.hash for meta in self._tier.metas()}

    def drain_events(self) -> list[KvEvent]:
        """As `Known.drain_events`."""
        return self._tier.drain_events()

    def snapshot(self) -> list[BlockStored]:
        """As `Known.snapshot`."""
        return self._tier.snapshot()

    def metas(self) -> list[BlockMeta]:
        """As `Known.metas`."""
        return self._tier.metas()

    def take_emptied(self) -> bool:
        """As `Known.take_emptied`; nobody else can."""
        return False


class KnownShared:
    """Of a shared tier: its own events, and what the store learnt of it, in order."""

    def __init__(self, tier: SharedTier, entries: int, *, clock: Clock, wall_clock: Clock = time.time) -> None:
        """Remember at most so many blocks."""
        self._wall_clock = wall_clock
        self._tier = tier
        self._directory = Directory(tier.name, entries, clock=clock)
        self._events: list[KvEvent] = []
        self._was_emptied = False

    def holds(self, name: BlockHash) -> bool:
        """As `Known.holds`."""
        return short(name) in self._directory

    def find(self, name: BlockHash) -> BlockMeta | None:
        """As `Known.find`."""
        return self._tier.find(name)

    def learn(self, metas: Sequence[BlockMeta]) -> None:
        """As `Known.learn`."""
        self._hear()
        wall = self._wall_clock()
        left = {meta.hash: meta.lifetime.told_s(wall) for meta in metas}
        for run in consecutive_runs(meta.link for meta in metas):
            for event in stored_events(self._tier.name, [run], shortest(left[BlockHash(name)] for name in run[1])):
                self._directory.apply(event)
                self._events.append(event)

    def lost(self, names: Sequence[BlockHash]) -> None:
        """As `Known.lost`; of those that were thought there, tell."""
        self._hear()
        gone = tuple(short(name) for name in names if short(name) in self._directory)
        if gone:
            self._directory.remove(gone)
            self._events.append(BlockRemoved(self._tier.name, gone, RemovalCause.ABSENT))

    def forget(self, names: Sequence[BlockHash], root: BlockHash | None, prefix: BlockHash | None) -> set[BlockHash]:
        """As `Known.forget`; blocks whose root is not known are forgotten, too."""
        self._hear()
        kept = {meta.hash for meta in self._tier.forget(root=root, prefix=prefix)} - set(names)
        self._directory.retain({short(name) for name in kept})
        return kept

    def drain_events(self) -> list[KvEvent]:
        """As `Known.drain_events`."""
        self._hear()
        events, self._events = self._events, []
        return events

    def snapshot(self) -> list[BlockStored]:
        """As `Known.snapshot`."""
        self._hear()
        return self._directory.snapshot()

    def metas(self) -> list[BlockMeta]:
        """Nothing there is ours alone."""
        return []

    def take_emptied(self) -> bool:
        """As `Known.take_emptied`."""
        self._hear()
        was_emptied, self._was_emptied = self._was_emptied, False
        return was_emptied

    def _hear(self) -> None:
        """Take the tier's events before anything is added to them, so that they stay in order."""
        events = self._tier.drain_events()
        for event in events:
            self._directory.apply(event)
            self._was_emptied |= isinstance(event, AllBlocksCleared)
        self._events += events
