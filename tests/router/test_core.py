"""The walk of a request through a real fleet: answers, second chances, refusals, accounting, explanations."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import aclosing
from typing import Any

import pytest

from kvstore.token_ids import unpacked
from router import errors
from router.core import Router
from router.policy import POLICIES
from router.protocol import Caller, Prompt, Role, RouterApi
from router.request import turn_of
from tests.router.fake_worker import FakeWorker, answers, breaks, refuses, says_one_token, stays_quiet
from tests.router.rig import (
    ADMIN,
    ALICE,
    CharEncoder,
    all_ready,
    context,
    eventually,
    generate,
    request,
    rig,
    states,
    tokens,
)
from tests.router.test_fleet import explain, fakes
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2, worker_pb2
from workers.simulated_sequence import Timing

BOB = Caller("bob", Role.USER, "bob")
SLOW = Timing(prefill_fixed_ms=1.0, prefill_token_ms=0.5, prefill_pair_ms=0.0, decode_step_ms=20.0)


async def settled(router: Router, requests: int) -> admin_pb2.WatchStatsResponse:
    """Statistics once that many requests are on the bill."""
    await eventually(lambda: sum(router.stats(show_prompts=False).requests.values()) == requests)
    return router.stats(show_prompts=False)


async def warmed(router: Router, ids: list[int]) -> str:
    """Run a prompt and wait until the index has heard of all its blocks, and the router that it is over; the worker."""
    worker = (await generate(router, request(ids))).route.worker
    async with asyncio.timeout(10):
        while (await explain(router, ids)).HasField("miss"):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)

    def is_idle() -> bool:
        (told,) = [each for each in router.list_workers() if each.name == worker]
        # A report from before the request shows nothing running either, and no blocks.
        return not told.running and told.tiers[0].blocks >= len(ids) // 16

    await eventually(is_idle)
    return worker


def test_it_satisfies_the_interface_of_servicers() -> None:
    def accepts(router: RouterApi) -> None: ...

    accepts(Router.__new__(Router))


def test_importing_it_takes_no_torch_ray_or_transformers() -> None:
    code = "import router.core, sys; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'transformers', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.asyncio
async def test_an_answer_streams_and_ends_with_usage_and_route() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        parts = [p async for p in router.generate(request(tokens(1, 40), 3), caller=ALICE, context=context("id-1"))]
        assert sum(len(p.token_ids) for p in parts) == 3
        assert all(not p.HasField("usage") and not p.finish_reason for p in parts[:-1])
        last = parts[-1]
        assert last.finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (40, 3)
        assert last.usage.prompt_tokens_by_fate.computed == 40
        assert (last.route.router, last.route.request_id, last.route.reason) == ("r0", "id-1", "no_hit")
        assert last.route.ttft_ms > 0
        assert last.route.predicted_ttft_ms > 0


@pytest.mark.asyncio
async def test_a_second_turn_goes_where_the_first_one_is_cached_and_the_prediction_holds() -> None:
    async with rig(4) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 4)
        for seed in range(6):
            worker = await warmed(router, tokens(seed, 160))
            again = await generate(router, request([*tokens(seed, 160), *tokens(90 + seed, 30)]))
            assert (again.route.worker, again.route.reason) == (worker, "prefix")
            assert again.route.predicted_cached_tokens == 160
            assert again.usage.prompt_tokens_by_fate.device == 160
        stats = await settled(router, 12)
        assert stats.predicted_cached_tokens == stats.reused_tokens == 6 * 160


@pytest.mark.asyncio
async def test_one_request_at_a_time_still_spreads_distinct_prompts_over_all_workers() -> None:
    async with rig(4) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 4)
        used = [await warmed(router, tokens(seed, 64)) for seed in range(16)]
        assert {used.count(f"w{n}") for n in range(4)} == {4}


@pytest.mark.asyncio
async def test_a_burst_on_one_new_document_computes_it_on_few_workers() -> None:
    async with rig(4, timing=Timing(1.0, 0.2, 0.0, 1.0)) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 4)
        document = tokens(5, 1600)
        answers = await asyncio.gather(*(generate(router, request([*document, *tokens(n, 8)])) for n in range(8)))
        assert len({a.route.worker for a in answers}) <= 2


@pytest.mark.asyncio
async def test_tenants_share_no_block_and_trust_groups_do() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await warmed(router, tokens(1, 64))
        assert (await generate(router, request(tokens(1, 64)), caller=BOB)).usage.prompt_tokens_by_fate.device == 0
        friend = Caller("carol", Role.USER, ALICE.trust_group)
        assert (await generate(router, request(tokens(1, 64)), caller=friend)).usage.prompt_tokens_by_fate.device > 0


@pytest.mark.asyncio
async def test_no_read_expects_and_gets_nothing_cached() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        await warmed(router, tokens(1, 64))
        body = request(tokens(1, 64))
        body.cache.no_read = True
        answer = await generate(router, body)
        assert answer.usage.prompt_tokens_by_fate.computed == 64
        assert answer.route.predicted_cached_tokens == 0


@pytest.mark.asyncio
async def test_each_policy_can_be_set_and_decides() -> None:
    async with rig(3) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 3)
        reasons = {}
        for info in router.get_policy().available:
            router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name=info.name)), caller=ADMIN)
            answers = [await generate(router, request(tokens(n, 40))) for n in range(3)]
            assert {a.route.policy for a in answers} == {info.name}
            reasons[info.name] = answers[0].route.reason
            if info.name == "round_robin":
                assert len({a.route.worker for a in answers}) == 3
        assert reasons["round_robin"] == "order"
        assert reasons["least_loaded"] == "balance"
        assert set(reasons) == set(POLICIES)


@pytest.mark.asyncio
async def test_a_request_whose_worker_is_lost_before_it_spoke_is_answered_by_another() -> None:
    dying, good = FakeWorker("w0", breaks), FakeWorker("w1")
    async with fakes(dying, good) as (_, router):
        await all_ready(router, 2)
        router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name="round_robin")), caller=ADMIN)
        answer = await generate(router, request(tokens(1, 20)))
        assert (answer.route.worker, answer.route.retries) == ("w1", 1)
        stats = await settled(router, 1)
        assert dict(stats.requests) == {"OK": 1}
        assert stats.prompt_tokens.computed == 20


@pytest.mark.asyncio
async def test_the_time_that_a_lost_worker_took_is_no_error_of_the_one_that_answers() -> None:
    lost: list[str] = []

    def first_is_lost(worker: FakeWorker, job: worker_pb2.Job) -> None:
        if lost:
            answers(worker, job)
        else:
            lost.append(worker.name)
            asyncio.get_running_loop().call_later(1.0, worker.hang_up)

    workers = FakeWorker("w0", first_is_lost), FakeWorker("w1", first_is_lost)
    async with fakes(*workers) as (_, router):
        await all_ready(router, 2)
        answer = await generate(router, request(tokens(1, 96), max_tokens=1))
        assert answer.route.retries == 1
        assert answer.route.ttft_ms > 900.0
        labels = {"worker": answer.route.worker, "sign": "late"}
        late_s = router.metrics.registry.get_sample_value("warmkv_time_to_first_token_error_seconds_sum", labels)
        assert (late_s or 0.0) < answer.route.ttft_ms / 1e3 - 0.9  # however long the second one took


@pytest.mark.asyncio
async def test_killing_a_real_worker_before_the_first_token_is_invisible_to_its_caller() -> None:
    async with rig(2, timing=Timing(1.0, 2.0, 0.0, 1.0)) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        running = asyncio.ensure_future(generate(router, request(tokens(1, 400))))
        await eventually(lambda: router.stats(show_prompts=False).recent)
        first = router.stats(show_prompts=False).recent[0].worker
        await fleet.kill_worker(first)
        answer = await running
        assert answer.route.worker != first
        assert answer.route.retries == 1


@pytest.mark.asyncio
async def test_without_handover_a_loss_in_the_middle_of_the_answer_is_unavailable_and_says_so() -> None:
    async with rig(2, timing=SLOW) as fleet:
        router = await fleet.start_router(handover=False)
        await all_ready(router, 2)
        stream = router.generate(request(tokens(1, 20), 50), caller=ALICE, context=context())
        async with aclosing(stream):
            await anext(stream)
            await fleet.kill_worker(router.stats(show_prompts=False).recent[0].worker)
            with pytest.raises(errors.WorkerLost, match=r"in the middle of the answer.*send the request again"):
                async for _ in stream:
                    pass
        assert dict((await settled(router, 1)).requests) == {"UNAVAILABLE": 1}


@pytest.mark.asyncio
async def test_a_request_that_has_lost_two_workers_is_never_sent_to_a_third() -> None:
    dying = [FakeWorker(f"w{n}", breaks) for n in range(3)]
    async with fakes(*dying) as (_, router):
        await all_ready(router, 3)
        with pytest.raises(errors.PoisonRequest, match="not sent to another"):
            await generate(router, request(tokens(1, 20)))
        assert sum(worker.kinds().count("submit") for worker in dying) == 2
        assert dict((await settled(router, 1)).requests) == {"FAILED_PRECONDITION": 1}


@pytest.mark.asyncio
async def test_a_failed_engine_counts_as_a_lost_worker_and_a_draining_one_does_not() -> None:
    failed = [FakeWorker(f"w{n}", refuses("ENGINE_FAILED")) for n in range(3)]
    async with fakes(*failed) as (_, router):
        await all_ready(router, 3)
        with pytest.raises(errors.PoisonRequest):
            await generate(router, request(tokens(1, 20)))
    draining = [FakeWorker(f"w{n}", refuses("WORKER_DRAINING")) for n in range(3)]
    async with fakes(*draining, FakeWorker("w3")) as (_, router):
        await all_ready(router, 4)
        answer = await generate(router, request(tokens(1, 20)))
        assert (answer.route.worker, answer.route.retries) == ("w3", 0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("CONTEXT_LENGTH_EXCEEDED", errors.ContextLengthExceeded),
        ("PROMPT_TOO_LARGE_FOR_WORKER", errors.InvalidRequest),
        ("SOMETHING_NEW", errors.InternalError),
    ],
)
async def test_a_workers_refusal_reaches_the_caller_as_the_right_error(
    reason: str, error: type[errors.RouterError]
) -> None:
    async with fakes(FakeWorker("w0", refuses(reason, "it cannot"))) as (_, router):
        await all_ready(router, 1)
        with pytest.raises(error, match=r"[Ii]t cannot"):
            await generate(router, request(tokens(1, 20)))


@pytest.mark.asyncio
async def test_closing_the_iterator_cancels_the_job_and_bills_it_as_cancelled() -> None:
    async with rig(1, timing=SLOW) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        async with aclosing(router.generate(request(tokens(1, 20), 500), caller=ALICE, context=context())) as stream:
            await anext(stream)
        stats = await settled(router, 1)
        assert dict(stats.requests) == {"CANCELLED": 1}
        assert stats.prompt_tokens.computed == 20
        assert 1 <= stats.generated_tokens < 500
        await eventually(lambda: router.list_workers()[0].running == 0)
        assert stats.in_flight == 0


@pytest.mark.asyncio
async def test_the_deadline_is_forwarded_and_honoured() -> None:
    deaf = FakeWorker("w0", stays_quiet)
    async with fakes(deaf) as (_, router):
        await all_ready(router, 1)
        loop = asyncio.get_running_loop()
        with pytest.raises(errors.DeadlineExceeded):
            await generate(router, request(tokens(1, 20)), about=context(deadline=loop.time() + 1.5))
        await eventually(lambda: "cancel" in deaf.kinds())
        job = next(r.submit for r in deaf.heard if r.HasField("submit"))
        assert 0 < job.deadline_ms <= 1500


@pytest.mark.asyncio
async def test_the_job_carries_what_the_worker_needs() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        body = request(tokens(1, 40), 5)
        body.priority = 7
        body.cache.ttl_seconds = 60
        await generate(router, body, about=context("id-9"))
        job = next(r.submit for r in worker.heard if r.HasField("submit"))
        assert (list(unpacked(job.packed_token_ids)), job.priority, job.cache.ttl_seconds) == (tokens(1, 40), 7, 60)
        assert (len(job.chain_root), len(job.block_hashes), len(job.tenant_salt)) == (32, 2 * 16, 32)
        assert job.request_id == "id-9"
        assert job.sampling.HasField("seed")
        assert not job.HasField("deadline_ms")


@pytest.mark.asyncio
async def test_the_job_carries_the_end_of_a_fixed_lifetime_the_priority_and_the_turn() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        body = request(tokens(1, 40), 5)
        body.cache.MergeFrom(common_pb2.CacheDirectives(ttl_seconds=60, fixed_ttl=True, keep_priority=80))
        before = time.time()
        await generate(router, body)
        job = next(r.submit for r in worker.heard if r.HasField("submit"))
        assert before + 60 <= job.cache.expires_at <= time.time() + 61
        assert not job.cache.HasField("ttl_seconds")
        assert (job.cache.keep_priority, job.turn) == (80, 0)
        body.cache.Clear()
        body.cache.expires_at = 1000
        with pytest.raises(errors.InvalidRequest, match="in the past"):
            await generate(router, body)


@pytest.mark.parametrize(("roles", "turn"), [("u", 1), ("su", 1), ("suaua", 2), ("suauatu", 3), ("", 0)])
def test_a_chats_turn_is_the_number_of_what_its_user_said(roles: str, turn: int) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [inference_pb2.ChatMessage(role=names[role], content="x") for role in roles]
    assert turn_of(inference_pb2.Input(chat=inference_pb2.Chat(messages=messages))) == turn


def test_a_text_is_no_conversation() -> None:
    assert turn_of(inference_pb2.Input(text="user: x")) == 0


@pytest.mark.asyncio
async def test_without_a_worker_a_request_waits_a_moment_and_is_then_told_what_to_do() -> None:
    async with rig() as fleet:
        router = await fleet.start_router()
        assert not router.ready()
        with pytest.raises(errors.NoWorkerAvailable, match="knows no worker; start one"):
            await generate(router, request(tokens(1, 20)))
        patient = await fleet.start_router("r1", wait_for_worker_s=60.0)
        waiting = asyncio.ensure_future(generate(patient, request(tokens(1, 20))))
        await asyncio.sleep(0.1)
        fleet.start_worker("w0")
        assert (await waiting).route.worker == "w0"
        await all_ready(router, 1)
        router.drain_worker("w0")
        with pytest.raises(errors.NoWorkerAvailable, match="w0 is drained"):
            await generate(router, request(tokens(1, 20)))


@pytest.mark.asyncio
async def test_bad_requests_are_refused_before_they_cost_anything() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        bad: list[tuple[inference_pb2.GenerateRequest, type[errors.RouterError]]] = [
            (request([]), errors.InvalidRequest),
            (request([1000]), errors.InvalidRequest),
            (request([1] * 9000), errors.ContextLengthExceeded),
            (request([1] * 8000, 500), errors.ContextLengthExceeded),
            (request([1], model="other"), errors.ModelNotFound),
            (request([1], 0), errors.InvalidRequest),
            (request([1], priority=101), errors.InvalidRequest),
            (inference_pb2.GenerateRequest(), errors.InvalidRequest),
        ]
        for body, error in bad:
            with pytest.raises(error):
                await generate(router, body)
        assert "submit" not in worker.kinds()
        assert (await settled(router, len(bad))).prompt_tokens == admin_pb2.TokensByFate64()
        assert (await generate(router, request([1]))).usage.prompt_tokens == 1


@pytest.mark.asyncio
async def test_quotas_refuse_and_drains_refuse() -> None:
    async with fakes(FakeWorker("w0", stays_quiet), max_in_flight_per_tenant=1) as (_, router):
        await all_ready(router, 1)
        running = asyncio.ensure_future(generate(router, request(tokens(1, 20))))
        await eventually(lambda: router.stats(show_prompts=False).in_flight == 1)
        with pytest.raises(errors.Overloaded, match="alice"):
            await generate(router, request(tokens(2, 20)))
        router.drain()
        assert not router.ready()
        with pytest.raises(errors.Draining):
            await generate(router, request(tokens(3, 20)), caller=BOB)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.asyncio
async def test_a_slow_reader_gets_everything_merged_and_in_order() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        expected = list((await generate(router, request(tokens(1, 20), 40))).token_ids)
        parts = []
        async for part in router.generate(request(tokens(1, 20), 40), caller=ALICE, context=context()):
            parts.append(part)
            await asyncio.sleep(0.05)
        assert [i for part in parts for i in part.token_ids] == expected
        assert len(parts) < 40


@pytest.mark.asyncio
async def test_tokens_lost_on_the_way_are_never_skipped() -> None:
    def loses_one(worker: FakeWorker, job: object) -> None:
        says_one_token(worker, job)  # type: ignore[arg-type]
        worker.skip()

    worker = FakeWorker("w0", loses_one)
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        with pytest.raises((errors.WorkerLost, errors.NoWorkerAvailable)):
            await generate(router, request(tokens(1, 20), 5))
        await eventually(lambda: "cancel" in worker.kinds())


@pytest.mark.asyncio
async def test_explain_says_what_generate_then_does_and_changes_nothing() -> None:
    async with rig(3) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 3)
        for policy in POLICIES:
            router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name=policy)), caller=ADMIN)
            for seed in range(4):
                await asyncio.sleep(0.06)  # until reports are in
                before = router.stats(show_prompts=False)
                explained = [await explain(router, tokens(seed, 64)) for _ in range(3)]
                after = router.stats(show_prompts=False)
                assert before.decisions == after.decisions
                assert before.prefixes == after.prefixes
                assert len({e.worker for e in explained}) == 1
                assert explained[0].candidates[0].worker == explained[0].worker
                answer = await generate(router, request(tokens(seed, 64)))
                assert (answer.route.worker, answer.route.reason) == (explained[0].worker, explained[0].reason)


@pytest.mark.asyncio
async def test_explain_of_policies_that_price_and_of_one_that_counts_blocks() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        worker = await warmed(router, tokens(1, 160))
        router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name="lowest_ttft")), caller=ADMIN)
        explained = await explain(router, tokens(1, 160))
        assert (explained.worker, explained.reason) == (worker, "prefix")
        for candidate in explained.candidates:
            assert [(t.name, t.weight) for t in candidate.terms] == [("queue", 1), ("load", 1), ("compute", 1)]
            assert candidate.cost_ms == candidate.predicted_ttft_ms == pytest.approx(sum(t.ms for t in candidate.terms))
        router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name="dynamo_cost")), caller=ADMIN)
        explained = await explain(router, tokens(1, 160))
        assert (explained.worker, explained.reason) == (worker, "prefix")
        assert [(c.cost_ms, list(c.terms)) for c in explained.candidates] == [(0, [])] * 2
        # Ten blocks held of ten, and ten more in use where the prompt goes; the other one has to compute them as well.
        assert [(explained.cost_unit, c.cost) for c in explained.candidates] == [("blocks", 10.0), ("blocks", 20.0)]


@pytest.mark.asyncio
async def test_dynamo_cost_counts_the_blocks_of_requests_in_flight() -> None:
    """The worker that was given most lately is idle, the other one decodes a prompt of 100 blocks."""
    async with rig(2, timing=SLOW) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        long = (await generate(router, request(tokens(1, 3200), 1))).route.worker
        stream = router.generate(request(tokens(2, 1600), 500), caller=ALICE, context=context())
        async with aclosing(stream):
            await anext(stream)
            busy = router.stats(show_prompts=False).recent[0].worker
            assert busy != long
            router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name="dynamo_cost")), caller=ADMIN)
            assert (await explain(router, tokens(3, 64))).worker == long


@pytest.mark.asyncio
async def test_explain_shows_what_each_worker_holds_and_what_it_would_cost() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        worker = await warmed(router, tokens(1, 160))
        # Who is believed to decode has one more term, which is no part of the prediction.
        await eventually(lambda: not any(link.report.load.decoding for link in router.fleet.links() if link.report))
        explained = await explain(router, [*tokens(1, 160), *tokens(2, 40)])
        assert (explained.prompt_tokens, explained.block_size, explained.blocks) == (200, 16, 12)
        assert (explained.worker, explained.reason, explained.miss.reason) == (worker, "prefix", "never_seen")
        assert explained.miss.block == 10
        best, other = explained.candidates
        assert (best.tokens.device, best.tokens.computed) == (160, 40)
        assert (other.tokens.device, other.tokens.computed) == (0, 200)
        for candidate in (best, other):
            assert candidate.eligible
            assert sum(t.ms * t.weight for t in candidate.terms) == pytest.approx(candidate.cost_ms)
            assert sum(t.ms for t in candidate.terms) == pytest.approx(candidate.predicted_ttft_ms)
            assert [t.name for t in candidate.terms] == ["queue", "load", "compute"]
        assert best.cost_ms < other.cost_ms
        router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(weights={"compute": 3.0})), caller=ADMIN)
        dearer = (await explain(router, [*tokens(1, 160), *tokens(2, 40)])).candidates[0]
        assert dearer.terms[2].weight == pytest.approx(3 * 1.5)


def chat(*messages: tuple[str, str, list[int]]) -> inference_pb2.Input:
    return inference_pb2.Input(
        chat=inference_pb2.Chat(
            messages=[inference_pb2.ChatMessage(role=r, content=c, token_ids=ids) for r, c, ids in messages]
        )
    )


@pytest.mark.asyncio
async def test_an_answer_sent_back_as_text_is_a_miss_called_retokenized_and_as_ids_a_hit() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        question = "what is the meaning of this long question? "
        body = inference_pb2.GenerateRequest(input=chat(("user", question, [])))
        body.sampling.max_tokens = 40
        body.sampling.temperature = 0
        answer = await generate(router, body)
        await eventually(lambda: router.list_workers()[0].tiers[0].blocks >= 6)  # 60 + 40 tokens
        ids = list(answer.token_ids)
        as_text = chat(("user", question, []), ("assistant", answer.text, []), ("user", "and now?", []))
        as_ids = chat(("user", question, []), ("assistant", answer.text, ids), ("user", "and now?", []))
        missed = (await router.explain(inference_pb2.ExplainRequest(input=as_text), caller=ALICE)).miss
        assert missed.reason == "retokenized"
        assert "token_ids" in missed.detail
        hit = await router.explain(inference_pb2.ExplainRequest(input=as_ids), caller=ALICE)
        assert hit.miss.reason == "never_seen"
        assert hit.miss.block > missed.block


@pytest.mark.asyncio
async def test_tokenize_gives_the_ids_and_names_that_generate_uses() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        body = inference_pb2.TokenizeRequest(input=inference_pb2.Input(text="x" * 40))
        told = await router.tokenize(body, caller=ALICE)
        assert list(told.token_ids) == [120] * 40
        assert [len(h) for h in told.block_hashes] == [16, 16]
        other = await router.tokenize(body, caller=BOB)
        assert not set(told.block_hashes) & set(other.block_hashes)


@pytest.mark.asyncio
async def test_the_bill_adds_up_over_answers_cancellations_and_losses() -> None:
    async with rig(3, timing=Timing(0.5, 0.05, 0.0, 2.0)) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 3)

        async def one(n: int) -> None:
            body = request([*tokens(n % 3, 80), *tokens(n, 16)], 10)
            async with aclosing(router.generate(body, caller=ALICE, context=context(str(n)))) as stream:
                async for _ in stream:
                    if n % 5 == 0:
                        return

        async def kill() -> None:
            await asyncio.sleep(0.05)
            await fleet.kill_worker("w2")

        results = await asyncio.gather(*(one(n) for n in range(30)), kill(), return_exceptions=True)
        stats = await settled(router, 30)
        assert all(r is None or isinstance(r, errors.RouterError) for r in results)
        fates = stats.prompt_tokens
        total = sum(getattr(fates, f) for f in ("computed", "device", "host", "disk", "redis", "peer"))
        assert total % 96 == 0
        assert stats.reused_tokens == total - fates.computed
        assert total // 96 >= stats.requests["OK"]
        value = router.metrics.registry.get_sample_value
        exported = sum(
            value("warmkv_prompt_tokens_total", {"model": "sim", "worker": w, "fate": f}) or 0
            for w in ("w0", "w1", "w2")
            for f in ("computed", "device", "host")
        )
        assert exported == total
        await eventually(lambda: states(router)["w2"] == "LOST")
        assert value("warmkv_worker_losses_total", {"worker": "w2"}) == 1
        assert router._traffic.check()
        router._index.check()


@pytest.mark.asyncio
async def test_statistics_show_who_holds_which_prefix_and_the_last_decisions() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router("r0", show_prompts=True)
        await all_ready(router, 2)
        shared = "You are a helpful assistant. " * 8
        for n in range(3):
            body = inference_pb2.GenerateRequest(input=inference_pb2.Input(text=f"{shared}{n}" * 2))
            body.sampling.max_tokens = 2
            answer = await generate(router, body)

        def held() -> dict[str, int]:
            return {h.worker: h.device_tokens for h in router.stats(show_prompts=True).prefixes[0].held}

        whole = len(shared) // 16 * 16
        await eventually(lambda: held().get(answer.route.worker) == whole)
        stats = router.stats(show_prompts=True)
        top = stats.prefixes[0]
        assert top.label.startswith("You are a helpful")
        assert (top.tenant, top.requests) == ("alice", 3)
        assert top.tokens == whole
        assert router.stats(show_prompts=False).prefixes[0].label != top.label
        newest = stats.recent[0]
        assert newest.HasField("reused_tokens")
        assert newest.HasField("ttft_ms")
        assert newest.runner_up
        assert stats.ttft.count == 3
        assert stats.ttft.p50_ms <= stats.ttft.p95_ms <= stats.ttft.p99_ms
        assert [w.name for w in stats.workers] == ["w0", "w1"]
        assert stats.workers[0].prefill_ms_per_1k > 0


@pytest.mark.asyncio
async def test_prompts_are_not_shown_or_kept_unless_the_settings_say_so() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        body = inference_pb2.GenerateRequest(input=inference_pb2.Input(text="secret words " * 4))
        body.sampling.max_tokens = 1
        await generate(router, body)
        assert "secret" not in str(router.stats(show_prompts=True))


@pytest.mark.asyncio
async def test_a_request_that_comes_while_no_worker_is_up_is_not_cut() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker, wait_for_worker_s=60.0) as (_, router):
        await all_ready(router, 1)
        port = worker.port
        await worker.stop()
        await eventually(lambda: states(router)["w0"] == "LOST")
        body = request(tokens(1, 20))
        body.sampling.ClearField("max_tokens")
        waiting = asyncio.ensure_future(generate(router, body))
        await asyncio.sleep(0.1)
        await worker.start(port)
        assert (await waiting).usage.completion_tokens == 8192 - 20


@pytest.mark.asyncio
async def test_a_request_that_lost_a_worker_and_finds_no_other_is_told_so() -> None:
    async with fakes(FakeWorker("w0", breaks, incarnation=3)) as (_, router):
        await all_ready(router, 1)
        fragile = router.fleet.link("w0")
        running = asyncio.ensure_future(generate(router, request(tokens(1, 20))))
        await eventually(lambda: not fragile.connected)
        router.drain_worker("w0")
        with pytest.raises(errors.WorkerLost, match="no other one is ready") as caught:
            await running
        assert caught.value.metadata == {"lost_workers": "w0"}


@pytest.mark.asyncio
async def test_a_call_that_its_edge_ends_at_the_deadline_is_booked_as_that() -> None:
    worker = FakeWorker("w0", stays_quiet)
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        deadline = asyncio.get_running_loop().time() + 0.3
        with pytest.raises(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await generate(router, request(tokens(1, 20)), about=context(deadline=deadline))
        worker.hang_up()
        assert dict((await settled(router, 1)).requests) == {"DEADLINE_EXCEEDED": 1}


class StopsReading(FakeWorker):
    """Its first stream is read no further than the router's hello."""

    async def _listen(self, requests: Any) -> None:
        if self.connects > 1:
            await super()._listen(requests)


