"""One gRPC stream to one worker, from its opening to its end: a transport, used once.

Covers: the channel and its options, the first messages, reading, writing, breaking off. Does not cover: what messages
mean (`link`) or when to try again (`link`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from warmkv import versions
from warmkv.v1 import worker_pb2, worker_pb2_grpc

_HELLO_TIMEOUT_S = 5.0
_LAST_WORD_S = 1.0
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Else a new channel would inherit the waiting time that a dead worker's address has earned.
    ("grpc.use_local_subchannel_pool", 1),
)

_Call = grpc.aio.StreamStreamCall[worker_pb2.ConnectRequest, worker_pb2.ConnectResponse]
Heard = Callable[[worker_pb2.ConnectResponse], None]


class LinkBroken(Exception):
    """The stream is over; the message says why."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What every link of a router has in common. `credentials` None: plaintext."""

    router: str
    version: str
    fleet_secret: str
    credentials: grpc.ChannelCredentials | None = None


def _nobody_asks() -> None:
    return


class WorkerStream:
    """See the module. Make it on the event loop, `run` it once."""

    def __init__(self, address: str, settings: LinkSettings) -> None:
        self._address = address
        self._settings = settings
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._outgoing: asyncio.Queue[tuple[worker_pb2.ConnectRequest, Callable[[], None]]] = asyncio.Queue()
        hello = worker_pb2.RouterHello(
            protocol_version=versions.OLDEST,
            newest_protocol_version=versions.NEWEST,
            package_version=settings.version,
            router=settings.router,
        )
        self.send(worker_pb2.ConnectRequest(hello=hello))

    def send(self, request: worker_pb2.ConnectRequest, on_leaving: Callable[[], None] = _nobody_asks) -> None:
        """Queue a message; messages keep their order.

        `on_leaving` is called before its first byte may leave; if the stream ends without, the worker never had it.
        """
        self._outgoing.put_nowait((request, on_leaving))

    def break_off(self, why: str) -> None:
        """End `run` with LinkBroken."""
        if not self._broken.done():
            self._broken.set_result(why)

    async def run(self, greeted: Heard, heard: Heard) -> None:
        """Open it, hand the hello to `greeted` and every later message to `heard`, until it ends.

        Raises:
            LinkBroken, grpc.RpcError, OSError: how it ended; never returns otherwise. And what the two raise.
        """
        async with self._channel() as channel:
            metadata = (("authorization", f"Bearer {self._settings.fleet_secret}"),)
            call = worker_pb2_grpc.WorkerServiceStub(channel).Connect(metadata=metadata)
            reader = asyncio.ensure_future(self._read(call, greeted, heard))
            writer = asyncio.ensure_future(self._write(call))
            try:
                ends: list[asyncio.Future[Any]] = [reader, writer, self._broken]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                await self._raise_end(reader, writer)
            finally:
                reader.cancel()
                writer.cancel()
                await asyncio.gather(reader, writer, return_exceptions=True)
                call.cancel()

    async def _raise_end(self, reader: asyncio.Future[None], writer: asyncio.Future[None]) -> None:
        if self._broken.done():
            raise LinkBroken(self._broken.result())
        # A failed write knows only that the stream is over; the reader is about to hear why.
        await asyncio.wait({reader}, timeout=_LAST_WORD_S)
        for task in (reader, writer):
            if task.done():
                task.result()
        raise LinkBroken("it closed the stream")

    async def _read(self, call: _Call, greeted: Heard, heard: Heard) -> None:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await call.read()
        except TimeoutError as error:
            raise LinkBroken(f"no hello from {self._address} within {_HELLO_TIMEOUT_S:.0f} s") from error
        if not isinstance(first, worker_pb2.ConnectResponse) or first.WhichOneof("kind") != "hello":
            raise LinkBroken("it closed the stream without a hello")
        greeted(first)
        while isinstance(message := await call.read(), worker_pb2.ConnectResponse):
            heard(message)

    async def _write(self, call: _Call) -> None:
        while True:
            request, on_leaving = await self._outgoing.get()
            if not call.done():
                on_leaving()
            await call.write(request)

    def _channel(self) -> grpc.aio.Channel:
        if self._settings.credentials is None:
            return grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self._address, self._settings.credentials, options=_CHANNEL_OPTIONS)
