"""Answers that go on at another worker: what the next one is sent, what the caller sees, what is on the bill."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import aclosing

import pytest

from kvstore.blocks import block_hashes, short
from kvstore.token_ids import unpacked
from router import errors
from router.core import Router
from router.handover import unable
from tests.router.fake_worker import FakeWorker, refuses
from tests.router.rig import (
    ALICE,
    all_ready,
    context,
    eventually,
    generate,
    request,
    rig,
    states,
    tokens,
)
from tests.router.test_core import settled
from tests.router.test_fleet import fakes
from warmkv.v1 import common_pb2, inference_pb2, worker_pb2
from workers.simulated_sequence import Timing

FEW_STEPS = 25
SLOW = Timing(prefill_fixed_ms=1.0, prefill_token_ms=0.05, prefill_pair_ms=0.0, decode_step_ms=10.0)
PROMPT = tokens(1, 40)


class Pace:
    """Workers' `sleep`: after some steps they are so slow that none ends an answer before a test has killed it."""

    def __init__(self) -> None:
        self.left = sys.maxsize

    def __call__(self, seconds: float) -> None:
        self.left -= 1
        time.sleep(seconds if self.left >= 0 else 0.2)

    def slow_down_after(self, steps: int) -> None:
        self.left = steps

    def hurry(self) -> None:
        self.left = sys.maxsize


Behaviour = Callable[[FakeWorker, worker_pb2.Job], None]


def token(place: int) -> int:
    """Of an answer, whoever makes it."""
    return 100 + place


def output(job: worker_pb2.Job, first: int, stop: int, **fields: object) -> worker_pb2.SequenceOutput:
    made = worker_pb2.SequenceOutput(
        job_id=job.job_id,
        token_ids=[token(place) for place in range(first, stop)],
        text="".join(f" {place}" for place in range(first, stop)),
        completion_tokens=stop,
        **fields,  # type: ignore[arg-type]
    )
    prompt = len(job.packed_token_ids) // 4 - job.resumed_tokens
    found = 32 if job.resumed_tokens else 16  # the second time more lies there: which is on no bill
    made.fates.computed, made.fates.device = prompt - found, found
    if job.resumed_tokens and first == job.resumed_tokens:
        made.resumed_fates.redis = 16
        made.resumed_fates.computed = prompt + job.resumed_tokens - 16
    return made


def says(*outputs: worker_pb2.SequenceOutput) -> dict[str, worker_pb2.Step]:
    return {"step": worker_pb2.Step(outputs=outputs)}


def finishes(worker: FakeWorker, job: worker_pb2.Job) -> None:
    """All that is left."""
    last = common_pb2.FINISH_REASON_LENGTH
    worker.say(**says(output(job, job.resumed_tokens, job.sampling.max_tokens, finish_reason=last)))


def begins(count: int, then: Behaviour = lambda worker, job: worker.hang_up()) -> Behaviour:
    """So many tokens, and then it is lost, or whatever."""

    def begin(worker: FakeWorker, job: worker_pb2.Job) -> None:
        if count:
            worker.say(**says(output(job, job.resumed_tokens, job.resumed_tokens + count)))
        then(worker, job)

    return begin


def hands_back(worker: FakeWorker, job: worker_pb2.Job) -> None:
    refuses("WORKER_DRAINING", "it is about to stop")(worker, job)


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """The first job that any worker is sent meets the first one."""
    left = list(behaviours)
    return lambda worker, job: left.pop(0)(worker, job)


def jobs(worker: FakeWorker) -> list[worker_pb2.Job]:
    return [each.submit for each in worker.heard if each.HasField("submit")]


def value(router: Router, name: str, **labels: str) -> float:
    return router.metrics.registry.get_sample_value(f"warmkv_{name}", labels) or 0.0


def check_whole(answer: inference_pb2.GenerateResponse, count: int) -> None:
    assert list(answer.token_ids) == [token(place) for place in range(count)]
    assert answer.text == "".join(f" {place}" for place in range(count))
    assert answer.usage.completion_tokens == count
    assert answer.usage.prompt_tokens == len(PROMPT)


