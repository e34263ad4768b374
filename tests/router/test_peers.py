"""Whom a job names as peers, what that does to a choice, and how a clear keeps them from undoing it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.attempts import _for_one_link
from router.core import Router
from router.errors import WorkerLost
from router.peers import MAX_HINTS, Holder, Holders
from tests.router.fake_worker import FakeWorker
from tests.router.rig import ADMIN, ALICE, all_ready, eventually, generate, request, states, tokens
from tests.router.test_fleet import explain, fakes
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2, kv_events_pb2, worker_pb2

IDS = tokens(1, 100)  # six full blocks


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9)), st.sampled_from("abcdefg"), st.integers(0, 9))
def test_those_that_hold_more_are_named_the_deepest_first(depths: dict[str, int], worker: str, own: int) -> None:
    held = Holders(lambda: (Holder(name, f"{name}:1", blocks) for name, blocks in depths.items()))
    hints = held.hints(worker, own)
    deeper = {name: blocks for name, blocks in depths.items() if blocks > own and name != worker}
    assert [each.blocks for each in hints] == sorted(deeper.values(), reverse=True)[:MAX_HINTS]
    assert all(deeper[each.worker] == each.blocks for each in hints)
    assert held.depth(worker) == max([blocks for name, blocks in depths.items() if name != worker], default=0)


def test_a_job_that_is_sent_again_is_another_message_without_the_first_ones_peers() -> None:
    job = worker_pb2.Job(token_ids=[1, 2], peers=[])
    first = _for_one_link(job, None)
    assert first is job, "no copy of a long prompt for the one link that most jobs ever see"
    first.job_id = 7
    first.peers.add(address="10.0.0.1:7", blocks=3)
    again = _for_one_link(job, None)
    assert again is not first
    assert (list(again.token_ids), list(again.peers)) == ([1, 2], [])


class HostWorker(FakeWorker):
    """Holds the first blocks of `IDS` in host RAM; reports what reading from peers costs."""

    def holds_first(self, hashes: list[bytes], blocks: int, tier: int = common_pb2.TIER_HOST) -> None:
        stored = kv_events_pb2.BlockStored(tier=tier, hashes=b"".join(hashes[:blocks]))  # type: ignore[arg-type]
        self.say(snapshot=worker_pb2.Snapshot(blocks=[stored] if blocks else [], first=True, last=True))

    def jobs(self) -> list[worker_pb2.Job]:
        return [one.submit for one in self.heard if one.HasField("submit")]

    def measured(self, block_ms: float) -> None:
        self.beating = False
        peer = worker_pb2.TierLoad(
            tier=common_pb2.TIER_PEER, healthy=True, hits=9, read_latency_ms=0.1, read_block_ms=0.1 + block_ms
        )
        host = worker_pb2.TierLoad(tier=common_pb2.TIER_HOST, healthy=True, read_latency_ms=0.1, read_block_ms=0.2)
        self.say(step=worker_pb2.Step(load=worker_pb2.Load(prefill_token_ms=1.0, tiers=[peer, host])))


@asynccontextmanager
async def fleet_of(*depths: int, policy: str = "cache_aware") -> AsyncIterator[tuple[Router, list[HostWorker]]]:
    """A worker for each depth, which holds so many blocks of `IDS`."""
    workers = [HostWorker(f"w{n}", peer_address=f"10.0.0.{n}:7") for n in range(len(depths))]
    async with fakes(*workers) as (_, router):
        await all_ready(router, len(workers))
        router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name=policy)), caller=ADMIN)
        hashes = await names(router)
        for worker, depth in zip(workers, depths, strict=True):
            worker.holds_first(hashes, depth)
        wanted = {f"w{n}": depth for n, depth in enumerate(depths)}
        await eventually(lambda: known(router, hashes) == wanted)
        yield router, workers


async def names(router: Router) -> list[bytes]:
    body = inference_pb2.TokenizeRequest(input=request(IDS).input)
    return list((await router.tokenize(body, caller=ALICE)).block_hashes)


def known(router: Router, hashes: list[bytes]) -> dict[str, int]:
    return {name: overlap.host for name, overlap in router._index.match(hashes).items()}


def peers_of(job: worker_pb2.Job) -> list[tuple[str, int]]:
    return [(hint.address, hint.blocks) for hint in job.peers]


async def asked(router: Router, workers: list[HostWorker], **fields: object) -> tuple[str, list[tuple[str, int]]]:
    """Send the prompt; which worker got it, and whom it may ask."""
    before = {worker.name: len(worker.jobs()) for worker in workers}
    await generate(router, request(IDS, **fields))
    ((worker, job),) = [(w.name, w.jobs()[-1]) for w in workers if len(w.jobs()) > before[w.name]]
    return worker, peers_of(job)


@pytest.mark.asyncio
async def test_a_job_names_those_that_hold_more_than_its_worker() -> None:
    async with fleet_of(2, 6, 4, 5, 3, policy="round_robin") as (router, workers):
        sent = dict([await asked(router, workers) for _ in workers])
    first, second, third, fourth = ("10.0.0.1:7", 6), ("10.0.0.3:7", 5), ("10.0.0.2:7", 4), ("10.0.0.4:7", 3)
    assert sent == {
        "w0": [first, second, third],
        "w1": [],
        "w2": [first, second],
        "w3": [first],
        "w4": [first, second, third],
    }
    assert fourth not in sent["w0"], "three are enough"


@pytest.mark.asyncio
async def test_a_drained_worker_is_named_and_a_silent_one_is_not() -> None:
    async with fleet_of(0, 6, 5) as (router, workers):
        router.drain_worker("w1")
        router.drain_worker("w2")
        assert await asked(router, workers) == ("w0", [("10.0.0.1:7", 6), ("10.0.0.2:7", 5)])
        workers[1].beating = False
        await eventually(lambda: states(router)["w1"] == "SUSPECT")
        assert await asked(router, workers) == ("w0", [("10.0.0.2:7", 5)])


@pytest.mark.asyncio
async def test_a_request_that_reads_no_cache_names_nobody() -> None:
    async with fleet_of(0, 6, policy="round_robin") as (router, workers):
        cache = common_pb2.CacheDirectives(no_read=True)
        assert [(await asked(router, workers, cache=cache))[1] for _ in workers] == [[], []]


@pytest.mark.asyncio
async def test_workers_that_serve_nobody_are_not_named() -> None:
    async with fleet_of(0, 6, policy="round_robin") as (router, workers):
        workers[1].hello.peer_address = ""
        workers[1].hang_up()
        await eventually(lambda: workers[1].connects == 2)
        workers[1].holds_first(await names(router), 6)
        await all_ready(router, 2)
        hashes = await names(router)
        await eventually(lambda: known(router, hashes)["w1"] == 6)
        assert [(await asked(router, workers))[1] for _ in workers] == [[], []]


@pytest.mark.asyncio
async def test_what_peers_hold_is_in_the_price_once_it_is_measured_and_shown() -> None:
    async with fleet_of(0, 6) as (router, workers):
        shown = {c.worker: c.tokens for c in (await explain(router, IDS)).candidates}
        assert (shown["w0"].peer, shown["w0"].computed) == (0, 100)
        for worker in workers:
            worker.measured(block_ms=5.0)
        await eventually(lambda: all(link.report and link.report.load.fit for link in router.fleet.links()))
        explained = await explain(router, IDS)
        shown = {c.worker: c for c in explained.candidates}
        assert (shown["w0"].tokens.peer, shown["w0"].tokens.computed) == (96, 4)
        assert (shown["w1"].tokens.peer, shown["w1"].tokens.host) == (0, 96)
        assert explained.worker == "w1", "what is at hand is nearer still"
        router.drain_worker("w1")
        shown = {c.worker: c for c in (await explain(router, IDS)).candidates}
        assert (shown["w0"].eligible, shown["w0"].tokens.peer) == (True, 96)
        workers[0].measured(block_ms=500.0)
        await eventually(lambda: router.fleet.link("w0").report.message.tiers[0].read_block_ms > 500)
        shown = {c.worker: c for c in (await explain(router, IDS)).candidates}
        assert shown["w0"].tokens.peer == 0, "computing is sooner"


@pytest.mark.asyncio
async def test_other_workers_fill_no_tier_of_a_worker_and_what_is_wrong_with_them_is_told() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        worker.beating = False
        peer = worker_pb2.TierLoad(tier=common_pb2.TIER_PEER, healthy=False, problem="peer 10.0.0.1:7: it hung up")
        host = worker_pb2.TierLoad(tier=common_pb2.TIER_HOST, healthy=True)
        worker.say(step=worker_pb2.Step(load=worker_pb2.Load(tiers=[host, peer])))
        await eventually(lambda: router.list_workers()[0].problem)
        (shown,) = router.list_workers()
        assert [tier.tier for tier in shown.tiers] == [common_pb2.TIER_HOST]
        assert shown.problem == "peer 10.0.0.1:7: it hung up"
        cache = router.cache.stats(admin_pb2.GetCacheStatsRequest(), caller=ADMIN).workers[0]
        assert [tier.tier for tier in cache.tiers] == [common_pb2.TIER_HOST, common_pb2.TIER_PEER]


# Clearing.


async def clear(router: Router) -> admin_pb2.ClearCacheResponse:
    return await router.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN)


def clears(worker: FakeWorker) -> list[worker_pb2.Clear]:
    return [one.clear for one in worker.heard if one.HasField("clear")]


def released(worker: FakeWorker) -> list[int]:
    return [one.peers_released.peers_hold for one in worker.heard if one.HasField("peers_released")]


@pytest.mark.asyncio
async def test_nobody_reads_from_others_from_its_clear_until_all_are_cleared() -> None:
    quick, late = (FakeWorker(name, peer_address=f"{name}:7", shared_tier_id="redis") for name in ("w0", "w1"))
    confirmed: set[tuple[str, int]] = set()

    def confirm(*workers: FakeWorker) -> bool:
        for worker in workers:
            for one in clears(worker):
                if (worker.name, one.clear_id) not in confirmed:
                    confirmed.add((worker.name, one.clear_id))
                    worker.say(clear_done={"clear_id": one.clear_id})
        return clearing.done()

    async with fakes(quick, late) as (_, router):
        await all_ready(router, 2)
        clearing = asyncio.ensure_future(clear(router))
        await eventually(lambda: clears(quick) and clears(late))
        (hold,) = {one.peers_hold for worker in (quick, late) for one in clears(worker)}
        assert hold > 0
        confirm(quick)
        await asyncio.sleep(0.1)
        assert released(quick) == [], "the other one still has everything"
        await eventually(lambda: confirm(quick, late))
        assert [one.shared_tier for one in clears(quick)] == [False, True, False]
        await eventually(lambda: released(quick) == released(late) == [hold])
        assert quick.kinds()[-1] == late.kinds()[-1] == "peers_released"
        again = asyncio.ensure_future(clear(router))
        await eventually(lambda: clears(late)[-1].peers_hold not in (0, hold))
        again.cancel()
        await asyncio.sleep(0.1)
        assert len(released(late)) == 1, "who asked has gone, but both still have everything"
        await eventually(lambda: confirm(quick, late) and len(released(late)) == 2)


@pytest.mark.asyncio
async def test_peers_are_released_when_a_worker_that_did_not_confirm_does_so_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.fleet_clears.CLEAR_TIMEOUT_S", 0.2)
    mute = FakeWorker("w0", peer_address="w0:7")
    async with fakes(mute) as (_, router):
        await all_ready(router, 1)
        with pytest.raises(WorkerLost, match="no answer"):
            await clear(router)
        assert router.fleet.link("w0").owes_clear
        await eventually(lambda: len(clears(mute)) == 2)
        assert released(mute) == []
        for one in clears(mute):
            mute.say(clear_done={"clear_id": one.clear_id})
        await eventually(lambda: released(mute) == [clears(mute)[0].peers_hold])
        assert not router.fleet.link("w0").owes_clear


@pytest.mark.asyncio
async def test_nobody_is_sent_to_a_worker_that_owes_a_clear() -> None:
    async with fleet_of(6, 0) as (router, (holder, reader)):
        hashes = await names(router)
        overlaps = router._index.match(hashes)
        assert router._decider.peers(overlaps).hints("w1", 0)[0].worker == "w0"
        owed = router.fleet.link("w0").owe_clear(worker_pb2.Clear())
        assert router._decider.peers(overlaps).hints("w1", 0) == ()
        await eventually(lambda: clears(holder))
        holder.say(clear_done={"clear_id": clears(holder)[0].clear_id})
        await owed
        assert router._decider.peers(overlaps).hints("w1", 0)[0].worker == "w0"
        assert clears(reader) == []


@pytest.mark.asyncio
async def test_a_fleet_without_peers_is_cleared_as_ever() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        clearing = asyncio.ensure_future(clear(router))
        await eventually(lambda: clears(worker))
        worker.say(clear_done={"clear_id": clears(worker)[0].clear_id})
        await clearing
        assert clears(worker)[0].peers_hold == 0
        assert released(worker) == []
