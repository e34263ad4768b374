"""What the Redis tier counts and believes: statistics, events, and which blocks it thinks are on the server.

No I/O. A belief is a memory of the last time a block was seen; the server may have dropped it since. Beliefs decide
which removals are worth an event and with which TTL a block is touched; they never answer a question.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, stored_events
from kvstore.errors import InvariantError, MissReason
from kvstore.events import AllBlocksCleared, BlockRemoved, KvEvent, RemovalCause, TierName
from kvstore.tier import BlockMeta, TierStats, select

MAX_BELIEFS = 1 << 16  # about 25 MB


class RedisBooks:
    """Thread-safe."""

    def __init__(self, *, max_beliefs: int = MAX_BELIEFS) -> None:
        self._max_beliefs = max_beliefs
        self._lock = threading.Lock()
        self._believed: OrderedDict[BlockHash, BlockMeta] = OrderedDict()  # the last seen at the end
        self._events: list[KvEvent] = []
        self._hits = self._stores = 0
        self._read_bytes = self._written_bytes = 0
        self._misses: Counter[str] = Counter()
        self._removals: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def missed(self, reason: MissReason) -> None:
        """A block was not delivered."""
        with self._lock:
            self._misses[reason] += 1

    def failed_to_store(self, cause: str, count: int) -> None:
        """Blocks were not written."""
        with self._lock:
            self._failures[cause] += count

    def delivered(self, metas: Sequence[BlockMeta], nbytes: int) -> None:
        """Blocks of `nbytes` payload each were read."""
        with self._lock:
            self._hits += len(metas)
            self._read_bytes += len(metas) * nbytes
            self._believe(metas)

    def stored(self, metas: Sequence[BlockMeta], *, written: int, nbytes: int) -> None:
        """The server holds these, in chain order; `written` of them since now."""
        with self._lock:
            self._stores += written
            self._written_bytes += written * nbytes
            self._believe(metas)

    def believed(self, names: Iterable[BlockHash]) -> dict[BlockHash, BlockMeta]:
        """What is remembered of them."""
        with self._lock:
            return {name: self._believed[name] for name in names if name in self._believed}

    def forget(self, *, root: BlockHash | None, prefix: BlockHash | None) -> list[BlockMeta]:
        """Believe no more what a clear of that scope drops; tell nobody. What is still believed."""
        with self._lock:
            for name in select(list(self._believed.values()), root, prefix):
                self._believed.pop(name, None)
            return list(self._believed.values())

    def removed(self, names: Sequence[BlockHash], cause: RemovalCause) -> None:
        """These were dropped."""
        with self._lock:
            self._removals[cause] += len(names)
            for name in names:
                self._believed.pop(name, None)
            self._announce_removal(names, cause)

    def absent(self, names: Sequence[BlockHash]) -> None:
        """These are not on the server; of those that were thought there, tell."""
        with self._lock:
            gone = [name for name in names if self._believed.pop(name, None) is not None]
            self._removals.update({RemovalCause.ABSENT: len(gone)} if gone else {})
            self._announce_removal(gone, RemovalCause.ABSENT)

    def emptied(self, dropped: int = 0) -> None:
        """Nothing of ours is left on the server; that many blocks were cleared by us."""
        with self._lock:
            self._removals.update({RemovalCause.CLEARED: dropped} if dropped else {})
            self._believed.clear()
            self._events.append(AllBlocksCleared(TierName.REDIS))

    def drain_events(self) -> list[KvEvent]:
        """The events since the last call, in order."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def stats(self) -> TierStats:
        """The counters; fill and health are left to the tier."""
        with self._lock:
            return TierStats(
                blocks=len(self._believed),
                hits=self._hits,
                misses=dict(self._misses),
                removals=dict(self._removals),
                stores=self._stores,
                store_failures=dict(self._failures),
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
            )

    def check(self) -> None:
        """Audit.

        Raises:
            InvariantError: the books are wrong.
        """
        with self._lock:
            if len(self._believed) > self._max_beliefs:
                raise InvariantError(f"{len(self._believed)} beliefs, more than {self._max_beliefs}")
            if any(name != meta.hash for name, meta in self._believed.items()):
                raise InvariantError("a belief is filed under another name")

    def _believe(self, metas: Sequence[BlockMeta]) -> None:
        fresh: dict[float | None, list[BlockMeta]] = {}
        for meta in metas:
            known = self._believed.get(meta.hash)
            if known is None or known.ttl_s != meta.ttl_s:
                fresh.setdefault(meta.ttl_s, []).append(meta)
            self._believed[meta.hash] = meta
            self._believed.move_to_end(meta.hash)
        while len(self._believed) > self._max_beliefs:
            self._believed.popitem(last=False)
        for ttl_s, news in fresh.items():
            runs = consecutive_runs(meta.link for meta in news)
            self._events += stored_events(TierName.REDIS, runs, ttl_s)

    def _announce_removal(self, names: Sequence[BlockHash], cause: RemovalCause) -> None:
        if names:
            self._events.append(BlockRemoved(TierName.REDIS, tuple(short(name) for name in names), cause))
