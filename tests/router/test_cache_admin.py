"""What operators ask of the cache, over real gRPC to simulated workers, and to fakes where a worker must misbehave."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from kvstore.blocks import block_hashes
from kvstore.errors import InvariantError
from router.core import Router
from router.errors import InvalidRequest, NoWorkerAvailable, RouterError, WorkerLost, WorkerNotFound
from tests.router.fake_worker import FakeWorker, refuses, stays_quiet
from tests.router.rig import (
    ADMIN,
    ALICE,
    BLOCK,
    FAST,
    all_ready,
    context,
    eventually,
    generate,
    request,
    rig,
    states,
    tokens,
)
from tests.router.test_fleet import fakes
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2, worker_pb2

DEVICE, HOST = common_pb2.TIER_DEVICE, common_pb2.TIER_HOST


def prompt(ids: list[int]) -> inference_pb2.Input:
    return inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids))


async def listed(router: Router, **fields: Any) -> list[admin_pb2.CachedBlock]:
    """All pages."""
    blocks, token = [], ""
    while True:
        asked = admin_pb2.ListBlocksRequest(page_token=token, **fields)
        page = await router.cache.list_blocks(asked, caller=ADMIN)
        assert not page.problems
        blocks += page.blocks
        if not (token := page.next_page_token):
            return blocks


def by_tier(counts: Any) -> dict[int, int]:
    return {count.tier: count.blocks for count in counts}


@pytest.mark.asyncio
async def test_all_blocks_are_listed_once_whatever_the_size_of_a_page() -> None:
    async with rig(2, host_blocks=512) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        for seed in range(6):
            await generate(router, request(tokens(seed, 50)))
        await generate(router, request(tokens(9, 70)), caller=ADMIN)
        whole = await listed(router, page_size=1000)
        assert len(whole) == 6 * 3 + 4
        assert [(b.worker, b.hash) for b in whole] == sorted((b.worker, b.hash) for b in whole)
        assert {(b.tenant, b.tokens) for b in whole} == {("alice", BLOCK), ("ops", BLOCK)}
        assert {tuple(b.tiers) for b in whole} == {(DEVICE, HOST)}
        for size in (1, 3, 22, 23):
            assert await listed(router, page_size=size) == whole
        starts = [b for b in whole if b.first_token == 0]
        assert len(starts) == 7
        assert all(not b.parent for b in starts)
        assert sorted({b.first_token for b in whole}) == [0, 16, 32, 48]


@pytest.mark.asyncio
async def test_blocks_are_listed_by_tenant_worker_tier_and_prompt() -> None:
    async with rig(2, host_blocks=2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        trunk = tokens(1, 48)
        for tail in ([5] * 16, [6] * 32):
            await generate(router, request(trunk + tail + [1]))
        await generate(router, request(tokens(2, 32)), caller=ADMIN)
        assert {b.tenant for b in await listed(router, tenant="ops")} == {"ops"}
        assert await listed(router, tenant="nobody") == []
        of_w0, of_w1 = await listed(router, worker="w0"), await listed(router, worker="w1")
        assert {b.worker for b in of_w0} <= {"w0"}
        assert of_w0 + of_w1 == await listed(router)
        on_host = await listed(router, tier=HOST, page_size=1)
        assert on_host
        assert [b.hash for b in on_host] == [b.hash for b in await listed(router) if HOST in b.tiers]
        assert await listed(router, tier=common_pb2.TIER_DISK) == []
        below = await listed(router, tenant="alice", prompt=prompt(trunk))
        assert sorted({b.hash: b.first_token for b in below}.values()) == [32, 48, 48, 64]
        shallow = await listed(router, tenant="alice", prompt=prompt([*trunk, *[6] * 32]))
        assert [b.first_token for b in shallow] == [64]
        assert await listed(router, prompt=prompt(trunk)) == [], "an operator's own prompt, not alice's"


@pytest.mark.asyncio
async def test_with_a_prompt_the_answer_says_how_much_of_it_each_worker_holds() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        ids = tokens(1, 80)
        worker = (await generate(router, request(ids[:50]))).route.worker
        asked = admin_pb2.ListBlocksRequest(tenant="alice", prompt=prompt(ids))
        answer = await router.cache.list_blocks(asked, caller=ADMIN)
        assert list(answer.blocks) == []
        held = answer.prompt_held
        assert (held.tenant, held.tokens, held.redis_tokens) == ("alice", 80, 0)
        assert {each.worker: each.device_tokens for each in held.held} == {"w0": 0, "w1": 0} | {worker: 48}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"page_size": 1001}, "page_size is 1001"),
        ({"page_token": "nonsense"}, "page_token is damaged"),
        ({"page_token": "k6FhoWE="}, "page_token is damaged"),
        ({"tier": 99}, "no tier 99"),
        ({"prompt": prompt([1, 2, 3])}, "shorter than a block; send at least 16"),
        ({"prompt": inference_pb2.Input()}, "no input"),
    ],
    ids=str,
)
async def test_a_question_that_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        with pytest.raises(InvalidRequest, match=said):
            await router.cache.list_blocks(admin_pb2.ListBlocksRequest(**fields), caller=ADMIN)


@pytest.mark.asyncio
async def test_a_page_token_holds_for_its_own_question_only() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await generate(router, request(tokens(1, 50)))
        page = await router.cache.list_blocks(admin_pb2.ListBlocksRequest(page_size=1), caller=ADMIN)
        other = admin_pb2.ListBlocksRequest(page_token=page.next_page_token, tenant="alice")
        with pytest.raises(InvalidRequest, match="another question"):
            await router.cache.list_blocks(other, caller=ADMIN)
        wider = admin_pb2.ListBlocksRequest(page_token=page.next_page_token, page_size=50)
        assert len((await router.cache.list_blocks(wider, caller=ADMIN)).blocks) == 2


@pytest.mark.asyncio
async def test_unknown_workers_are_not_found_and_without_any_worker_there_is_no_answer() -> None:
    async with rig() as fleet:
        router = await fleet.start_router()
        cache = router.cache
        with pytest.raises(NoWorkerAvailable):
            await cache.list_blocks(admin_pb2.ListBlocksRequest(), caller=ADMIN)
        with pytest.raises(NoWorkerAvailable):
            await cache.check(admin_pb2.CheckStoreRequest(), caller=ADMIN)
        assert list(cache.stats(admin_pb2.GetCacheStatsRequest(), caller=ADMIN).workers) == []
        fleet.start_worker("w0")
        await all_ready(router, 1)
        ids = tokens(1, 32)
        for asked in (
            cache.list_blocks(admin_pb2.ListBlocksRequest(worker="w9"), caller=ADMIN),
            cache.check(admin_pb2.CheckStoreRequest(workers=["w0", "w9"]), caller=ADMIN),
            cache.warm(admin_pb2.WarmRequest(prompt=prompt(ids), workers=["w9"]), caller=ADMIN),
            cache.pin(admin_pb2.PinRequest(tenant="a", workers=["w9"]), caller=ADMIN),
            cache.unpin(admin_pb2.UnpinRequest(tenant="a", workers=["w9"]), caller=ADMIN),
        ):
            with pytest.raises(WorkerNotFound, match="w9"):
                await asked
        with pytest.raises(WorkerNotFound, match="w9"):
            cache.stats(admin_pb2.GetCacheStatsRequest(worker="w9"), caller=ADMIN)


@pytest.mark.asyncio
async def test_statistics_are_those_that_the_worker_reported() -> None:
    async with rig(2, host_blocks=64) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        router.drain_worker("w1")
        ids = tokens(1, 64)
        await generate(router, request(ids))
        await generate(router, request(ids))
        await router.cache.pin(admin_pb2.PinRequest(tenant="alice"), caller=ADMIN)

        def tiers() -> list[admin_pb2.TierCache]:
            asked = admin_pb2.GetCacheStatsRequest(worker="w0")
            (cache,) = router.cache.stats(asked, caller=ADMIN).workers
            return list(cache.tiers)

        await eventually(lambda: [(tier.tier, tier.pinned) for tier in tiers()] == [(DEVICE, 0), (HOST, 4)])
        device = tiers()[0]
        assert (device.blocks, device.stores, device.hits, device.healthy) == (4, 4, 4, True)
        both = router.cache.stats(admin_pb2.GetCacheStatsRequest(), caller=ADMIN).workers
        assert [(each.worker, each.state) for each in both] == [
            ("w0", admin_pb2.WORKER_STATE_READY),
            ("w1", admin_pb2.WORKER_STATE_DRAINED),
        ]


# Pins.


@pytest.mark.asyncio
async def test_a_pinned_prompt_outlives_what_would_have_taken_its_room() -> None:
    async with rig(1, device_blocks=16, host_blocks=0) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        ids = tokens(1, 64)
        await generate(router, request([*ids, 5]))
        answer = await router.cache.pin(admin_pb2.PinRequest(tenant="alice", prompt=prompt(ids)), caller=ADMIN)
        assert [(w.worker, by_tier(w.pinned), w.problem) for w in answer.workers] == [("w0", {DEVICE: 4}, "")]
        for seed in range(2, 20):
            await generate(router, request(tokens(seed, 100)))
        kept = await listed(router, tenant="alice", prompt=prompt(ids))
        assert [b.pinned for b in kept] == [True]
        assert sum(b.pinned for b in await listed(router)) == 4
        done = await router.cache.unpin(admin_pb2.UnpinRequest(tenant="alice", prompt=prompt(ids)), caller=ADMIN)
        assert [by_tier(w.unpinned) for w in done.workers] == [{DEVICE: 4}]
        for seed in range(20, 40):
            await generate(router, request(tokens(seed, 100)))
        assert not any(b.pinned for b in await listed(router))
        assert await listed(router, tenant="alice", prompt=prompt(ids)) == []


@pytest.mark.asyncio
async def test_all_blocks_of_a_tenant_are_pinned_in_pieces_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.cache_commands.MAX_BLOCKS", 5)
    monkeypatch.setattr("router.cache_admin.MAX_BLOCKS", 5)
    async with rig(2, host_blocks=512) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        for seed in range(8):
            await generate(router, request(tokens(seed, 70)))
        await generate(router, request(tokens(50, 200)), caller=ADMIN)
        answer = await router.cache.pin(admin_pb2.PinRequest(tenant="alice", seconds=600), caller=ADMIN)
        total = sum(by_tier(w.pinned).get(HOST, 0) for w in answer.workers)
        assert total == 32
        assert {b.tenant for b in await listed(router) if b.pinned} == {"alice"}
        one = await router.cache.unpin(
            admin_pb2.UnpinRequest(tenant="ops", prompt=prompt(tokens(50, 200)), workers=["w0"]), caller=ADMIN
        )
        assert [(w.worker, by_tier(w.unpinned)) for w in one.workers] == [("w0", {})]
        done = await router.cache.unpin(admin_pb2.UnpinRequest(tenant="alice"), caller=ADMIN)
        assert sum(by_tier(w.unpinned).get(HOST, 0) for w in done.workers) == 32
        assert not any(b.pinned for b in await listed(router))


@pytest.mark.asyncio
async def test_a_pin_needs_a_scope_and_a_time_that_makes_sense() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        with pytest.raises(InvalidRequest, match="a tenant nor a prompt"):
            await router.cache.pin(admin_pb2.PinRequest(), caller=ADMIN)
        with pytest.raises(InvalidRequest, match="a tenant nor a prompt"):
            await router.cache.unpin(admin_pb2.UnpinRequest(), caller=ADMIN)
        for seconds in (0, 31_536_001):
            with pytest.raises(InvalidRequest, match="leave it out to pin until Unpin"):
                await router.cache.pin(admin_pb2.PinRequest(tenant="a", seconds=seconds), caller=ADMIN)


# Warming.


@pytest.mark.asyncio
async def test_warming_hands_a_fixed_end_and_a_priority_on() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        ids, ends = tokens(1, 64), int(time.time()) + 900
        asked = admin_pb2.WarmRequest(prompt=prompt(ids), compute=True, expires_at=ends, keep_priority=60)
        await router.cache.warm(asked, caller=ADMIN)
        found = await listed(router)
        assert {(b.ttl_seconds, b.priority) for b in found} == {(0.0, 60)}
        assert all(800 < b.ttl_left_seconds <= 900 for b in found)
        later = admin_pb2.WarmRequest(prompt=prompt(ids), ttl_seconds=3000, fixed_ttl=True)
        await router.cache.warm(later, caller=ADMIN)  # nothing to bring up, but a longer promise
        assert all(2900 < b.ttl_left_seconds <= 3001 for b in await listed(router))


@pytest.mark.asyncio
async def test_computing_a_prompt_makes_the_next_request_a_hit_and_counts_as_no_request() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        ids = tokens(1, 100)
        asked = admin_pb2.WarmRequest(prompt=prompt(ids), tenant="alice", compute=True, ttl_seconds=60)
        answer = await router.cache.warm(asked, caller=ADMIN)
        (warmed,) = answer.workers
        assert (answer.prompt_tokens, answer.blocks, warmed.problem) == (100, 6, "")
        assert warmed.fates == common_pb2.TokensByFate(computed=100)
        assert {b.ttl_seconds for b in await listed(router, worker=warmed.worker)} == {60.0}
        assert router.stats(show_prompts=False).prompt_tokens == admin_pb2.TokensByFate64()
        other = {"w0": "w1", "w1": "w0"}[warmed.worker]
        router.drain_worker(other)
        again = await generate(router, request(ids))
        router.undrain_worker(other)
        assert again.usage.prompt_tokens_by_fate.device == 96
        both = admin_pb2.WarmRequest(prompt=prompt(ids), tenant="alice", compute=True, workers=["w1", "w0", "w1"])
        fates = {w.worker: w.fates.device for w in (await router.cache.warm(both, caller=ADMIN)).workers}
        assert fates == {"w0": 0, "w1": 0} | {warmed.worker: 96}
        assert {b.worker for b in await listed(router)} == {"w0", "w1"}


@pytest.mark.asyncio
async def test_warming_goes_where_the_policy_would_send_the_prompt_and_to_drained_workers_when_named() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        router.drain_worker("w0")
        asked = admin_pb2.WarmRequest(prompt=prompt(tokens(1, 32)), compute=True)
        assert [w.worker for w in (await router.cache.warm(asked, caller=ADMIN)).workers] == ["w1"]
        asked.workers.append("w0")
        (warmed,) = (await router.cache.warm(asked, caller=ADMIN)).workers
        assert (warmed.worker, warmed.fates.computed) == ("w0", 32)
        router.drain_worker("w1")
        del asked.workers[:]
        with pytest.raises(NoWorkerAvailable, match="name the workers"):
            await router.cache.warm(asked, caller=ADMIN)


@pytest.mark.asyncio
async def test_bringing_up_moves_what_only_host_holds_to_the_device() -> None:
    async with rig(1, device_blocks=10, host_blocks=64) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        ids = tokens(1, 64)
        await generate(router, request([*ids, 1]))
        await generate(router, request(tokens(2, 140)))
        before = {b.hash for b in await listed(router, tenant="alice") if DEVICE in b.tiers}
        asked = admin_pb2.WarmRequest(prompt=prompt(ids), tenant="alice")
        (warmed,) = (await router.cache.warm(asked, caller=ADMIN)).workers
        names = [name[:16].hex() for name in block_hashes(ids, router._preparer.root_of_tenant("alice")[0], BLOCK)]
        assert warmed.started == len(set(names) - before) > 0
        after = {b.hash for b in await listed(router, tenant="alice") if DEVICE in b.tiers}
        assert set(names) <= after
        cold = admin_pb2.WarmRequest(prompt=prompt(tokens(77, 64)))
        assert [w.started for w in (await router.cache.warm(cold, caller=ADMIN)).workers] == [0]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (admin_pb2.WarmRequest(), "no input"),
        (admin_pb2.WarmRequest(prompt=prompt([1])), "shorter than a block"),
        (admin_pb2.WarmRequest(prompt=prompt([1] * 20), ttl_seconds=0), "ttl_seconds is 0"),
        (admin_pb2.WarmRequest(prompt=prompt([1] * 20), expires_at=5), "in the past"),
        (admin_pb2.WarmRequest(prompt=prompt([1] * 20), fixed_ttl=True), "set ttl_seconds too"),
        (admin_pb2.WarmRequest(prompt=prompt([1] * 20), keep_priority=101), "from 0 to 100"),
        (admin_pb2.WarmRequest(prompt=prompt([5000] * 20)), "out of range"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
async def test_a_prompt_that_cannot_be_warmed_is_refused(asked: admin_pb2.WarmRequest, said: str) -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        with pytest.raises(InvalidRequest, match=said):
            await router.cache.warm(asked, caller=ADMIN)


@pytest.mark.asyncio
async def test_a_worker_that_refuses_or_dies_while_it_computes_is_named_with_the_reason() -> None:
    good, refusing, dying = FakeWorker("w0"), FakeWorker("w1", refuses("TOO_BUSY", "no room")), FakeWorker("w2")
    dying.submitted = lambda worker, job: worker.hang_up()
    asked = admin_pb2.WarmRequest(prompt=prompt(tokens(1, 32)), compute=True, workers=["w0", "w1", "w2"])
    async with fakes(good, refusing, dying) as (_, router):
        await all_ready(router, 3)
        told = {w.worker: w.problem for w in (await router.cache.warm(asked, caller=ADMIN)).workers}
        assert told["w0"] == ""
        assert told["w1"] == "no room"
        assert "w2 was lost" in told["w2"]
        del asked.workers[:]
        asked.workers.append("w1")
        with pytest.raises(WorkerLost, match="w1: no room"):
            await router.cache.warm(asked, caller=ADMIN)


@pytest.mark.asyncio
async def test_a_warming_that_nobody_waits_for_any_more_is_cancelled_on_the_worker() -> None:
    mute = FakeWorker("w0", stays_quiet)
    async with fakes(mute) as (_, router):
        await all_ready(router, 1)
        asked = admin_pb2.WarmRequest(prompt=prompt(tokens(1, 32)), compute=True)
        warming = asyncio.ensure_future(router.cache.warm(asked, caller=ADMIN))
        await eventually(lambda: "submit" in mute.kinds())
        (job,) = [each.submit for each in mute.heard if each.HasField("submit")]
        assert (job.sampling.max_tokens, job.priority) == (1, -100)
        warming.cancel()
        await eventually(lambda: "cancel" in mute.kinds())


# Audits, and workers that do not answer.


@pytest.mark.asyncio
async def test_an_audit_tells_which_store_is_wrong_and_how() -> None:
    async with rig(2, host_blocks=16) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        sound = await router.cache.check(admin_pb2.CheckStoreRequest(), caller=ADMIN)
        assert [(w.worker, w.wrong, w.problem) for w in sound.workers] == [("w0", "", ""), ("w1", "", "")]

        def broken() -> None:
            raise InvariantError("slot 3 is held twice")

        fleet.workers["w1"]._engine.cache.check = broken  # type: ignore[method-assign]
        found = await router.cache.check(admin_pb2.CheckStoreRequest(), caller=ADMIN)
        assert [(w.worker, w.wrong) for w in found.workers] == [("w0", ""), ("w1", "slot 3 is held twice")]
        named = await router.cache.check(admin_pb2.CheckStoreRequest(workers=["w0"]), caller=ADMIN)
        assert [w.worker for w in named.workers] == ["w0"]


@pytest.mark.asyncio
async def test_a_worker_that_is_away_is_told_of_and_the_others_answer() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        for seed in range(4):
            await generate(router, request(tokens(seed, 40)))
        await fleet.kill_worker("w0")
        await eventually(lambda: states(router)["w0"] == "LOST")
        page = await router.cache.list_blocks(admin_pb2.ListBlocksRequest(), caller=ADMIN)
        assert {b.worker for b in page.blocks} == {"w1"}
        assert [problem.worker for problem in page.problems] == ["w0"]
        assert "is lost" in page.problems[0].problem
        pinned = await router.cache.pin(admin_pb2.PinRequest(tenant="alice"), caller=ADMIN)
        assert [bool(w.problem) for w in pinned.workers] == [True, False]
        checked = await router.cache.check(admin_pb2.CheckStoreRequest(), caller=ADMIN)
        assert [bool(w.problem) for w in checked.workers] == [True, False]
        stats = router.cache.stats(admin_pb2.GetCacheStatsRequest(), caller=ADMIN).workers
        assert [(w.state == admin_pb2.WORKER_STATE_LOST, len(w.tiers) > 0) for w in stats] == [
            (True, False),
            (False, True),
        ]
        with pytest.raises(WorkerLost, match="w0: it is lost"):
            await router.cache.list_blocks(admin_pb2.ListBlocksRequest(worker="w0"), caller=ADMIN)
        with pytest.raises(WorkerLost, match="w0: it is lost"):
            await router.cache.check(admin_pb2.CheckStoreRequest(workers=["w0"]), caller=ADMIN)


@pytest.mark.asyncio
async def test_a_worker_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.cache_orders.ANSWER_TIMEOUT_S", 0.2)
    mute = FakeWorker("w0")
    async with fakes(mute) as (_, router):
        await all_ready(router, 1)
        with pytest.raises(WorkerLost, match=r"w0: no answer within 0\.2 s"):
            await router.cache.check(admin_pb2.CheckStoreRequest(), caller=ADMIN)
        await eventually(lambda: "cache" in mute.kinds())
        (order,) = [each.cache for each in mute.heard if each.HasField("cache")]
        mute.say(cache_done=worker_pb2.CacheDone(command_id=order.command_id))  # too late, and harmless
        await eventually(lambda: not router.fleet.link("w0")._asked._orders)
        assert states(router)["w0"] == "READY"


@pytest.mark.asyncio
async def test_an_order_to_a_worker_that_dies_meanwhile_ends_at_once() -> None:
    mute = FakeWorker("w0")
    async with fakes(mute) as (_, router):
        await all_ready(router, 1)
        checking = asyncio.ensure_future(router.cache.check(admin_pb2.CheckStoreRequest(), caller=ADMIN))
        await eventually(lambda: "cache" in mute.kinds())
        mute.hang_up()
        with pytest.raises(WorkerLost, match="it was lost"):
            await checking


@pytest.mark.asyncio
async def test_an_answer_that_may_be_lost_in_a_gap_is_not_waited_for() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        checking = asyncio.ensure_future(router.cache.check(admin_pb2.CheckStoreRequest(), caller=ADMIN))
        await eventually(lambda: "cache" in worker.kinds())
        worker.skip()
        with pytest.raises(WorkerLost, match="messages were lost"):
            await checking


@pytest.mark.asyncio
async def test_a_list_that_finds_little_comes_back_with_what_it_has() -> None:
    """Of very many blocks few may lie in a tier: the caller hears from us before the end, and goes on."""
    worker = FakeWorker("w0")
    name = b"a" * 32

    async def answer() -> None:
        answered = 0
        while True:
            orders = [each.cache for each in worker.heard if each.HasField("cache")]
            for order in orders[answered:]:
                worker.say(cache_done=worker_pb2.CacheDone(command_id=order.command_id, next=name))
            answered = len(orders)
            await asyncio.sleep(0.001)

    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        answering = asyncio.ensure_future(answer())
        page = await router.cache.list_blocks(admin_pb2.ListBlocksRequest(tier=HOST), caller=ADMIN)
        answering.cancel()
    assert list(page.blocks) == []
    assert page.next_page_token


# The log.


@pytest.mark.asyncio
async def test_every_order_is_logged_with_who_what_and_how_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    ids = tokens(1, 32)
    async with rig(1, timing=FAST) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await generate(router, request(ids), caller=ALICE, about=context())
        cache = router.cache
        with caplog.at_level(logging.INFO, "router.audit"):
            await cache.list_blocks(admin_pb2.ListBlocksRequest(), caller=ADMIN)
            cache.stats(admin_pb2.GetCacheStatsRequest(), caller=ADMIN)
            await cache.warm(admin_pb2.WarmRequest(prompt=prompt(ids), compute=True), caller=ADMIN)
            await cache.pin(admin_pb2.PinRequest(tenant="alice", prompt=prompt(ids), seconds=60), caller=ADMIN)
            await cache.unpin(admin_pb2.UnpinRequest(tenant="alice"), caller=ADMIN)
            await cache.check(admin_pb2.CheckStoreRequest(), caller=ADMIN)
            await router.clear_cache(admin_pb2.ClearCacheRequest(tenant="alice"), caller=ADMIN)
            with pytest.raises(RouterError):
                await cache.pin(admin_pb2.PinRequest(), caller=ADMIN)
    lines: list[Any] = [record for record in caplog.records if record.name == "router.audit"]
    told = [(line.order, line.tenant, line.outcome) for line in lines]
    orders = ["list_blocks", "cache_stats", "warm", "pin", "unpin", "check", "clear"]
    assert told == [*((order, "ops", "OK") for order in orders), ("pin", "ops", "INVALID_REQUEST")]
    pin = lines[3]
    last = block_hashes(ids, router._preparer.root_of_tenant("alice")[0], BLOCK)[-1]
    assert (pin.of_tenant, pin.seconds, pin.workers) == ("alice", 60, {"w0": "OK"})
    assert pin.scope == f"2 blocks up to {last[:16].hex()}"
