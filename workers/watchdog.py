"""Notices an engine whose thread is stuck or gone, so that its worker ends and a new process takes its place.

A thread that raises is heard of (`engine_thread`). One that never comes back from a driver or a file system is not, nor
one that could not even say that it failed: the server's loop goes on beating for it, and routers wait for tokens that
do not come. So the loop looks how long the turn under way has taken, and whether there is a thread at all. Where the
loop cannot run either (a call that keeps the interpreter's lock), faulthandler's timer, which needs no lock, prints all
stacks and ends the process. That timer runs until `disarm`: the end of a worker can be stuck as well as a turn.
"""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Protocol

# Of the limit: how often the loop looks.
LOOKS = 20
# Times the limit: when the process ends though the loop said nothing.
LAST_RESORT = 2.0
STDERR = 2


class EngineStuckError(Exception):
    """The engine's thread has not come back for longer than a turn may take."""


class EngineGoneError(Exception):
    """The engine's thread has ended and has not said why."""


class Watched(Protocol):
    """What is looked at; `workers.engine_thread.EngineThread`."""

    @property
    def ident(self) -> int | None:
        """The thread."""
        ...

    @property
    def has_died(self) -> bool:
        """Whether it has ended though nobody asked it to."""
        ...

    def turn_takes_s(self) -> float:
        """For how long the turn under way has run."""
        ...


class Watchdog:
    """Of one engine's thread. `watch` runs on the server's loop, till the engine is closed.

    Args:
        limit_s: the longest turn. bite: told once what is stuck.
        last_resort: whether the process is this worker's own and may be ended.
    """

    def __init__(
        self, engine: Watched, limit_s: float, bite: Callable[[BaseException], None], *, last_resort: bool = False
    ) -> None:
        self._engine, self._limit_s, self._bite, self._last_resort = engine, limit_s, bite, last_resort

    async def watch(self) -> None:
        """Until a turn takes too long, or the thread is gone; cancel it to end. The last resort stays armed."""
        while (turn_s := self._engine.turn_takes_s()) <= self._limit_s and not self._engine.has_died:
            self.arm(LAST_RESORT * self._limit_s)
            await asyncio.sleep(self._limit_s / LOOKS)
        if turn_s <= self._limit_s:
            self._bite(EngineGoneError("the engine's thread has ended, and its error was lost; the log may have it"))
            return
        self._bite(EngineStuckError(_words(turn_s, self._limit_s, self._engine.ident)))

    def arm(self, within_s: float) -> None:
        """The process ends after so long, unless this or `disarm` is called before."""
        if self._last_resort:
            faulthandler.dump_traceback_later(within_s, exit=True, file=STDERR)

    def disarm(self) -> None:
        """The process need not end any more."""
        if self._last_resort:
            faulthandler.cancel_dump_traceback_later()


def _words(turn_s: float, limit_s: float, ident: int | None) -> str:
    frame = sys._current_frames().get(ident) if ident is not None else None
    stack = "".join(traceback.format_stack(frame)) if frame is not None else "(it has ended)\n"
    alive = ", ".join(sorted(thread.name for thread in threading.enumerate()))
    return (
        f"the engine's thread has been at one turn for {turn_s:.0f} s, and workers.watchdog allows {limit_s:g} s; raise"
        f" that if steps may take so long. It is at:\n{stack}Threads: {alive}"
    )
