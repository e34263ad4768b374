"""One router's stream: reads what it asks, writes what its outbox holds. Lives on the server's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from kvstore.tier import Clock
from warmkv.v1 import worker_pb2
from workers.outbox import Outbox

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 10.0  # a router that stays slow fills no log

Context = grpc.aio.ServicerContext[worker_pb2.ConnectRequest, worker_pb2.ConnectResponse]


@dataclass(frozen=True, slots=True)
class Status:
    """How a stream ends: a gRPC code and a message that says what to do."""

    code: grpc.StatusCode
    message: str


class ProtocolViolation(Exception):
    """The router broke a rule of the stream; it ends with `status`."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.status = Status(grpc.StatusCode.INVALID_ARGUMENT, message)


class RouterStream:
    """One connected router.

    Attributes:
        number: unique in this server's life. router: its name. outbox: what it must still be told; call `wake` after
        adding to it. jobs: those of its numbers that have not ended.
    """

    def __init__(self, number: int, router: str, outbox: Outbox, clock: Clock) -> None:
        self.number = number
        self.router = router
        self.outbox = outbox
        self.jobs: set[int] = set()
        self._clock = clock
        self._changed = asyncio.Event()
        self._ending: Status | None = None
        self._router_left = False
        self._overflows = 0
        self._reported_at = float("-inf")

    def wake(self) -> None:
        """Look into the outbox again."""
        self._changed.set()

    def end(self, status: Status) -> None:
        """Send what is in the outbox, then end with this status."""
        self._ending = status
        self._changed.set()

    async def run(
        self,
        requests: AsyncIterable[worker_pb2.ConnectRequest],
        context: Context,
        *,
        handle: Callable[[worker_pb2.ConnectRequest], None],
        left: Callable[[], None],
        ask_snapshot: Callable[[], None],
    ) -> None:
        """Until the router leaves or `end` is called. `left` is called as soon as the router sends no more."""
        reader = asyncio.create_task(self._read(requests, handle, left))
        try:
            await self._write(context, ask_snapshot)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterable[worker_pb2.ConnectRequest],
        handle: Callable[[worker_pb2.ConnectRequest], None],
        left: Callable[[], None],
    ) -> None:
        try:
            async for request in requests:
                if self._ending is None:
                    self._handle(request, handle)
        except grpc.aio.BaseError as error:  # this stream was ended from our side
            logger.debug("stream ended while reading: %s", error, extra={"router": self.router})
        finally:
            self._router_left = True
            self._changed.set()
            left()

    def _handle(self, request: worker_pb2.ConnectRequest, handle: Callable[[worker_pb2.ConnectRequest], None]) -> None:
        try:
            handle(request)
        except ProtocolViolation as violation:
            logger.warning("router broke the protocol: %s", violation, extra={"router": self.router})
            self.end(violation.status)
        except Exception:
            logger.exception("message of a router could not be handled", extra={"router": self.router})
            message = "the worker could not handle a message; its log says why. Connect again"
            self.end(Status(grpc.StatusCode.INTERNAL, message))

    async def _write(self, context: Context, ask_snapshot: Callable[[], None]) -> None:
        while True:
            now = self._clock()
            message = self.outbox.pop(now)
            if self.outbox.wants_snapshot(now):
                self._report_overflow(now)
                self.outbox.snapshot_asked(now)
                ask_snapshot()
            if message is not None:
                await context.write(message)
            elif self._ending is not None:
                await context.abort(self._ending.code, self._ending.message)
            elif self._router_left:
                return
            else:
                await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        # Nothing ran between the look into the outbox and this line, so no wake is lost.
        self._changed.clear()
        wake_at = self.outbox.wake_at()
        timer: asyncio.TimerHandle | None = None
        if wake_at is not None:
            pause = max(0.0, wake_at - self._clock())
            timer = asyncio.get_running_loop().call_later(pause, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _report_overflow(self, now: float) -> None:
        if self.outbox.overflows > self._overflows and now >= self._reported_at + REPORT_INTERVAL_S:
            self._overflows, self._reported_at = self.outbox.overflows, now
            facts = {"router": self.router, "overflows": self._overflows}
            logger.warning("router read too slowly and was sent a new snapshot", extra=facts)