@pytest.mark.asyncio
async def test_a_job_that_never_left_this_router_is_no_suspect_of_having_killed_a_worker() -> None:
    workers = [StopsReading(f"w{n}", answers) for n in range(2)]
    async with fakes(*workers) as (_, router):
        await all_ready(router, 2)
        for worker in workers:  # more than a stream takes in: what comes after it stays here
            for names in (600_000, 1):  # the next one is tried in the moment of the end
                router.fleet.link(worker.name).probe([bytes(32)] * names, lambda _: None)
        await asyncio.sleep(0.1)
        running = asyncio.ensure_future(generate(router, request(tokens(1, 20))))
        for _ in workers:
            await eventually(lambda: any(router.fleet.link(w.name).jobs for w in workers))
            (holder,) = [w for w in workers if router.fleet.link(w.name).jobs]
            holder.hang_up()
            await eventually(lambda w=holder: not router.fleet.link(w.name).connected)  # type: ignore[misc]
        answer = await running
        assert (answer.route.retries, sum(w.kinds().count("submit") for w in workers)) == (2, 1)
        assert dict((await settled(router, 1)).requests) == {"OK": 1}


def gaps(worker: FakeWorker, job: object) -> None:
    worker.skip()


@pytest.mark.asyncio
async def test_gaps_in_the_streams_of_healthy_workers_are_no_losses_and_another_worker_is_preferred() -> None:
    async with fakes(*(FakeWorker(f"w{n}", gaps) for n in range(3)), FakeWorker("w3")) as (_, router):
        await all_ready(router, 4)
        router.set_policy(admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name="round_robin")), caller=ADMIN)
        answer = await generate(router, request(tokens(1, 20)))
        assert (answer.route.worker, answer.route.retries) == ("w3", 3)


