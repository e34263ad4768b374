"""One trial's processes: fresh workers and a fresh router, gone at its end."""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, Self

from bench.peers.callers import Caller
from bench.peers.contenders import Contender, Ports
from bench.peers.processes import Child
from bench.peers.service import Constants, WorkerBooks

WORKERS = 4
_SERVES = '"serves"'


class TrialFleet:
    """A router before four workers; an async context manager."""

    def __init__(self, contender: Contender, constants: Constants) -> None:
        self.contender, self.constants = contender, constants
        self.ports = Ports.choose(WORKERS)
        self._folder = tempfile.TemporaryDirectory(prefix="warmkv-peers-")
        self._numbers = itertools.count()
        self._workers: list[Child] = []
        self._router: Child | None = None

    async def __aenter__(self) -> Self:
        try:
            self._workers = [self._start_worker(number) for number in range(WORKERS)]
            for worker in self._workers:
                await asyncio.to_thread(worker.wait_for, _SERVES)
            await self.start_router()
            await self.forget()
        except BaseException:
            self.end()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.end()

    @property
    def router(self) -> Child:
        """The router's process."""
        if self._router is None:
            raise RuntimeError("the router was not started")
        return self._router

    def caller(self) -> Caller:
        """A client of the router."""
        return self.contender.caller(self.ports)

    async def start_router(self) -> None:
        """Start it; returns when it is ready.

        Raises:
            NotStarted: it is not within two minutes.
        """
        self._router = self._start("router", self.contender.router_command(self.ports, self.constants))
        ready = asyncio.ensure_future(self.contender.until_ready(self.ports))
        try:
            while not ready.done():
                self._router.check()
                await asyncio.wait([ready], timeout=0.2)
            await ready
        finally:
            ready.cancel()

    def kill_worker(self, number: int) -> None:
        """SIGKILL."""
        self._workers[number].kill()

    async def restart_worker(self, number: int) -> float:
        """Start it at the same address; when it was ready, seconds since the epoch."""
        self._workers[number] = self._start_worker(number)
        await asyncio.to_thread(self._workers[number].wait_for, _SERVES)
        return float(json.loads(self._workers[number].log.splitlines()[-1])["at"])

    async def books(self) -> list[WorkerBooks]:
        """Of all workers, in order."""
        return [await self.books_of(number) for number in range(WORKERS)]

    async def books_of(self, number: int) -> WorkerBooks:
        """Of one."""
        return WorkerBooks(**await self._get(number, "/books"))

    async def forget(self) -> None:
        """All workers' books begin anew; their caches stay."""
        for number in range(WORKERS):
            await self._get(number, "/forget")

    def end(self) -> None:
        """Kill everything."""
        for child in [*self._workers, *([self._router] if self._router else [])]:
            child.kill()
        self._folder.cleanup()

    def _start_worker(self, number: int) -> Child:
        return self._start(f"worker-{number}", self.contender.worker_command(number, self.ports, self.constants))

    def _start(self, name: str, command: list[str]) -> Child:
        log = Path(self._folder.name) / f"{name}-{next(self._numbers)}.log"
        return Child(command, log, self.contender.environment())

    async def _get(self, number: int, path: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.contender.books_port(number, self.ports)}{path}"
        return await asyncio.to_thread(_fetch, url)


def _fetch(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return dict(json.load(answer))
