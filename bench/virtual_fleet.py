"""A whole router and simulated workers in one process on a virtual clock: an hour of overload in seconds, exactly.

Covers: an event loop whose time jumps to the next timer, and workers without sockets on it. All of `router.core` is the
real thing but for the streams: what a worker says comes at the end of its step, in order, its load at most every 20 ms.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any, TypeVar, cast

from bench.ready_ids import ReadyIds
from kvstore.layout import KVLayout
from router import kv_wire
from router.config import RouterConfig
from router.core import Router
from router.discovery import StaticDiscovery
from router.fleet import Fleet, _Member
from router.flight import Flight, FlightEnd
from router.handshake import identity_of
from router.index import PrefixIndex
from router.link import Report, WorkerLink
from router.traffic import Known
from warmkv import versions
from warmkv.v1 import inference_pb2, worker_pb2
from workers.job_wire import job_from_wire
from workers.simulated import SimulatedEngine
from workers.simulated_info import simulated_info
from workers.simulated_sequence import Timing
from workers.wire import event_to_wire, hello_to_wire, load_to_wire, output_to_wire

T = TypeVar("T")

BLOCK = 64
_LOAD_EVERY_S = 0.02
_LEAST_STEP_S = 0.001


class VirtualLoop(asyncio.SelectorEventLoop):
    """Never sleeps: where another loop would wait for a timer this one sets its clock to it."""

    def __init__(self) -> None:
        self._now = 0.0
        selector = selectors.DefaultSelector()
        super().__init__(selector)
        select = selector.select

        def jump(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is None:
                raise RuntimeError("nothing is left that could happen; the simulated program waits for ever")
            self._now += timeout
            return select(0)

        selector.select = jump  # type: ignore[method-assign]

    def time(self) -> float:
        """Virtual seconds."""
        return self._now


def run_virtually(main: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function on a clock of its own."""

    async def awaited() -> T:
        return await main()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(awaited())


class VirtualLink:
    """What a router uses of a `router.link.WorkerLink`, before a simulated engine in the same loop."""

    refused = suspect = owes_clear = False
    role = 0
    connected = synced = was_up = True
    problem = ""
    address = "virtual"
    joined_at = float("-inf")

    def __init__(
        self, name: str, engine: SimulatedEngine, fleet: Fleet, index: PrefixIndex, slept: list[float]
    ) -> None:
        self.name = name
        self.engine = engine
        self.hello = hello_to_wire(engine.info, worker=name, incarnation=1, protocol_version=versions.NEWEST)
        self.incarnation = 1
        self.report: Report | None = None
        self.flights: dict[int, Flight] = {}
        self._fleet, self._index, self._slept = fleet, index, slept
        self._ids = count(1)
        self._wake = asyncio.Event()
        self._reported_at = float("-inf")
        index.join(name, 1)
        index.begin_snapshot(name, 1)
        index.end_snapshot(name, 1)

    @property
    def jobs(self) -> int:
        """Under way."""
        return len(self.flights)

    def submit(
        self, job: worker_pb2.Job, on_tokens: Callable[[int], None], on_end: Callable[[FlightEnd], None]
    ) -> Flight:
        """As a link does."""
        job.job_id = number = next(self._ids)

        def ended(end: FlightEnd) -> None:
            self.flights.pop(number, None)
            on_end(end)

        flight = self.flights[number] = Flight(self.name, job, on_tokens=on_tokens, on_end=ended)
        now = asyncio.get_running_loop().time()
        self.engine.submit(job_from_wire(job, job_id=number, info=self.engine.info, now=now))
        self._wake.set()
        return flight

    def cancel(self, flight: Flight) -> None:
        """As a link does."""
        self.engine.cancel(flight.job.job_id)
        self._wake.set()

    def send_record(self, record: worker_pb2.FleetRecord) -> None:
        """Nobody else is there to hear of it."""

    def judge_silence(self) -> None:
        """It is never silent."""

    async def run(self) -> None:
        """Step for ever."""
        self._tell_load()
        while True:
            while not self.engine.has_work():
                self._wake.clear()
                self._tell_load()
                await self._wake.wait()
            self._slept.clear()
            report = self.engine.step()
            await asyncio.sleep(sum(self._slept) or _LEAST_STEP_S)
            events = [event_to_wire(event) for event in report.events]
            if events:
                self._index.apply(self.name, 1, kv_wire.events(events))
            if asyncio.get_running_loop().time() - self._reported_at >= _LOAD_EVERY_S:
                self._tell_load()
            for output in report.outputs:
                number = cast("int", output.job_id)
                if number in self.flights:
                    self.flights[number].deliver(output_to_wire(output, number))

    def _tell_load(self) -> None:
        self._reported_at = asyncio.get_running_loop().time()
        message = load_to_wire(self.engine.load())
        message.routers = 1
        # Time stands still between two steps here: what is sent at the moment of a report is sent after it.
        known = Known(math.nextafter(self._reported_at, -math.inf), 0)
        self.report = Report(message, self._reported_at, known=known)
        self._fleet.reported(cast("WorkerLink", self))


class VirtualRouter(Router):
    """A router over virtual workers. Use it inside `run_virtually`."""

    def __init__(
        self,
        workers: int,
        *,
        timing: Timing,
        device_blocks: int,
        seed: int = 0,
        max_running: int = 64,
        max_batch_tokens: int = 2048,
        **settings: Any,
    ) -> None:
        """`settings` are those of a `RouterConfig`."""
        config = RouterConfig(name="r0", model_dir="", model_name="simulated", **settings)
        clock = asyncio.get_running_loop().time
        super().__init__(
            config, ReadyIds(), StaticDiscovery([]), clock=clock, wall_clock=clock, rng=random.Random(seed)
        )
        self.links = [
            self._link(
                f"w{n}", timing, device_blocks=device_blocks, max_running=max_running, max_batch_tokens=max_batch_tokens
            )
            for n in range(workers)
        ]
        self.fleet.identity = identity_of(self.links[0].hello)
        self.fleet._context_length = self.links[0].hello.context_length
        self.fleet._vocab_size = self.links[0].hello.vocab_size

    def _link(
        self, name: str, timing: Timing, *, device_blocks: int, max_running: int, max_batch_tokens: int
    ) -> VirtualLink:
        clock = asyncio.get_running_loop().time
        layout = KVLayout(1, 1, 4, 4, "float32", BLOCK)
        info = simulated_info(fingerprint=b"f" * 32, layout=layout, context_length=device_blocks * BLOCK)
        slept: list[float] = []
        engine = SimulatedEngine(
            info,
            device_blocks=device_blocks,
            timing=timing,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            clock=clock,
            wall_clock=clock,
            sleep=slept.append,
        )
        link = VirtualLink(name, engine, self.fleet, self._index, slept)
        task = asyncio.get_running_loop().create_task(link.run())
        self.fleet._members[name] = _Member(cast("WorkerLink", link), task)
        return link

    async def close(self) -> None:
        """End the workers."""
        self.drain()
        for member in self.fleet._members.values():
            member.task.cancel()
        await asyncio.gather(*(member.task for member in self.fleet._members.values()), return_exceptions=True)


def question(ids: Sequence[int], *, max_tokens: int, priority: int = 0) -> inference_pb2.GenerateRequest:
    """A request for exactly so many tokens."""
    body = inference_pb2.GenerateRequest(
        input=inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids)), priority=priority
    )
    body.sampling.max_tokens = max_tokens
    body.sampling.temperature = 0
    body.sampling.ignore_eos = True
    return body
