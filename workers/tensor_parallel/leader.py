"""Rank 0 of a worker: the engine that the server talks to. It tells the other ranks what it does, and does it too.

Covers: `workers.protocol.Engine` over the engines of all ranks. What is done goes to the other ranks with the next
step, in the same order; what operators order is carried out on all ranks at once, and answered for all of them. Does
not cover: how ranks agree within a step (`agreement`), their processes (`processes`).

What is told to routers is rank 0's: its events, its snapshot, its times. A block that another rank has lost is a
shorter prefix when it is asked for. Bytes are those of all ranks, which hold equal shares.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from dataclasses import replace

from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError, TierError
from kvstore.events import BlockStored, TierName
from kvstore.lifetime import Lifetime
from kvstore.tier import Clock, TierStats
from workers.engine import TorchEngine
from workers.protocol import CachedBlock, EngineInfo, Job, JobId, Load, StepReport
from workers.tensor_parallel.agreement import TensorParallel
from workers.tensor_parallel.group import RankGroup
from workers.tensor_parallel.lost import RankLost
from workers.tensor_parallel.messages import packed, unpacked
from workers.tensor_parallel.orders import NO_CLEARS, Reply, carry_out
from workers.tensor_parallel.processes import RankProcesses

log = logging.getLogger(__name__)

CLEAR_TIMEOUT_S = 120.0
_POLL_S = 0.01
_END_GRACE_S = 10.0  # beyond the flush: what a rank may take to close its store and end


class LeadingEngine:
    """`workers.protocol.Engine` for a worker of several ranks. Everything but `info` belongs to one thread.

    Attributes:
        info: of the worker; rank 0's hash scheme. cache: the blocks of all ranks. engine: rank 0's own.
        group: its end of the ranks.
    """

    def __init__(
        self,
        engine: TorchEngine,
        group: RankGroup,
        ranks: TensorParallel,
        processes: RankProcesses | None = None,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        """Lead the others, which follow already.

        Args:
            engine: rank 0's, made with `ranks`; closed with this one. processes: of the others; ended with this one.
            clock: the engine's; deadlines of jobs count on it.
        """
        self.engine, self.group, self._ranks, self._processes = engine, group, ranks, processes
        self._commands: list[list[object]] = []  # for the other ranks, with the next message
        self._lost, self._clock = False, clock
        ranks.status = list(NO_CLEARS)
        self.info: EngineInfo = engine.info
        self.cache = LeadingCache(self)

    def submit(self, job: Job) -> None:
        """As `TorchEngine.submit`, on every rank."""
        self._commands.append(["submit", job])
        self.engine.submit(job)

    def cancel(self, job_id: JobId) -> None:
        """As `TorchEngine.cancel`, on every rank."""
        self._commands.append(["cancel", job_id])
        self.engine.cancel(job_id)

    def has_work(self) -> bool:
        """Whether a step would do anything; also idle steps must come, or the other ranks give rank 0 up."""
        return self.engine.has_work()

    def step(self) -> StepReport:
        """One step on every rank.

        Raises:
            RankLost: a rank is gone. Whatever is raised, no step can follow.
        """
        try:
            self._ranks.now = self._clock()
            self._tell(["step", self._ranks.now])
            report = self.engine.step()
        except RankLost as error:
            raise self._lost_for(error) from error
        except BaseException:
            self._lost = True
            raise
        self.info = self.engine.info
        return report

    def wait(self, timeout_s: float) -> None:
        """As `TorchEngine.wait`; what other ranks wait for is seen by the next step."""
        self.engine.wait(timeout_s)

    def load(self) -> Load:
        """Rank 0's, with the bytes of all ranks."""
        load = self.engine.load()
        load.tiers = {
            tier: (_of_all(stats, self.group.size), latency_ms, block_ms)
            for tier, (stats, latency_ms, block_ms) in load.tiers.items()
        }
        return load

    def snapshot(self) -> list[BlockStored]:
        """Rank 0's."""
        return self.engine.snapshot()

    def close(self, *, flush_s: float) -> None:
        """End all jobs and all ranks; each flushes its own store for at most that long."""
        self.cache.end()
        try:
            if not self._lost:
                self._tell(["end", flush_s])
        except RankLost as error:
            log.warning("a rank was gone when the worker ended: %s", self._lost_for(error))
        finally:
            try:
                self.engine.close(flush_s=flush_s)
            finally:
                self.group.close()
                if self._processes is not None:
                    self._processes.end(0.0 if self._lost else flush_s + _END_GRACE_S)

    def tell_later(self, *command: object) -> None:
        """Have the other ranks do something to their caches before the next step."""
        self._commands.append(["cache", *command])

    def order(self, name: str, *arguments: object) -> list[Reply]:
        """Have every rank carry out an order now; what each says, rank 0 first.

        Raises:
            RankLost: a rank is gone.
        """
        try:
            self._tell(["order", name, list(arguments)])
            reply = carry_out(self.engine.cache, name, list(arguments))
            return [Reply(*unpacked(raw)) for raw in self.group.messages_of_all(packed([*reply]))]
        except RankLost as error:
            raise self._lost_for(error) from error
        except BaseException:
            self._lost = True
            raise

    @property
    def agreed_clears(self) -> list[int]:
        """Of clears of the shared tier: how many every rank has ended, and, negated, the most that failed on one."""
        return self._ranks.agreed_status or list(NO_CLEARS)

    def _tell(self, action: list[object]) -> None:
        if self._lost:
            raise RankLost("a rank of this worker was lost before; only a new process can go on")
        commands, self._commands = self._commands, []
        self.group.message_of_first(packed([commands, action]))

    def _lost_for(self, error: RankLost) -> RankLost:
        """What to raise: which ranks have ended, as far as that is what happened."""
        self._lost = True
        ended = [] if self._processes is None else self._processes.ended()
        for each in ended:
            log.critical("a rank of the worker has ended: %s", each)
        return RankLost(f"{'; '.join(ended)}; the worker ends, and a new process can go on" if ended else f"{error}")


