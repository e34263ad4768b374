"""The wire contract of the release before, as its own message classes, and a wire on which only that is understood."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

RELEASED = Path(__file__).parent.parent / "proto" / "released" / "0.1.binpb"
PROTOCOL_VERSION = 2  # what that release speaks, and nothing else
CONNECT = "/warmkv.v1.WorkerService/Connect"


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(RELEASED.read_bytes()).file:
        pool.Add(file)
    return pool


def released(name: str) -> type[Message]:
    """The message class as it was; `name` without the package."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"warmkv.v1.{name}"))


class OldWire:
    """Stands between a router and a worker and passes on what the last release understands of their messages.

    To the router it is a worker of that release, to the worker a router of it: what is newer is lost on the way.

    Attributes:
        refused: protocol versions of routers that such a worker would have turned away.
    """

    def __init__(self, worker_address: str) -> None:
        self._worker_address = worker_address
        self.refused: list[int] = []

    async def start(self) -> str:
        self._server = grpc.aio.server()
        handler = grpc.stream_stream_rpc_method_handler(self._connect)
        handlers = {"Connect": handler}
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("warmkv.v1.WorkerService", handlers)]
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self._server.stop(None)

    async def _connect(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async with grpc.aio.insecure_channel(self._worker_address) as channel:
            call = channel.stream_stream(CONNECT)(metadata=tuple(context.invocation_metadata()))
            down = asyncio.create_task(self._down(requests, call, context))
            try:
                while (answer := await call.read()) is not grpc.aio.EOF:
                    await context.write(self._old("ConnectResponse", answer))
            finally:
                down.cancel()
                await asyncio.gather(down, return_exceptions=True)

    async def _down(self, requests: AsyncIterator[bytes], call: Any, context: Any) -> None:
        first = True
        async for request in requests:
            old = self._old("ConnectRequest", request)
            if first:
                said = released("ConnectRequest").FromString(old).hello.protocol_version  # type: ignore[attr-defined]
                if said != PROTOCOL_VERSION:
                    self.refused.append(said)
                    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"protocol_version {said}")
            first = False
            await call.write(old)
        await call.done_writing()

    def _old(self, name: str, message: bytes) -> bytes:
        parsed = released(name).FromString(message)
        parsed.DiscardUnknownFields()
        return parsed.SerializeToString()
