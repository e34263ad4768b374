"""Overload on a virtual clock: a whole router over simulated workers. Times are exact, so nothing here can be flaky."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from bench.overload import AT_ONCE, Arrival, Outcome, conversations, offer, run
from bench.virtual_fleet import VirtualRouter, question, run_virtually
from router.config import OverloadConfig
from router.decide import Choice, Question
from router.errors import (
    DeadlineUnreachable,
    Draining,
    InternalError,
    NoWorkerAvailable,
    Overloaded,
    QuotaExceeded,
    RouterError,
)
from router.protocol import Caller, RequestContext, Role
from warmkv.v1 import inference_pb2
from workers.simulated_sequence import Timing

# A thousand tokens a second; an answer of one token takes no decode step.
SLOW = Timing(prefill_fixed_ms=0.0, prefill_token_ms=1.0, prefill_pair_ms=0.0, decode_step_ms=1.0)
SHORT = OverloadConfig(max_worker_queue_s=0.5)
Test = Callable[[VirtualRouter], Awaitable[None]]


def on_router(test: Test, workers: int = 1, overload: OverloadConfig = SHORT, **settings: Any) -> None:
    async def main() -> None:
        router = VirtualRouter(
            workers, timing=SLOW, device_blocks=400, max_batch_tokens=100, overload=overload, **settings
        )
        try:
            await test(router)
            await asyncio.sleep(30)
            assert_nothing_is_left(router)
        finally:
            await router.close()

    run_virtually(main)


def assert_nothing_is_left(router: VirtualRouter) -> None:
    room = router._room
    assert (len(room), room.tokens, room.check(), room._lateness.silent()) == (0, 0, True, 0)
    assert router.stats(show_prompts=False).in_flight == 0
    assert router._traffic.check()


def prompt(seed: int, tokens: int) -> list[int]:
    return [(seed * 7919 + n * 31) % 1000 for n in range(tokens)]


async def ask(
    router: VirtualRouter,
    ids: Sequence[int],
    *,
    tenant: str = "a",
    priority: int = 0,
    deadline_s: float | None = None,
    max_tokens: int = 1,
) -> inference_pb2.Route:
    """Where it ran; when it was answered is in its `ttft_ms`."""
    deadline = None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s
    body = question(ids, max_tokens=max_tokens, priority=priority)
    caller = Caller(tenant, Role.USER, tenant)
    route = inference_pb2.Route()
    async for part in router.generate(body, caller=caller, context=RequestContext("id", "", deadline)):
        route = part.route
    return route


async def flood(router: VirtualRouter, count: int, tokens: int = 200, **fields: Any) -> list[asyncio.Task[Any]]:
    """So many different prompts at once, all at the door when this returns."""
    tasks = [asyncio.ensure_future(ask(router, prompt(1000 + n, tokens), **fields)) for n in range(count)]
    await asyncio.sleep(0.001)
    return tasks


async def measured(router: VirtualRouter) -> None:
    """Enough first tokens that forecasts count for something."""
    for n in range(10):
        await ask(router, prompt(n, 200))


def test_an_idle_fleet_is_sent_to_at_once() -> None:
    async def test(router: VirtualRouter) -> None:
        route = await ask(router, prompt(1, 100))
        assert route.router_wait_ms == 0
        assert route.ttft_ms == pytest.approx(100.0)
        assert not router.metrics.registry.get_sample_value("warmkv_queue_wait_seconds_count")

    on_router(test)


def test_a_worker_is_sent_no_more_than_its_longest_queue_and_the_rest_waits_here() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 10)
        # 500 ms of queue and the request that was sent at that; 200 ms each.
        assert (router.links[0].jobs, len(router._room)) == (3, 7)
        assert router.stats(show_prompts=False).queued == 7
        assert router.stats(show_prompts=False).queued_tokens == 1400
        routes = await asyncio.gather(*tasks)
        assert [r.ttft_ms for r in routes] == [pytest.approx(200.0 * (n + 1), abs=210) for n in range(10)]
        assert routes[9].router_wait_ms > 1000

    on_router(test)


def test_never_sends_everything_at_once() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 10)
        assert router.links[0].jobs == 10
        assert {r.router_wait_ms for r in await asyncio.gather(*tasks)} == {0.0}

    on_router(test, overload=AT_ONCE)


def test_a_pass_sends_each_worker_no_more_than_fits() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 60)
        most = 0
        while not all(task.done() for task in tasks):
            loads = [link.engine.load() for link in router.links]
            most = max(most, *(load.pending_prefill_tokens for load in loads))
            await asyncio.sleep(0.05)
        assert most <= 500 + 200 + 50  # the limit, the request sent at it, the age of the report

    on_router(test, workers=3)


def test_work_is_conserved_while_requests_wait() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 40)
        await asyncio.gather(*tasks)
        assert asyncio.get_running_loop().time() == pytest.approx(40 * 0.2 / 2, rel=0.1)

    on_router(test, workers=2)


def test_one_tenants_flood_does_not_move_anothers_first_token() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 50, tenant="flood")
        await asyncio.sleep(1.0)
        waits = []
        for n in range(8):
            waits.append((await ask(router, prompt(n, 100), tenant="quiet")).ttft_ms)
            await asyncio.sleep(0.1)
        # The worker's queue, one request of the flood that is before it in turn, and its own prompt.
        assert max(waits) <= 500 + 200 + 200 + 100 + 60
        assert not tasks[-1].done()
        await asyncio.gather(*tasks)

    on_router(test)


def test_tenants_are_served_by_their_weights() -> None:
    async def test(router: VirtualRouter) -> None:
        ends: list[str] = []

        async def one(tenant: str, seed: int) -> None:
            await ask(router, prompt(seed, 100), tenant=tenant)
            ends.append(tenant)

        await flood(router, 5, tenant="first")
        tasks = [asyncio.ensure_future(one(t, n)) for n in range(40) for t in ("gold", "plain")]
        await asyncio.gather(*tasks)
        assert 28 <= ends[:40].count("gold") <= 32

    on_router(test, overload=OverloadConfig(max_worker_queue_s=0.2, tenant_weights={"gold": 3.0}))


def test_a_higher_priority_overtakes_those_that_wait() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 20)
        urgent = await ask(router, prompt(1, 100), priority=10)
        assert urgent.ttft_ms <= 500 + 200 + 200 + 100 + 60
        assert sum(task.done() for task in tasks) < 6
        await asyncio.gather(*tasks)

    on_router(test)


def test_a_cancelled_request_that_waits_leaves_nothing_and_costs_the_worker_nothing() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 10)
        for task in tasks[3:]:
            task.cancel()
        assert [type(each) for each in await asyncio.gather(*tasks[3:], return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 7
        assert len(router._room) == 0
        await asyncio.gather(*tasks[:3])
        assert router.links[0].engine._orders == 3
        assert router.stats(show_prompts=False).requests["CANCELLED"] == 7

    on_router(test)


@pytest.mark.parametrize("end", ["cancelled", "deadline"])
def test_what_ends_in_its_workers_queue_costs_nothing_and_what_ends_under_way_does(end: str) -> None:
    async def test(router: VirtualRouter) -> None:
        first = asyncio.ensure_future(ask(router, prompt(1, 640), max_tokens=200))
        await asyncio.sleep(0.001)
        deadline_s = 0.3 if end == "deadline" else None
        second = asyncio.ensure_future(ask(router, prompt(2, 400), tenant="b", max_tokens=200, deadline_s=deadline_s))
        await asyncio.sleep(0.2)
        assert (router.links[0].jobs, router.links[0].engine.load().waiting) == (2, 1)
        flows = router._room._queue._flows
        assert flows["b"].start >= 400
        if end == "cancelled":
            second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await asyncio.sleep(0.2)
        assert router.links[0].jobs == 1
        assert flows["b"].start == pytest.approx(0.0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.sleep(1.0)
        assert flows["a"].start >= 640

    on_router(test, overload=OverloadConfig(max_worker_queue_s=2.0), max_running=1)


def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_one_that_can_is_kept() -> None:
    async def test(router: VirtualRouter) -> None:
        await measured(router)
        tasks = await flood(router, 30)
        await asyncio.sleep(2.0)  # the rate at which the queue drains is known now
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineUnreachable, match=r"deadline is in 1\.0 s") as refused:
            await ask(router, prompt(1, 100), deadline_s=1.0)
        assert asyncio.get_running_loop().time() == began
        retry_s = refused.value.retry_after_s or 0.0
        route = await ask(router, prompt(2, 100), deadline_s=8.0)
        assert route.ttft_ms < 8000
        await asyncio.sleep(max(0.0, began + retry_s - asyncio.get_running_loop().time()))
        assert (await ask(router, prompt(1, 100), deadline_s=1.0)).ttft_ms < 1000
        await asyncio.gather(*tasks)

    on_router(test)


def test_a_prompt_that_takes_longer_than_its_deadline_is_refused_by_an_idle_fleet_too() -> None:
    async def test(router: VirtualRouter) -> None:
        with pytest.raises(RouterError) as late:  # nothing is known yet, so it is tried
            await ask(router, prompt(1, 3000), deadline_s=1.0)
        assert late.value.reason == "DEADLINE_EXCEEDED"
        await measured(router)
        with pytest.raises(DeadlineUnreachable):
            await ask(router, prompt(1, 3000), deadline_s=1.0)
        assert (await ask(router, prompt(1, 3000), deadline_s=5.0)).ttft_ms > 1000

    on_router(test)


def test_a_deadline_that_turns_out_impossible_while_waiting_is_refused_then() -> None:
    async def test(router: VirtualRouter) -> None:
        await measured(router)
        tasks = await flood(router, 40)
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineUnreachable):  # not at once: nobody knows yet how fast the queue drains
            await ask(router, prompt(50, 100), deadline_s=4.0)
        assert 0.4 < asyncio.get_running_loop().time() - began < 2.0
        await asyncio.gather(*tasks)

    on_router(test)


@pytest.mark.parametrize(
    ("limit", "config"),
    [
        ("max_queued", OverloadConfig(max_worker_queue_s=0.5, max_queued=5)),
        ("max_queued_per_tenant", OverloadConfig(max_worker_queue_s=0.5, max_queued_per_tenant=5)),
        ("max_queued_tokens", OverloadConfig(max_worker_queue_s=0.5, max_queued_tokens=1000)),
        ("max_queued_tokens_per_tenant", OverloadConfig(max_worker_queue_s=0.5, max_queued_tokens_per_tenant=1000)),
    ],
)
def test_the_queue_is_bounded_and_a_refusal_names_the_limit(limit: str, config: OverloadConfig) -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 12)
        refused = [task.exception() for task in tasks if task.done()]
        assert len(refused) == 12 - 3 - 5
        for error in refused:
            assert isinstance(error, Overloaded)
            assert (error.metadata["limit"], error.retry_after_s) == (limit, 1.0)
            assert f"router.{limit}" in error.message
        assert dict(router.stats(show_prompts=False).refused) == {limit: 4}
        await asyncio.gather(*tasks, return_exceptions=True)

    on_router(test, overload=config)


def test_nobody_waits_for_longer_than_the_longest_wait() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 30)
        await asyncio.wait(tasks)
        errors = [task.exception() for task in tasks if task.exception()]
        assert {error.metadata["limit"] for error in errors if isinstance(error, Overloaded)} == {"max_queue_wait"}
        assert asyncio.get_running_loop().time() < 2.0 + 0.5 + 0.2 + 0.3
        assert 10 <= 30 - len(errors) <= 14

    on_router(test, overload=OverloadConfig(max_worker_queue_s=0.5, max_queue_wait_s=2.0))


def test_a_draining_router_sends_those_that_wait_elsewhere_and_ends_what_runs() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 10)
        router.drain()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in results] == [inference_pb2.Route] * 3 + [Draining] * 7

    on_router(test)


def test_a_quota_refuses_until_it_has_refilled_and_bills_what_was_used() -> None:
    async def test(router: VirtualRouter) -> None:
        for n in range(4):
            await ask(router, prompt(n, 249))
        with pytest.raises(QuotaExceeded, match="'a' has used its 1,000 tokens") as refused:
            await ask(router, prompt(9, 249))
        assert (await ask(router, prompt(9, 249), tenant="b")).ttft_ms > 0
        retry_s = refused.value.retry_after_s or 0.0
        assert 5 < retry_s < 16
        await asyncio.sleep(retry_s)
        assert (await ask(router, prompt(9, 249))).ttft_ms > 0

    on_router(test, overload=OverloadConfig(tokens_per_minute={"a": 1000}))


def test_cached_tokens_count_a_tenth_of_a_quota() -> None:
    async def test(router: VirtualRouter) -> None:
        for _ in range(10):
            await ask(router, prompt(1, 640))
        with pytest.raises(QuotaExceeded):
            await ask(router, prompt(2, 640))

    # 641 for the first, then 63 + 64 (the last block holds the token that is always computed) at most.
    on_router(test, overload=OverloadConfig(tokens_per_minute={"a": 1800}))


def test_a_worker_that_is_stuck_gets_nothing_more_and_others_serve() -> None:
    async def test(router: VirtualRouter) -> None:
        stuck = router.links[0]
        task = router.fleet._members["w0"].task
        held = [asyncio.ensure_future(ask(router, prompt(n, 64))) for n in range(2)]
        await asyncio.sleep(0.001)
        task.cancel()
        assert stuck.jobs == 1
        await asyncio.sleep(12.0)
        routes = [await ask(router, prompt(50 + n, 64)) for n in range(6)]
        assert {route.worker for route in routes} == {"w1"}
        for each in held:
            each.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        for flight in list(stuck.flights.values()):
            flight.lose("it is stuck for good")

    on_router(test, workers=2)


def hold(router: VirtualRouter, name: str) -> Any:
    """A worker that says nothing any more; what lies on it is believed as before."""
    router.fleet._members[name].task.cancel()
    return next(link for link in router.links if link.name == name)


def test_a_stuck_worker_is_not_waited_for_by_those_whose_prompts_only_it_holds() -> None:
    async def test(router: VirtualRouter) -> None:
        known = prompt(1, 640)
        home = (await ask(router, known)).worker
        assert (await ask(router, known)).worker == home
        stuck = hold(router, home)
        held = asyncio.ensure_future(ask(router, known))
        await asyncio.sleep(12.0)
        assert stuck.jobs == 1
        began = asyncio.get_running_loop().time()
        route = await ask(router, known)  # at the door
        assert (route.worker != home, route.router_wait_ms) == (True, 0)
        assert asyncio.get_running_loop().time() - began < 1.0
        tasks = await flood(router, 8)  # fills the other worker, so that the next one waits
        route = await ask(router, [*known, *prompt(2, 64)])  # in the queue
        assert route.worker != home
        held.cancel()
        await asyncio.gather(held, *tasks, return_exceptions=True)
        for flight in list(stuck.flights.values()):
            flight.lose("it is stuck for good")

    on_router(test, workers=2)


def test_a_worker_that_becomes_stuck_frees_those_that_wait_for_it() -> None:
    async def test(router: VirtualRouter) -> None:
        known = prompt(1, 3200)
        home = (await ask(router, known)).worker
        tasks = [asyncio.ensure_future(ask(router, [*known, *prompt(50 + n, 200)])) for n in range(12)]
        await asyncio.sleep(0.001)
        assert len(router._room) > 6  # it is believed to work, and sent more, until it is late
        stuck = hold(router, home)
        await asyncio.sleep(30.0)
        waited = [task for task in tasks if task.done()]
        assert len(waited) >= 2
        assert {task.result().worker for task in waited} == {"w0", "w1"} - {home}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for flight in list(stuck.flights.values()):
            flight.lose("it is stuck for good")

    on_router(test, workers=2)


def test_where_all_workers_are_stuck_those_that_wait_are_told_so_and_what_to_do() -> None:
    async def test(router: VirtualRouter) -> None:
        held = [asyncio.ensure_future(ask(router, prompt(n, 64))) for n in range(2)]
        await asyncio.sleep(0.001)
        stuck = [hold(router, name) for name in ("w0", "w1")]
        await asyncio.sleep(12.0)
        with pytest.raises(Overloaded, match=r"all workers that take requests \(w0, w1\) .*restart those") as refused:
            await ask(router, prompt(9, 64))
        assert "raise router.max_queue_wait" not in refused.value.message
        for each in held:
            each.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        for link in stuck:
            for flight in list(link.flights.values()):
                flight.lose("it is stuck for good")

    on_router(test, workers=2)


def test_a_request_whose_worker_is_full_lets_those_pass_whose_worker_is_not() -> None:
    async def test(router: VirtualRouter) -> None:
        first, second = prompt(1, 3200), prompt(2, 3200)
        homes = [(await ask(router, ids)).worker for ids in (first, second)]
        assert len(set(homes)) == 2
        tasks = [asyncio.ensure_future(ask(router, [*first, *prompt(50 + n, 200)])) for n in range(12)]
        await asyncio.sleep(0.001)
        assert len(router._room) >= 6
        route = await ask(router, [*second, *prompt(99, 100)])
        assert (route.worker, sum(task.done() for task in tasks)) == (homes[1], 0)
        assert route.ttft_ms < 250
        assert {(await task).worker for task in tasks} == {homes[0]}

    on_router(test, workers=2)


def test_a_full_batch_is_a_queue_too_and_what_is_let_in_is_in_time() -> None:
    """Short prompts and long answers: no prompt waits to be computed, and yet a place in the batch is a second away."""
    arrivals = [Arrival(n / 14, prompt(n, 100), deadline_s=5.0, max_tokens=50) for n in range(140)]
    waiting: list[int] = []

    async def main() -> Outcome:
        timing = Timing(prefill_fixed_ms=4.0, prefill_token_ms=0.1, prefill_pair_ms=0.0, decode_step_ms=20.0)
        router = VirtualRouter(1, timing=timing, device_blocks=560, max_running=8, overload=OverloadConfig())

        async def look() -> None:
            await asyncio.sleep(4.0)
            while True:
                waiting.append(router.links[0].engine.load().waiting)
                await asyncio.sleep(0.05)

        looking = asyncio.ensure_future(look())
        try:
            return (await offer(router, arrivals))["t"]
        finally:
            looking.cancel()
            await router.close()

    outcome = run_virtually(main)  # eight a second can be served; half a second of them may wait at the worker
    assert max(waiting) <= 8
    assert outcome.died <= 0.03 * outcome.asked


def test_those_that_wait_are_told_when_no_worker_is_left() -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 6)
        router.links[0].synced = False
        began = asyncio.get_running_loop().time()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, NoWorkerAvailable) for each in results] == [False] * 3 + [True] * 3
        assert 3.0 <= asyncio.get_running_loop().time() - began <= 3.6

    on_router(test)


async def ask_new(router: VirtualRouter, ids: Sequence[int]) -> inference_pb2.Route:
    """Before all others, and with what only newer workers know."""
    body = question(ids, max_tokens=1, priority=10)
    body.sampling.presence_penalty = 1.0
    route = inference_pb2.Route()
    async for part in router.generate(body, caller=Caller("a", Role.USER, "a"), context=RequestContext("id", "", None)):
        route = part.route
    return route


def test_a_request_for_newer_workers_that_are_gone_holds_up_nobody() -> None:
    async def test(router: VirtualRouter) -> None:
        old, new = router.links
        old.hello.protocol_version = 2
        tasks = await flood(router, 20)
        waits = asyncio.ensure_future(ask_new(router, prompt(7, 150)))
        await asyncio.sleep(0.001)
        assert len(router._room) == 20 - 6 + 1
        new.synced = False
        began = asyncio.get_running_loop().time()
        results = await asyncio.gather(*tasks)
        assert {route.worker for route in results} == {"w0", "w1"}
        # Fourteen that waited, 200 ms each, behind the three that were sent before: the old worker has no idle moment.
        assert asyncio.get_running_loop().time() - began <= 17 * 0.2 + 0.2
        with pytest.raises(NoWorkerAvailable, match="w0 run an older warmkv"):
            await waits

    on_router(test, workers=2)


def test_one_that_waits_for_newer_workers_is_told_when_they_have_been_gone_for_a_while() -> None:
    async def test(router: VirtualRouter) -> None:
        router.links[0].hello.protocol_version = 2
        new = router.links[1]
        tasks = await flood(router, 16)
        waits = [asyncio.ensure_future(ask_new(router, prompt(70 + n, 150))) for n in range(9)]
        await asyncio.sleep(0.001)
        new.synced = False
        await asyncio.sleep(2.0)
        new.synced = True
        await waits[0]  # in time: what follows is a patience of its own
        new.synced = False
        began = asyncio.get_running_loop().time()
        results = await asyncio.gather(*waits[-2:], return_exceptions=True)
        assert [type(each) for each in results] == [NoWorkerAvailable] * 2
        assert 3.0 <= asyncio.get_running_loop().time() - began <= 3.6
        await asyncio.gather(*tasks, *waits, return_exceptions=True)

    on_router(test, workers=2)


def test_a_request_for_newer_workers_that_are_full_lets_others_pass() -> None:
    async def test(router: VirtualRouter) -> None:
        old, new = router.links
        old.hello.protocol_version = 2
        long = [asyncio.ensure_future(ask_new(router, prompt(50 + n, 2000))) for n in range(2)]
        await asyncio.sleep(0.001)
        assert (new.jobs, len(router._room)) == (1, 1)
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(await flood(router, 6)))
        assert asyncio.get_running_loop().time() - began <= 6 * 0.2 + 0.3, "the old worker was idle"
        assert [route.worker for route in await asyncio.gather(*long)] == ["w1"] * 2

    on_router(test, workers=2)


def test_a_request_that_cannot_be_decided_fails_alone_and_those_behind_it_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(router: VirtualRouter) -> None:
        tasks = await flood(router, 10)
        decide = router._decider.decide

        def fails_for_one(asked: Question) -> Choice | None:
            if asked.hashes == broken:
                raise ZeroDivisionError("a policy's defect")
            return decide(asked)

        waiting = asyncio.ensure_future(ask(router, prompt(7, 150), priority=10))
        await asyncio.sleep(0.001)
        assert len(router._room) == 8
        first, _ = next(router._room._queue.in_order())
        broken = first.body.question.hashes
        router._decider.decide = fails_for_one  # type: ignore[method-assign]
        async with asyncio.timeout(60):
            results = await asyncio.gather(waiting, *tasks, return_exceptions=True)
        assert [type(each) for each in results] == [InternalError] + [inference_pb2.Route] * 10
        assert router.stats(show_prompts=False).requests == {"INTERNAL": 1, "OK": 10}

    on_router(test)
    assert "a policy's defect" in caplog.text


def test_explain_says_how_long_a_request_would_wait() -> None:
    async def test(router: VirtualRouter) -> None:
        caller = Caller("a", Role.USER, "a")
        body = inference_pb2.ExplainRequest(input=question(prompt(1, 100), max_tokens=1).input)
        assert (await router.explain(body, caller=caller)).router_wait_ms == 0
        tasks = await flood(router, 30)
        await asyncio.sleep(2.0)
        assert (await router.explain(body, caller=caller)).router_wait_ms == pytest.approx(3000, rel=0.35)
        await asyncio.gather(*tasks)

    on_router(test)


def test_under_twice_the_load_late_binding_answers_more_of_what_it_lets_in_and_keeps_its_hits() -> None:
    """Shorter bursts are over before a forecast has seen a wait that it could learn from: then it lets in too few."""
    arrivals = list(conversations(2.0, 12.0, 1))
    late, at_once = run(OverloadConfig(), arrivals)["t"], run(AT_ONCE, arrivals)["t"]
    assert late.asked == at_once.asked
    assert late.hit >= at_once.hit
    assert late.died < 0.02 * late.asked
    assert late.died < at_once.died / 3
    assert late.good >= at_once.good


def test_an_outcome_counts_every_request_once() -> None:
    async def test(router: VirtualRouter) -> None:
        arrivals = [Arrival(0.1 * n, prompt(n, 200), max_tokens=1, deadline_s=2.0) for n in range(40)]
        outcome: Outcome = (await offer(router, arrivals))["t"]
        assert outcome.good + outcome.refused + outcome.died == outcome.asked == 40
        assert outcome.refused

    on_router(test)
