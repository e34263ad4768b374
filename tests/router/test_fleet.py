"""The fleet over real gRPC: joining, silence, loss, gaps, restarts, refusals, agreement between routers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from router.core import Router
from router.errors import InvalidRequest, NotSupported, NoWorkerAvailable, WorkerLost, WorkerNotFound
from router.link import LOST_AFTER_S, SUSPECT_AFTER_S
from router.protocol import WorkerAddress
from tests.router.fake_worker import FakeWorker, stays_quiet
from tests.router.rig import ADMIN, ALICE, Rig, all_ready, context, eventually, generate, request, rig, states, tokens
from warmkv.v1 import admin_pb2, inference_pb2, worker_pb2

SOON_S = 6.0  # what takes a second at most, on a machine that others use, too; far below LOST_AFTER_S


@asynccontextmanager
async def fakes(*workers: FakeWorker, **settings: object) -> AsyncIterator[tuple[Rig, Router]]:
    async with rig() as fleet:
        for worker in workers:
            fleet.addresses[worker.name] = await worker.start()
        router = await fleet.start_router(**settings)  # type: ignore[arg-type]
        try:
            yield fleet, router
        finally:
            await asyncio.gather(*(worker.stop() for worker in workers))


async def explain(router: Router, ids: list[int]) -> inference_pb2.ExplainResponse:
    body = inference_pb2.ExplainRequest(input=inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids)))
    return await router.explain(body, caller=ALICE)


async def explain_when(
    router: Router, ids: list[int], holds: Callable[[inference_pb2.ExplainResponse], object]
) -> inference_pb2.ExplainResponse:
    """The first explanation of which it holds: nothing announces that what a worker said has been taken in."""
    async with asyncio.timeout(10.0):
        while not holds(explained := await explain(router, ids)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return explained


def device_tokens(explained: inference_pb2.ExplainResponse) -> dict[str, int]:
    return {c.worker: c.tokens.device for c in explained.candidates}


@pytest.mark.asyncio
async def test_a_worker_joins_and_its_snapshot_must_be_whole_before_it_takes_requests() -> None:
    worker = FakeWorker("w0")
    worker.snapshots = False
    async with fakes(worker) as (_, router):
        await eventually(lambda: worker.connects and states(router)["w0"] == "JOINING")
        assert not router.ready()
        worker.holds(last=False)
        await asyncio.sleep(0.1)
        assert states(router)["w0"] == "JOINING"
        worker.holds(first=False)
        await all_ready(router, 1)
        assert router.ready()


@pytest.mark.asyncio
async def test_a_broken_stream_loses_the_worker_at_once_and_it_is_back_within_two_seconds() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        worker.snapshots = False
        worker.hang_up()
        await eventually(lambda: states(router)["w0"] != "READY", timeout_s=SOON_S)
        await eventually(lambda: worker.connects == 2, timeout_s=SOON_S)
        worker.holds()
        await all_ready(router, 1)


@pytest.mark.asyncio
async def test_silence_makes_a_worker_suspect_and_its_next_word_ready_again() -> None:
    quiet, other = FakeWorker("w0"), FakeWorker("w1")
    async with fakes(quiet, other) as (_, router):
        await all_ready(router, 2)
        quiet.beating = False
        await eventually(lambda: states(router)["w0"] == "SUSPECT", timeout_s=SUSPECT_AFTER_S + 3)
        assert states(router)["w1"] == "READY"
        answer = await generate(router, request(tokens(1, 20)))
        assert (answer.route.worker, answer.route.reason) == ("w1", "only_one")
        explained = await explain(router, tokens(1, 20))
        assert {c.worker: c.excluded_because for c in explained.candidates} == {"w0": "is silent", "w1": ""}
        quiet.beating = True
        await all_ready(router, 2)
        assert quiet.connects == 1


@pytest.mark.asyncio
async def test_long_silence_loses_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LOST_AFTER_S == 10.0
    monkeypatch.setattr("router.link.LOST_AFTER_S", 0.8)
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        worker.beating = False
        await eventually(lambda: worker.connects == 2, timeout_s=5.0)


@pytest.mark.asyncio
async def test_explain_says_of_whom_only_a_lower_bound_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = FakeWorker("w0"), FakeWorker("w1")
    async with fakes(one, other) as (_, router):
        await all_ready(router, 2)
        body = inference_pb2.TokenizeRequest(input=request(tokens(1, 80)).input)
        hashes = (await router.tokenize(body, caller=ALICE)).block_hashes
        one.holds(*hashes)
        other.holds(hashes[0])
        exact = await explain_when(router, tokens(1, 80), lambda e: device_tokens(e) == {"w0": 79, "w1": 16})
        assert {c.worker: c.suspect for c in exact.candidates} == {"w0": "", "w1": ""}
        monkeypatch.setattr(router._index, "_max_probes", 1)
        cut = await explain(router, tokens(1, 80))
        assert device_tokens(cut) == {"w0": 16, "w1": 16}
        suspects = {c.worker: c.suspect for c in cut.candidates}
        assert "may hold more than was looked at" in suspects["w0"]
        assert suspects["w1"] == ""


@pytest.mark.asyncio
async def test_a_gap_in_the_stream_asks_for_a_snapshot_and_halves_the_credit_until_it_came() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        body = inference_pb2.TokenizeRequest(input=request(tokens(1, 48)).input)
        hashes = (await router.tokenize(body, caller=ALICE)).block_hashes
        worker.holds(*hashes)
        await explain_when(router, tokens(1, 48), lambda e: device_tokens(e) == {"w0": 47})
        worker.skip()
        await eventually(lambda: "resync" in worker.kinds())
        doubted = await explain(router, tokens(1, 48))
        assert device_tokens(doubted) == {"w0": 16}  # half of three blocks, in whole blocks
        assert "messages were missed" in doubted.candidates[0].suspect
        assert states(router)["w0"] == "READY"
        assert "messages were missed" in router.list_workers()[0].index.suspect
        worker.holds(*hashes[:2], last=False)
        # What it names may not be all.
        await explain_when(router, tokens(1, 48), lambda e: device_tokens(e) == {"w0": 0})
        worker.holds(first=False)
        trusted = await explain_when(router, tokens(1, 48), lambda e: device_tokens(e) == {"w0": 32})
        assert trusted.candidates[0].suspect == ""
        assert router.metrics.registry.get_sample_value("warmkv_index_resyncs_total", {"worker": "w0"}) == 1


@pytest.mark.asyncio
async def test_a_restarted_worker_has_no_credit_for_its_old_blocks_and_is_back_within_two_seconds() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        port = int(fleet.addresses["w0"].rsplit(":", 1)[1])
        await generate(router, request(tokens(1, 64)))
        await eventually(lambda: router.list_workers()[0].tiers[0].blocks >= 4)
        assert device_tokens(await explain(router, tokens(1, 64))) == {"w0": 63}
        await fleet.kill_worker("w0")
        await eventually(lambda: states(router)["w0"] == "LOST")
        lost = await explain(router, tokens(1, 64))
        assert lost.miss.reason == "worker_lost"
        fleet.start_worker("w0", port=port)
        started = asyncio.get_running_loop().time()
        await all_ready(router, 1)
        assert asyncio.get_running_loop().time() - started < SOON_S
        assert device_tokens(await explain(router, tokens(1, 64))) == {"w0": 0}


@pytest.mark.asyncio
async def test_a_worker_that_moved_is_followed() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        first = fleet.addresses["w0"]
        await fleet.kill_worker("w0")
        fleet.start_worker("w0")
        assert fleet.addresses["w0"] != first
        await all_ready(router, 1)
        assert router.list_workers()[0].address == fleet.addresses["w0"]


@pytest.mark.asyncio
async def test_an_older_incarnation_is_not_listened_to() -> None:
    worker = FakeWorker("w0", incarnation=5)
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        worker.hello.incarnation, worker.hello.recent_work_ms, worker.hello.up_ms = 4, 60_000.0, 60_000
        worker.hang_up()
        await eventually(lambda: worker.connects >= 3)
        assert states(router)["w0"] == "LOST"
        assert "older incarnation" in router.list_workers()[0].problem
        assert router._traffic.utilisation(1) == 0.0
        worker.hello.incarnation = 6
        await all_ready(router, 1)


@pytest.mark.asyncio
async def test_an_older_incarnation_is_taken_once_no_later_one_has_answered_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Incarnations are times: on a machine whose clock is behind, a worker that moved there would stay out for ever."""
    monkeypatch.setattr("router.link.OUTLIVED_AFTER_S", 1.0)
    worker = FakeWorker("w0", incarnation=5)
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        worker.hello.incarnation = 4
        worker.hang_up()
        await eventually(lambda: "older incarnation" in router.list_workers()[0].problem)
        await all_ready(router, 1)
        assert router.list_workers()[0].incarnation == 4
        assert worker.connects >= 3


