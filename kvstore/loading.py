"""Reads of slow tiers: one load each, run by an I/O thread of that tier, so that a stalled one delays no other.

Covers: what a load is, fetching its bytes, copying them to host. Does not cover: which load to start and where its
blocks go (`promotion`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from kvstore.acquisition import Acquisition, Wish
from kvstore.blocks import BlockHash
from kvstore.buffers import Buffers
from kvstore.errors import InvariantError
from kvstore.host.tier import HostTier
from kvstore.source import Source
from kvstore.tier import BlockMeta, Clock, prolonged

MIN_DEADLINE_S = 0.02  # below this, the scheduler's jitter decides
MAX_DEADLINE_S = 10.0  # while nobody knows what computing would take
GRACE_S = 0.05  # a tier ends its reads at the deadline by itself; one that does not is given up this much later
IDLE_BUFFERS = 64

logger = logging.getLogger(__name__)

FindMeta = Callable[[BlockHash], BlockMeta | None]


@dataclass(slots=True, eq=False)
class Load:
    """One read of a slow tier.

    Attributes:
        source: the tier. metas: what is read. wish: whose. first: position of the first block in the wish.
        owner: who waits for it; None: a prefetch, which ends in host. waiters: others that want the same blocks.
        deadline_s: how long the read may take. started: when it was asked for, on the clock.
        budget: of a prefetch, blocks that it may go on to fetch when these have come.
        buffers: where the bytes are. arrived: blocks that are whole, under the metadata that they were stored with;
        both set by the I/O thread, valid once the load is finished.
        ms: how long it took; None: the tier was not asked. ended_absent: the next block is not in the tier.
        discarded: cleared meanwhile: nothing of it may be registered. Guarded by `lock`.
        is_stuck: its tier does not keep the deadline, and nobody joins it any more.
    """

    source: Source
    metas: list[BlockMeta]
    wish: Wish
    first: int
    owner: Acquisition | None
    deadline_s: float
    budget: int = 0
    started: float = 0.0
    waiters: list[Acquisition] = field(default_factory=list)
    buffers: list[memoryview] = field(default_factory=list)
    arrived: list[BlockMeta] = field(default_factory=list)
    ms: float | None = None
    ended_absent: bool = False
    discarded: bool = False
    is_stuck: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_short(self) -> bool:
        """Whether less came than was asked for."""
        return len(self.arrived) < len(self.metas)

    def leave(self, acquisition: Acquisition) -> None:
        """It does not wait for this any more."""
        self.owner = None if acquisition is self.owner else self.owner
        self.waiters = [waiter for waiter in self.waiters if waiter is not acquisition]

    @property
    def interested(self) -> list[Acquisition]:
        """Who waits for it, its owner first."""
        everybody = [*([] if self.owner is None else [self.owner]), *self.waiters]
        return [acquisition for acquisition in everybody if not acquisition.cancelled]


def deadline_s(compute_ms: float | None) -> float:
    """How long a load may take: no longer than computing (None: not measured)."""
    return MAX_DEADLINE_S if compute_ms is None else min(MAX_DEADLINE_S, max(MIN_DEADLINE_S, compute_ms / 1e3))


class Loader:
    """The loads that run. `start`, `take_finished`, `discard` and `check` are for the engine's thread.

    Attributes:
        arrived: set when `take_finished` has something.
    """

    def __init__(
        self, sources: Sequence[Source], host: HostTier | None, block_nbytes: int, *, clock: Clock, io_threads: int
    ) -> None:
        """Each source has `io_threads` threads of its own, made when they are needed."""
        self._host = host
        self._clock = clock
        self._buffers = Buffers(block_nbytes, keep=IDLE_BUFFERS)
        self._loading: dict[BlockHash, Load] = {}
        self._running: dict[Load, Future[None]] = {}  # in the order of their start
        self._finished: deque[Load] = deque()
        self._threads = {s.name: ThreadPoolExecutor(io_threads, f"kvstore-{s.name}") for s in sources}
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
        """Loads whose tier does not keep the deadline, each once. Nobody joins them any more, and others may be started
        for the same blocks; but none of their tier while one of them runs."""
        now = self._clock()
        late = [load for load in self._running if now >= load.started + load.deadline_s + GRACE_S]
        stuck = [load for load in late if not load.is_stuck]
        for load in stuck:
            load.is_stuck = True
            load.source.stuck += 1
            self._unlist(load)
        return stuck

    def overdue(self) -> list[tuple[Load, Acquisition]]:
        """Who has waited long enough, and for what."""
        now = self._clock()
        return [(load, each) for load in self._running for each in load.interested if now >= each.give_up_at]

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
            threads.shutdown(wait=False, cancel_futures=True)
        wait(self._running.values(), timeout_s)
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
            arrived = [] if load.is_stuck else self._fetch(load, find)
            with load.lock:
                if self._host is not None and arrived and not load.discarded:
                    self._host.write(arrived, load.buffers[: len(arrived)])
            load.arrived = arrived
        except Exception:
            # Tiers promise not to raise; if one does, the request must not wait for ever.
            logger.exception("load failed", extra={"tier": load.source.name})
        finally:
            self._finished.append(load)
            self.arrived.set()

    def _fetch(self, load: Load, find: FindMeta) -> list[BlockMeta]:
        """Read; what arrived, with the longer one of its own lifetime and the reader's."""
        tier = load.source.tier
        load.buffers = self._buffers.take(len(load.metas))
        was_healthy, started = tier.stats().healthy, self._clock()
        count = tier.read([meta.hash for meta in load.metas], load.buffers, deadline_s=load.deadline_s)
        took_s = self._clock() - started
        if count > 0 or was_healthy:  # else the breaker may have answered, which says nothing of reads
            load.ms = 1e3 * took_s
        is_late = took_s >= load.deadline_s
        load.ended_absent = count < len(load.metas) and not is_late and was_healthy and tier.stats().healthy
        stored = [find(meta.hash) or meta for meta in load.metas[:count]]
        return [prolonged(own, load.wish.lifetime) for own in stored]
