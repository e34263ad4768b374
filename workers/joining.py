"""A router at the door: who it is, and whether it speaks the same protocol.

Covers: the fleet's secret, the first message. Does not cover: what follows (`streams`).
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator

import grpc

from warmkv import versions
from warmkv.v1 import worker_pb2
from workers.router_stream import Context

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0


class Door:
    """Of one worker; `secret` empty: everybody may come. Who is turned away has its call aborted with the reason."""

    def __init__(self, worker: str, secret: str) -> None:
        self._worker = worker
        self._authorization = f"Bearer {secret}".encode() if secret else b""

    async def greeted(
        self, requests: AsyncIterator[worker_pb2.ConnectRequest], context: Context
    ) -> tuple[worker_pb2.RouterHello, int]:
        """The hello of a router that fits, and the protocol version of its stream."""
        hello = await self._first(requests, context)
        version = versions.agreed(hello.protocol_version, hello.newest_protocol_version)
        if version is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self._version_mismatch(hello))
        return hello, version

    async def authenticate(self, context: Context) -> None:
        """Turn away whoever does not know the fleet's secret."""
        presented = dict(context.invocation_metadata() or ()).get("authorization", "")
        token = presented if isinstance(presented, bytes) else presented.encode()
        if self._authorization and not hmac.compare_digest(token, self._authorization):
            logger.warning("caller without the fleet secret was refused", extra={"peer": context.peer()})
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "the bearer token is not this fleet's secret; give router and workers the same fleet_secret",
            )

    async def _first(
        self, requests: AsyncIterator[worker_pb2.ConnectRequest], context: Context
    ) -> worker_pb2.RouterHello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(aiter(requests), None)
        except TimeoutError:
            message = f"no RouterHello came within {HELLO_TIMEOUT_S:g} s; send it as the first message"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message)
        if first is None or first.WhichOneof("kind") != "hello":
            message = "the first message is not a RouterHello; send it before anything else"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
        return first.hello

    def _version_mismatch(self, hello: worker_pb2.RouterHello) -> str:
        theirs = max(hello.protocol_version, hello.newest_protocol_version)
        return (
            f"protocol_version: worker {self._worker} (warmkv {versions.VERSION}) speaks {versions.span()}, "
            f"router {hello.router} (warmkv {hello.package_version}) speaks {hello.protocol_version} to {theirs}; "
            "install warmkv of the same or the next minor version on routers and workers"
        )
