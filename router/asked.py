"""What one worker was asked beside jobs, and waits to be answered: clears, operators' orders, probes.

Covers: numbering, which answer belongs to what, what is asked again after a loss (clears) and what is not (the rest).
Does not cover: what any of them means, when to ask (`fleet_clears`, `cache_orders`, `self_audit`). Owned by the event
loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from warmkv.v1 import worker_pb2


@dataclass(slots=True)
class _Clearing:
    request: worker_pb2.Clear
    done: asyncio.Future[worker_pb2.ClearDone] = field(repr=False)


class Asked:
    """`send` is called with each message; `ids` numbers them."""

    def __init__(self, ids: Iterator[int], send: Callable[[worker_pb2.ConnectRequest], None]) -> None:
        self._ids, self._send = ids, send
        self._clears: dict[int, _Clearing] = {}
        self._orders: dict[int, asyncio.Future[worker_pb2.CacheDone]] = {}
        self._probes: dict[int, Callable[[worker_pb2.Probed], None]] = {}

    # Clears: owed until they are answered

    @property
    def owes_clear(self) -> bool:
        """Whether it may hold blocks of its own that were cleared."""
        return bool(self._clears) and any(not owed.request.shared_tier for owed in self._clears.values())

    def clear(self, request: worker_pb2.Clear, *, is_connected: bool) -> asyncio.Future[worker_pb2.ClearDone]:
        """Note it, and send it where somebody can hear it; its answer."""
        clearing = _Clearing(worker_pb2.Clear(), asyncio.get_running_loop().create_future())
        clearing.request.CopyFrom(request)
        clearing.request.clear_id = next(self._ids)
        self._clears[clearing.request.clear_id] = clearing
        if is_connected:
            self._send(worker_pb2.ConnectRequest(clear=clearing.request))
        return clearing.done

    def clear_again(self) -> None:
        """It said hello: send all that it owes."""
        for owed in self._clears.values():
            self._send(worker_pb2.ConnectRequest(clear=owed.request))

    def cleared(self, done: worker_pb2.ClearDone) -> None:
        """It answered a clear."""
        clearing = self._clears.pop(done.clear_id, None)
        if clearing is not None and not clearing.done.done():
            clearing.done.set_result(done)

    # Orders: failed when it is lost

    def order(self, command: worker_pb2.CacheCommand) -> asyncio.Future[worker_pb2.CacheDone]:
        """Send an order, whose id this fills in; its answer, with `error` set when it will not come."""
        command.command_id = next(self._ids)
        done: asyncio.Future[worker_pb2.CacheDone] = asyncio.get_running_loop().create_future()
        self._orders[command.command_id] = done
        done.add_done_callback(lambda _: self._orders.pop(command.command_id, None))
        self._send(worker_pb2.ConnectRequest(cache=command))
        return done

    def ordered(self, done: worker_pb2.CacheDone) -> None:
        """It answered an order."""
        waiting = self._orders.get(done.command_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(done)

    def fail_orders(self, error: str) -> None:
        """Their answers will not come."""
        for command_id in list(self._orders):
            self.ordered(worker_pb2.CacheDone(command_id=command_id, error=error))

    # Probes: forgotten when they are lost

    def probe(self, names: Sequence[bytes], answered: Callable[[worker_pb2.Probed], None]) -> None:
        """Ask where blocks lie (names of 32 bytes). One at a time: who asks again has given up the one before."""
        number = next(self._ids)
        self._probes = {number: answered}
        self._send(worker_pb2.ConnectRequest(probe=worker_pb2.Probe(probe_id=number, hashes=b"".join(names))))

    def probed(self, answer: worker_pb2.Probed, *, is_usable: bool) -> None:
        """It answered a probe; hand that on where it says something."""
        answered = self._probes.pop(answer.probe_id, None)
        if answered is not None and is_usable:
            answered(answer)

    def forget_probes(self) -> None:
        """Their answers will not come."""
        self._probes.clear()
