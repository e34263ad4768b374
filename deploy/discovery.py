"""How a router finds its workers through Ray: by a child process.

Covers: the child's life (start, restart with growing pauses, end), calls to it, the list of workers. Does not cover:
what the child does (`deploy.driver`), fixed lists (`router.discovery`). Nothing here imports Ray, and a router goes on
with the last list when Ray dies: whether a worker lives, its own stream tells.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from deploy.cluster import ClusterProblem
from router.errors import NotSupported
from router.protocol import WorkerAddress
from workers.config import WorkerConfig

log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_CALL_TIMEOUT_S = 60.0
_LINE_LIMIT = 64 << 20  # a tokenizer.json travels in one line


@dataclass(frozen=True, slots=True)
class KnownWorker:
    """What the child last heard from a worker; see `workers.actor.WorkerDescription`."""

    name: str
    state: str
    address: str
    incarnation: int
    pid: int
    node: str
    problem: str = ""


class Borrowed:
    """A discovery for a router that closes what it was given, where its owner still needs it afterwards."""

    def __init__(self, owned: RayDiscovery) -> None:
        self._owned = owned

    def watch(self) -> AsyncIterator[list[WorkerAddress]]:
        """See `RayDiscovery.watch`."""
        return self._owned.watch()

    async def scale(self, workers: int) -> tuple[list[str], list[str]]:
        """See `RayDiscovery.scale`."""
        return await self._owned.scale(workers)

    async def close(self) -> None:
        """Nothing: the owner closes it."""


class RayDiscovery:
    """Finds and scales workers through a child process that is the Ray driver.

    Belongs to one event loop. Use: `await start()`, then `watch()` and calls, in the end `await close()`.
    """

    def __init__(
        self,
        ray_address: str,
        environment: Mapping[str, str],
        *,
        drain_s: float = 30.0,
        flush_s: float = 5.0,
        start_timeout_s: float = 60.0,
        command: Sequence[str] = (sys.executable, "-m", "deploy.driver"),
    ) -> None:
        """Name the Ray to speak with.

        Args:
            environment: of the child; see `deploy.cluster.ray_environment`.
            drain_s: how long a worker that is told to end may finish its jobs. flush_s: and then write blocks out.
            command: for tests.
        """
        self._command = [*command, "--ray-address", ray_address]
        self._environment = dict(environment)
        self._address = ray_address
        self._ending = {"drain_s": drain_s, "flush_s": flush_s}
        self._start_timeout_s = start_timeout_s
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._child: asyncio.subprocess.Process | None = None
        self._connected = asyncio.Event()
        self._heard = asyncio.Event()  # replaced whenever a list comes
        self._workers: list[KnownWorker] | None = None
        self._problem = ""
        self._configuration: dict[str, Any] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def workers(self) -> list[KnownWorker]:
        """The last list, workers that are starting or failed included."""
        return list(self._workers or ())

    @property
    def connected(self) -> bool:
        """Whether the child speaks with Ray now."""
        return self._connected.is_set()

    async def start(self) -> None:
        """Start the child and wait for its connection.

        Raises:
            ClusterProblem: Ray cannot be joined.
        """
        self._keeping = asyncio.create_task(self._keep_child(), name="ray driver")
        waiting = asyncio.create_task(self._connected.wait())
        await asyncio.wait({waiting, self._keeping}, timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._connected.is_set():
            return
        problem = self._problem or f"Ray at {self._address} does not answer; check its address, or start it"
        await self.close()
        raise ClusterProblem(problem)

    async def configure(self, config: WorkerConfig, bundle: Mapping[str, float]) -> None:
        """Say what new workers are made from and which Ray resources each reserves."""
        self._configuration = {"config": asdict(config), "bundle": dict(bundle)}
        await self.call("configure", **self._configuration)

    async def watch(self) -> AsyncIterator[list[WorkerAddress]]:
        """The full list as soon as it is known, and again whenever it changes."""
        said: list[WorkerAddress] | None = None
        while not self._closed:
            heard = self._heard
            if self._workers is not None:
                now = [WorkerAddress(worker.name, worker.address) for worker in self._workers if worker.address]
                if now != said:
                    said = now
                    yield now
            await heard.wait()

    async def changed(self) -> None:
        """Sleep until the next list comes (or the child ends)."""
        await self._heard.wait()

    async def scale(self, workers: int) -> tuple[list[str], list[str]]:
        """Place or end workers; names placed, names ended.

        Raises:
            NotSupported: Ray does not answer, or there is no worker to make another one like it.
        """
        try:
            started, stopped = await self.call("scale", count=workers, **self._ending)
        except ClusterProblem as problem:
            raise NotSupported(f"workers cannot be scaled now: {problem}") from problem
        return started, stopped

    async def end_all(self) -> list[str]:
        """End every worker and wait for it; their names. Raises ClusterProblem."""
        names: list[str] = await self.call("end_all", **self._ending)
        return names

    async def model_card(self) -> dict[str, bytes]:
        """The small files of the model folder, from a worker. Raises ClusterProblem."""
        card: dict[str, str] = await self.call("model_card")
        return {name: base64.b64decode(data) for name, data in card.items()}

    async def call(self, method: str, **parameters: Any) -> Any:
        """Ask the child.

        Raises:
            ClusterProblem: it is not connected, does not answer, or answers with an error.
        """
        child = self._child
        if child is None or child.stdin is None or not self._connected.is_set():
            raise ClusterProblem(self._problem or "Ray does not answer; check that it runs")
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            child.stdin.write(json.dumps({"id": number, "method": method, "params": parameters}).encode() + b"\n")
            await child.stdin.drain()
            async with asyncio.timeout(_CALL_TIMEOUT_S + sum(self._ending.values())):
                return await answer
        except TimeoutError as error:
            raise ClusterProblem(f"Ray did not answer in time when asked to {method}; check that it is well") from error
        except ConnectionError as error:
            raise ClusterProblem("the connection to Ray was lost; it is being made again, so try again") from error
        finally:
            self._calls.pop(number, None)

    async def close(self) -> None:
        """End the child. Workers go on."""
        self._closed = True
        self._heard.set()
        if self._keeping is not None:
            self._keeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeping
        await self._end_child()

    async def _keep_child(self) -> None:
        """Start the child, again and again; give up only when the very first one cannot connect."""
        pause = _FIRST_PAUSE_S
        was_connected = False
        while True:
            await self._run_child()
            if self._connected.is_set():
                was_connected, pause = True, _FIRST_PAUSE_S
                self._connected.clear()
            self._fail_calls()
            if not was_connected:
                return
            log.warning("the Ray driver ended and is started again", extra={"why": self._problem, "pause_s": pause})
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _run_child(self) -> None:
        self._child = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=_LINE_LIMIT,
            start_new_session=True,  # Ctrl-C is for the router, which then ends us in order
        )
        if self._child.stdout is not None:
            while line := await self._child.stdout.readline():
                self._hear(json.loads(line))
        await self._child.wait()

    def _hear(self, message: dict[str, Any]) -> None:
        hear: Callable[[dict[str, Any]], None] | None = {
            "connected": self._hear_connected,
            "workers": self._hear_workers,
            "failed": self._hear_failed,
        }.get(message.get("event", ""))
        if hear is not None:
            hear(message)
        elif (answer := self._calls.get(message.get("id", 0))) is not None and not answer.done():
            if "error" in message:
                answer.set_exception(ClusterProblem(message["error"]))
            else:
                answer.set_result(message["result"])

    def _hear_connected(self, message: dict[str, Any]) -> None:
        self._problem = ""
        self._connected.set()
        if self._configuration is not None and self._child is not None and self._child.stdin is not None:
            line = json.dumps({"id": 0, "method": "configure", "params": self._configuration})
            self._child.stdin.write(line.encode() + b"\n")

    def _hear_workers(self, message: dict[str, Any]) -> None:
        self._workers = [KnownWorker(**worker) for worker in message["workers"]]
        self._tell()

    def _hear_failed(self, message: dict[str, Any]) -> None:
        self._problem = message["message"]
        self._tell()

    def _tell(self) -> None:
        self._heard.set()
        self._heard = asyncio.Event()

    def _fail_calls(self) -> None:
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(ClusterProblem(self._problem or "the Ray driver ended; try it again"))

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None or child.returncode is not None:
            return
        if child.stdin is not None:
            child.stdin.close()  # it ends by itself
        try:
            async with asyncio.timeout(2.0):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()
