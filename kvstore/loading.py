"""Reads of slow tiers: one load each, run by an I/O thread of that tier, so that a stalled one delays no other.

Covers: what a load is, fetching its bytes piece by piece, copying them to host. Does not cover: which load to start and
where its blocks go (`promotion`), how long it may take (`patience`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from kvstore.acquisition import Acquisition, Wish
from kvstore.blocks import BlockHash
from kvstore.buffers import Buffers
from kvstore.daemon_pool import DaemonPool
from kvstore.errors import InvariantError, MissReason
from kvstore.host.tier import HostTier
from kvstore.patience import Limit
from kvstore.source import Source
from kvstore.tier import BlockMeta, Clock, Delivery, arrived_as

IDLE_BUFFERS = 64

_NO_MEASURE = (MissReason.BREAKER, MissReason.BUSY, MissReason.ERROR)  # refused: that says nothing of reads

logger = logging.getLogger(__name__)

FindMeta = Callable[[BlockHash], BlockMeta | None]


@dataclass(slots=True, eq=False)
class Load:
    """One read of a slow tier.

    Attributes:
        source: the tier. metas: what is read. wish: whose. first: position of the first block in the wish.
        owner: who waits for it; None: a prefetch, which ends in host. waiters: others that want the same blocks.
        limits: of each of its pieces, in order. started: when it was asked for, on the clock.
        budget: of a prefetch, blocks that it may go on to fetch when these have come.
        buffers: where the bytes are. arrived: blocks that are whole, under the metadata that they were stored with;
        grows by a piece at a time. Both written by the I/O thread.
        landed: of those, what was put into the device before the load had ended.
        ms: how long it took; None: nobody learnt how long reads take. is_next_gone: the tier lacks the next block.
        discarded: cleared meanwhile: nothing of it may be registered. Guarded by `lock`.
        is_stuck: its tier does not keep the limit, and nobody joins it any more.
    """

    source: Source
    metas: list[BlockMeta]
    wish: Wish
    first: int
    owner: Acquisition | None
    limits: list[Limit]
    budget: int = 0
    started: float = 0.0
    waiters: list[Acquisition] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)
    arrived: list[BlockMeta] = field(default_factory=list)
    landed: list[BlockMeta] = field(default_factory=list)
    ms: float | None = None
    is_next_gone: bool = False
    discarded: bool = False
    is_stuck: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_short(self) -> bool:
        """Whether less came than was asked for."""
        return len(self.arrived) < len(self.metas)

    @property
    def limit_s(self) -> float:
        """How long the piece that is on its way may take, from the start of the load."""
        come = len(self.arrived)
        return next((limit.seconds for limit in self.limits if limit.stop > come), float("inf"))

    def leave(self, acquisition: Acquisition) -> None:
        """It does not wait for this any more."""
        self.owner = None if acquisition is self.owner else self.owner
        self.waiters = [waiter for waiter in self.waiters if waiter is not acquisition]

    @property
    def interested(self) -> list[Acquisition]:
        """Who waits for it, its owner first."""
        everybody = [*([] if self.owner is None else [self.owner]), *self.waiters]
        return [acquisition for acquisition in everybody if not acquisition.cancelled]


class Loader:
    """The loads that run. `start`, `take_finished`, `discard` and `check` are for the engine's thread.

    Attributes:
        arrived: set when `take_finished` has something.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        host: HostTier | None,
        block_nbytes: int,
        *,
        clock: Clock,
        wall_clock: Clock = time.time,
        io_threads: int,
        make_buffer: Callable[[], memoryview] | None = None,
    ) -> None:
        """Each source has `io_threads` threads of its own, made when they are needed. `make_buffer`: see `Buffers`."""
        self._host = host
        self._clock = clock
        self._wall_clock = wall_clock
        self._buffers = Buffers(block_nbytes, keep=IDLE_BUFFERS, make=make_buffer)
        self._loading: dict[BlockHash, Load] = {}
        self._running: dict[Load, Future[None]] = {}  # in the order of their start
        self._finished: deque[Load] = deque()
        self._threads = {s.name: DaemonPool(io_threads, f"kvstore-{s.name}") for s in sources}
        self._next_limit = float("inf")  # on the clock; as of the last `start` or `overdue`
        self.arrived = threading.Event()

    def __contains__(self, name: BlockHash) -> bool:
        """Whether this block is on its way."""
        return name in self._loading

    def get(self, name: BlockHash) -> Load | None:
        """The load that brings this block."""
        return self._loading.get(name)

    def start(self, load: Load, find: FindMeta) -> None:
        """Read in the background. `find` tells, afterwards, under which metadata a block is stored there."""
        for meta in load.metas:
            self._loading.setdefault(meta.hash, load)
        load.started = self._clock()
        load.source.pending_blocks += len(load.metas)
        self._running[load] = self._threads[load.source.name].submit(self._run, load, find)
        self._next_limit = min(self._next_limit, load.started + load.limit_s)

    def take_finished(self) -> list[Load]:
        """Loads that ended since the last call, in that order. Give each one's buffers back by `end`."""
        self.arrived.clear()
        loads = []
        while self._finished:
            loads.append(self._finished.popleft())
        for load in loads:
            del self._running[load]
            load.source.pending_blocks -= len(load.metas)
            load.source.stuck -= load.is_stuck
            self._unlist(load)
        return loads

    def find_stuck(self) -> list[Load]:
        """Loads whose tier does not keep the limit, each once. Nobody joins them any more, and others may be started
        for the same blocks; but none of their tier while one of them runs."""
        now = self._clock()
        late = [load for load in self._running if now >= load.started + load.limit_s]
        stuck = [load for load in late if not load.is_stuck]
        for load in stuck:
            load.is_stuck = True
            load.source.stuck += 1
            self._unlist(load)
        return stuck

    def overdue(self) -> list[tuple[Load, Acquisition]]:
        """Who has waited long enough, and for what."""
        now = self._clock()
        late = []
        self._next_limit = min((load.started + load.limit_s for load in self._running), default=float("inf"))
        for load in self._running:
            come = len(load.arrived)
            for each in load.interested:
                give_up_at = each.give_up_at(come)
                if now >= give_up_at:
                    late.append((load, each))
                else:
                    self._next_limit = min(self._next_limit, give_up_at)
        return late

    def wait(self, timeout_s: float) -> None:
        """Sleep until something arrived, somebody has waited long enough, or the timeout."""
        now = self._clock()
        if now < self._next_limit < now + timeout_s:
            timeout_s = self._next_limit - now
        self.arrived.wait(timeout_s)

    def end(self, load: Load) -> None:
        """The bytes of a finished load are not needed any more."""
        buffers, load.buffers = load.buffers, []
        self._buffers.give(buffers)

    def metas(self) -> list[BlockMeta]:
        """Blocks that are on their way."""
        return [meta for load in self._running for meta in load.metas]

    def discard(self, names: set[BlockHash]) -> None:
        """A load of any of these is registered nowhere. On return no thread will write one of them to host any more."""
        for load in self._running:
            if any(meta.hash in names for meta in load.metas):
                with load.lock:
                    load.discarded = True

    def close(self, timeout_s: float) -> list[Load]:
        """End the loads that wait for a thread, and wait for the others; those that did not end in time."""
        for threads in self._threads.values():
            threads.close()
        wait([future for load, future in self._running.items() if not load.is_stuck], timeout_s)
        self._finished.extend(load for load, future in self._running.items() if future.cancelled())
        return [load for load, future in self._running.items() if not future.done()]

    def check(self) -> None:
        """Blocks on their way are filed under their names.

        Raises:
            InvariantError: otherwise.
        """
        for name, load in self._loading.items():
            if load not in self._running or all(meta.hash != name for meta in load.metas):
                raise InvariantError("a block is being loaded under another name, or by a load that has ended")

    def _unlist(self, load: Load) -> None:
        for meta in load.metas:
            if self._loading.get(meta.hash) is load:
                del self._loading[meta.hash]

    def _run(self, load: Load, find: FindMeta) -> None:
        """In an I/O thread: fetch, copy to host, report."""
        try:
            self.fetch(load, find)
        except Exception:
            # Tiers promise not to raise; if one does, the request must not wait for ever.
            logger.exception("load failed", extra={"tier": load.source.name})
        finally:
            self._finished.append(load)
            self.arrived.set()

    def fetch(self, load: Load, find: FindMeta) -> None:
        """In an I/O thread: read piece by piece, until one comes short or late, and copy what came to host."""
        started, first = self._clock(), 0
        load.buffers = self._buffers.take(len(load.metas))
        for limit in load.limits:
            left_s = limit.told_s - (self._clock() - load.started)
            if load.is_stuck or load.discarded or left_s <= 0:
                return
            delivery = self._read_piece(load, slice(first, limit.stop), left_s, started)
            self._keep(load, first, delivery.count, find)
            first += delivery.count
            if first < limit.stop:
                return

    def _read_piece(self, load: Load, piece: slice, left_s: float, started: float) -> Delivery:
        """Read, and note how long all of it has taken and whether the next block is gone."""
        tier = load.source.tier
        was_healthy = tier.stats().healthy
        delivery = tier.read([meta.hash for meta in load.metas[piece]], load.buffers[piece], deadline_s=left_s)
        count, ended = delivery
        if count > 0 or (ended not in _NO_MEASURE and (was_healthy or ended is not MissReason.DEADLINE)):
            load.ms = 1e3 * (self._clock() - started)
        load.is_next_gone = ended is not None and ended.is_gone
        return delivery

    def _keep(self, load: Load, first: int, count: int, find: FindMeta) -> None:
        """Copy what arrived to host, with the longer one of its own lifetime and the reader's."""
        wanted = load.metas[first : first + count]
        lifetime, wall = load.wish.lifetime, self._wall_clock()
        arrived = [arrived_as(find(meta.hash) or meta, lifetime, wall) for meta in wanted]
        with load.lock:
            if self._host is not None and arrived and not load.discarded:
                self._host.write(arrived, load.buffers[first : first + count])
        load.arrived += arrived
