"""An operator who drains a worker may have what runs there go on elsewhere at once, or after a while."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from router.core import Router
from router.errors import NotSupported, NoWorkerAvailable
from tests.router.fake_worker import FakeWorker
from tests.router.rig import ALICE, Rig, all_ready, context, eventually, generate, request, rig, states, tokens
from tests.router.test_fleet import fakes
from tests.router.test_handover import SLOW, value
from warmkv.v1 import inference_pb2

PROMPT = tokens(1, 40)
TOKENS = 60
DRAINED, READY = "DRAINED", "READY"


async def drained_under_way(
    router: Router, *, after_s: float | None, undrain: bool = False
) -> tuple[list[int], inference_pb2.Route, str]:
    """The tokens of an answer whose worker is drained after ten of them, how it came, and that worker."""
    told: list[int] = []
    worker = ""
    async with aclosing(router.generate(request(PROMPT, TOKENS), caller=ALICE, context=context())) as stream:
        async for part in stream:
            told += part.token_ids
            if len(told) == 10:
                worker = router.stats(show_prompts=False).recent[0].worker
                assert router.drain_worker(worker, hand_over_after_s=after_s) == 1
                if undrain:
                    router.undrain_worker(worker)
    return told, part.route, worker


async def two(fleet: Rig) -> Router:
    router = await fleet.start_router()
    await all_ready(router, 2)
    return router


@pytest.mark.asyncio
@pytest.mark.parametrize("after_s", [0.0, 0.05])
async def test_what_runs_there_goes_on_elsewhere_and_the_worker_stays(after_s: float) -> None:
    async with rig(2, timing=SLOW) as fleet:
        router = await two(fleet)
        whole = await generate(router, request(PROMPT, TOKENS))
        told, route, worker = await drained_under_way(router, after_s=after_s)
        assert told == list(whole.token_ids)
        assert (route.handovers, route.worker != worker) == (1, True)
        assert value(router, "handovers_total", worker=worker, reason="draining") == 1
        assert states(router)[worker] == DRAINED
        router.undrain_worker(worker)
        router.drain_worker(route.worker)
        assert (await generate(router, request(tokens(2, 40), 3))).route.worker == worker, "it is as good as before"


@pytest.mark.asyncio
async def test_what_ends_in_time_and_what_is_called_off_stays_where_it_is() -> None:
    async with rig(2, timing=SLOW) as fleet:
        router = await two(fleet)
        for after_s, undrain in ((60.0, False), (0.1, True), (None, False)):
            told, route, worker = await drained_under_way(router, after_s=after_s, undrain=undrain)
            assert (len(told), route.handovers, route.worker) == (TOKENS, 0, worker)
            router.undrain_worker(worker)


@pytest.mark.asyncio
async def test_jobs_of_all_routers_are_handed_over() -> None:
    async with rig(1, timing=SLOW) as fleet:
        routers = [await fleet.start_router("r0"), await fleet.start_router("r1")]
        for router in routers:
            await all_ready(router, 1)
        running = [asyncio.create_task(generate(router, request(PROMPT, 100))) for router in routers]
        await eventually(lambda: all(router.fleet.links()[0].jobs for router in routers))
        fleet.start_worker("w1", timing=SLOW)
        for router in routers:
            await all_ready(router, 2)
        routers[0].drain_worker("w0", hand_over_after_s=0.0)
        answers = await asyncio.gather(*running)
        assert [answer.route.worker for answer in answers] == ["w1", "w1"]
        assert all(len(answer.token_ids) == 100 for answer in answers)


@pytest.mark.asyncio
async def test_it_is_refused_where_nobody_could_go_on_and_then_nothing_is_drained() -> None:
    async with rig(1, timing=SLOW) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        with pytest.raises(NoWorkerAvailable, match="w0, which was not drained; start one"):
            router.drain_worker("w0", hand_over_after_s=0.0)
        assert states(router)["w0"] == READY


@pytest.mark.asyncio
async def test_an_older_worker_is_not_asked_what_it_does_not_understand() -> None:
    old = FakeWorker("w0")
    old.hello.protocol_version = 2
    async with fakes(old, FakeWorker("w1")) as (_, router):
        await all_ready(router, 2)
        with pytest.raises(NotSupported, match="older warmkv"):
            router.drain_worker("w0", hand_over_after_s=0.0)
        with pytest.raises(NoWorkerAvailable):
            router.drain_worker("w1", hand_over_after_s=0.0)


@pytest.mark.asyncio
async def test_a_worker_that_cannot_hear_it_is_not_said_to_hand_over() -> None:
    async with rig(2) as fleet:
        router = await two(fleet)
        await fleet.kill_worker("w0")
        await eventually(lambda: not router.fleet.link("w0").connected)
        with pytest.raises(NotSupported, match="not connected"):
            router.drain_worker("w0", hand_over_after_s=0.0)
        assert router.fleet.record.drained == frozenset()
