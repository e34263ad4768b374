"""Whatever two routers and their workers do: a job before its first token is in a report or beside it, never both.

Real streams, random traffic. What a worker's report knows is noted on the engine's thread when the report is made, so
that there is something to hold the routers' belief against.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Hashable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from router.core import Router
from router.errors import RouterError
from router.link import WorkerLink
from tests.router.rig import ALICE, Rig, all_ready, context, eventually, request, rig, tokens
from warmkv.v1 import worker_pb2
from workers.protocol import Job, Load
from workers.server import WorkerServer
from workers.simulated_sequence import Timing

SLOW = Timing(prefill_fixed_ms=4.0, prefill_token_ms=0.2, prefill_pair_ms=0.0, decode_step_ms=3.0)
WORKERS = ("w0", "w1")
TOLD = 0.02  # what was sent down a stream that broke, and never came, is remembered by its router alone


@dataclass
class Truth:
    """Which jobs each report knows. Reports are told apart by their number of steps, which is made unique.

    Attributes:
        known: jobs (stream, number) that the engine had when it made a report, by worker, life and report. others, own:
        those jobs by the keys of other routers' and of a router's own requests in `Traffic`. checks, late: requests
        looked at, and those of them that were beside their worker's report.
    """

    known: dict[tuple[str, int, int], frozenset[Hashable]] = field(default_factory=dict)
    others: dict[tuple[str, int, int], Hashable] = field(default_factory=dict)  # worker, life, OtherJob.number
    own: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)  # router and key -> worker, job
    checks: int = 0
    late: int = 0

    def watch_worker(self, server: WorkerServer) -> None:
        engine, name, life = server._engine, server._config.name, server.incarnation
        submitted: set[Hashable] = set()
        submit, load = engine.submit, engine.load
        engine._max_batch_tokens = 48  # type: ignore[attr-defined]
        count = 0

        def submits(job: Job) -> None:
            submitted.add(job.job_id)
            submit(job)

        def loads() -> Load:
            nonlocal count
            count += 1
            self.known[name, life, count] = frozenset(submitted)
            return replace(load(), steps=count)

        engine.submit, engine.load = submits, loads  # type: ignore[method-assign]
        running = server._streams._running
        came = running.came

        def comes(stream: int, job: worker_pb2.Job, now: float) -> worker_pb2.OtherJob:
            told = came(stream, job, now)
            self.others[name, life, told.number] = (stream, job.job_id)
            return told

        running.came = comes  # type: ignore[method-assign]

    def watch_router(self, router: Router) -> None:
        sent = router._traffic.sent
        last: Any = None

        def sends(key: Hashable, worker: str, hashes: Any, **about: Any) -> None:
            nonlocal last
            last = key
            sent(key, worker, hashes, **about)

        router._traffic.sent = sends  # type: ignore[method-assign]
        for link in router.fleet.links():
            self._watch_link(router, link, lambda: last)

    def _watch_link(self, router: Router, link: WorkerLink, last: Callable[[], Any]) -> None:
        submit = link.submit

        def submits(job: worker_pb2.Job, *calls: Any) -> Any:
            key = last()
            flight = submit(job, *calls)
            self.own[router._config.name, key] = (link.name, job.job_id)
            return flight

        link.submit = submits  # type: ignore[method-assign]

    def check(self, router: Router, link: WorkerLink, server: WorkerServer) -> None:
        """Raises AssertionError where a job is counted twice, or not at all."""
        report = link.report
        if report is None or not link.connected or link.incarnation != server.incarnation:
            return
        inside = self.known.get((link.name, server.incarnation, report.message.steps))
        if inside is None:
            return  # made before anybody watched
        late = {id(flight) for flight in router._traffic._late(link.name, report.known)}
        for key, flight in router._traffic._prefilling.get(link.name, {}).items():
            job = self._job(router, link, server, key)
            if job is None:
                continue
            self.checks += 1
            self.late += id(flight) in late
            assert (id(flight) in late) != (job in inside), (router._config.name, key, job, report.known)

    def _job(self, router: Router, link: WorkerLink, server: WorkerServer, key: Any) -> Hashable | None:
        if isinstance(key, tuple):
            return self.others[link.name, server.incarnation, key[1]]
        name = router._config.name
        worker, job = self.own.get((name, key), ("", 0))
        streams = [s.number for s in list(server._streams._streams.values()) if s.router == name]
        return (streams[-1], job) if worker == link.name and streams else None


async def ask(router: Router, rng: random.Random) -> None:
    ids = tokens(rng.randrange(6), 16 * rng.randrange(1, 20)) + [rng.randrange(1000)] * rng.randrange(60)
    leaves = rng.random() < 0.25
    try:
        async with asyncio.timeout(rng.random() * 0.1 if leaves else 20):
            body = request(ids, max_tokens=rng.randrange(1, 5))
            async with aclosing(router.generate(body, caller=ALICE, context=context())) as answers:
                async for _ in answers:
                    pass
    except (RouterError, TimeoutError):
        return


def is_quiet(router: Router) -> bool:
    traffic = router._traffic
    left: list[Any] = [traffic._flights, traffic._arriving, traffic._sharing, traffic._active]
    left += list(traffic._prefilling.values()) + list(traffic._active_blocks.values())
    left += list(traffic._in_flight.values()) + list(router.fleet._others._running.values())
    return not any(left)


def worker_is_quiet(server: WorkerServer) -> bool:
    streams = server._streams
    news = [stream.outbox.others for stream in list(streams._streams.values())]
    return not (streams._running._jobs or any(each._told or each._waiting for each in news))


async def disturb(fleet: Rig, rng: random.Random, truth: Truth) -> None:
    link = rng.choice(fleet.routers).fleet.link(rng.choice(WORKERS))
    match rng.randrange(4):
        case 0:
            link._break("the test says so")
        case 1 if link.connected:
            link._feed._seq -= 1
        case 2 if link.connected:
            link.resync()
        case 3:
            name = link.name
            old = fleet.workers[name]
            port = int(fleet.addresses[name].rsplit(":", 1)[1])
            await fleet.kill_worker(name)
            fleet.start_worker(name, timing=SLOW, incarnation=old.incarnation + 1, port=port)
            truth.watch_worker(fleet.workers[name])


@pytest.mark.asyncio
@pytest.mark.parametrize(("seed", "calm"), [(1, True), (2, False), (3, False)])
async def test_each_job_is_in_the_report_or_beside_it(seed: int, calm: bool) -> None:
    rng = random.Random(seed)
    truth = Truth()
    async with rig(2, timing=SLOW) as fleet:
        for server in fleet.workers.values():
            truth.watch_worker(server)
        for name in ("r1", "r2"):
            router = await fleet.start_router(name)
            await all_ready(router, 2)
            truth.watch_router(router)

        def check() -> None:
            for router in fleet.routers:
                for link in router.fleet.links():
                    if link.name in fleet.workers:
                        truth.check(router, link, fleet.workers[link.name])

        asked: list[asyncio.Task[None]] = []
        for number in range(200):
            asked.append(asyncio.create_task(ask(rng.choice(fleet.routers), rng)))
            if not calm and number % 25 == 24:
                await disturb(fleet, rng, truth)
            for _ in range(3):
                await asyncio.sleep(rng.random() * 0.012)
                check()
        await asyncio.gather(*asked)
        for router in fleet.routers:
            await all_ready(router, 2)
            await eventually(lambda router=router: is_quiet(router))
            for link in router.fleet.links():
                report = link.report
                assert report is None or not router._traffic.unreported(link.name, report.known).requests
        for name, server in fleet.workers.items():
            await eventually(lambda server=server: worker_is_quiet(server))
            given_ms = server._streams._running.recent_work_ms(time.monotonic())
            for router in fleet.routers:
                assert router._traffic.recent_work_ms(name) == pytest.approx(given_ms, rel=TOLD)
        one, two = (router._traffic.utilisation(2) for router in fleet.routers)
        assert one == pytest.approx(two, rel=0.05)
        assert truth.checks > 500
        assert 0.1 * truth.checks < truth.late < 0.95 * truth.checks, "both ways of counting a job were seen"
