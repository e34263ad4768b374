"""Workers at fixed addresses. Covers: `warmkv router --worker` and tests. Ray's discovery is `deploy`'s."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from router.errors import NotSupported
from router.protocol import WorkerAddress


class StaticDiscovery:
    """A list that changes only when `set` is called."""

    def __init__(self, workers: Iterable[WorkerAddress]) -> None:
        self._workers = list(workers)
        self._changed = asyncio.Event()

    def set(self, workers: Iterable[WorkerAddress]) -> None:
        """Another list from now on."""
        self._workers = list(workers)
        self._changed.set()

    async def watch(self) -> AsyncIterator[list[WorkerAddress]]:
        """The list, and again whenever it is set."""
        while True:
            self._changed.clear()
            yield list(self._workers)
            await self._changed.wait()

    async def scale(self, workers: int) -> tuple[list[str], list[str]]:
        """Not possible with fixed addresses. Raises NotSupported."""
        raise NotSupported(
            f"This router was given fixed worker addresses and cannot scale to {workers}; start or stop workers"
            " yourself, or run the fleet with `warmkv up`."
        )

    async def close(self) -> None:
        """Nothing to stop."""
