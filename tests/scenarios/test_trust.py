"""Workers that send no events, and workers whose events come late: real gRPC, simulated engines."""

from __future__ import annotations

import asyncio

import pytest

from router.core import Router
from tests.router.fake_worker import FakeWorker, answers
from tests.router.rig import (
    ADMIN,
    ALICE,
    all_ready,
    eventually,
    generate,
    request,
    rig,
    states,
    tokens,
)
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2, kv_events_pb2, worker_pb2


async def explain(router: Router, ids: list[int]) -> dict[str, int]:
    body = inference_pb2.ExplainRequest(input=inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids)))
    return {c.worker: c.tokens.device for c in (await router.explain(body, caller=ALICE)).candidates}


@pytest.mark.asyncio
async def test_without_events_a_second_turn_goes_where_the_first_one_was_sent_and_finds_it() -> None:
    async with rig(3, kv_events="off") as fleet:
        router = await fleet.start_router()
        await all_ready(router, 3)
        homes = {}
        for seed in range(6):
            homes[seed] = (await generate(router, request(tokens(seed, 160)))).route.worker
        for seed in range(6):
            again = await generate(router, request([*tokens(seed, 160), 1, 2, 3]))
            assert again.route.worker == homes[seed]
            assert again.route.predicted_cached_tokens == 160
            assert again.usage.prompt_tokens_by_fate.device == 160
        assert len(set(homes.values())) == 3
        assert all(worker.index.approximate for worker in router.list_workers())


@pytest.mark.asyncio
async def test_without_events_each_router_knows_only_what_it_sent_itself() -> None:
    async with rig(1, kv_events="off") as fleet:
        first, second = await fleet.start_router("r0"), await fleet.start_router("r1")
        await asyncio.gather(all_ready(first, 1), all_ready(second, 1))
        await generate(first, request(tokens(1, 96)))
        assert await explain(first, tokens(1, 96)) == {"w0": 95}
        assert await explain(second, tokens(1, 96)) == {"w0": 0}
        found = await generate(second, request(tokens(1, 96)))
        assert found.usage.prompt_tokens_by_fate.device == 95
        assert await explain(second, tokens(1, 96)) == {"w0": 95}


@pytest.mark.asyncio
async def test_without_events_an_answer_corrects_what_was_believed() -> None:
    """Another router's prompts drive out what the first one sent: an answer tells, and all that is older goes."""
    async with rig(1, kv_events="off", device_blocks=40) as fleet:
        first, second = await fleet.start_router("r0"), await fleet.start_router("r1")
        await asyncio.gather(all_ready(first, 1), all_ready(second, 1))
        for seed in (1, 2, 3):
            await generate(first, request(tokens(seed, 96)))
        for seed in range(10, 20):
            await generate(second, request(tokens(seed, 96)))
        assert await explain(first, tokens(1, 96)) == {"w0": 95}  # it cannot know better
        assert (await generate(first, request(tokens(2, 96)))).usage.prompt_tokens_by_fate.device == 0
        assert await explain(first, tokens(1, 96)) == {"w0": 0}
        assert await explain(first, tokens(2, 96)) == {"w0": 95}


@pytest.mark.asyncio
async def test_without_events_a_restart_or_a_clear_ends_the_belief_and_a_broken_stream_does_not() -> None:
    async with rig(1, kv_events="off") as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await generate(router, request(tokens(1, 96)))
        router.fleet.link("w0")._break("the test says so")
        await eventually(lambda: states(router)["w0"] == "LOST")
        await all_ready(router, 1)
        assert await explain(router, tokens(1, 96)) == {"w0": 95}
        await router.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN)
        assert await explain(router, tokens(1, 96)) == {"w0": 0}
        await generate(router, request(tokens(1, 96)))
        assert await explain(router, tokens(1, 96)) == {"w0": 95}
        port = int(fleet.addresses["w0"].rsplit(":", 1)[1])
        await fleet.kill_worker("w0")
        fleet.start_worker("w0", port=port, kv_events="off")
        await all_ready(router, 1)
        assert await explain(router, tokens(1, 96)) == {"w0": 0}


