"""Follows one or several routers and writes what they tell into a trace, until it is told to stop.

Covers: connections, when a recording ends, signals. Does not cover: the lines (`replay.recorder`), options and words
(`cli_replay`).
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.connection import Connection
from deploy.failures import UNREACHABLE, Failure
from replay.recorder import Recorded, Recorder, TraceFile
from warmkv.client import AsyncClient, WarmkvError
from warmkv.v1 import admin_pb2

_SALT_BYTES = 16
_FIRST_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to record.

    Attributes:
        seconds, requests: end after so many; None: no such limit. with_text: prompts, too.
    """

    file: Path
    seconds: float | None = None
    requests: int | None = None
    with_text: bool = False


@dataclass(frozen=True, slots=True)
class _Feed:
    """What a router sends, and the first of it."""

    router: str
    messages: AsyncIterator[admin_pb2.WatchRequestsResponse]
    first: admin_pb2.WatchRequestsResponse


_Lost = tuple[str, WarmkvError | None]


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended. `lost`: the errors of routers that ended before it, by address."""

    recorded: Recorded
    lost: Mapping[str, WarmkvError]


def record(wanted: Wanted, routers: Sequence[Connection], *, say: Callable[[str], None]) -> Ended:
    """Record until SIGINT, SIGTERM, a limit, or the end of the last router. The file is made once all have answered.

    Raises:
        WarmkvError: a router refuses. Failure: one cannot be reached. OSError: the file cannot be made or written.
        BlockSizeChanged: a router serves another fleet than before.
    """
    return asyncio.run(_record(wanted, routers, say))


async def _record(wanted: Wanted, routers: Sequence[Connection], say: Callable[[str], None]) -> Ended:
    began_us = time.time_ns() // 1000
    salt = secrets.token_bytes(_SALT_BYTES)
    async with AsyncExitStack() as held:
        feeds = await asyncio.gather(*(_open(held, router, wanted, salt) for router in routers))
        file = held.enter_context(TraceFile(wanted.file, private=wanted.with_text))
        recorder = Recorder(file, began_us)
        stop = asyncio.Event()
        held.enter_context(_signals(stop))
        say(f"recording {', '.join(router.router for router in routers)} to {wanted.file}; Ctrl-C ends it")
        lost = await _until(stop, wanted, [_follow(feed, recorder, wanted, stop, say) for feed in feeds])
        recorder.done.seconds = max(recorder.done.seconds, (time.time_ns() // 1000 - began_us) / 1e6)
    return Ended(recorder.done, lost)


async def _until(
    stop: asyncio.Event, wanted: Wanted, feeds: Sequence[Coroutine[None, None, _Lost]]
) -> dict[str, WarmkvError]:
    """Run the feeds until they have ended, or `stop` is set, or the time is over; the errors that ended them."""
    tasks = [asyncio.create_task(feed) for feed in feeds]
    following, stopped = asyncio.gather(*tasks), asyncio.ensure_future(stop.wait())
    both: set[asyncio.Future[Any]] = {following, stopped}
    try:
        await asyncio.wait(both, timeout=wanted.seconds, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()  # raises what a feed did not expect
    finally:
        stopped.cancel()
        following.cancel()
        await asyncio.gather(stopped, following, *tasks, return_exceptions=True)
    ended = [task.result() for task in tasks if not task.cancelled()]
    return {router: error for router, error in ended if error is not None}


async def _open(held: AsyncExitStack, router: Connection, wanted: Wanted, salt: bytes) -> _Feed:
    """A stream whose first message has come."""
    client = await held.enter_async_context(AsyncClient(router.router, api_key=router.api_key, tls=router.tls))
    messages = client.watch_requests(salt=salt, with_text=wanted.with_text)
    with router.reaching():
        try:
            async with asyncio.timeout(_FIRST_ANSWER_S):
                return _Feed(router.router, messages, await anext(messages))
        except TimeoutError:
            raise Failure(f"the router at {router.router} does not answer; try it again", UNREACHABLE) from None


async def _follow(
    feed: _Feed, recorder: Recorder, wanted: Wanted, stop: asyncio.Event, say: Callable[[str], None]
) -> _Lost:
    """Write what a router tells until it ends; its error."""
    recorder.take(feed.router, feed.first)
    try:
        async for message in feed.messages:
            if recorder.take(feed.router, message, most=wanted.requests):
                stop.set()
                break
    except WarmkvError as error:
        say(f"the router at {feed.router} ended the recording: {error}")
        return feed.router, error
    return feed.router, None


@contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGINT and SIGTERM end the recording in the block, between two lines."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
