"""Write-behind to the shared tier: a bounded queue, one thread, and the schedule of refreshes.

The engine's thread only puts entries in; a full queue drops the new entry, never blocks. Queued bytes are leased host
slots where there is a host tier, else copies.

Refreshing: a block that is used in a fast tier must not die in the shared one. `RefreshSchedule` says when a name is
due, at most once per quarter of its TTL; the thread then touches what the server holds and reports what it lost, which
the store writes again.
"""

from __future__ import annotations

import heapq
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError
from kvstore.events import RemovalCause
from kvstore.host import Lease
from kvstore.tier import BlockMeta, Clock, SharedTier, is_longer

BATCH_BLOCKS = 32  # what one write or refresh asks of the server at once
RETRY_S = 5.0  # after a refresh that got no answer; sooner where the TTL is short
REFRESH_WITHOUT_TTL_S = 300.0  # keeps recency in a server that evicts by it

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class QueuedWrite:
    """A block on its way to the shared tier.

    Attributes:
        payload: its bytes; valid while the lease lasts, or a copy of its own. lease: None: a copy.
        cancelled: it was cleared while it was being written: remove it again.
    """

    meta: BlockMeta
    payload: memoryview
    lease: Lease | None = None
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What became of a refresh: the blocks asked for, and which of them the tier lacks; None: it gave no answer."""

    metas: list[BlockMeta]
    missing: list[BlockHash] | None


class WriteBehind:
    """Bounded queue and thread in front of a slow tier.

    All methods are for the engine's thread; only `flush`, `settle_cancelled` and `close` wait for I/O.
    """

    def __init__(self, tier: SharedTier, *, max_blocks: int, end_lease: Callable[[Lease], None]) -> None:
        """Start the thread. At most `max_blocks` are queued or being written; leases end by `end_lease`."""
        self._tier = tier
        self._max_blocks = max_blocks
        self._end_lease = end_lease
        self._changed = threading.Condition()
        self._queue: OrderedDict[BlockHash, QueuedWrite] = OrderedDict()
        self._writing: list[QueuedWrite] = []
        self._stale: dict[BlockHash, BlockMeta] = {}
        self._refreshing = 0
        self._refreshed: deque[Refreshed] = deque()
        self._unwritten: deque[BlockHash] = deque()
        self._queue_full = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvstore-write-behind", daemon=True)
        self._thread.start()

    @property
    def queue_full(self) -> int:
        """Blocks that were dropped because the queue was full."""
        return self._queue_full

    def put(self, write: QueuedWrite) -> bool:
        """Queue a block; False: the queue is full, it was dropped and counted. A queued name is not queued again."""
        with self._changed:
            known = write.meta.hash in self._queue
            fits = len(self._queue) + len(self._writing) < self._max_blocks
            if not known and fits:
                self._queue[write.meta.hash] = write
                self._changed.notify_all()
                return True
            self._queue_full += not known
        self._end([write])
        return known

    def refresh(self, metas: Sequence[BlockMeta]) -> None:
        """Touch these, in chain order, in the background, and give them at least these TTLs."""
        with self._changed:
            self._stale.update((meta.hash, meta) for meta in metas)
            self._changed.notify_all()

    def take_refreshed(self) -> list[Refreshed]:
        """What refreshes found since the last call."""
        found = []
        while self._refreshed:
            found.append(self._refreshed.popleft())
        return found

    def take_unwritten(self) -> list[BlockHash]:
        """Blocks of writes that came short since the last call: the tier may hold them or not."""
        names = []
        while self._unwritten:
            names.append(self._unwritten.popleft())
        return names

    def metas(self) -> list[BlockMeta]:
        """Blocks that are queued or being written."""
        with self._changed:
            return [write.meta for write in (*self._queue.values(), *self._writing)]

    def drop(self, names: set[BlockHash]) -> None:
        """Take blocks out of the queue; those being written are removed right after."""
        with self._changed:
            dropped = [self._queue.pop(name) for name in list(self._queue) if name in names]
            for name in [name for name in self._stale if name in names]:
                del self._stale[name]
            for write in self._writing:
                write.cancelled |= write.meta.hash in names
        self._end(dropped)

    def settle_cancelled(self, timeout_s: float) -> bool:
        """Wait until no cancelled write is running any more; False: the time was up (it is removed later then)."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(write.cancelled for write in self._writing), timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that is queued has been tried; False: the time was up."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._queue or self._writing or self._stale or self._refreshing), timeout_s
            )

    def close(self, timeout_s: float) -> None:
        """Drop what is queued and end the thread; wait at most so long for the write that it is in."""
        with self._changed:
            self._closed = True
            dropped = list(self._queue.values())
            self._queue.clear()
            self._stale.clear()
            self._changed.notify_all()
        self._end(dropped)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("a write to the shared tier was left running at close", extra={"tier": self._tier.name})

    def check(self) -> None:
        """Audit the queue.

        Raises:
            InvariantError: a block is queued under another name, or there are more than may be.
        """
        with self._changed:
            if len(self._queue) + len(self._writing) > self._max_blocks:
                raise InvariantError("more blocks wait for the shared tier than may")
            if any(name != write.meta.hash for name, write in self._queue.items()):
                raise InvariantError("a block is queued under another name")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stale or self._closed)
                if self._closed:
                    return
                batch = [self._queue.popitem(last=False)[1] for _ in range(min(BATCH_BLOCKS, len(self._queue)))]
                stale = list(self._stale.values())[:BATCH_BLOCKS]
                for meta in stale:
                    del self._stale[meta.hash]
                self._writing, self._refreshing = batch, len(stale)
            self._attempt(batch, stale)

    def _attempt(self, batch: list[QueuedWrite], stale: list[BlockMeta]) -> None:
        count, missing = 0, None
        try:
            if batch:
                count = self._tier.write([write.meta for write in batch], [write.payload for write in batch])
                self._undo_cancelled(batch)
            if stale:
                missing = self._tier.refresh(stale)
        except Exception:
            # Tiers promise not to raise; if one does, the thread must live on to serve the rest.
            logger.exception("write-behind failed", extra={"tier": self._tier.name})
        finally:
            if count < len(batch):
                self._unwritten.extend(write.meta.hash for write in batch)
            if stale:
                self._refreshed.append(Refreshed(stale, missing))
            self._end(batch)
            with self._changed:
                self._writing, self._refreshing = [], 0
                self._changed.notify_all()

    def _undo_cancelled(self, batch: list[QueuedWrite]) -> None:
        with self._changed:
            cancelled = [write.meta.hash for write in batch if write.cancelled]
        if cancelled:
            self._tier.remove(cancelled, RemovalCause.CLEARED)

    def _end(self, writes: Sequence[QueuedWrite]) -> None:
        for write in writes:
            if write.lease is not None:
                self._end_lease(write.lease)


