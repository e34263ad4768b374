"""Clients of a router under test: HTTP for the peers, the project's own gRPC client for its own router."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from bench.peers.mock_worker import MODEL
from bench.peers.prompts import Prompt
from warmkv.client import AsyncClient, Retry, WarmkvError

TIMEOUT_S = 30.0


class CallFailed(RuntimeError):
    """A router gave no answer; the message says what came instead."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client sees of an answer."""

    prompt_tokens: int
    cached_tokens: int


class Caller(Protocol):
    """One client program with as many connections as it needs."""

    async def ask(self, prompt: Prompt) -> Answer:
        """Wait for the whole answer.

        Raises:
            CallFailed: none came. Nothing is tried again: that is the router's matter.
        """
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class GrpcCaller:
    """The project's own client, without its retries."""

    def __init__(self, target: str) -> None:
        self._client = AsyncClient(target, retry=Retry(attempts=1), timeout=TIMEOUT_S)

    async def ask(self, prompt: Prompt) -> Answer:
        """See Caller."""
        stream = self._client.generate(token_ids=prompt.token_ids, max_tokens=1, temperature=0.0, ignore_eos=True)
        try:
            usage = (await stream.result()).usage
        except WarmkvError as error:
            raise CallFailed(f"{error}") from error
        return Answer(usage.prompt_tokens, usage.prompt_tokens - usage.prompt_tokens_by_fate.computed)

    async def close(self) -> None:
        """See Caller."""
        await self._client.close()


class HttpCaller:
    """An OpenAI client of few microseconds: HTTP/1.1 over kept connections, bodies of known length or in chunks."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: deque[_HttpConnection] = deque()

    async def ask(self, prompt: Prompt) -> Answer:
        """See Caller."""
        body = json.dumps({"model": MODEL, "prompt": prompt.text, "max_tokens": 1}).encode()
        status, answer = await self.request(b"POST", "/v1/completions", body)
        if status != 200:
            raise CallFailed(f"{status}: {answer[:200].decode(errors='replace')}")
        try:
            usage: dict[str, Any] = json.loads(answer)["usage"]
            return Answer(usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise CallFailed(f"no completion with its usage: {answer[:200].decode(errors='replace')}") from error

    async def request(self, method: bytes, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer.

        Raises:
            CallFailed: the connection broke, or nothing came for `TIMEOUT_S`.
        """
        head = b"%s %s HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = self._idle.pop() if self._idle else await _connect(self._port)
                answer = await connection.exchange(head % (method, path.encode(), len(body)) + body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            raise CallFailed(f"{type(error).__name__}: {error}") from error
        self._idle.append(connection)
        return answer

    async def close(self) -> None:
        """See Caller."""
        while self._idle:
            self._idle.pop().close()


class _HttpConnection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        try:
            self._writer.write(request)
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            body = await (self._chunks() if b"transfer-encoding: chunked" in head else self._plain(head))
        except BaseException:
            self.close()
            raise
        return int(head[9:12]), body

    def close(self) -> None:
        self._writer.close()

    async def _plain(self, head: bytes) -> bytes:
        _, _, rest = head.partition(b"content-length:")
        return await self._reader.readexactly(int(rest.partition(b"\r\n")[0] or 0))

    async def _chunks(self) -> bytes:
        parts = []
        while True:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            parts.append(await self._reader.readexactly(size))
            await self._reader.readexactly(2)
            if not size:
                return b"".join(parts)


async def _connect(port: int) -> _HttpConnection:
    return _HttpConnection(*await asyncio.open_connection("127.0.0.1", port))
