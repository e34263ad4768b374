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
_MOST_AT_ONCE = 1024  # samples that are there before they spoke; a number that the router will refuse costs nothing


class Sample:
    """One answer of a generation, as far as it has come.

    Attributes:
        index: from 0. token_ids, logprobs: so far.
        finish_reason: `stop`, `length`, `deadline`, ...; `cancelled` after `cancel()`; None while it runs.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[common_pb2.TokenLogprob] = []
        self.finish_reason: str | None = None
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        self._texts = ["".join(self._texts)]
        return self._texts[0]

    def _add(self, piece: Piece) -> None:
        self._texts.append(piece.text)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        if piece.finish_reason:
            self.finish_reason = (
                common_pb2.FinishReason.Name(piece.finish_reason).removeprefix("FINISH_REASON_").lower()
            )


class Generation:
    """What has come so far.

    Attributes:
        samples: the answers, in order: one, or as many as `n` asked for.
        done: whether the stream ended, however it did.
    """

    def __init__(self, on_complete: Callable[[Generation], None] | None = None, *, n: int = 1) -> None:
        self.samples = [Sample(index) for index in range(min(max(1, n), _MOST_AT_ONCE))]
        self._last: Piece | None = None
        self.done = False
        self._spoken = False
        self._on_complete = on_complete

    @property
    def text(self) -> str:
        """The text so far; of the first answer, where there are several."""
        return self.samples[0].text

    @property
    def token_ids(self) -> list[int]:
        """The ids so far; of the first answer, where there are several."""
        return self.samples[0].token_ids

    @property
    def logprobs(self) -> list[common_pb2.TokenLogprob]:
        """One for each of `token_ids`, when asked for."""
        return self.samples[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        """As that of a sample; of the first answer, where there are several."""
        return self.samples[0].finish_reason

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
        while len(self.samples) <= piece.index:
            self.samples.append(Sample(len(self.samples)))
        self.samples[piece.index]._add(piece)
        if piece.HasField("usage"):
            self._last = piece
        return piece

    def _is_cancelled(self) -> None:
        self.done = True
        for sample in self.samples:
            sample.finish_reason = sample.finish_reason or "cancelled"

    def _end(self) -> None:
        """The stream ended without an error; a complete answer is handed on, once."""
        if not self.done and self._last is not None and self._on_complete is not None:
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

    def __init__(
        self, open_call: Open, waits: Waits, on_complete: Callable[[Generation], None] | None = None, *, n: int = 1
    ) -> None:
        super().__init__(on_complete, n=n)
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
            self._cancelled = True
            self._is_cancelled()
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.cancel()


class AsyncStream(Generation):
    """Iterate over it for the pieces as they come; `result()` reads them all. `async with` cancels what is left."""

    def __init__(
        self, open_call: Open, waits: Waits, on_complete: Callable[[Generation], None] | None = None, *, n: int = 1
    ) -> None:
        super().__init__(on_complete, n=n)
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
            self._cancelled = True
            self._is_cancelled()
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.cancel()