@pytest.mark.asyncio
async def test_the_next_worker_is_sent_what_was_said_and_the_bill_is_one_answers() -> None:
    turns = in_turn(begins(10), finishes)
    workers = [FakeWorker(f"w{n}", turns) for n in range(2)]
    async with fakes(*workers) as (_, router):
        await all_ready(router, 2)
        answer = await generate(router, request(PROMPT, 30))
        check_whole(answer, 30)
        (left,) = [worker for worker in workers if jobs(worker) and worker.name != answer.route.worker]
        (next_one,) = [worker for worker in workers if worker.name == answer.route.worker]
        (asked,), (job,) = jobs(left), jobs(next_one)
        assert (asked.resumed_tokens, job.resumed_tokens) == (0, 10)
        assert list(unpacked(job.packed_token_ids)) == PROMPT + [token(place) for place in range(10)]
        names = block_hashes(list(unpacked(job.packed_token_ids)), job.chain_root, 16)
        assert len(names) == 3
        assert job.block_hashes == b"".join(map(short, names))
        assert (job.sampling, job.request_id, job.tenant_salt) == (asked.sampling, asked.request_id, asked.tenant_salt)
        assert (answer.route.handovers, answer.route.retries) == (1, 0)
        assert answer.usage.prompt_tokens_by_fate == common_pb2.TokensByFate(computed=24, device=16)
        stats = await settled(router, 1)
        assert (dict(stats.requests), stats.generated_tokens) == ({"OK": 1}, 30)
        assert (stats.prompt_tokens.computed, stats.prompt_tokens.device, stats.prompt_tokens.redis) == (24, 16, 0)
        assert value(router, "handovers_total", worker=left.name, reason="lost") == 1
        assert value(router, "request_retries_total", worker=left.name) == 0
        assert value(router, "handover_pause_seconds_count") == 1
        assert value(router, "time_to_first_token_seconds_count", model="sim") == 1
        assert value(router, "handover_tokens_total", fate="redis") == 16
        assert value(router, "handover_tokens_total", fate="computed") == 34
        assert value(router, "prompt_tokens_total", model="sim", worker=left.name, fate="device") == 16
        assert value(router, "generation_tokens_total", model="sim", worker=left.name) == 10
        assert value(router, "generation_tokens_total", model="sim", worker=next_one.name) == 20
        assert value(router, "tenant_tokens_total", tenant="other", kind="generated") == 30
        assert value(router, "tenant_tokens_total", tenant="other", kind="computed") == 24
        (first, *_) = stats.recent[::-1]
        assert (first.worker, first.prompt_tokens, first.reused_tokens) == (left.name, 40, 16)
        assert router._traffic.check()


@pytest.mark.asyncio
async def test_a_real_worker_that_is_killed_changes_no_token_and_its_caller_sees_a_pause() -> None:
    pace = Pace()
    async with rig(2, timing=SLOW, host_blocks=100, sleep=pace) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        for temperature in (0.0, 1.0):
            body = request(PROMPT, 60)
            body.sampling.temperature = temperature
            body.sampling.seed = 5
            whole = await generate(router, body)
            stream = router.generate(body, caller=ALICE, context=context())
            told, parts, victim = [], [], ""
            pace.slow_down_after(FEW_STEPS)
            async with aclosing(stream):
                async for part in stream:
                    parts.append(part)
                    told += part.token_ids
                    if len(told) >= 20 and not victim:
                        victim = router.stats(show_prompts=False).recent[0].worker
                        await fleet.kill_worker(victim)
                        pace.hurry()
            assert told == list(whole.token_ids)
            assert "".join(part.text for part in parts) == whole.text
            assert (parts[-1].route.handovers, parts[-1].route.worker != victim) == (1, True)
            assert parts[-1].usage.completion_tokens == 60
            fleet.start_worker(victim, timing=SLOW, host_blocks=100, sleep=pace)
            await all_ready(router, 2)
        assert router._traffic.check()
        assert all(link.jobs == 0 for link in router.fleet.links())