@pytest.mark.asyncio
async def test_without_events_a_clear_by_another_router_ends_the_belief() -> None:
    async with rig(2, kv_events="off") as fleet:
        first, second = await fleet.start_router("r0"), await fleet.start_router("r1")
        await asyncio.gather(all_ready(first, 2), all_ready(second, 2))
        home = (await generate(second, request(tokens(1, 96)))).route.worker
        assert (await explain(second, tokens(1, 96)))[home] == 95
        await first.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN)
        await eventually(lambda: [clear.confirmed for clear in second.fleet.record.clears] == [{"w0", "w1"}])
        assert await explain(second, tokens(1, 96)) == {"w0": 0, "w1": 0}


@pytest.mark.asyncio
async def test_without_events_a_request_that_keeps_nothing_is_not_believed() -> None:
    async with rig(1, kv_events="off") as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await generate(router, request(tokens(1, 96), cache=common_pb2.CacheDirectives(no_store=True)))
        assert await explain(router, tokens(1, 96)) == {"w0": 0}


@pytest.mark.asyncio
async def test_without_events_a_prompt_sent_before_the_first_report_is_believed() -> None:
    """How many blocks fit is known from reports, and the first one may come after the prompt was sent."""

    def reports_then_answers(worker: FakeWorker, job: worker_pb2.Job) -> None:
        room = worker_pb2.TierLoad(tier=common_pb2.TIER_DEVICE, capacity_bytes=100 * worker.hello.block_nbytes)
        worker.say(step=worker_pb2.Step(load=worker_pb2.Load(tiers=[room])))
        answers(worker, job)

    worker = FakeWorker("w0", reports_then_answers, kv_events_off=True, block_nbytes=1024)
    worker.beating = False
    async with rig() as fleet:
        fleet.addresses["w0"] = await worker.start()
        router = await fleet.start_router()
        try:
            await all_ready(router, 1)
            assert router.fleet.link("w0").report is None
            await generate(router, request(tokens(1, 96)))
            assert await explain(router, tokens(1, 96)) == {"w0": 95}
        finally:
            await worker.stop()


@pytest.mark.asyncio
async def test_fleets_may_be_mixed() -> None:
    async with rig() as fleet:
        fleet.start_worker("w0")
        fleet.start_worker("w1", kv_events="off")
        router = await fleet.start_router()
        await all_ready(router, 2)
        homes = {(await generate(router, request(tokens(seed, 96)))).route.worker for seed in range(8)}
        assert homes == {"w0", "w1"}
        await eventually(lambda: len(router._index) == 8 * 6)
        assert [worker.index.approximate for worker in router.list_workers()] == [False, True]


@pytest.mark.asyncio
async def test_a_worker_whose_events_come_late_is_suspect_until_they_are_there() -> None:
    worker = FakeWorker("w0")
    worker.beating = False
    async with rig() as fleet:
        fleet.addresses["w0"] = await worker.start()
        router = await fleet.start_router()
        try:
            await all_ready(router, 1)
            body = inference_pb2.TokenizeRequest(input=request(tokens(1, 128)).input)
            hashes = (await router.tokenize(body, caller=ALICE)).block_hashes
            stored = kv_events_pb2.BlockStored(tier=common_pb2.TIER_DEVICE, hashes=b"".join(hashes))
            worker.say(step=worker_pb2.Step(events=[kv_events_pb2.KvEvent(stored=stored)]))
            worker.say(step=worker_pb2.Step(load=worker_pb2.Load(events_behind_ms=3000)))
            await eventually(lambda: "3.0 s behind" in router.list_workers()[0].index.suspect)
            assert await explain(router, tokens(1, 128)) == {"w0": 32}  # a quarter of eight blocks
            assert router.metrics.registry.get_sample_value("warmkv_index_credit_ratio", {"worker": "w0"}) == 0.25
            worker.say(step=worker_pb2.Step(load=worker_pb2.Load()))
            await eventually(lambda: not router.list_workers()[0].index.suspect)
            assert await explain(router, tokens(1, 128)) == {"w0": 127}
        finally:
            await worker.stop()
