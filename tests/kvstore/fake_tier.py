"""A shared tier in memory that does what a test tells it to: hold its answers back, fail, lose blocks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, select, stored_events
from kvstore.errors import MissReason
from kvstore.events import AllBlocksCleared, BlockRemoved, KvEvent, RemovalCause, TierName
from kvstore.tier import BlockMeta, Clock, Delivery, Honours, TierStats, prolonged


@dataclass(slots=True)
class _Stored:
    meta: BlockMeta
    payload: bytes
    used: float


class FakeSharedTier:
    """Naive on purpose. Thread-safe.

    Attributes:
        reads_open, writes_open: cleared by a test to hold answers back until it sets them again.
        read_limit: deliver at most so many blocks of a read; None: all. ends: what a read says that it cuts short.
        raises: fail with this error in read and write.
        healthy: what `stats` says; if not, the breaker answers what is missing.
        reads, writes: names asked for in each call.
    """

    name = TierName.REDIS
    honours = Honours(capacity=False, ttl=True, named_eviction=False, injected_clock=True)

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stored: dict[BlockHash, _Stored] = {}
        self._events: list[KvEvent] = []
        self.reads_open, self.writes_open = threading.Event(), threading.Event()
        self.reads_open.set()
        self.writes_open.set()
        self.read_limit: int | None = None
        self.ends = MissReason.ABSENT
        self.raises: Exception | None = None
        self.healthy = True
        self.reads: list[list[BlockHash]] = []
        self.writes: list[list[BlockHash]] = []
        self.touched: list[list[BlockHash]] = []
        self.deadlines: list[float | None] = []

    def held(self) -> dict[BlockHash, bytes]:
        """All unexpired blocks and their bytes."""
        with self._lock:
            return {name: stored.payload for name, stored in self._stored.items() if self._live(name)}

    def lose(self, names: Sequence[BlockHash]) -> None:
        """As a server that evicts: no event tells of it."""
        with self._lock:
            for name in names:
                self._stored.pop(name, None)

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        with self._lock:
            return self._leading(hashes)

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        self.reads.append(list(hashes))
        self.deadlines.append(deadline_s)
        assert self.reads_open.wait(30)
        if self.raises is not None:
            raise self.raises
        with self._lock:
            count = there = self._leading(hashes)
            if self.read_limit is not None:
                count = min(count, self.read_limit)
            for name, buffer in zip(hashes[:count], into, strict=False):
                buffer[:] = self._stored[name].payload
                self._stored[name].used = self._clock()
            for buffer in into[count:]:
                buffer[:] = b"\xff" * len(buffer)  # garbage, as the contract allows
            ended = MissReason.ABSENT if count == there else self.ends
            ended = ended if self.healthy else MissReason.BREAKER
            return Delivery(count, ended if count < len(hashes) else None)

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        assert self.writes_open.wait(30)
        if self.raises is not None:
            raise self.raises
        self.writes.append([meta.hash for meta in metas])
        with self._lock:
            for meta, payload in zip(metas, payloads, strict=True):
                self._stored[meta.hash] = _Stored(meta, bytes(payload), self._clock())
            for run in consecutive_runs(meta.link for meta in metas):
                self._events += stored_events(self.name, [run], metas[0].ttl_s)
        return len(metas)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        self.touched.append(list(hashes))
        with self._lock:
            for name in hashes:
                if self._live(name):
                    self._stored[name].used = self._clock()

    def find(self, name: BlockHash) -> BlockMeta | None:
        with self._lock:
            return self._stored[name].meta if self._live(name) else None

    def refresh(self, metas: Sequence[BlockMeta]) -> list[BlockHash] | None:
        if not self.healthy:
            return None
        with self._lock:
            held = [meta for meta in metas if self._live(meta.hash)]
            for meta in held:
                stored = self._stored[meta.hash]
                stored.meta = prolonged(stored.meta, meta.lifetime)
        self.touch([meta.hash for meta in held])
        return [meta.hash for meta in metas if meta not in held]

    def forget(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> list[BlockMeta]:
        with self._lock:
            metas = [stored.meta for stored in self._stored.values()]
        gone = set(select(metas, root, prefix))
        return [meta for meta in metas if meta.hash not in gone]

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        with self._lock:
            gone = [name for name in hashes if self._stored.pop(name, None) is not None]
            if gone:
                self._events.append(BlockRemoved(self.name, tuple(short(name) for name in gone), cause))
        return len(gone)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        with self._lock:
            names = select([stored.meta for stored in self._stored.values()], root, prefix)
        count = self.remove(names, RemovalCause.CLEARED)
        if root is None and prefix is None:
            self._events.append(AllBlocksCleared(self.name))
        return count

    def sweep(self) -> float | None:
        return None

    def drain_events(self) -> list[KvEvent]:
        with self._lock:
            events, self._events = self._events, []
        return events

    def stats(self) -> TierStats:
        return TierStats(blocks=len(self._stored), healthy=self.healthy)

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.reads_open.set()
        self.writes_open.set()

    def _live(self, name: BlockHash) -> bool:
        stored = self._stored.get(name)
        if stored is None:
            return False
        ttl_s, until, now = stored.meta.ttl_s, stored.meta.until, self._clock()  # which is the wall clock here, too
        return ttl_s is None or stored.used + ttl_s > now or (until is not None and until > now)

    def _leading(self, hashes: Sequence[BlockHash]) -> int:
        return next((i for i, name in enumerate(hashes) if not self._live(name)), len(hashes))
