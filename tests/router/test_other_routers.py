"""A router's memory of traffic covers what the other routers of the fleet send."""

from __future__ import annotations

import asyncio

import pytest

from router.other_routers import OtherRouters
from router.traffic import MEMORY_S, NOTHING_KNOWN, Traffic
from tests.router.fake_worker import FakeWorker
from tests.router.rig import ALICE, all_ready, context, eventually, request, rig, tokens
from warmkv.v1 import inference_pb2, worker_pb2
from workers.simulated_sequence import Timing

A, B, C = (bytes([n]) * 16 for n in range(3))
SLOW = Timing(prefill_fixed_ms=300.0, prefill_token_ms=0.01, prefill_pair_ms=0.0, decode_step_ms=20.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(
    number: int, state: str = "PREFILL", *hashes: bytes, cached: int = 0, work_ms: float = 0.0
) -> worker_pb2.OtherJob:
    value = worker_pb2.OtherJobState.Value(f"OTHER_JOB_STATE_{state}")
    return worker_pb2.OtherJob(
        number=number, state=value, block_hashes=b"".join(hashes), cached_blocks=cached, work_ms=work_ms
    )


def heard(traffic: Traffic) -> OtherRouters:
    others = OtherRouters(traffic)
    others.heard("w", [told(1, "PREFILL", A, B, cached=1, work_ms=7.0)])
    return others


def test_a_job_of_another_router_counts_as_ones_own() -> None:
    theirs, own = Traffic(Clock()), Traffic(Clock())
    others = heard(theirs)
    own.sent(1, "w", [A, B], work_ms=7.0, cached_blocks=1)
    for step in ("DECODE", "ENDED"):
        for chain in ([A, B, C], [A, C]):
            assert theirs.arriving(chain) == own.arriving(chain)
            assert theirs.sharers(chain) == own.sharers(chain)
            assert theirs.active_blocks(chain, ["w"]) == own.active_blocks(chain, ["w"])
        assert theirs.unreported("w", NOTHING_KNOWN) == own.unreported("w", NOTHING_KNOWN)
        assert theirs.recent_work_ms("w") == own.recent_work_ms("w") == 7.0
        assert theirs.utilisation(2) == own.utilisation(2) > 0
        others.heard("w", [told(1, step)])
        (own.first_token if step == "DECODE" else own.ended)(1)
    assert theirs.check()


def test_what_is_told_again_counts_once() -> None:
    traffic = Traffic(Clock())
    others = heard(traffic)
    others.heard("w", [told(1, "PREFILL", A, B, cached=1), told(1, "DECODE", A, B, cached=1)])
    assert traffic.sharers([A, B]) == [(1, 2)]
    assert traffic.recent_work_ms("w") == 7.0
    others.heard("w", [told(1, "ENDED"), told(1, "ENDED"), told(9, "DECODE"), told(9, "ENDED")])
    assert traffic.check()


@pytest.mark.parametrize("how", ["missed", "lost"])
def test_after_a_gap_or_a_loss_nothing_is_left_of_them(how: str) -> None:
    traffic = Traffic(Clock())
    others = heard(traffic)
    others.heard("x", [told(1, "PREFILL", C)])
    getattr(others, how)("w")
    assert traffic.arriving([A, B]) == {}
    assert traffic.active_blocks([A], ["w"]) == [1]
    assert traffic.arriving([C]) == {"x": 1}, "of another worker nothing was lost"
    others.heard("w", [told(1, "DECODE"), told(1, "ENDED")])  # what came before the worker heard of it
    others.heard("x", [told(1, "ENDED")])
    assert traffic.check()


def test_a_worker_says_in_its_hello_what_work_it_was_given() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    others = OtherRouters(traffic)
    others.greeted("w", worker_pb2.WorkerHello(recent_work_ms=600.0, up_ms=3_600_000))
    assert traffic.recent_work_ms("w") == 600.0
    assert traffic.utilisation(1) == pytest.approx(600.0 / (MEMORY_S * 1000))
    traffic.sent(1, "w", [], work_ms=60.0, cached_blocks=0)
    others.lost("w")  # the stream breaks and is back: its hello says the same again, and more
    assert traffic.recent_work_ms("w") == 0.0
    others.greeted("w", worker_pb2.WorkerHello(recent_work_ms=700.0))
    assert traffic.recent_work_ms("w") == 700.0
    assert traffic.utilisation(1) == pytest.approx(700.0 / (MEMORY_S * 1000))
    others.lost("w")
    others.greeted("w", worker_pb2.WorkerHello())  # a new life of the worker knows of nothing
    assert traffic.recent_work_ms("w") == 0.0
    assert traffic.utilisation(1) == pytest.approx(700.0 / (MEMORY_S * 1000))


def test_what_runs_when_a_stream_begins_is_in_the_hello_and_still_before_the_worker() -> None:
    """Before a long step nobody but the worker's server knows of it: no report does."""
    traffic = Traffic(Clock())
    others = OtherRouters(traffic)
    others.greeted("w", worker_pb2.WorkerHello(recent_work_ms=600.0, up_ms=3_600_000))
    job = told(1, "PREFILL", A, B, work_ms=500.0)
    job.work_is_known = True
    others.heard("w", [job])
    assert traffic.recent_work_ms("w") == 600.0
    assert traffic.utilisation(1) == pytest.approx(600.0 / (MEMORY_S * 1000))
    assert traffic.unreported("w", NOTHING_KNOWN).ms == 500.0
    others.heard("w", [told(1, "DECODE"), told(1, "ENDED")])
    assert traffic.check()


def test_a_prompt_of_less_than_a_block_that_has_a_token_when_it_is_told_of_counts_as_work() -> None:
    traffic = Traffic(Clock())
    others = OtherRouters(traffic)
    others.heard("w", [told(1, "DECODE", work_ms=10.0), told(1, "ENDED"), told(2, "DECODE")])
    assert traffic.recent_work_ms("w") == 10.0
    assert traffic.check()


def test_lost_workers_are_forgotten_with_their_work() -> None:
    clock = Clock()
    traffic = Traffic(clock)
    for number in range(1000):
        traffic.sent(number, f"w{number}", [], work_ms=1000.0, cached_blocks=0)
        traffic.ended(number)
        traffic.forget(f"w{number}")
        clock.now += 5.0
    assert len(traffic._lost_work) < 60


@pytest.mark.asyncio
async def test_a_gap_in_the_stream_ends_what_was_known_of_others_until_it_is_told_again() -> None:
    worker = FakeWorker("w0")
    async with rig() as fleet:
        fleet.addresses["w0"] = await worker.start()
        router = await fleet.start_router()
        await all_ready(router, 1)
        worker.say(step=worker_pb2.Step(others=[told(1, "PREFILL", A, B), told(2, "PREFILL", C)]))
        await eventually(lambda: router._traffic.arriving([C]))
        worker.skip()
        worker.say(step=worker_pb2.Step(others=[told(3, "PREFILL", A)]))
        await eventually(lambda: router._traffic.arriving([A, B]) == {"w0": 1})
        assert router._traffic.arriving([C]) == {}
        await worker.stop()


@pytest.mark.asyncio
async def test_two_routers_over_real_streams_know_the_same_traffic() -> None:
    async with rig(2, timing=SLOW) as fleet:
        one, two = await fleet.start_router("r1"), await fleet.start_router("r2")
        await all_ready(one, 2)
        await all_ready(two, 2)
        body = request(tokens(1, 64), max_tokens=8)
        answers = one.generate(body, caller=ALICE, context=context())
        running = asyncio.create_task(anext(answers))
        chain = (await two.tokenize(inference_pb2.TokenizeRequest(input=body.input), caller=ALICE)).block_hashes
        await eventually(lambda: two._traffic.arriving(chain))
        assert two._traffic.arriving(chain) == one._traffic.arriving(chain)
        await running
        await eventually(lambda: two._traffic.sharers(chain))
        assert two._traffic.sharers(chain) == [(1, 4)]
        late = await fleet.start_router("r3")
        await all_ready(late, 2)
        await eventually(lambda: late._traffic.sharers(chain))
        async for _ in answers:
            pass
        for router in (one, two, late):
            await eventually(lambda router=router: router._traffic.check())
        works = [[router._traffic.recent_work_ms(name) for name in ("w0", "w1")] for router in (one, two, late)]
        assert works[1] == pytest.approx(works[0], rel=0.05)
        assert works[2] == pytest.approx(works[0], rel=0.05)
        assert max(works[0]) > 100.0
        assert min(works[0]) == 0.0