@pytest.mark.asyncio
async def test_tokens_that_come_with_the_end_of_their_worker_are_handed_out() -> None:
    def both_at_once(worker: FakeWorker, job: worker_pb2.Job) -> None:
        last = output(job, 5, 8, finish_reason=common_pb2.FINISH_REASON_ERROR)
        last.error.reason, last.error.message = "WORKER_DRAINING", "it is about to stop"
        worker.say(**says(output(job, 0, 5), last))

    turns = in_turn(both_at_once, finishes)
    async with fakes(FakeWorker("w0", turns), FakeWorker("w1", turns)) as (_, router):
        await all_ready(router, 2)
        answer = await generate(router, request(PROMPT, 20))
        check_whole(answer, 20)
        left = "w0" if answer.route.worker == "w1" else "w1"
        assert answer.route.handovers == 1
        assert value(router, "handovers_total", worker=left, reason="draining") == 1


@pytest.mark.asyncio
async def test_a_request_that_lost_two_workers_is_not_sent_to_a_third_whatever_was_said() -> None:
    turns = in_turn(begins(4), begins(4), finishes)
    async with fakes(*(FakeWorker(f"w{n}", turns) for n in range(3))) as (_, router):
        await all_ready(router, 3)
        told: list[int] = []

        async def listen() -> None:
            async for part in router.generate(request(PROMPT, 20), caller=ALICE, context=context()):
                told.extend(part.token_ids)

        with pytest.raises(errors.PoisonRequest, match="not sent to another"):
            await listen()
        assert told == [token(place) for place in range(8)]
        assert dict((await settled(router, 1)).requests) == {"FAILED_PRECONDITION": 1}
        assert router._traffic.check()


@pytest.mark.asyncio
@pytest.mark.parametrize(("made", "is_poison"), [(63, True), (64, False)])
async def test_a_worker_that_made_much_of_it_clears_it_of_the_loss_before(made: int, is_poison: bool) -> None:
    turns = in_turn(begins(4), begins(made), finishes)
    async with fakes(*(FakeWorker(f"w{n}", turns) for n in range(3))) as (_, router):
        await all_ready(router, 3)
        if is_poison:
            with pytest.raises(errors.PoisonRequest):
                await generate(router, request(PROMPT, 100))
            return
        answer = await generate(router, request(PROMPT, 100))
        check_whole(answer, 100)
        assert answer.route.handovers == 2


@pytest.mark.asyncio
async def test_what_goes_on_losing_workers_ends_however_much_they_made() -> None:
    workers = [FakeWorker(f"w{n}", begins(70)) for n in range(7)]
    async with fakes(*workers) as (_, router):
        await all_ready(router, 7)
        with pytest.raises(errors.PoisonRequest):
            await generate(router, request(PROMPT, 1000))
        assert sum(len(jobs(worker)) for worker in workers) == 6


@pytest.mark.asyncio
async def test_a_failed_engine_counts_as_lost_and_workers_that_hand_back_do_not() -> None:
    fails = refuses("ENGINE_FAILED", "it broke")
    turns = in_turn(begins(2, hands_back), begins(2, hands_back), begins(2, fails), begins(2, hands_back), finishes)
    async with fakes(*(FakeWorker(f"w{n}", turns) for n in range(5))) as (_, router):
        await all_ready(router, 5)
        answer = await generate(router, request(PROMPT, 20))
        check_whole(answer, 20)
        assert (answer.route.handovers, answer.route.retries) == (4, 0)
    turns = in_turn(begins(2, fails), begins(2, fails), finishes)
    async with fakes(*(FakeWorker(f"w{n}", turns) for n in range(3))) as (_, router):
        await all_ready(router, 3)
        with pytest.raises(errors.PoisonRequest):
            await generate(router, request(PROMPT, 20))


@pytest.mark.asyncio
async def test_a_worker_that_refuses_what_is_under_way_begins_no_second_handover() -> None:
    turns = in_turn(begins(4), hands_back, refuses("PROMPT_TOO_LARGE_FOR_WORKER"), finishes)
    async with fakes(*(FakeWorker(f"w{n}", turns) for n in range(4))) as (_, router):
        await all_ready(router, 4)
        answer = await generate(router, request(PROMPT, 20))
        check_whole(answer, 20)
        assert (answer.route.handovers, answer.route.retries) == (1, 0)