class LeadingCache:
    """`workers.protocol.Cache` over the stores of all ranks."""

    def __init__(self, leader: LeadingEngine) -> None:
        self._leader, self._own = leader, leader.engine.cache
        self._clears = 0
        self._ended = False

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> dict[TierName, int]:
        """On every rank; by tier the most blocks that one dropped.

        Raises:
            TierError: a rank could not.
        """
        return _most(_good(self._leader.order("clear", root, prefix)))

    def shared_clearing(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None
    ) -> Callable[[], dict[TierName, int]] | None:
        """As `EngineCache.shared_clearing`. The other ranks begin at once; what is given waits for them, too."""
        self._leader.tell_later("clear_shared", root, prefix)
        own = self._own.shared_clearing(root=root, prefix=prefix)
        self._clears += 1
        number, failed = self._clears, -self._leader.agreed_clears[1]

        def clear() -> dict[TierName, int]:
            dropped = {} if own is None else own()
            self._await_others(number, failed)
            return dropped

        return clear

    def shared_cleared(self) -> None:
        """What `shared_clearing` gave has ended."""
        self._leader.tell_later("shared_cleared")
        self._own.shared_cleared()

    def hold_peers(self, key: Hashable, for_s: float) -> None:
        """On every rank, before the next clear."""
        self._leader.tell_later("hold_peers", key, for_s)
        self._own.hold_peers(key, for_s)

    def release_peers(self, key: Hashable) -> None:
        """On every rank."""
        self._leader.tell_later("release_peers", key)
        self._own.release_peers(key)

    def promise_broken(self, address: str, ticket: BlockHash) -> None:
        """On every rank."""
        self._leader.tell_later("promise_broken", address, ticket)
        self._own.promise_broken(address, ticket)

    def list_blocks(
        self, *, root: BlockHash | None, prefix: BlockHash | None, after: BlockHash | None, limit: int
    ) -> list[CachedBlock]:
        """Rank 0's."""
        return self._own.list_blocks(root=root, prefix=prefix, after=after, limit=limit)

    def prefetch(self, hashes: Items[BlockHash], *, root: BlockHash, lifetime: Lifetime | None) -> int:
        """On every rank; the fewest blocks that are on their way on one."""
        replies = _good(self._leader.order("prefetch", list(hashes), root, lifetime))
        return min(reply.counts.get("", 0) for reply in replies)

    def lease(self, hashes: Items[BlockHash], for_s: float | None) -> dict[TierName, int]:
        """On every rank; by tier the fewest that one promised."""
        return _fewest(_good(self._leader.order("lease", list(hashes), for_s)))

    def end_leases(self, hashes: Items[BlockHash]) -> dict[TierName, int]:
        """On every rank; by tier the most that one ended."""
        return _most(_good(self._leader.order("end_leases", list(hashes))))

    def where(self, hashes: Items[BlockHash]) -> list[tuple[TierName, ...]]:
        """Rank 0's, as its events are."""
        return self._own.where(hashes)

    def check(self) -> None:
        """Audit the stores of all ranks. Raises InvariantError: says which ranks' books are wrong, and how."""
        replies = self._leader.order("check")
        wrong = [f"rank {rank}: {reply.error}" for rank, reply in enumerate(replies) if reply.error]
        if wrong:
            raise InvariantError("; ".join(wrong))

    def set_shared_reads(self, *, enabled: bool) -> None:
        """On every rank from the next step on."""
        self._leader.tell_later("set_shared_reads", enabled)
        self._own.set_shared_reads(enabled=enabled)

    def owes_peers(self) -> bool:
        """Whether one rank does."""
        return any(reply.counts.get("", 0) for reply in _good(self._leader.order("owes_peers")))

    def share_running(self) -> bool:
        """On every rank; whether all of it is there on all of them."""
        return all(reply.counts.get("", 0) for reply in _good(self._leader.order("share_running")))

    def end(self) -> None:
        """The engine ends: nobody need wait for other ranks any more."""
        self._ended = True

    def _await_others(self, number: int, failed: int) -> None:
        """Until the steps, in another thread, have heard that every rank has cleared its share."""
        give_up = time.monotonic() + CLEAR_TIMEOUT_S
        while self._leader.agreed_clears[0] < number:
            if self._ended or time.monotonic() > give_up:
                raise TierError("another rank of the worker did not clear its share in time; clear again")
            time.sleep(_POLL_S)
        if -self._leader.agreed_clears[1] > failed:
            raise TierError("another rank of the worker could not clear its share, its log says why; clear again")


def _good(replies: list[Reply]) -> list[Reply]:
    """The replies.

    Raises:
        TierError: of one rank or more, an error.
    """
    wrong = [f"rank {rank}: {reply.error}" for rank, reply in enumerate(replies) if reply.error]
    if wrong:
        raise TierError("; ".join(wrong))
    return replies


def _most(replies: list[Reply]) -> dict[TierName, int]:
    names = sorted({name for reply in replies for name in reply.counts})
    return {TierName(name): max(reply.counts.get(name, 0) for reply in replies) for name in names}


def _fewest(replies: list[Reply]) -> dict[TierName, int]:
    names = sorted({name for reply in replies for name in reply.counts})
    return {TierName(name): min(reply.counts.get(name, 0) for reply in replies) for name in names}


def _of_all(stats: TierStats, size: int) -> TierStats:
    return replace(
        stats,
        used_bytes=stats.used_bytes * size,
        capacity_bytes=stats.capacity_bytes * size,
        read_bytes=stats.read_bytes * size,
        written_bytes=stats.written_bytes * size,
    )
