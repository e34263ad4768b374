"""Routers and workers that start anew while others live: how much of what is cached their decisions know.

Real gRPC; simulated workers where tensors do not matter, real ones with a real Redis where the shared tier does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from deploy.redis_server import PrivateRedis
from router.config import RouterConfig
from router.core import Router
from router.decide import Choice, Question
from router.discovery import StaticDiscovery
from router.protocol import WorkerAddress
from tests.kvstore.redis.redis_for_tests import client_of
from tests.router.fake_worker import FakeWorker
from tests.router.rig import (
    ALICE,
    SECRET,
    CharEncoder,
    Rig,
    all_ready,
    eventually,
    generate,
    request,
    rig,
    states,
    tokens,
)
from tests.scenarios.test_peers import CONFIG
from warmkv.v1 import inference_pb2
from workers.build import build_engine
from workers.server import WorkerServer

PROMPTS = 24
BLOCKS = 6


def prompt(number: int, question: int) -> list[int]:
    """One of a few long prefixes, and a question of its own behind it."""
    return tokens(number, BLOCKS * 16) + [question % 1000] * 8


async def explain(router: Router, ids: list[int]) -> inference_pb2.ExplainResponse:
    body = inference_pb2.ExplainRequest(input=inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids)))
    return await router.explain(body, caller=ALICE)


async def warm(router: Router) -> None:
    for number in range(PROMPTS):
        await generate(router, request(prompt(number, 0)))


@asynccontextmanager
async def slow_to_tell() -> AsyncIterator[Rig]:
    """Four workers whose snapshots take a third of a second longer each."""
    async with rig() as fleet:
        for number in range(4):
            fleet.start_worker(f"w{number}", snapshot_takes_s=0.3 * number)
        yield fleet


async def load(router: Router, requests: int) -> list[inference_pb2.GenerateResponse]:
    """Many requests at once, as those find it that come back when a router does."""
    return await asyncio.gather(
        *(generate(router, request(prompt(n % PROMPTS, 1000 + n))) for n in range(requests)),
    )


def watch_decisions(router: Router) -> list[bool]:
    """Of each decision from now on, whether it was blind: no candidate was known to hold a block of the prompt, though
    some worker holds the prefix of every prompt.
    """
    blind: list[bool] = []
    decide = router._decider.decide

    def watched(question: Question) -> Choice | None:
        choice = decide(question)
        if choice is not None:
            known = router._beliefs.match(question.hashes)
            blind.append(not any(overlap.shared for overlap in known.values()))
        return choice

    router._decider.decide = watched  # type: ignore[method-assign]
    return blind


@pytest.mark.asyncio
async def test_a_restarted_router_knows_all_living_workers_before_its_first_decision() -> None:
    async with slow_to_tell() as fleet:
        first = await fleet.start_router("r0", policy="power_of_two")
        await all_ready(first, 4)
        await warm(first)
        assert {w.name for w in first.list_workers() if w.tiers[0].blocks} == {"w0", "w1", "w2", "w3"}
        running = asyncio.gather(load(first, 40), return_exceptions=True)
        await asyncio.sleep(0.05)
        await first.close()  # under load
        await running
        second = await fleet.start_router("r1")
        blind = watch_decisions(second)
        answers = await load(second, 200)
        assert len(blind) >= len(answers) == 200
        assert sum(blind) <= 0.01 * len(blind)
        assert len({answer.route.worker for answer in answers}) == 4


@pytest.mark.asyncio
async def test_without_waiting_a_restarted_router_is_blind() -> None:
    """What the wait is for: were this not so, the test above could not fail."""
    async with slow_to_tell() as fleet:
        first = await fleet.start_router("r0", policy="power_of_two")
        await all_ready(first, 4)
        await warm(first)
        await first.close()
        second = await fleet.start_router("r1", catch_up_s=0.0)
        blind = watch_decisions(second)
        await load(second, PROMPTS)
        assert sum(blind) > PROMPTS / 4


@pytest.mark.asyncio
async def test_the_wait_is_bounded_and_the_state_is_told_meanwhile() -> None:
    worker = FakeWorker("w1")
    worker.snapshots = False  # it never says what it holds
    async with rig(1) as fleet:
        fleet.addresses["w1"] = await worker.start()
        try:
            router = await fleet.start_router(catch_up_s=1.0)
            await eventually(lambda: len(router.list_workers()) == 2 and states(router)["w0"] == "READY")
            assert not router.ready()
            await eventually(lambda: list(router.stats(show_prompts=False).catching_up) == ["w1"])
            assert router.metrics.registry.get_sample_value("warmkv_router_catching_up") == 1
            started = asyncio.get_running_loop().time()
            answer = await generate(router, request(tokens(1, 40)))
            assert answer.route.worker == "w0"
            assert asyncio.get_running_loop().time() - started < 5.0
            assert router.ready()
            assert not router.stats(show_prompts=False).catching_up
            assert router.metrics.registry.get_sample_value("warmkv_router_catching_up") == 0
        finally:
            await worker.stop()


@pytest.mark.asyncio
async def test_a_worker_that_is_not_reached_at_first_is_waited_for() -> None:
    late = FakeWorker("w1")
    port = int((await late.start()).rsplit(":", 1)[1])
    await late.stop()
    late = FakeWorker("w1")
    async with rig(1) as fleet:
        fleet.addresses["w1"] = f"127.0.0.1:{port}"
        router = await fleet.start_router(catch_up_s=30.0)
        link = router.fleet.link
        await eventually(lambda: len(router.list_workers()) == 2 and link("w1").problem and link("w0").synced)
        assert list(router.fleet.catching_up) == ["w1"]
        await late.start(port)
        try:
            await eventually(lambda: not router.fleet.catching_up)
            assert link("w1").synced
        finally:
            await late.stop()


@pytest.mark.asyncio
async def test_a_worker_that_is_no_longer_listed_is_not_waited_for() -> None:
    silent = FakeWorker("w1")
    silent.snapshots = False
    async with rig(1) as fleet:
        fleet.addresses["w1"] = await silent.start()
        try:
            router = await fleet.start_router(catch_up_s=30.0)
            await eventually(lambda: list(router.fleet.catching_up) == ["w1"])
            del fleet.addresses["w1"]
            fleet.announce()
            await eventually(lambda: not router.fleet.catching_up)
        finally:
            await silent.stop()


@pytest.mark.asyncio
async def test_a_worker_that_cannot_be_reached_is_not_waited_for() -> None:
    async with rig(1) as fleet:
        fleet.addresses["gone"] = "127.0.0.1:1"
        router = await fleet.start_router(catch_up_s=30.0)
        async with asyncio.timeout(10):
            await generate(router, request(tokens(1, 40)))


@pytest.mark.asyncio
async def test_a_restarted_workers_old_blocks_count_nothing_at_once_and_its_new_ones_do() -> None:
    """Its messages are numbered from 1 again, and its blocks are new though their names are not."""
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        port = int(fleet.addresses["w0"].rsplit(":", 1)[1])
        old, new = tokens(1, 64), tokens(2, 64)
        await generate(router, request(old))
        await eventually(lambda: router.list_workers()[0].tiers[0].blocks >= 4)
        await fleet.kill_worker("w0")
        fleet.start_worker("w0", port=port)
        await all_ready(router, 1)
        assert (await explain(router, old)).candidates[0].tokens.device == 0
        await generate(router, request(new))
        await eventually(lambda: router.list_workers()[0].tiers[0].blocks >= 4)
        assert (await explain(router, new)).candidates[0].tokens.device == 63
        assert (await explain(router, old)).candidates[0].tokens.device == 0


@pytest.mark.asyncio
async def test_what_the_device_drops_still_counts_where_host_holds_it() -> None:
    async with rig(1, device_blocks=24, host_blocks=400) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await generate(router, request(tokens(1, 160)))
        for seed in range(2, 8):
            await generate(router, request(tokens(seed, 160)))
        evicted = (await explain(router, tokens(1, 160))).candidates[0].tokens
        assert evicted.device == 0
        assert evicted.host == 159


# The shared tier


@pytest.fixture
def redis() -> Iterator[PrivateRedis]:
    with PrivateRedis(maxmemory_bytes=256 << 20) as running:
        yield running


@asynccontextmanager
async def on_redis(url: str, workers: int = 2, **settings: object) -> AsyncIterator[Router]:
    """A fleet of its own around a server: all of it is new."""
    servers: dict[str, WorkerServer] = {}
    for number in range(workers):
        config = replace(
            CONFIG,
            **{"name": f"w{number}", "redis_url": url, "peers": False, "redis_timeout_s": 5.0, **settings},  # type: ignore[arg-type]
        )
        servers[config.name] = WorkerServer(config, await asyncio.to_thread(build_engine, config))
    addresses = [WorkerAddress(name, server.start()) for name, server in servers.items()]
    router = Router(
        RouterConfig(name="r0", model_dir="", model_name="tiny", fleet_secret=SECRET),
        CharEncoder(),
        StaticDiscovery(addresses),
        wait_for_worker_s=5.0,
    )
    try:
        await router.start()
        await all_ready(router, workers)
        # A server that is slow to answer a worker is told in a report and not in the hello.
        await eventually(lambda: all(link.has_shared_tier for link in router.fleet.links()))
        yield router
    finally:
        await router.close()
        for server in servers.values():
            await asyncio.to_thread(server.close, flush_s=5.0)


async def shared_tokens(router: Router, ids: list[int]) -> dict[str, int]:
    return {c.worker: c.tokens.redis for c in (await explain(router, ids)).candidates}


async def shared_blocks(router: Router, ids: list[int]) -> dict[str, int]:
    """What each worker could reuse of a prompt, whether by its measured reads that is worth its while or not."""
    body = inference_pb2.TokenizeRequest(input=request(ids).input)
    names = list((await router.tokenize(body, caller=ALICE)).block_hashes)
    return {worker: overlap.shared for worker, overlap in router._beliefs.match(names).items()}


@pytest.mark.asyncio
async def test_after_all_was_restarted_the_first_decision_counts_the_shared_tier(redis: PrivateRedis) -> None:
    ids = tokens(1, 330)
    async with on_redis(redis.url) as router:
        first = await generate(router, request(ids))
        await eventually(lambda: (router.stats(show_prompts=False).shared_tier.blocks) >= 20)
        used = first.route.worker
        other = {"w0": "w1", "w1": "w0"}[used]
        assert (await shared_tokens(router, ids))[other] == 320  # for every worker, not the writer alone
    async with on_redis(redis.url) as router:
        assert await shared_blocks(router, ids) == {"w0": 20, "w1": 20}
        again = await generate(router, request(ids))
        assert again.route.predicted_cached_tokens == 320
        assert again.usage.prompt_tokens_by_fate.redis == 320
        assert again.token_ids == first.token_ids


@pytest.mark.asyncio
async def test_what_was_flushed_meanwhile_is_not_counted(redis: PrivateRedis) -> None:
    ids = tokens(1, 330)
    async with on_redis(redis.url, workers=1) as router:
        await generate(router, request(ids))
        await eventually(lambda: (router.stats(show_prompts=False).shared_tier.blocks) >= 20)
    with client_of(redis) as client:
        client.flushall()
    async with on_redis(redis.url, workers=1) as router:
        assert await shared_tokens(router, ids) == {"w0": 0}
        assert router.stats(show_prompts=False).shared_tier.blocks == 0


@pytest.mark.asyncio
async def test_a_worker_that_is_told_not_to_ask_knows_nothing(redis: PrivateRedis) -> None:
    ids = tokens(1, 330)
    async with on_redis(redis.url, workers=1) as router:
        await generate(router, request(ids))
        await eventually(lambda: (router.stats(show_prompts=False).shared_tier.blocks) >= 20)
    async with on_redis(redis.url, workers=1, redis_recall_s=0.0) as router:
        assert await shared_tokens(router, ids) == {"w0": 0}
