"""Reads of the backs of prefixes, one thread for each slow tier, and what becomes of the blocks that come.

Each piece is read like any load: into memory of its own, copied to host by the thread, and put into device blocks by
`pump`, which names and references them for the tail, on a GPU when they have been copied beside the steps. It takes no
room that the front before it needs: with too little of it the tail ends. Nobody else waits for these reads, and whoever
wants the same blocks reads them, too; what is there twice is put into the device once.

A tail teaches its tier's estimate once, when it has ended: what one of its pieces took, in the mean, as each of them is
a read. It is no load in the score of loads against computing: no request waited for it.

Covers: starting, reading, ending. Does not cover: what its owner sees (`tail`), putting blocks into the device
(`tail_landing`), the choice (`meeting`). For the engine's thread, but for what the threads run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from kvstore.acquisition import Acquisition, Wish
from kvstore.blocks import BlockHash
from kvstore.daemon_pool import DaemonPool
from kvstore.device import DeviceTier
from kvstore.errors import InvariantError
from kvstore.loading import Load, Loader
from kvstore.meeting import is_worthwhile, meeting
from kvstore.patience import PIECE_NBYTES
from kvstore.slow_reads import SlowReads
from kvstore.source import Source
from kvstore.tail import Pace, Tail
from kvstore.tail_landing import OnLanded, TailLandings
from kvstore.tier import BlockMeta, Clock

PIECES = 32  # it is cut into so many: what both ends do twice where they meet is a part of one ...
LATENCIES = 8  # ... unless a piece were read in less than so many times the latency of a read

logger = logging.getLogger(__name__)

OnRead = Callable[[Source, list[BlockMeta], int, bool], None]


@dataclass(slots=True, eq=False)
class _Run:
    """A tail that is being read. `pending`: blocks of it that others count with. `loads`: those that have come."""

    tail: Tail
    pending: int
    future: Future[None] | None = None
    loads: list[Load] = field(default_factory=list)
    is_stuck: bool = False


class Tails:
    """The tails of a store.

    Attributes:
        landings: their pieces that are being copied.
    """

    def __init__(
        self,
        device: DeviceTier,
        reads: SlowReads,
        loader: Loader,
        sources: Sequence[Source],
        *,
        clock: Clock,
        reserve: int,
        on_read: OnRead,
        on_landed: OnLanded,
    ) -> None:
        """`reserve`: device blocks that are left free. `on_read`: see `Promoter`. `on_landed`: hears what came."""
        self._device, self._reads, self._loader, self._clock = device, reads, loader, clock
        self._sources, self._reserve = sources, reserve
        self._on_read = on_read
        self.landings = TailLandings(device, end=loader.end, on_landed=on_landed)
        self._threads = {source.name: DaemonPool(1, f"kvstore-{source.name}-tail") for source in sources}
        self._most = max(1, PIECE_NBYTES // device.block_nbytes)
        self._runs: list[_Run] = []

    def start(self, acquisition: Acquisition) -> Tail | None:
        """Begin to load what comes next of an acquisition from its back; None: that is not worthwhile.

        Not where blocks further back are near, or on their way: then what is between is loaded as ever.
        """
        wish, first, names = acquisition.wish, acquisition.position, acquisition.rest
        if self._reads.closed or not wish.reads.device or len(names) > self._device.available - self._reserve:
            return None
        found = [plan for source in self._sources if (plan := self._plan(source, wish, first, names)) is not None]
        if not found or len(self._reads.unheld(wish, names)) < len(names):
            return None
        _, source, count, meets, pace = min(found, key=lambda plan: plan[0])
        metas = self._reads.metas(wish, first, count, acquisition)
        tail = Tail(source, wish, first, metas, pace, clock=self._clock, give_back=self._device.release)
        run = _Run(tail, count - meets)
        source.pending_blocks += run.pending
        self._runs.append(run)
        run.future = self._threads[source.name].submit(self._read, tail)
        return tail

    def pump(self) -> None:
        """Put what has come into the device, and end what has ended."""
        self.landings.pump()
        for run in list(self._runs):
            has_ended = run.future is None or run.future.done()
            while run.tail.finished:
                self._settle(run, run.tail.finished.popleft())
            if has_ended:
                self._end(run)
            elif run.tail.is_late() and not run.is_stuck:
                self._expect_no_more(run)

    def metas(self) -> list[BlockMeta]:
        """Blocks that are, or will be, on their way."""
        return [meta for tail in self._bringing() for meta in tail.metas]

    def discard(self, names: set[BlockHash]) -> None:
        """A tail that brings one of these brings nothing any more. On return none is written to host."""
        for tail in self._bringing():
            if tail.brings(names):
                tail.discard()

    def close(self, timeout_s: float) -> None:
        """End all of them, and wait for reads and copies that run."""
        for tail in self._bringing():
            tail.discard()
        for threads in self._threads.values():
            threads.close()
        wait([run.future for run in self._runs if run.future is not None and not run.is_stuck], timeout_s)
        self.pump()
        self.landings.finish()

    def check(self) -> None:
        """Audit what tails hold.

        Raises:
            InvariantError: a block of one is free, or one that nobody wants holds some, or see `TailLandings.check`.
        """
        self.landings.check()
        for tail in self._bringing():
            held = tail.block_ids
            if any(self._device.refs(block) == 0 for block in held):
                raise InvariantError("a tail holds a block that is free")
            if tail.cancelled and held:
                raise InvariantError("a tail that was given up holds blocks")

    def _bringing(self) -> list[Tail]:
        """Those that are being read or copied, each once."""
        return list(dict.fromkeys([*(run.tail for run in self._runs), *self.landings.tails]))

    def _plan(
        self, source: Source, wish: Wish, first: int, names: Sequence[BlockHash]
    ) -> tuple[float, Source, int, int, Pace] | None:
        """How long it takes, from this tier, how many blocks, how many of them are computed, the pace; None: not so."""
        if source.stuck or not source.estimate.measured or not wish.reads.allows(source.name):
            return None
        if source.pending_blocks:  # others wait for this tier, and will compute, too: the front would not be alone
            return None
        count = source.reach(names[: source.known(names)])
        if count == 0 or wish.price(first, count) is None:
            return None
        nbytes, fit = self._device.block_nbytes, source.estimate
        block_ms = fit.ms_per(nbytes)
        least = math.ceil(LATENCIES * fit.latency_ms / block_ms) if block_ms else count
        piece = max(1, min(self._most, count, max(least, count // PIECES)))
        queued_ms = source.pending_blocks * block_ms
        pace = Pace(piece, block_ms + fit.latency_ms / piece, queued_ms)

        def compute_ms(blocks: int) -> float:
            return (wish.price(first, blocks) or 0.0) if blocks else 0.0

        meets = meeting(count, compute_ms=compute_ms, load_ms=pace.load_ms)
        all_ms = queued_ms + fit.latency_ms + count * block_ms
        if not is_worthwhile(count, meets, compute_ms=compute_ms, load_ms=pace.load_ms, all_ms=all_ms):
            return None
        return max(compute_ms(meets), pace.load_ms(count - meets)), source, count, meets, pace

    def _read(self, tail: Tail) -> None:
        """In a thread: piece by piece from the back, until the front is met, or one comes short or late."""
        while (load := tail.next_piece()) is not None:
            try:
                self._loader.fetch(load, self._reads.find(load.source.name))
            except Exception:
                # Tiers promise not to raise; if one does, the front computes what is missing.
                logger.exception("load failed", extra={"tier": load.source.name})
            tail.add_piece(load)
            self._loader.arrived.set()
            if load.is_short:
                return

    def _settle(self, run: _Run, load: Load) -> None:
        tail = run.tail
        if not load.discarded:
            self._on_read(load.source, load.metas, len(load.arrived), load.is_next_gone)
        run.loads.append(load)
        passed = tail.has_come(load)
        if load.discarded or tail.cancelled or passed >= len(load.arrived):
            self._loader.end(load)
        elif load.first + len(load.arrived) - tail.floor > self._device.available - self._reserve:
            tail.has_ended = True  # what the front needs before it comes there goes first
            self._loader.end(load)
        else:
            self.landings.start(tail, load, passed)

    def _expect_no_more(self, run: _Run) -> None:
        """The tier does not keep the limit: nothing else is asked of it before it answers."""
        tail, load = run.tail, run.tail.current
        tail.has_ended = run.is_stuck = True
        tail.source.stuck += 1
        if load is not None:
            tail.source.gave_up(len(load.metas), 1e3 * (self._clock() - load.started), None)

    def _end(self, run: _Run) -> None:
        source = run.tail.source
        run.tail.has_ended = True
        self._runs.remove(run)
        source.pending_blocks -= run.pending
        source.stuck -= run.is_stuck
        read = [(len(load.arrived), load.ms) for load in run.loads if load.ms is not None]
        if read and not run.is_stuck:
            blocks, ms = sum(count for count, _ in read), sum(took for _, took in read)
            source.observe(round(blocks / len(read)), ms / len(read))
