"""Waiting for a worker, but not for long, and saying why there is none.

Covers: the patience of requests that come while no worker can take them. Does not cover: who can (`fleet`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from router.errors import DeadlineExceeded, NoWorkerAvailable
from router.fleet import Fleet
from router.handshake import FleetIdentity

_LOOK_AGAIN_S = 1.0  # the fleet tells of every change; this is for one that it would not tell


class Readiness:
    """`patience_s`: how long a request waits while no worker is ready."""

    def __init__(self, fleet: Fleet, clock: Callable[[], float], *, patience_s: float) -> None:
        self._fleet = fleet
        self._clock = clock
        self._patience_s = patience_s

    def until(self, times: float = 1.0) -> float:
        """The end of the patience of somebody who starts to wait now, and has so many times as much as others."""
        return self._clock() + times * self._patience_s

    async def identity(self, deadline: float | None) -> FleetIdentity:
        """What all workers have in common; waits for the first one. Raises like `wait`."""
        until = self.until()
        while self._fleet.identity is None:
            await self.wait(until, deadline)
        return self._fleet.identity

    async def caught_up(self, deadline: float | None) -> None:
        """Until the workers that this router met first have said what they hold, or that takes too long.

        Raises:
            DeadlineExceeded: the caller's deadline came first.
        """
        while self._fleet.catching_up:
            left = _LOOK_AGAIN_S if deadline is None else min(_LOOK_AGAIN_S, time_left(deadline))
            if left <= 0:
                raise too_late()
            await self._fleet.wait_for_change(left)

    def known_identity(self) -> FleetIdentity:
        """The same without waiting. Raises NoWorkerAvailable."""
        if self._fleet.identity is None:
            raise self.none_ready()
        return self._fleet.identity

    async def wait(self, until: float, deadline: float | None) -> None:
        """Until something changed in the fleet.

        Raises:
            NoWorkerAvailable: it is `until`. DeadlineExceeded: the caller's deadline came first.
        """
        left = until - self._clock()
        if deadline is not None:
            if time_left(deadline) <= 0:
                raise too_late()
            left = min(left, time_left(deadline))
        if left <= 0:
            raise self.none_ready()
        await self._fleet.wait_for_change(left)

    def none_ready(self) -> NoWorkerAvailable:
        """The error for a patience that has ended."""
        return NoWorkerAvailable(self._why(), retry_after_s=1.0)

    def _why(self) -> str:
        links = self._fleet.links()
        if not links:
            return (
                "This router knows no worker; start one with `warmkv up` or `warmkv scale`, or name one with --worker."
            )
        states = "; ".join(f"{link.name} {self._fleet.excluded_because(link) or 'has refused it'}" for link in links)
        return f"No worker can take requests ({states}); wait for one, undrain one, or start more."


def time_left(deadline: float) -> float:
    """Seconds until a deadline on the event loop's clock."""
    return deadline - asyncio.get_running_loop().time()


def too_late() -> DeadlineExceeded:
    """The error for a deadline that passed."""
    return DeadlineExceeded("The deadline passed before the answer was complete; allow more time, or ask for less.")
