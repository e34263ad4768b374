"""Simulations: times by hand, the same seed the same result, one fate for every token, workers that die."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.outcome import Outcome, quantile
from replay.serial_engine import SerialProfile
from replay.simulated_router import RouterSettings
from replay.simulation import Failure, Setup, Simulation, simulate
from replay.workload import workload
from router.errors import InvalidRequest
from router.policy import POLICIES
from tests.replay.made import BLOCK, made, made_work

# A token a millisecond, and a tenth of a second for each request.
PLAIN = SerialProfile(
    prefill_tokens_per_s=1000.0, request_s=0.1, decode_token_s=0.1, decode_drag=math.inf, pool_tokens=1000
)
TEN, OTHER = list(range(10)), list(range(100, 110))


def setup(policy: str = "round_robin", *, workers: int = 1, **more: object) -> Setup:
    plain = Setup(workers, RouterSettings(policy), PLAIN)
    return replace(plain, **more)  # type: ignore[arg-type]


def ttft(outcome: Outcome) -> list[float]:
    return [round(fate.ttft_s, 9) for fate in outcome.fates]


def test_times_and_fates_by_hand() -> None:
    # The second waits for the first until 0.2 s and finds its ten blocks; the third finds an idle engine.
    work = made_work([(0.0, TEN), (0.05, [*TEN, *OTHER[:5]]), (1.0, OTHER)], extra=3)
    outcome = simulate(work, setup())
    assert ttft(outcome) == [0.203, pytest.approx(0.203 + 0.153 - 0.05), 0.203]
    assert [(fate.cached, fate.computed) for fate in outcome.fates] == [(0, 103), (100, 53), (0, 103)]
    assert outcome.end_s == pytest.approx(1.203 + 0.5)
    assert outcome.busy_s == {"worker-0": pytest.approx(0.203 + 0.153 + 0.203)}
    figures = outcome.figures(warm_up=0.0)
    assert figures.hit == pytest.approx(100 / 359)
    assert figures.split == {"worker-0": 3}


def test_decoding_slows_a_prefill() -> None:
    outcome = simulate(made_work([(0.0, TEN), (0.3, OTHER)]), setup(profile=replace(PLAIN, decode_drag=2.0)))
    assert ttft(outcome) == [0.2, pytest.approx(0.1 + 0.1 * 1.5)]


def test_blocks_are_cached_when_their_prefill_ends_and_go_oldest_first() -> None:
    work = made_work([(0.0, TEN), (1.0, OTHER), (2.0, TEN)])
    small = setup(profile=replace(PLAIN, pool_tokens=150))
    # Five of the first ten blocks survive the second prompt: the leading ones.
    assert [fate.cached for fate in simulate(work, small).fates] == [0, 0, 50]


def test_a_turn_of_a_closed_loop_follows_its_answer() -> None:
    work = workload(made([(0.0, TEN), (0.1, [*TEN, 99])], session="a"), closed_loop=True)
    outcome = simulate(work, setup())
    assert outcome.fates[1].arrived_s == pytest.approx(0.2 + 5 * 0.1 + 1.0)


def test_cache_aware_goes_where_the_blocks_are() -> None:
    work = made_work([(float(n), [*(TEN if n % 2 else OTHER), 1000 + n]) for n in range(20)])
    figures = simulate(work, setup("cache_aware", workers=2)).figures(warm_up=0.1)
    assert figures.hit == pytest.approx(10 / 11)
    assert sorted(figures.split.values()) == [9, 9]
    assert figures.overrated == 0.0


def test_a_late_event_is_a_wrong_prediction() -> None:
    work = made_work([(0.0, TEN), (1.0, OTHER), (2.0, TEN)])
    small = setup("cache_aware", profile=replace(PLAIN, pool_tokens=100))
    late = replace(small, router=RouterSettings("cache_aware", delay_s=1.5))
    assert simulate(work, small).figures(warm_up=0.0).overrated == 0.0
    assert simulate(work, late).figures(warm_up=0.0).overrated == pytest.approx(99 / 300)


@pytest.mark.parametrize("routers", [1, 3])
def test_the_same_seed_gives_the_same_result(routers: int) -> None:
    work = made_work([(n * 0.05, [n % 7, n % 5, n % 3, n]) for n in range(200)])
    chosen = setup("cache_aware", workers=4, routers=routers, failures=(Failure(1, 3.0, 2.0),))
    first, again = simulate(work, chosen), simulate(work, chosen)
    assert first == again
    assert simulate(work, replace(chosen, seed=2)).fates != first.fates


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.floats(0, 20), st.lists(st.integers(0, 2), max_size=12)), min_size=1, max_size=30
    ).map(sorted),
    policy=st.sampled_from(sorted(POLICIES)),
    workers=st.integers(1, 3),
    routers=st.integers(1, 2),
    delay_s=st.sampled_from([0.0, 0.3]),
    failures=st.lists(st.builds(Failure, st.just(0), st.floats(0, 20), st.floats(0, 5)), max_size=1),
)
def test_every_prompt_token_has_one_fate(
    prompts: list[tuple[float, list[int]]],
    policy: str,
    workers: int,
    routers: int,
    delay_s: float,
    failures: list[Failure],
) -> None:
    work = made_work(prompts, extra=1)
    router = RouterSettings(policy, delay_s=delay_s)
    simulation = Simulation(work, setup(policy, workers=workers, routers=routers, failures=failures, router=router))
    outcome = simulation.run()
    simulation.check()
    for request, fate in zip(work.requests, outcome.fates, strict=True):
        assert fate.cached + fate.computed == request.input_length
        assert 0 <= fate.cached <= request.input_length // BLOCK * BLOCK
        assert fate.ttft_s >= 0.1
    if not failures:
        needed = sum(0.1 + fate.computed / 1000 for fate in outcome.fates)
        assert sum(outcome.busy_s.values()) == pytest.approx(needed)


def test_requests_of_a_dead_worker_go_elsewhere() -> None:
    work = made_work([(0.0, TEN), (0.01, OTHER), (5.0, OTHER)])
    failing = setup(workers=2, failures=(Failure(0, 0.1, 2.0),))
    outcome = simulate(work, failing)
    first, second, _ = outcome.fates
    assert (first.worker, first.attempts, first.failed) == ("worker-1", 2, False)
    assert first.ttft_s == pytest.approx(0.21 + 0.2)  # behind the other one
    assert (second.worker, second.attempts) == ("worker-1", 1)
    assert outcome.busy_s["worker-0"] == pytest.approx(0.1)
    assert outcome.figures(warm_up=0.0).retried == 1


def test_an_answer_that_had_begun_is_cut_off() -> None:
    figures = simulate(made_work([(0.0, TEN)]), setup(failures=(Failure(0, 0.3, 1.0),))).figures(warm_up=0.0)
    assert (figures.failed, figures.retried, figures.unanswered) == (1, 0, 0)


def test_requests_wait_while_no_worker_is_up_and_a_new_life_is_empty() -> None:
    work = made_work([(0.0, TEN), (2.0, TEN)])
    outcome = simulate(work, setup("cache_aware", failures=(Failure(0, 1.0, 4.0),)))
    assert outcome.fates[1].ttft_s == pytest.approx(3.0 + 0.2)
    assert outcome.fates[1].predicted_tokens == 0


def test_what_makes_no_sense_is_refused() -> None:
    work = made_work([(0.0, TEN)])
    with pytest.raises(ValueError, match="at least one"):
        simulate(work, setup(workers=0))
    with pytest.raises(ValueError, match="number them"):
        simulate(work, setup(failures=(Failure(1, 0.0, 1.0),)))
    with pytest.raises(InvalidRequest, match="no policy"):
        simulate(work, setup("best"))


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.99) == pytest.approx(9.9)
    assert math.isnan(quantile([], 0.5))
