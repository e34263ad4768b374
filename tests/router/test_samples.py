"""Several answers to one prompt: where they run, what they cost, how they end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from router import errors
from router.core import Router
from tests.router.fake_worker import FakeWorker, answers, breaks, refuses, says_one_token
from tests.router.rig import ALICE, all_ready, context, eventually, request, rig, tokens
from tests.router.test_core import SLOW, settled
from tests.router.test_fleet import fakes
from warmkv.v1 import common_pb2, inference_pb2, worker_pb2

LENGTH = common_pb2.FINISH_REASON_LENGTH


def asks(ids: list[int], n: int, max_tokens: int = 4, *, seed: int = 100, **cache: object):
    body = request(ids, max_tokens)
    body.n = n
    body.sampling.seed = seed
    body.sampling.temperature = 1.0
    body.cache.CopyFrom(common_pb2.CacheDirectives(**cache))
    return body


def jobs(worker: FakeWorker) -> list[worker_pb2.Job]:
    return [heard.submit for heard in worker.heard if heard.HasField("submit")]


async def pieces(router: Router, body: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
    return [each async for each in router.generate(body, caller=ALICE, context=context("id-1"))]


def ids_by_index(parts: list[inference_pb2.GenerateResponse]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for part in parts:
        found.setdefault(part.index, []).extend(part.token_ids)
    return found


@pytest.mark.asyncio
async def test_each_answer_is_that_of_a_request_alone_with_its_seed() -> None:
    async with rig(3) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 3)
        together = ids_by_index(await pieces(router, asks(tokens(1, 100), 4)))
        alone = {
            place: ids_by_index(await pieces(router, asks(tokens(1, 100), 1, seed=100 + place)))[0]
            for place in range(4)
        }
        assert together == alone
        assert len({tuple(answer) for answer in together.values()}) == 4


@pytest.mark.asyncio
async def test_every_answer_has_its_own_end_and_the_last_one_the_bill_of_all() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        parts = await pieces(router, asks(tokens(1, 100), 5))
        ends = [part for part in parts if part.finish_reason]
        assert sorted(part.index for part in ends) == [0, 1, 2, 3, 4]
        assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]
        usage = parts[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (100, 20)
        assert usage.prompt_tokens_by_fate.computed == 100  # once, by the first of them
        assert (parts[-1].route.worker, parts[-1].route.request_id) == ("w0", "id-1")
        assert parts[-1].route.ttft_ms > 0
        stats = await settled(router, 1)
        assert stats.prompt_tokens.computed == 100
        assert stats.generated_tokens == 20
        assert len(stats.decisions) == 1


@pytest.mark.asyncio
async def test_they_come_interleaved() -> None:
    async with rig(1, timing=SLOW) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        parts = await pieces(router, asks(tokens(1, 40), 3, 6))
        order = [part.index for part in parts]
        assert order != sorted(order)


@pytest.mark.asyncio
async def test_they_run_on_one_worker_and_compute_the_prompt_once() -> None:
    async with rig(4) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 4)
        engines = [server._engine for server in fleet.workers.values()]
        for round_ in range(3):
            before = [engine.load().steps for engine in engines]
            parts = await pieces(router, asks(tokens(round_, 320), 6))
            assert sum(bool(part.finish_reason) for part in parts) == 6
            steps = [engine.load().steps - was for engine, was in zip(engines, before, strict=True)]
            assert sorted(steps)[:3] == [0, 0, 0]


@pytest.mark.asyncio
async def test_all_of_them_go_to_the_chosen_worker_at_once_with_their_seeds() -> None:
    workers = FakeWorker("w0"), FakeWorker("w1")
    async with fakes(*workers) as (_, router):
        await pieces(router, asks(tokens(1, 50), 3, seed=2**64 - 1))
        (used,) = [sent for worker in workers if (sent := jobs(worker))]
        assert [job.sampling.seed for job in used] == [2**64 - 1, 0, 1]
        assert len({job.job_id for job in used}) == 3
        assert len({job.packed_token_ids for job in used}) == 1


@pytest.mark.asyncio
async def test_the_later_ones_count_as_little_work() -> None:
    worker = FakeWorker("w0")
    async with fakes(worker) as (_, router):
        await pieces(router, asks(tokens(1, 165), 3))
        first, *others = jobs(worker)
        assert first.cached_blocks == 0
        assert all(job.cached_blocks == 10 for job in others)
        assert all(0 < job.work_ms < first.work_ms / 10 for job in others)
        await pieces(router, asks(tokens(2, 165), 2, no_read=True))
        first, second = jobs(worker)[-2:]
        assert first.work_ms == second.work_ms  # without the cache each computes the prompt


@pytest.mark.asyncio
async def test_cancelling_the_call_cancels_all_of_them() -> None:
    async with rig(1, timing=SLOW) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        async with aclosing(router.generate(asks(tokens(1, 40), 4, 500), caller=ALICE, context=context())) as answer:
            async for _ in answer:
                break
        stats = await settled(router, 1)
        assert dict(stats.requests) == {"CANCELLED": 1}
        engine = fleet.workers["w0"]._engine
        await eventually(lambda: engine.load().running == engine.load().waiting == 0)
        assert router.stats(show_prompts=False).in_flight == 0


@pytest.mark.asyncio
async def test_a_worker_that_is_lost_before_a_word_is_replaced_for_each_of_them() -> None:
    broken: list[str] = []

    def breaks_once(worker: FakeWorker, job: worker_pb2.Job) -> None:
        if not broken or worker.name in broken:
            broken[:] = [worker.name]
            breaks(worker, job)
        else:
            answers(worker, job)

    async with fakes(FakeWorker("w0", breaks_once), FakeWorker("w1", breaks_once)) as (_, router):
        parts = await pieces(router, asks(tokens(1, 50), 3))
        assert sorted(part.index for part in parts if part.finish_reason == LENGTH) == [0, 1, 2]
        assert parts[-1].usage.completion_tokens == 12
        assert parts[-1].route.retries == 3, "of all answers"
        assert sum(router.metrics.retries.labels(name)._value.get() for name in ("w0", "w1")) == 3
        (record,) = router.stats(show_prompts=False).recent
        assert (list(record.tried), record.worker) == (broken, ({"w0", "w1"} - {*broken}).pop())


@pytest.mark.asyncio
async def test_answers_whose_worker_dies_under_them_all_go_on_elsewhere() -> None:
    async with rig(2, timing=SLOW) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        body = asks(tokens(1, 100), 3, max_tokens=30)
        wanted = ids_by_index(await pieces(router, body))
        parts: list[inference_pb2.GenerateResponse] = []
        worker = ""
        async for part in router.generate(body, caller=ALICE, context=context("id-2")):
            parts.append(part)
            if not worker and {each.index for each in parts} == {0, 1, 2}:
                (worker,) = (each.name for each in router.list_workers() if each.running)
                await fleet.kill_worker(worker)
        assert ids_by_index(parts) == wanted
        last = parts[-1]
        assert last.usage.completion_tokens == 90
        assert sum(getattr(last.usage.prompt_tokens_by_fate, f) for f in ("computed", "device", "host")) == 100
        assert last.route.handovers == 3
        assert last.route.worker != worker
        made = {name: router.metrics.generation_tokens.labels("sim", name)._value.get() for name in ("w0", "w1")}
        assert sum(made.values()) == 180
        assert all(made.values()), "each worker is credited with what it made"


@pytest.mark.asyncio
async def test_the_error_of_one_is_that_of_the_call_and_ends_the_others() -> None:
    def third_fails(worker: FakeWorker, job: worker_pb2.Job) -> None:
        (refuses("CONSTRAINT_DEAD_END", "no way on") if len(jobs(worker)) == 3 else says_one_token)(worker, job)

    worker = FakeWorker("w0", third_fails)
    async with fakes(worker) as (_, router):
        with pytest.raises(errors.InvalidRequest, match="No way on"):
            await pieces(router, asks(tokens(1, 50), 4))
        await eventually(lambda: worker.kinds().count("cancel") == 3)


@pytest.mark.asyncio
async def test_quotas_pay_for_the_prompt_once_and_for_all_answers() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        taken: list[float] = []
        room = router._room
        take = room._quotas.take
        room._quotas.take = lambda tenant, amount: (taken.append(amount), take(tenant, amount))
        await pieces(router, asks(tokens(1, 100), 4, 10))
        await settled(router, 1)
        assert taken[0] == pytest.approx(100 + 4 * 10)  # what was expected
        assert sum(taken) == pytest.approx(100 + 4 * 10)  # and what it took


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 0}, "from 1 to 64"),
        ({"n": 65}, "from 1 to 64"),
        ({"n": 2, "temperature": 0.0}, "would be the same"),
    ],
)
async def test_a_senseless_number_of_answers_is_refused(change: dict[str, float], words: str) -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        body = asks(tokens(1, 20), int(change["n"]))
        body.sampling.temperature = change.get("temperature", 1.0)
        with pytest.raises(errors.InvalidRequest, match=words):
            await pieces(router, body)


@pytest.mark.asyncio
async def test_an_adapter_is_refused_by_name_and_never_ignored() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        body = request(tokens(1, 20))
        body.adapter = "my-lora"
        with pytest.raises(errors.AdapterNotFound, match="my-lora") as caught:
            await pieces(router, body)
        assert caught.value.code.name == "NOT_FOUND"


@pytest.mark.asyncio
async def test_a_simulated_worker_says_that_it_cannot_keep_a_constraint() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        body = request(tokens(1, 20))
        body.sampling.ignore_eos = False
        body.sampling.constraint.regex = "yes|no"
        with pytest.raises(errors.NotSupported, match="simulated"):
            await pieces(router, body)


@pytest.mark.asyncio
async def test_one_answer_is_one_place_in_flight_however_many_are_asked_for() -> None:
    async with rig(1, timing=SLOW) as fleet:
        router = await fleet.start_router(max_in_flight=1)
        await all_ready(router, 1)
        running = asyncio.create_task(pieces(router, asks(tokens(1, 40), 4, 10)))
        await eventually(lambda: router.stats(show_prompts=False).in_flight == 1)
        with pytest.raises(errors.Overloaded):
            await pieces(router, request(tokens(2, 20)))
        assert sum(bool(part.finish_reason) for part in await running) == 4
