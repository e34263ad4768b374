"""A running generation, as the caller sees it: pieces while it runs, the whole after its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from warmkv.channel import Waits
from warmkv.errors import WarmkvError, from_rpc_error
from warmkv.v1 import common_pb2, inference_pb2

Piece = inference_pb2.GenerateResponse
Open = Callable[[float | None], Any]


class Generation:
    """What has come so far.

    Attributes:
        token_ids, logprobs: of all pieces so far.
        finish_reason: `stop`, `length`, `deadline`, ...; `cancelled` after `cancel()`; None while it runs.
        done: whether the stream ended, however it did.
    """

    def __init__(self, on_complete: Callable[[Generation], None] | None = None) -> None:
        self._texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[common_pb2.TokenLogprob] = []
        self.finish_reason: str | None = None
        self._last: Piece | None = None
        self.done = False
        self._spoken = False
        self._on_complete = on_complete

    @property
    def text(self) -> str:
        """The text of all pieces so far."""
        self._texts = ["".join(self._texts)]
        return self._texts[0]

    @property
    def usage(self) -> inference_pb2.Usage:
        """What the request used: every prompt token's fate among it.

        Raises:
            RuntimeError: the whole answer has not come.
        """
        return self._ended().usage

    @property
    def route(self) -> inference_pb2.Route:
        """Where the request ran and why.

        Raises:
            RuntimeError: the whole answer has not come.
        """
        return self._ended().route

    def _ended(self) -> Piece:
        if self._last is None:
            raise RuntimeError("usage and route come with the last piece. Read the stream to its end.")
        return self._last

    def _add(self, piece: Piece) -> Piece:
        self._spoken = True
        self._texts.append(piece.text)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        if piece.finish_reason:
            self.finish_reason = (
                common_pb2.FinishReason.Name(piece.finish_reason).removeprefix("FINISH_REASON_").lower()
            )
            self._last = piece
        return piece

    def _end(self) -> None:
        """The stream ended without an error; a complete answer is handed on, once."""
        if not self.done and self.finish_reason is not None and self._on_complete is not None:
            self._on_complete(self)
        self.done = True

    def _wait_after(self, error: WarmkvError, waits: Waits) -> float:
        """Seconds after which to try again.

        Raises:
            WarmkvError: the error itself, where trying again is no use or the stream has spoken.
        """
        wait = None if self._spoken else waits.before_retry(error)
        if wait is None:
            self.done = True
            raise error
        return wait


class Stream(Generation):
    """Iterate over it for the pieces as they come; `result()` reads them all. A `with` block cancels what is left."""

    def __init__(self, open_call: Open, waits: Waits, on_complete: Callable[[Generation], None] | None = None) -> None:
        super().__init__(on_complete)
        self._open = open_call
        self._waits = waits
        self._cancelled = False
        self._call = open_call(waits.time_left())

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        while not self.done:
            try:
                return self._add(next(self._call))
            except StopIteration:
                self._end()
            except grpc.RpcError as error:
                if self._cancelled:
                    break
                time.sleep(self._wait_after(from_rpc_error(error), self._waits))
                self._call = self._open(self._waits.time_left())
        raise StopIteration

    def result(self) -> Self:
        """Read to the end; returns itself.

        Raises:
            WarmkvError: the generation failed.
        """
        for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """Stop; the router frees the request's blocks. Nothing after the end."""
        if not self.done:
            self._cancelled = self.done = True
            self.finish_reason = "cancelled"
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.cancel()


class AsyncStream(Generation):
    """Iterate over it for the pieces as they come; `result()` reads them all. `async with` cancels what is left."""

    def __init__(self, open_call: Open, waits: Waits, on_complete: Callable[[Generation], None] | None = None) -> None:
        super().__init__(on_complete)
        self._open = open_call
        self._waits = waits
        self._cancelled = False
        self._call = open_call(waits.time_left())

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        while not self.done:
            try:
                piece = await self._call.read()
                if piece is not grpc.aio.EOF:
                    return self._add(piece)
                self._end()
            except asyncio.CancelledError:
                if not self._cancelled:
                    self._call.cancel()
                    raise
            except grpc.RpcError as error:
                if self._cancelled:
                    break
                await asyncio.sleep(self._wait_after(from_rpc_error(error), self._waits))
                self._call = self._open(self._waits.time_left())
        raise StopAsyncIteration

    async def result(self) -> Self:
        """Read to the end; returns itself.

        Raises:
            WarmkvError: the generation failed.
        """
        async for _ in self:
            pass
        return self

    def cancel(self) -> None:
        """Stop; the router frees the request's blocks. Nothing after the end."""
        if not self.done:
            self._cancelled = self.done = True
            self.finish_reason = "cancelled"
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.cancel()