@pytest.mark.asyncio
async def test_a_worker_that_handed_back_is_as_good_as_any_once_it_was_started_anew() -> None:
    """Rolling restarts meet one long answer again and again."""
    worker = FakeWorker("w0", begins(3, hands_back))
    async with fakes(worker) as (_, router):
        await all_ready(router, 1)
        running = asyncio.ensure_future(generate(router, request(PROMPT, 20)))
        await eventually(lambda: len(jobs(worker)) == 1)
        await asyncio.sleep(0.1)
        assert len(jobs(worker)) == 1, "it is not asked again as it is"
        port = worker.port
        await worker.stop()
        worker.hello.incarnation, worker.submitted = 2, finishes
        await eventually(lambda: states(router)["w0"] == "LOST")
        await worker.start(port)
        check_whole(await running, 20)


@pytest.mark.asyncio
async def test_a_gap_in_the_middle_of_an_answer_is_made_good() -> None:
    def gap(worker: FakeWorker, job: worker_pb2.Job) -> None:
        asyncio.get_running_loop().call_later(0.2, worker.skip)  # when the tokens are out

    turns = in_turn(begins(4, gap), finishes)
    async with fakes(FakeWorker("w0", turns), FakeWorker("w1", turns)) as (_, router):
        await all_ready(router, 2)
        answer = await generate(router, request(PROMPT, 20))
        check_whole(answer, 20)
        left = "w0" if answer.route.worker == "w1" else "w1"
        assert value(router, "handovers_total", worker=left, reason="gap") == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("then", [begins(4), begins(4, hands_back)])
async def test_off_it_is_an_error_that_says_what_is_right(then: Behaviour) -> None:
    turns = in_turn(then, finishes)
    async with fakes(FakeWorker("w0", turns), FakeWorker("w1", turns), handover=False) as (_, router):
        await all_ready(router, 2)
        with pytest.raises(
            errors.WorkerLost, match=r"the tokens that came, 4, are right.*send the request again"
        ) as got:
            await generate(router, request(PROMPT, 20))
        assert got.value.metadata["generated_tokens"] == "4"
        stats = await settled(router, 1)
        assert dict(stats.requests) == {"UNAVAILABLE": 1}
        assert (stats.prompt_tokens.device, stats.generated_tokens) == (16, 4), "what was told of it is on the bill"


@pytest.mark.asyncio
async def test_nobody_left_is_an_error_after_a_longer_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.handover.PATIENCE", 1.5)
    async with fakes(FakeWorker("w0", begins(4, hands_back))) as (_, router):
        await all_ready(router, 1)
        started = asyncio.get_running_loop().time()
        with pytest.raises(
            errors.WorkerLost, match=r"Worker w0 was lost in the middle.*no other one went on"
        ) as caught:
            await generate(router, request(PROMPT, 20))
        assert asyncio.get_running_loop().time() - started >= 1.4
        assert caught.value.metadata == {"worker": "w0", "generated_tokens": "4"}
        assert router._traffic.check()


@pytest.mark.asyncio
async def test_the_deadline_goes_on_counting_while_nobody_answers() -> None:
    async with fakes(FakeWorker("w0", begins(4, hands_back))) as (_, router):
        await all_ready(router, 1)
        about = context(deadline=asyncio.get_running_loop().time() + 0.4)
        with pytest.raises(errors.DeadlineExceeded):
            await generate(router, request(PROMPT, 20), about=about)
        assert dict((await settled(router, 1)).requests) == {"DEADLINE_EXCEEDED": 1}


@pytest.mark.asyncio
@pytest.mark.parametrize("is_sent", [False, True])
async def test_a_caller_that_leaves_in_the_pause_leaves_nothing_behind(is_sent: bool) -> None:
    def quiet(worker: FakeWorker, job: worker_pb2.Job) -> None:
        return None

    turns = in_turn(begins(4, hands_back), quiet)
    workers = [FakeWorker(f"w{n}", turns) for n in range(2 if is_sent else 1)]
    async with fakes(*workers) as (_, router):
        await all_ready(router, len(workers))
        told: list[int] = []

        async def listen() -> None:
            async for part in router.generate(request(PROMPT, 20), caller=ALICE, context=context()):
                told.extend(part.token_ids)

        running = asyncio.ensure_future(listen())
        await eventually(lambda: sum(len(jobs(worker)) for worker in workers) == len(workers) and len(told) == 4)
        await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        if is_sent:
            last = next(worker for worker in workers if jobs(worker) and jobs(worker)[-1].resumed_tokens)
            await eventually(lambda: "cancel" in last.kinds())
            job = jobs(last)[-1]
            cancelled = common_pb2.FINISH_REASON_CANCELLED
            last.say(**says(worker_pb2.SequenceOutput(job_id=job.job_id, finish_reason=cancelled, completion_tokens=4)))
        stats = await settled(router, 1)
        assert (dict(stats.requests), stats.generated_tokens, stats.in_flight) == ({"CANCELLED": 1}, 4, 0)
        assert (stats.prompt_tokens.computed, stats.prompt_tokens.device) == (24, 16)
        await eventually(lambda: all(link.jobs == 0 for link in router.fleet.links()))
        assert router._traffic.check()