@pytest.mark.asyncio
async def test_a_broken_stream_does_not_make_a_worker_look_idle_and_a_restart_does() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        for seed in range(8):
            await generate(router, request(tokens(seed, 160)))
        link = router.fleet.link("w0")
        before = router._traffic.recent_work_ms("w0", joined_at=link.joined_at)
        link._break("the test says so")
        await eventually(lambda: link.snapshots == 2 and states(router)["w0"] == "READY")
        assert router._traffic.recent_work_ms("w0", joined_at=link.joined_at) > before / 2 > 0
        port = int(fleet.addresses["w0"].rsplit(":", 1)[1])
        await fleet.kill_worker("w0")
        fleet.start_worker("w0", port=port)
        await eventually(lambda: link.snapshots == 3 and states(router)["w0"] == "READY")
        assert router._traffic.recent_work_ms("w0", joined_at=link.joined_at) == 0.0


@pytest.mark.asyncio
async def test_a_worker_that_does_not_fit_is_refused_with_field_and_remedy_and_joins_when_put_right() -> None:
    good, bad = FakeWorker("w0"), FakeWorker("w1")
    bad.hello.scheme.block_size = 32
    async with fakes(good) as (fleet, router):
        await all_ready(router, 1)
        fleet.addresses["w1"] = await bad.start()
        fleet.announce()
        try:
            await eventually(lambda: states(router).get("w1") == "REFUSED")
            problem = router.list_workers()[1].problem
            assert "block_size=32" in problem
            assert "same model folder" in problem
            assert states(router)["w0"] == "READY"
            bad.hello.scheme.block_size = 16
            await all_ready(router, 2)
        finally:
            await bad.stop()


