"""Requests of which another worker prefills the prompt, and what becomes of that when workers fail or are full."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.blocks import BlockHash, block_hashes
from router import errors
from router.core import Router
from router.pairing import DECODE, PREFILL
from tests.router.fake_worker import FakeWorker, Submitted, refuses, stays_quiet
from tests.router.rig import ADMIN, ALICE, BLOCK, all_ready, eventually, generate, request, tokens
from tests.router.test_fleet import explain_when, fakes
from tests.router.test_handover import begins, check_whole, finishes, jobs
from warmkv.v1 import admin_pb2, common_pb2, worker_pb2

PROMPT = tokens(1, 40)
SHADOW = "warmkv_shadow_predicted_ttft_seconds_total"


class Loaded(FakeWorker):
    """A worker of which an answer costs others much: it is always paired with one that prefills."""

    def __init__(self, name: str, submitted: Submitted, role: int, *, decoding: int = 0, pending: int = 0) -> None:
        super().__init__(name, submitted, role=role, peer_address=f"{name}:1")
        self.load = worker_pb2.Load(
            prefill_fixed_ms=5.0, prefill_token_ms=1.0, decoding=decoding, running=decoding, slots=1000
        )
        self.load.pending_prefill_tokens = pending

    async def _beat(self) -> None:
        while True:
            self.say(step=worker_pb2.Step(load=self.load))
            await asyncio.sleep(0.05)


async def paired(router: Router, *, by: str = "p0") -> None:
    """The decision is a pair."""
    await eventually(lambda: all(link.report for link in router.fleet.links()))
    await explain_when(router, PROMPT, lambda explained: explained.prefill_worker == by)


@pytest.mark.asyncio
async def test_who_goes_on_with_an_answer_is_not_promised_what_the_one_before_was() -> None:
    prefills = Loaded("p0", stays_quiet, PREFILL)

    def left(worker: FakeWorker, job: worker_pb2.Job) -> None:
        router.undrain_worker("d1")
        worker.snapshots = False  # it does not come back
        worker.hang_up()

    loaded, idle = Loaded("d0", begins(10, left), DECODE, decoding=50), Loaded("d1", finishes, DECODE)
    async with fakes(prefills, loaded, idle) as (_, router):
        await all_ready(router, 3)
        router.drain_worker("d1")
        await paired(router)
        check_whole(await generate(router, request(PROMPT, 30)), 30)
        (first,), (second,) = jobs(loaded), jobs(idle)
        assert first.HasField("promise")
        assert (second.resumed_tokens, second.HasField("promise")) == (10, False)


@pytest.mark.asyncio
async def test_an_engine_that_fails_over_a_prompt_counts_against_it_also_where_it_prefilled_only() -> None:
    prefills = Loaded("p0", refuses("ENGINE_FAILED"), PREFILL)
    answers = Loaded("d0", stays_quiet, DECODE, decoding=50)
    async with fakes(prefills, answers) as (_, router):
        await all_ready(router, 2)
        await paired(router)
        answer = asyncio.ensure_future(generate(router, request(PROMPT, 30)))
        await eventually(lambda: jobs(prefills) and jobs(answers))
        (job,) = jobs(answers)
        await asyncio.sleep(0.1)
        refuses("ENGINE_FAILED")(answers, job)
        with pytest.raises(errors.PoisonRequest, match="p0 and d0"):
            async with asyncio.timeout(2.0):
                await answer


@pytest.mark.asyncio
async def test_a_prefill_that_nobody_needs_is_cancelled_once() -> None:
    prefills = Loaded("p0", stays_quiet, PREFILL)

    def answers_slowly(worker: FakeWorker, job: worker_pb2.Job) -> None:
        for count in range(1, 11):
            output = worker_pb2.SequenceOutput(job_id=job.job_id, token_ids=[7], text="x", completion_tokens=count)
            if count == 10:
                output.finish_reason = common_pb2.FINISH_REASON_LENGTH
            worker.say(step=worker_pb2.Step(outputs=[output]))

    async with fakes(prefills, Loaded("d0", answers_slowly, DECODE, decoding=50)) as (_, router):
        await all_ready(router, 2)
        await paired(router)
        await generate(router, request(PROMPT, 10))
        await eventually(lambda: "cancel" in prefills.kinds())
        await asyncio.sleep(0.1)
        assert prefills.kinds().count("cancel") == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("reason", ["WORKER_DRAINING", "PROMPT_TOO_LARGE_FOR_WORKER"])
async def test_who_answers_is_told_that_its_prefill_failed(reason: str) -> None:
    prefills = Loaded("p0", refuses(reason), PREFILL)
    answers = Loaded("d0", stays_quiet, DECODE, decoding=50)
    async with fakes(prefills, answers) as (_, router):
        await all_ready(router, 2)
        await paired(router)
        answer = asyncio.ensure_future(generate(router, request(PROMPT, 10)))
        await eventually(lambda: "promise_broken" in answers.kinds())
        (job,) = jobs(answers)
        assert answers.kinds().index("submit") < answers.kinds().index("promise_broken")
        (broken,) = (heard.promise_broken for heard in answers.heard if heard.HasField("promise_broken"))
        names = block_hashes(PROMPT, BlockHash(job.chain_root), BLOCK)
        assert (broken.address, broken.ticket) == (job.promise.address, names[job.promise.blocks - 1])
        finishes(answers, job)
        await answer
        assert dict(router.stats(show_prompts=False).prefill_jobs) == {"failed": 1}


@pytest.mark.asyncio
async def test_a_prefill_that_did_all_it_should_or_is_not_needed_breaks_no_promise() -> None:
    def made(worker: FakeWorker, job: worker_pb2.Job) -> None:
        output = worker_pb2.SequenceOutput(job_id=job.job_id, finish_reason=common_pb2.FINISH_REASON_LENGTH)
        worker.say(step=worker_pb2.Step(outputs=[output]))

    prefills, answers = Loaded("p0", made, PREFILL), Loaded("d0", finishes, DECODE, decoding=50)
    async with fakes(prefills, answers) as (_, router):
        await all_ready(router, 2)
        await paired(router)
        await generate(router, request(PROMPT, 10))
        prefills.submitted = stays_quiet
        await generate(router, request(PROMPT, 10))
        await eventually(lambda: "cancel" in prefills.kinds())
        cancelled = jobs(prefills)[-1]
        refuses("CANCELLED")(prefills, cancelled)
        await asyncio.sleep(0.2)
        assert "promise_broken" not in answers.kinds()
        stats = router.stats(show_prompts=False)
        assert stats.prefill_jobs["done"] == 1
        assert stats.recent[0].prefill_worker == "p0"


@pytest.mark.asyncio
async def test_a_shadow_that_chooses_the_same_worker_promises_the_same() -> None:
    prefills = Loaded("p0", stays_quiet, PREFILL)
    async with fakes(prefills, Loaded("d0", finishes, DECODE, decoding=50)) as (_, router):
        await all_ready(router, 2)
        await paired(router)
        router.set_shadow_policy(
            admin_pb2.SetShadowPolicyRequest(policy=admin_pb2.Policy(name="cache_aware")), caller=ADMIN
        )
        await generate(router, request(PROMPT, 10))
        in_force, shadow = (
            router.metrics.registry.get_sample_value(SHADOW, {"side": side}) for side in ("in_force", "shadow")
        )
        assert in_force == shadow > 0


@pytest.mark.asyncio
async def test_the_forecast_of_a_first_token_contains_the_queue_of_who_prefills() -> None:
    prefills = Loaded("p0", stays_quiet, PREFILL, pending=400)
    async with fakes(prefills, Loaded("d0", finishes, DECODE, decoding=5000)) as (_, router):
        await all_ready(router, 2)
        await paired(router)
        prepared = await router._preparer.prepare(
            request(PROMPT).input, ALICE, common_pb2.CacheDirectives(), deadline=None
        )
        choice = router._decider.decide(prepared.question)
        assert choice is not None
        assert choice.pair is not None
        assert router._room._headroom.first_token_ms(choice) == choice.predicted_ttft_ms > 400
        router._room.sent(1, choice)
        assert router._room._lateness._silent["d0"][1].own_ms > 400, "who waits for another one is not late"
        router._room.ended(1, "d0")


@pytest.mark.asyncio
async def test_a_worker_may_have_any_name_beside_other_routers() -> None:
    prefills = Loaded("prefill", stays_quiet, PREFILL)
    async with fakes(prefills, Loaded("d0", finishes, DECODE, decoding=50)) as (_, router):
        await all_ready(router, 2)
        await paired(router, by="prefill")
        other = worker_pb2.OtherJob(number=1, state=worker_pb2.OTHER_JOB_STATE_PREFILL, block_hashes=b"o" * 32)
        prefills.submitted = lambda worker, job: worker.say(step=worker_pb2.Step(others=[other]))
        answer = await generate(router, request(PROMPT, 10))
        assert answer.route.prefill_worker == "prefill"
        await eventually(lambda: router._traffic.prompt_blocks(["prefill"]) == [4])
        (job,) = jobs(prefills)
        refuses("CANCELLED")(prefills, job)
        await eventually(lambda: router._traffic.prompt_blocks(["prefill"]) == [2])
        other.state = worker_pb2.OTHER_JOB_STATE_ENDED
        prefills.say(step=worker_pb2.Step(others=[other]))
        await eventually(lambda: router._traffic.prompt_blocks(["prefill"]) == [0])
        assert router._traffic.check()


@pytest.mark.asyncio
async def test_a_role_of_a_later_version_answers_and_is_listed() -> None:
    later = Loaded("w1", finishes, 9)
    async with fakes(Loaded("w0", finishes, DECODE, decoding=50), later) as (_, router):
        await all_ready(router, 2)
        assert {worker.name: worker.role for worker in router.list_workers()} == {"w0": "decode", "w1": "unknown"}
        router.drain_worker("w0")
        answer = await generate(router, request(PROMPT, 10))
        assert (answer.route.worker, answer.route.prefill_worker) == ("w1", "")