@pytest.mark.asyncio
async def test_a_worker_that_is_too_old_is_never_sent_what_another_began() -> None:
    def hands_back_soon(worker: FakeWorker, job: worker_pb2.Job) -> None:
        asyncio.get_running_loop().call_later(0.1, hands_back, worker, job)

    turns = in_turn(*[begins(4, hands_back_soon), finishes] * 4)
    workers = [FakeWorker(f"w{n}", turns) for n in range(4)]
    async with fakes(*workers) as (_, router):
        await all_ready(router, 4)
        links = router.fleet.links()
        assert unable(links) == frozenset()
        for link in links[:3]:
            assert link.hello is not None
            link.hello.protocol_version = 2
        assert unable(links) == {"w0", "w1", "w2"}
        for number in range(4):
            router.drain_worker("w3")
            stream = router.generate(request([*PROMPT[:-1], number], 20), caller=ALICE, context=context())
            async with aclosing(stream):
                await anext(stream)
                router.undrain_worker("w3")
                parts = [part async for part in stream]
            assert (parts[-1].route.worker, parts[-1].route.handovers) == ("w3", 1)


@pytest.mark.parametrize("stuck", ["w1", "w2"])
@pytest.mark.asyncio
async def test_a_worker_that_is_stuck_is_sent_what_another_began_only_if_there_is_no_other(stuck: str) -> None:
    def left(worker: FakeWorker, job: worker_pb2.Job) -> None:
        for name in others:
            router.undrain_worker(name)
        worker.snapshots = False  # it does not come back
        worker.hang_up()

    workers = [FakeWorker("w0", begins(5, left)), FakeWorker("w1", finishes), FakeWorker("w2", finishes)]
    async with fakes(*workers) as (_, router):
        await all_ready(router, 3)
        router.drain_worker("w1")
        router.drain_worker("w2")
        router._room._headroom.stuck = lambda: frozenset({stuck})  # type: ignore[method-assign]
        others = ["w1", "w2"]
        answer = await generate(router, request(PROMPT, 20))
        check_whole(answer, 20)
        assert answer.route.worker == {"w1": "w2", "w2": "w1"}[stuck]
    alone = [FakeWorker("w0", begins(5, left)), FakeWorker(stuck, finishes)]
    async with fakes(*alone) as (_, router):
        await all_ready(router, 2)
        router.drain_worker(stuck)
        router._room._headroom.stuck = lambda: frozenset({stuck})  # type: ignore[method-assign]
        others = [stuck]
        assert (await generate(router, request(PROMPT, 20))).route.worker == stuck


@pytest.mark.asyncio
async def test_nothing_comes_behind_the_end() -> None:
    def ends_and_dies(worker: FakeWorker, job: worker_pb2.Job) -> None:
        finishes(worker, job)
        worker.hang_up()

    async with fakes(FakeWorker("w0", ends_and_dies)) as (_, router):
        await all_ready(router, 1)
        parts = [part async for part in router.generate(request(PROMPT, 5), caller=ALICE, context=context())]
        assert [bool(part.finish_reason) for part in parts] == [*[False] * (len(parts) - 1), True]
        check_whole(parts[-1], 5)
        assert parts[-1].route.handovers == 0


@pytest.mark.asyncio
async def test_a_death_before_the_last_token_costs_that_token_once() -> None:
    turns = in_turn(begins(19), finishes)
    async with fakes(FakeWorker("w0", turns), FakeWorker("w1", turns)) as (_, router):
        await all_ready(router, 2)
        check_whole(await generate(router, request(PROMPT, 20)), 20)