@pytest.mark.asyncio
async def test_a_wrong_secret_is_a_refusal_that_says_so() -> None:
    async with rig(1, secret="another secret") as fleet:
        router = await fleet.start_router()
        await eventually(lambda: router.list_workers() and states(router)["w0"] == "REFUSED")
        assert "fleet_secret" in router.list_workers()[0].problem


@pytest.mark.asyncio
async def test_a_fleet_may_change_its_model_once_all_old_workers_are_gone() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await fleet.kill_worker("w0")
        await eventually(lambda: states(router)["w0"] == "LOST")
        fleet.start_worker("w0", fingerprint=b"g" * 32)
        await all_ready(router, 1)
        assert (await generate(router, request(tokens(1, 20)))).usage.prompt_tokens == 20


@pytest.mark.asyncio
async def test_a_policy_set_on_one_router_is_applied_by_the_other_within_a_second() -> None:
    async with rig(2) as fleet:
        first, second = await fleet.start_router("r0"), await fleet.start_router("r1")
        await all_ready(first, 2)
        await all_ready(second, 2)
        change = admin_pb2.SetPolicyRequest(
            policy=admin_pb2.Policy(name="cache_aware", weights={"queue": 0.5}), shared_tier_reads=False
        )
        done = first.set_policy(change, caller=ADMIN)
        await eventually(lambda: second.get_policy().version == done.version, timeout_s=SOON_S)
        assert second.get_policy().policy.weights["queue"] == 0.5
        assert not second.get_policy().shared_tier_reads
        second.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name="round_robin")), caller=ADMIN)
        await eventually(lambda: first.get_policy().policy.name == "round_robin", timeout_s=SOON_S)


@pytest.mark.asyncio
async def test_a_router_that_joins_later_learns_the_record_from_the_workers() -> None:
    async with rig(1) as fleet:
        first = await fleet.start_router("r0")
        await all_ready(first, 1)
        first.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name="round_robin")), caller=ADMIN)
        second = await fleet.start_router("r1")
        await eventually(lambda: second.get_policy().policy.name == "round_robin")


@pytest.mark.asyncio
async def test_a_drain_holds_on_all_routers_and_is_undone() -> None:
    async with rig(2) as fleet:
        first, second = await fleet.start_router("r0"), await fleet.start_router("r1")
        await all_ready(first, 2)
        await all_ready(second, 2)
        assert first.drain_worker("w0") == 0
        await eventually(lambda: states(second)["w0"] == "DRAINED", timeout_s=SOON_S)
        answers = [await generate(second, request(tokens(n, 20))) for n in range(3)]
        assert {a.route.worker for a in answers} == {"w1"}
        second.undrain_worker("w0")
        await eventually(lambda: states(first)["w0"] == "READY", timeout_s=SOON_S)
        with pytest.raises(WorkerNotFound, match="w0, w1"):
            first.drain_worker("w9")


