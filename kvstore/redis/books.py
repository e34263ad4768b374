"""What the Redis tier counts and believes: statistics, events, and which blocks it thinks are on the server.

No I/O. A belief is a memory of the last time a block was seen; the server may have dropped it since. Beliefs decide
which removals are worth an event and with which TTL a block is touched; they never answer a question.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, parent_of, stored_events, tree_runs
from kvstore.errors import InvariantError, MissReason
from kvstore.events import AllBlocksCleared, BlockRemoved, KvEvent, RemovalCause, TierName
from kvstore.lifetime import shortest
from kvstore.tier import BlockMeta, Clock, Honours, TierStats, select

MAX_BELIEFS = 1 << 16  # about 25 MB
_MAX_HEARD = 1 << 14
TOLD_S = 10.0

Found = tuple[BlockMeta, float | None]  # a block that lies there, and the seconds that it has left (None: no end)


class RedisBooks:
    """Thread-safe."""

    def __init__(self, *, max_beliefs: int = MAX_BELIEFS, wall_clock: Clock = time.time) -> None:
        self._wall_clock = wall_clock
        self._max_beliefs = max_beliefs
        self._lock = threading.Lock()
        self._believed: OrderedDict[BlockHash, BlockMeta] = OrderedDict()  # the last seen at the end
        self._events: list[KvEvent] = []
        self._hits = self._stores = 0
        self._read_bytes = self._written_bytes = 0
        self._misses: Counter[str] = Counter()
        self._removals: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._doubts: list[set[BlockHash]] = []
        self._heard: OrderedDict[BlockHash, None] = OrderedDict()  # said to be gone while not believed there
        self._doubtful: list[BlockHash] = []
        self._told: OrderedDict[BlockHash, float] = OrderedDict()  # as gone, and not believed there since; when
        self._flushes = 0
        self._removed_meanwhile: set[BlockHash] | None = None  # set while somebody looks at all that is there
        self._emptied_meanwhile = False
        self._cleared_meanwhile: list[tuple[BlockHash | None, BlockHash | None]] = []  # roots and prefixes

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
        wall = self._wall_clock()
        with self._lock:
            self._stores += written
            self._written_bytes += written * nbytes
            # What was written after its end is gone already, and what is there all the same is found by its next read.
            self._believe([meta for meta in metas if not written or meta.lifetime.left_s(wall) != 0])

    def believed(self, names: Iterable[BlockHash]) -> dict[BlockHash, BlockMeta]:
        """What is remembered of them."""
        with self._lock:
            return {name: self._believed[name] for name in names if name in self._believed}

    def forget(self, *, root: BlockHash | None, prefix: BlockHash | None) -> list[BlockMeta]:
        """Believe no more what a clear of that scope drops; tell nobody. What is still believed."""
        with self._lock:
            if self._removed_meanwhile is not None:
                self._cleared_meanwhile.append((root, prefix))
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
        """The server has said that these are not there: tell of those that were thought there, and of the first.

        Whatever was thought of the first: somebody may count on what a worker wrote that has died since. It is where
        the prefix ends, so nobody counts on those behind it either, and a cold prompt costs one block in one event, and
        none if it was told in the last TOLD_S.
        """
        with self._lock:
            gone = {name for name in names if self._believed.pop(name, None) is not None}
            self._removals.update({RemovalCause.ABSENT: len(gone)} if gone else {})
            gone.update(name for name in names[:1] if not self._was_told(name))
            self._announce_removal([name for name in names if name in gone], RemovalCause.ABSENT)

    @contextmanager
    def recalling(self) -> Iterator[Callable[[Sequence[Found]], int]]:
        """Somebody asks a server for all that it holds; one at a time. Gives what to tell the answer to.

        That tells of the blocks, the chains' order kept, and returns how many are believed since now. What was removed
        or cleared between question and answer is not believed, nothing at all is if the server was emptied, and what
        was seen by use stays longer in memory.
        """
        with self._lock:
            self._removed_meanwhile, self._emptied_meanwhile = set(), False
            self._cleared_meanwhile = []
        try:
            yield self._recalled
        finally:
            with self._lock:
                self._removed_meanwhile = None

    @contextmanager
    def doubting(self) -> Iterator[set[BlockHash]]:
        """The server is being asked which blocks are gone; the set collects those that are seen on it meanwhile."""
        seen: set[BlockHash] = set()
        with self._lock:
            self._doubts.append(seen)
        try:
            yield seen
        finally:
            with self._lock:
                self._doubts = [other for other in self._doubts if other is not seen]

    def gone(self, causes: Mapping[BlockHash, RemovalCause], *, seen: set[BlockHash]) -> list[BlockHash]:
        """The server has said that these are gone; tell, of blocks that were not believed there, too.

        An answer may be older than what was seen meanwhile (a write, a read): those stay, and are returned.
        Events keep the order of `causes`.
        """
        with self._lock:
            again = [name for name in causes if name in seen]
            told = [(name, cause) for name, cause in causes.items() if name not in seen]
            for cause, run in groupby(told, key=lambda pair: pair[1]):
                names = [name for name, _ in run]
                believed = sum(self._believed.pop(name, None) is not None for name in names)
                self._removals.update({cause: believed} if believed else {})
                self._announce_removal(names, cause)
                self._note_heard(names)
            return again

    def suspects(self, name: BlockHash) -> bool:
        """Somebody says that this may be gone: whether it is believed there. If not, it is doubtful once it is."""
        with self._lock:
            if name not in self._believed:
                self._note_heard([name])
            return name in self._believed

    def take_doubtful(self) -> list[BlockHash]:
        """Blocks that are believed there since the last call, and were said to be gone shortly before.

        A write is entered here after the server has taken it; news that it is gone already may be faster.
        """
        with self._lock:
            doubtful, self._doubtful = self._doubtful, []
        return doubtful

    @property
    def flushes(self) -> int:
        """How often `flushed` was called."""
        return self._flushes

    def flushed(self) -> None:
        """Somebody emptied a server: tell that nothing is held. What is held nevertheless must be told again."""
        with self._lock:
            self._flushes += 1
            self._emptied_meanwhile = True
            self._events.append(AllBlocksCleared(TierName.REDIS))

    def tell_again(self, names: Iterable[BlockHash]) -> None:
        """Tell of those that are believed there, though it was told before: somebody may have been told otherwise."""
        with self._lock:
            self._announce([self._believed[name] for name in names if name in self._believed])

    def names(self) -> list[BlockHash]:
        """All that is believed there, the last seen at the end."""
        with self._lock:
            return list(self._believed)

    def emptied(self, dropped: int = 0) -> None:
        """Nothing of ours is left on the server; that many blocks were cleared by us."""
        with self._lock:
            self._removals.update({RemovalCause.CLEARED: dropped} if dropped else {})
            self._note_told(self._believed)
            self._believed.clear()
            self._emptied_meanwhile = True
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
        fresh: list[BlockMeta] = []
        for meta in metas:
            known = self._believed.get(meta.hash)
            if known is None or known.lifetime != meta.lifetime:
                fresh.append(meta)
            self._believed[meta.hash] = meta
            self._believed.move_to_end(meta.hash)
            self._told.pop(meta.hash, None)
            for seen in self._doubts:
                seen.add(meta.hash)
            if meta.hash in self._heard:
                del self._heard[meta.hash]
                self._doubtful.append(meta.hash)
        while len(self._believed) > self._max_beliefs:
            self._believed.popitem(last=False)
        self._announce(fresh)

    def _recalled(self, found: Sequence[Found]) -> int:
        with self._lock:
            if self._emptied_meanwhile:
                return 0
            gone = set(self._removed_meanwhile or ())
            for root, prefix in self._cleared_meanwhile:
                gone.update(select([meta for meta, _ in found], root, prefix))
            room = self._max_beliefs - len(self._believed)
            news = [(meta, s) for meta, s in found if meta.hash not in self._believed and meta.hash not in gone][:room]
            for meta, _ in news:
                self._believed[meta.hash] = meta
                self._believed.move_to_end(meta.hash, last=False)
                self._told.pop(meta.hash, None)
                for seen in self._doubts:
                    seen.add(meta.hash)
            for left_s, parents in _by_time_left(news):
                self._events += stored_events(TierName.REDIS, tree_runs(parents), left_s)
            return len(news)

    def _note_heard(self, names: Iterable[BlockHash]) -> None:
        self._heard.update(dict.fromkeys(names))
        while len(self._heard) > _MAX_HEARD:
            self._heard.popitem(last=False)

    def _announce(self, metas: Iterable[BlockMeta]) -> None:
        by_time: dict[float | None, list[BlockMeta]] = {}  # the seconds that they have left
        wall = self._wall_clock()
        for meta in metas:
            by_time.setdefault(meta.lifetime.told_s(wall), []).append(meta)
        for left_s, news in by_time.items():
            runs = consecutive_runs(meta.link for meta in news)
            self._events += stored_events(TierName.REDIS, runs, left_s)

    def _note_told(self, names: Iterable[BlockHash]) -> None:
        self._told.update(dict.fromkeys(names, self._wall_clock()))
        while len(self._told) > _MAX_HEARD:
            self._told.popitem(last=False)

    def _was_told(self, name: BlockHash) -> bool:
        told_at = self._told.get(name)
        return told_at is not None and abs(self._wall_clock() - told_at) < TOLD_S

    def _announce_removal(self, names: Sequence[BlockHash], cause: RemovalCause) -> None:
        if self._removed_meanwhile is not None:
            self._removed_meanwhile.update(names)
        if names:
            self._note_told(names)
            self._events.append(BlockRemoved(TierName.REDIS, tuple(short(name) for name in names), cause))


def _by_time_left(found: Sequence[Found]) -> Iterator[tuple[float | None, dict[bytes, bytes | None]]]:
    """Blocks and the blocks before them, those together whose ends differ by less than a tenth; the least counts."""
    groups: dict[int | None, tuple[float | None, dict[bytes, bytes | None]]] = {}
    for meta, left_s in found:
        kind = None if left_s is None else round(math.log(max(left_s, 1e-3)) / math.log(1.1))
        least, parents = groups.get(kind, (left_s, {}))
        parents[meta.hash] = parent_of(meta)
        groups[kind] = (shortest((least, left_s)), parents)
    yield from groups.values()


class FromBooks:
    """What a tier on Redis servers answers from its books alone, as the contract of `SharedTier` says."""

    name = TierName.REDIS
    honours = Honours(capacity=False, ttl=True, named_eviction=False, injected_clock=False, restart=True)

    def __init__(self, *, wall_clock: Clock = time.time) -> None:
        self._books = RedisBooks(wall_clock=wall_clock)

    def find(self, name: BlockHash) -> BlockMeta | None:
        """As `SharedTier.find`."""
        return self._books.believed([name]).get(name)

    def forget(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> list[BlockMeta]:
        """As `SharedTier.forget`."""
        return self._books.forget(root=root, prefix=prefix)

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> int:
        """As `Tier.lease`: the server evicts as it likes."""
        return 0

    def end_leases(self, hashes: Sequence[BlockHash]) -> int:
        """As `Tier.end_leases`."""
        return 0

    def sweep(self) -> float | None:
        """Nothing to do: the server drops what has expired."""
        return None

    def drain_events(self) -> list[KvEvent]:
        """As `Tier.drain_events`. A removal is told of blocks that this tier believed on the server.

        And of the block at which a look-up or a read ended, because the server did not hold it. While it is watched,
        all blocks that others wrote are told as removed, too.
        """
        return self._books.drain_events()

    def check(self) -> None:
        """As `Tier.check`; of what is on the server nothing is known for sure, so only our own books are audited."""
        self._books.check()