@pytest.mark.asyncio
async def test_a_router_that_ends_waits_for_no_other_worker() -> None:
    worker = FakeWorker("w0", begins(4, lambda worker, job: None))
    async with fakes(worker, wait_for_worker_s=60.0) as (_, router):
        await all_ready(router, 1)
        stream = router.generate(request(PROMPT, 20), caller=ALICE, context=context())
        assert len((await anext(stream)).token_ids) == 4
        started = asyncio.get_running_loop().time()
        await router.close()
        with pytest.raises(errors.WorkerLost, match="this router is ending"):
            await anext(stream)
        assert asyncio.get_running_loop().time() - started < 30.0


@pytest.mark.asyncio
async def test_each_of_two_routers_hands_over_its_own() -> None:
    pace = Pace()
    async with rig(3, timing=SLOW, sleep=pace) as fleet:
        first, second = await fleet.start_router("r0"), await fleet.start_router("r1")
        await asyncio.gather(all_ready(first, 3), all_ready(second, 3))
        wholes = await asyncio.gather(*(generate(first, request(tokens(n, 30), 40)) for n in range(6)))
        told: list[list[int]] = [[] for _ in wholes]
        handovers = [0] * len(wholes)

        async def listen(router: Router, n: int) -> None:
            async for part in router.generate(request(tokens(n, 30), 40), caller=ALICE, context=context()):
                told[n].extend(part.token_ids)
                handovers[n] = part.route.handovers or handovers[n]

        pace.slow_down_after(FEW_STEPS)
        running = [asyncio.ensure_future(listen(router, n)) for n, router in enumerate([first, second] * 3)]
        await eventually(lambda: all(told))
        busiest = max(("w0", "w1", "w2"), key=lambda name: sum(r.fleet.link(name).jobs for r in (first, second)))
        await fleet.kill_worker(busiest)
        pace.hurry()
        await asyncio.gather(*running)
        assert told == [list(whole.token_ids) for whole in wholes]
        assert sum(handovers) > 0
        for router in (first, second):
            await eventually(router._traffic.check)


@pytest.mark.asyncio
async def test_a_request_is_one_line_of_the_last_decisions_however_often_it_moves() -> None:
    turns = in_turn(begins(0), begins(10, hands_back), begins(5, hands_back), finishes)
    workers = [FakeWorker(f"w{n}", turns) for n in range(4)]
    async with fakes(*workers) as (_, router):
        await all_ready(router, 4)
        check_whole(await generate(router, request(PROMPT, 30)), 30)
        (record,) = router.stats(show_prompts=False).recent
        path = [*record.tried, record.worker, *record.went_on_at]
        assert len(path) == len(set(path)) == 4, "each worker was left once"
        assert (len(record.tried), len(record.went_on_at)) == (1, 2)
        lost, first, second, last = ({worker.name: worker for worker in workers}[name] for name in path)
        counts = [[job.resumed_tokens for job in jobs(worker)] for worker in (lost, first, second, last)]
        assert counts == [[0], [0], [10], [15]]
        assert record.reused_tokens == 16, "the bill's, that of its first admission"
        assert record.ttft_ms > 0


@pytest.mark.asyncio
async def test_handovers_and_their_pauses_are_in_the_numbers_that_operators_see() -> None:
    workers = [FakeWorker(name, finishes) for name in ("w0", "w1")]
    async with fakes(*workers) as (_, router):
        await all_ready(router, 2)
        router.drain_worker("w1")
        workers[0].submitted = begins(10, lambda worker, job: (router.undrain_worker("w1"), hands_back(worker, job)))
        before = router.stats(show_prompts=False)
        assert (dict(before.handovers), before.handover_pause.count) == ({}, 0)
        check_whole(await generate(router, request(PROMPT, 30)), 30)
        stats = router.stats(show_prompts=False)
        assert dict(stats.handovers) == {"draining": 1}
        pause = stats.handover_pause
        assert pause.count == 1
        assert 0 < pause.p50_ms == pause.p99_ms == value(router, "handover_pause_seconds_sum") * 1000
