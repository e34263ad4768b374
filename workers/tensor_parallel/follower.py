"""Ranks 1 and above: an engine that does what rank 0 says, in the same order, and tells nobody but the other ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kvstore.events import TierName
from workers.engine import TorchEngine
from workers.tensor_parallel.agreement import TensorParallel
from workers.tensor_parallel.group import RankGroup
from workers.tensor_parallel.messages import packed, unpacked
from workers.tensor_parallel.orders import carry_out

log = logging.getLogger(__name__)


class Follower:
    """One rank's end of what `leader` says."""

    def __init__(self, engine: TorchEngine, group: RankGroup, ranks: TensorParallel) -> None:
        """Follow with an engine that was made with `ranks`."""
        self._engine, self._group, self._ranks = engine, group, ranks
        self._cleared = self._failed = 0  # clears of this rank's share of the shared tier
        self._clears: list[Future[dict[TierName, int]]] = []
        self._clearing = ThreadPoolExecutor(1, thread_name_prefix="rank-clear")

    def run(self) -> None:
        """Until rank 0 ends the worker. The engine is closed then.

        Raises:
            RankLost: another rank is gone.
        """
        try:
            while self.turn():
                pass
        finally:
            self._clearing.shutdown(wait=False, cancel_futures=True)

    def turn(self) -> bool:
        """One message of rank 0; whether another may follow."""
        commands, action = unpacked(self._group.message_of_first())
        for command, *arguments in commands:
            self._do(command, arguments)
        match action:
            case ["step", now]:
                self._step(now)
            case ["order", name, arguments]:
                reply = carry_out(self._engine.cache, name, arguments)
                self._group.messages_of_all(packed([*reply]))
            case ["end", flush_s]:
                self._engine.close(flush_s=flush_s)
                return False
        return True

    def _step(self, now: float) -> None:
        for done in [each for each in self._clears if each.done()]:
            self._clears.remove(done)
            self._cleared += 1
            if (error := done.exception()) is not None:
                self._failed += 1
                log.error("rank %d could not clear the shared tier", self._group.rank, exc_info=error)
        self._ranks.now, self._ranks.status = now, [self._cleared, -self._failed]
        self._engine.step()

    def _do(self, command: str, arguments: list[Any]) -> None:
        match command, arguments:
            case "submit", [job]:
                self._engine.submit(job)
            case "cancel", [job_id]:
                self._engine.cancel(job_id)
            case "cache", ["set_shared_reads", enabled]:
                self._engine.cache.set_shared_reads(enabled=enabled)
            case "cache", ["shared_cleared"]:
                self._engine.cache.shared_cleared()
            case "cache", ["hold_peers", key, for_s]:
                self._engine.cache.hold_peers(key, for_s)
            case "cache", ["release_peers", key]:
                self._engine.cache.release_peers(key)
            case "cache", ["promise_broken", address, ticket]:
                self._engine.cache.promise_broken(address, ticket)
            case "cache", ["clear_shared", root, prefix]:
                self._clear_shared(self._engine.cache.shared_clearing(root=root, prefix=prefix))

    def _clear_shared(self, clearing: Callable[[], dict[TierName, int]] | None) -> None:
        self._clears.append(self._clearing.submit(clearing or dict))