@dataclass(slots=True)
class _Use:
    renewed: float | None  # when the lower tier last heard of it; None: not that we know
    ttl_s: float | None = None  # that it then heard of
    due: float | None = None


class RefreshSchedule:
    """When to refresh a name in the lower tier: a quarter of its TTL after the last refresh, if it was used since.

    A use that comes too early is not forgotten: it is due when the quarter is over, so that the lower tier's TTL ends
    at the earliest three quarters of a TTL after the last use. Pure, on an injected clock; O(log n) once per refresh,
    O(1) for uses in between. Bounded: names not used for longest are forgotten, which costs one early refresh.
    """

    def __init__(self, capacity: int, *, clock: Clock) -> None:
        """Remember at most `capacity` names."""
        self._capacity = capacity
        self._clock = clock
        self._uses: OrderedDict[BlockHash, _Use] = OrderedDict()
        self._heap: list[tuple[float, int, BlockHash]] = []
        self._serial = 0

    def used(self, name: BlockHash, ttl_s: float | None) -> None:
        """It was hit in a faster tier."""
        use = self._entry(name)
        grew = use.renewed is not None and is_longer(ttl_s, use.ttl_s)
        if use.due is not None and not grew:
            return
        now = self._clock()
        self._set_due(name, use, now if grew or use.renewed is None else max(now, use.renewed + _interval_s(ttl_s)))
        if grew or use.renewed is None:
            use.ttl_s = ttl_s

    def renewed(self, name: BlockHash, ttl_s: float | None) -> None:
        """The lower tier has just been written or read: its TTL, this one, has begun again."""
        use = self._entry(name)
        use.renewed, use.due, use.ttl_s = self._clock(), None, ttl_s

    def unanswered(self, name: BlockHash, ttl_s: float | None) -> None:
        """A refresh got no answer: try again soon."""
        self._set_due(name, self._entry(name), self._clock() + min(RETRY_S, _interval_s(ttl_s) / 4))

    def lost(self, name: BlockHash) -> None:
        """The lower tier does not hold it."""
        self._uses.pop(name, None)

    def retain(self, names: set[BlockHash]) -> None:
        """Of all others it is not known any more whether the lower tier holds them."""
        for name in [name for name in self._uses if name not in names]:
            del self._uses[name]

    def pop_due(self) -> list[BlockHash]:
        """Names to refresh now, in the order of their uses. They count as renewed."""
        now, due = self._clock(), []
        while self._heap and self._heap[0][0] <= now:
            time, _, name = heapq.heappop(self._heap)
            use = self._uses.get(name)
            if use is not None and use.due == time:
                use.renewed, use.due = now, None
                due.append(name)
        return due

    def _set_due(self, name: BlockHash, use: _Use, time: float) -> None:
        use.due = time
        self._serial += 1
        heapq.heappush(self._heap, (time, self._serial, name))

    def _entry(self, name: BlockHash) -> _Use:
        use = self._uses.get(name)
        if use is None:
            use = self._uses[name] = _Use(renewed=None)
            if len(self._uses) > self._capacity:
                self._uses.popitem(last=False)
        else:
            self._uses.move_to_end(name)
        return use


def _interval_s(ttl_s: float | None) -> float:
    return REFRESH_WITHOUT_TTL_S if ttl_s is None else ttl_s / 4