@pytest.mark.asyncio
async def test_what_is_not_allowed_changes_nothing() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        before = router.get_policy()
        for policy in (admin_pb2.Policy(name="magic"), admin_pb2.Policy(name="cache_aware", weights={"queue": -1})):
            with pytest.raises(InvalidRequest):
                router.set_policy(admin_pb2.SetPolicyRequest(policy=policy), caller=ADMIN)
        assert router.get_policy() == before
        with pytest.raises(NotSupported, match="fixed worker addresses"):
            await router.scale_workers(3)


@pytest.mark.asyncio
async def test_clearing_waits_for_every_worker_and_frees_the_credit() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        for seed in range(4):
            await generate(router, request(tokens(seed, 64)))
        await generate(router, request(tokens(9, 64)), caller=ADMIN)
        done = await router.clear_cache(admin_pb2.ClearCacheRequest(tenant="alice"), caller=ADMIN)
        assert [w.worker for w in done.workers] == ["w0", "w1"]
        assert sum(tier.blocks for w in done.workers for tier in w.dropped) >= 4 * 4
        explained = await explain(router, tokens(1, 64))
        assert set(device_tokens(explained).values()) == {0}
        assert explained.miss.reason == "cleared"
        prefix = admin_pb2.ClearCacheRequest.Prefix(token_ids=tokens(9, 64)[:40])
        done = await router.clear_cache(admin_pb2.ClearCacheRequest(prefix=prefix), caller=ADMIN)
        assert sum(tier.blocks for w in done.workers for tier in w.dropped) >= 3
        with pytest.raises(InvalidRequest, match="shorter than a block"):
            await router.clear_cache(
                admin_pb2.ClearCacheRequest(prefix=admin_pb2.ClearCacheRequest.Prefix(token_ids=[1])), caller=ADMIN
            )
        with pytest.raises(InvalidRequest, match="set all to true"):
            await router.clear_cache(admin_pb2.ClearCacheRequest(), caller=ADMIN)


@pytest.mark.asyncio
async def test_a_worker_that_was_away_is_cleared_when_it_is_heard_of_again() -> None:
    gone, here = FakeWorker("w0"), FakeWorker("w1")

    def confirms(worker: FakeWorker) -> None:
        for one in worker.heard:
            if one.HasField("clear"):
                worker.say(clear_done={"clear_id": one.clear.clear_id})

    async with fakes(gone, here) as (_, router):
        await all_ready(router, 2)
        port = gone.port
        await gone.stop()
        await eventually(lambda: states(router)["w0"] == "LOST")
        clearing = asyncio.ensure_future(router.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN))
        await eventually(lambda: "clear" in here.kinds())
        assert not clearing.done()
        confirms(here)
        with pytest.raises(WorkerLost, match="w0: it is lost") as caught:
            await clearing
        assert caught.value.metadata == {"workers": "w0"}
        await gone.start(port)
        await eventually(lambda: "clear" in gone.kinds())


@pytest.mark.asyncio
async def test_a_clear_goes_over_all_workers_then_the_shared_tier_then_what_was_read_from_there_meanwhile() -> None:
    workers = [FakeWorker(name, shared_tier_id="redis") for name in ("w0", "w1")]
    confirmed: list[tuple[str, bool]] = []
    seen: set[tuple[str, int]] = set()

    def confirm() -> bool:
        for worker, name in zip(workers, ("w0", "w1"), strict=True):
            for one in worker.heard:
                if one.HasField("clear") and (name, one.clear.clear_id) not in seen:
                    seen.add((name, one.clear.clear_id))
                    confirmed.append((name, one.clear.shared_tier))
                    worker.say(clear_done={"clear_id": one.clear.clear_id, "host": 1})
        return clearing.done()

    async with fakes(*workers) as (_, router):
        await all_ready(router, 2)
        clearing = asyncio.ensure_future(router.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN))
        await eventually(confirm)
        done = clearing.result()
    local = {("w0", False), ("w1", False)}
    assert (set(confirmed[:2]), confirmed[2], set(confirmed[3:])) == (local, ("w0", True), local)
    assert sum(tier.blocks for each in done.workers for tier in each.dropped) == 4


@pytest.mark.asyncio
async def test_a_lost_worker_fails_over_to_those_that_are_left() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        await fleet.kill_worker("w0")
        answers = [await generate(router, request(tokens(n, 20)), about=context(str(n))) for n in range(4)]
        assert {a.route.worker for a in answers} == {"w1"}