@pytest.mark.asyncio
async def test_after_a_gap_the_only_worker_is_asked_once_more_and_not_for_ever() -> None:
    worker = FakeWorker("w0", gaps)
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        with pytest.raises(errors.NoWorkerAvailable, match="broke twice"):
            await generate(router, request(tokens(1, 20)))
        assert worker.kinds().count("submit") == 2


@pytest.mark.asyncio
async def test_the_label_of_a_prefix_is_what_a_person_wrote() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router("r0", show_prompts=True)
        await all_ready(router, 1)
        body = inference_pb2.GenerateRequest(input=chat(("system", "You  are a helpful assistant.", [])))
        body.sampling.max_tokens = 1
        await generate(router, body)
        assert router.stats(show_prompts=True).prefixes[0].label == "You are a helpful assistant."
        await generate(router, request(tokens(1, 64)))
        assert {len(p.label) for p in router.stats(show_prompts=True).prefixes} == {12, 28}


@pytest.mark.asyncio
async def test_the_encoder_is_told_whose_memory_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    encode = CharEncoder.encode

    async def noting(self: CharEncoder, input: inference_pb2.Input, *, group: str = "") -> Prompt:
        told.append(group)
        return await encode(self, input, group=group)

    monkeypatch.setattr(CharEncoder, "encode", noting)
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        for caller in (ALICE, BOB):
            await router.explain(inference_pb2.ExplainRequest(input=inference_pb2.Input(text="hello")), caller=caller)
    assert told == [ALICE.trust_group, BOB.trust_group]
    assert ALICE.trust_group != BOB.trust_group