@pytest.mark.asyncio
async def test_a_clear_that_no_worker_can_hear_is_an_error_and_the_shared_tier_is_cleared_by_the_next_one() -> None:
    first, second = FakeWorker("w0", shared_tier_id="redis"), FakeWorker("w1", shared_tier_id="redis")
    async with fakes(first) as (fleet, router):
        await all_ready(router, 1)
        await first.stop()
        await eventually(lambda: states(router)["w0"] == "LOST")
        with pytest.raises(NoWorkerAvailable, match="nothing was cleared yet"):
            await router.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN)
        fleet.addresses["w1"] = await second.start()
        fleet.announce()
        try:
            # Its disk may hold blocks from before, so it owes the clear as any worker does.
            await eventually(lambda: second.kinds().count("clear") == 2)
            asked = [one.clear for one in second.heard if one.HasField("clear")]
            assert [clear.shared_tier for clear in asked] == [False, True]
            second.say(clear_done={"clear_id": asked[1].clear_id})
            await eventually(lambda: not router.fleet._clears.shared_debts)
        finally:
            await second.stop()


@pytest.mark.asyncio
async def test_a_worker_that_does_not_confirm_a_clear_is_named_and_still_owes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.fleet_clears.CLEAR_TIMEOUT_S", 0.2)
    mute = FakeWorker("w0", shared_tier_id="redis")
    async with fakes(mute) as (_, router):
        await all_ready(router, 1)
        with pytest.raises(WorkerLost, match="w0: no answer") as caught:
            await router.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN)
        assert caught.value.metadata == {"workers": "w0"}
        mute.heard.clear()
        mute.hello.incarnation += 1
        mute.hang_up()
        await eventually(lambda: any(one.clear.shared_tier for one in mute.heard))


@pytest.mark.asyncio
async def test_what_the_last_worker_could_take_is_remembered_when_it_is_gone() -> None:
    async with rig(1, context_length=4096) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await fleet.kill_worker("w0")
        await eventually(lambda: states(router)["w0"] == "LOST")
        assert (router.fleet.context_length(), router.fleet.vocab_size()) == (4096, 1000)


@pytest.mark.asyncio
async def test_a_defect_while_a_link_is_read_is_a_broken_link_that_heals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        with monkeypatch.context() as broken:

            def fails(*_: object) -> None:
                raise KeyError("a defect")

            broken.setattr(router.fleet, "missed", fails)
            worker.skip()
            await eventually(lambda: "a link failed by a defect" in caplog.text)
        await eventually(lambda: worker.connects >= 2)
        await all_ready(router, 1)


@pytest.mark.asyncio
async def test_a_drain_ends_with_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        router.drain_worker("w0")
        router.drain_worker("w1")

        async def scale(workers: int) -> tuple[list[str], list[str]]:
            return [], ["w1"]

        monkeypatch.setattr(fleet.discoveries[0], "scale", scale)
        assert await router.scale_workers(1) == ([], ["w1"])
        assert router.fleet.record.drained == {"w0"}


@pytest.mark.asyncio
async def test_links_are_sorted_by_name_whenever_and_in_whatever_order_workers_come() -> None:
    async with rig() as fleet:
        router = await fleet.start_router()
        for names in (["w2", "w0"], ["w2", "w3", "w0", "w1"]):
            fleet.discoveries[0].set([WorkerAddress(name, "127.0.0.1:1") for name in names])
            await eventually(lambda names=names: [link.name for link in router.fleet.links()] == sorted(names))


@pytest.mark.asyncio
async def test_a_report_covers_the_jobs_that_it_names_and_the_moment_that_it_tells_of() -> None:
    worker = FakeWorker("w0", stays_quiet)
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        worker.beating = False
        asking = []
        for number in range(3):
            asking.append(asyncio.create_task(generate(router, request(tokens(number, 20)))))
            await eventually(lambda number=number: worker.kinds().count("submit") == number + 1)  # type: ignore[misc]
        sent = [heard.submit.job_id for heard in worker.heard if heard.HasField("submit")]
        link, traffic = router.fleet.link("w0"), router._traffic
        for nth, (known, unreported) in enumerate([(0, 3), (sent[1], 1), (sent[1], 1), (sent[2], 0)], start=1):
            said = time.monotonic()
            worker.say(step=worker_pb2.Step(load=worker_pb2.Load(last_job_id=known, age_ms=5000.0, steps=nth)))
            await eventually(lambda nth=nth: link.report is not None and link.report.message.steps == nth)  # type: ignore[misc]
            assert link.report is not None
            assert said - 5.0 <= link.report.at < said
            assert traffic.unreported("w0", link.report.known).requests == unreported
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
