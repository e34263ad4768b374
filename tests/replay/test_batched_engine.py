"""The batched engine does what a naive one does, which takes one step and one block at a time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.events import TierName
from replay.batched_engine import BatchedEngine
from replay.batched_profile import BatchedProfile
from replay.outcome import Outcome
from replay.simulated_router import RouterSettings
from replay.simulation import Failure, RouterRestart, Setup, Simulation, simulate
from replay.tiers import NO_TIERS, TierProfile, Tiers
from replay.workload import Workload, workload
from router.cost import PrefillFit
from tests.replay.made import made
from tests.replay.naive_engine import naive

PROFILE = BatchedProfile(
    PrefillFit(3.0, 1.0, 0.001),
    decode_ms=7.0,
    chunk_ms=0.5,
    decode_sequence_ms=0.3,
    decode_context_ms=0.01,
    mixed_ms=1.1,
    mixed_sequence_ms=0.7,
    max_batch_tokens=40,
    max_running=5,
    pool_tokens=300,
)
HOST = TierProfile(tokens=500, latency_ms=0.3, token_ms=0.2)
SLOW = TierProfile(tokens=2000, latency_ms=1.0, token_ms=0.8)
REDIS = TierProfile(tokens=900, latency_ms=2.0, token_ms=0.5)
Prompt = tuple[float, list[int], int, int]  # arrival, contents, tokens of the answer, priority


def mixed(prompts: list[Prompt], *, extra: int) -> Workload:
    """Prompts of (arrival, contents, tokens of the answer, priority); arrivals are made different."""
    prompts = sorted(prompts)
    trace = made([(at + n * 1e-4, blocks) for n, (at, blocks, _, _) in enumerate(prompts)], extra=extra)
    requests = tuple(
        replace(request, output_length=output, priority=priority)
        for request, (_, _, output, priority) in zip(trace.requests, prompts, strict=True)
    )
    return workload(replace(trace, requests=requests))


def simulated(work: Workload, profile: BatchedProfile, tiers: Tiers) -> tuple[Outcome, BatchedEngine]:
    simulation = Simulation(work, Setup(1, RouterSettings("round_robin"), profile, tiers=tiers))
    outcome = simulation.run()
    simulation.check()
    (engine,) = simulation._engines.values()
    assert isinstance(engine, BatchedEngine)
    engine.check()
    return outcome, engine


def assert_same(work: Workload, profile: BatchedProfile, tiers: Tiers) -> None:
    outcome, engine = simulated(work, profile, tiers)
    jobs, oracle = naive(work, profile, tiers)
    assert [fate.first_token_s for fate in outcome.fates] == pytest.approx(
        [job.first_token_s for job in sorted(jobs, key=lambda each: each.number)]
    )
    assert outcome.end_s == pytest.approx(max(job.end_s for job in jobs if job.end_s is not None))
    for job in jobs:
        fate = outcome.fates[job.number]
        assert job.cached is not None
        assert fate.cached == sum(job.cached.values())
        for tier, tokens in job.cached.items():
            assert fate.tiers.get(TierName(tier), 0) == tokens
    assert engine.scheduler.preemptions == oracle.preemptions
    for chain in work.chains:
        assert engine._blocks.pool.leading(chain) == oracle.pool.run(list(chain))
    assert engine._blocks.pool.used == len(oracle.pool.idle)


def prompts(*, longest: int, priorities: int = 0) -> st.SearchStrategy[list[Prompt]]:
    one = st.tuples(
        st.floats(0, 4), st.lists(st.integers(0, 2), max_size=longest), st.integers(1, 60), st.integers(0, priorities)
    )
    return st.lists(one, min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(given_=prompts(longest=20), pool=st.sampled_from([300, 420, 5000]), budget=st.sampled_from([12, 40, 1000]))
def test_steps_blocks_and_preemptions(given_: list[Prompt], pool: int, budget: int) -> None:
    assert_same(mixed(given_, extra=3), replace(PROFILE, pool_tokens=pool, max_batch_tokens=budget), NO_TIERS)


@settings(max_examples=40, deadline=None, derandomize=True)  # see `Approximations` of the simulator in docs/design.md
@given(
    given_=prompts(longest=20),
    pool=st.sampled_from([300, 420]),
    tiers=st.sampled_from(
        [
            Tiers(HOST),
            Tiers(redis=REDIS),
            Tiers(HOST, redis=REDIS),
            Tiers(HOST, disk=SLOW, redis=REDIS, ttl_s=0.8),
            Tiers(redis=replace(REDIS, admission="second_hit"), ttl_s=1.5),
        ]
    ),
)
def test_reads_of_tiers(given_: list[Prompt], pool: int, tiers: Tiers) -> None:
    assert_same(mixed(given_, extra=3), replace(PROFILE, pool_tokens=pool), tiers)


def burst(seed: int, count: int) -> list[Prompt]:
    rng = random.Random(seed)
    return [(rng.uniform(0, 1), [rng.randint(0, 1)] * rng.randint(4, 20), rng.randint(20, 60), 0) for _ in range(count)]


def test_a_burst_is_preempted_and_ends() -> None:
    work = mixed(burst(1, 40), extra=3)
    assert_same(work, replace(PROFILE, pool_tokens=300), Tiers(HOST))
    outcome, engine = simulated(work, replace(PROFILE, pool_tokens=300), Tiers(HOST))
    assert engine.scheduler.preemptions > 5
    assert all(fate.ended_s is not None for fate in outcome.fates)
    assert engine._blocks.pool.reserved == 0


def test_times_by_hand() -> None:
    # Chunks of 40, 40 and 23 tokens, then four steps of decode.
    (fate,) = simulated(mixed([(0.0, list(range(10)), 5, 0)], extra=3), PROFILE, NO_TIERS)[0].fates
    chunks = [(40, 0), (40, 40), (23, 80)]
    prefill = sum(3.0 + 0.5 + n + 0.001 * n * (m + n / 2) for n, m in chunks)
    decode = sum(7.0 + 0.3 + 0.01 * (104 + step) for step in range(4))
    assert fate.ttft_s == pytest.approx(prefill / 1e3)
    assert fate.ended_s == pytest.approx((prefill + decode) / 1e3)
    assert fate.tpot_s == pytest.approx(decode / 4e3)


def test_a_burst_over_one_document_computes_it_once() -> None:
    document = list(range(20))
    outcome, _ = simulated(mixed([(n * 0.001, document, 3, 0) for n in range(4)], extra=3), PROFILE, NO_TIERS)
    assert [fate.computed for fate in outcome.fates] == [203, 3, 3, 3]


def test_priority_goes_first() -> None:
    one_by_one = replace(PROFILE, max_running=1)
    work = mixed([(0.0, [1] * 10, 3, 0), (0.01, [2] * 10, 3, 0), (0.02, [3] * 10, 3, 5)], extra=3)
    first, second, third = (fate.first_token_s for fate in simulated(work, one_by_one, NO_TIERS)[0].fates)
    assert first is not None
    assert second is not None
    assert third is not None
    assert first < third < second


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    work = mixed([(0.0, list(range(40)), 3, 0), (1.0, [1], 3, 0)], extra=3)
    too_long, other = simulated(work, PROFILE, NO_TIERS)[0].fates
    assert too_long.failed
    assert too_long.first_token_s is None
    assert not other.failed
    assert other.first_token_s is not None


def test_whole_prompts_are_admitted_in_turn_where_they_reserve_their_room() -> None:
    reserving = replace(PROFILE, pool_tokens=300, reserves_prompt=True)
    work = mixed([(0.0, [1] * 20, 3, 0), (0.01, [2] * 20, 3, 0), (0.02, [3], 3, 0)], extra=3)
    fates = simulated(work, reserving, NO_TIERS)[0].fates
    times = [fate.first_token_s for fate in fates]
    assert times == sorted(times, key=lambda at: at or 0.0)  # the short one waits behind the one without room
    assert fates[0].ended_s is not None
    assert times[1] is not None
    assert times[1] > fates[0].ended_s


def fleet_work(count: int = 120) -> Workload:
    rng = random.Random(3)
    return mixed(
        [
            (rng.uniform(0, 12), [rng.randint(0, 1), *[rng.randint(0, 4)] * rng.randint(1, 15)], rng.randint(1, 40), 0)
            for _ in range(count)
        ],
        extra=3,
    )


@pytest.mark.parametrize("policy", ["cache_aware", "lowest_ttft", "round_robin"])
def test_a_fleet_keeps_its_books(policy: str) -> None:
    setup = Setup(
        3,
        RouterSettings(policy, delay_s=0.02),
        PROFILE,
        tiers=Tiers(HOST, redis=REDIS, ttl_s=5.0),
        routers=2,
        failures=(Failure(1, 4.0, 2.0),),
        restarts=(RouterRestart(0, 6.0, 0.5),),
    )
    work = fleet_work()
    simulation = Simulation(work, setup)
    outcome = simulation.run()
    simulation.check()
    for engine in simulation._engines.values():
        assert isinstance(engine, BatchedEngine)
        engine.check()
        assert engine._blocks.pool.reserved == 0
    for request, fate in zip(work.requests, outcome.fates, strict=True):
        assert fate.ended_s is not None
        assert fate.first_token_s is None or fate.cached + fate.computed == request.input_length
        assert sum(fate.tiers.values()) == fate.cached
    assert Simulation(work, setup).run() == outcome


def test_what_one_worker_wrote_another_one_reads_from_the_shared_tier() -> None:
    work = mixed([(0.0, [1] * 10, 3, 0), (2.0, [1] * 10, 3, 0)], extra=3)
    fast = replace(REDIS, token_ms=0.1)
    setup = Setup(2, RouterSettings("round_robin"), PROFILE, tiers=Tiers(redis=fast))
    first, second = Simulation(work, setup).run().fates
    assert first.worker != second.worker
    assert second.tiers == {TierName.DEVICE: 0, TierName.REDIS: 100}
    computed_ms = 3.0 + 0.5 + 3 + 0.001 * 3 * (100 + 1.5)
    assert second.ttft_s == pytest.approx((2.0 + 100 * 0.1 + computed_ms) / 1e3)


def test_what_takes_longer_to_read_is_computed() -> None:
    work = mixed([(0.0, [1] * 10, 3, 0), (2.0, [1] * 10, 3, 0)], extra=3)
    setup = Setup(2, RouterSettings("round_robin"), PROFILE, tiers=Tiers(redis=replace(REDIS, token_ms=1.2)))
    assert [fate.computed for fate in Simulation(work, setup).run().fates] == [103, 103]


def test_the_router_knows_the_shared_tier_and_prices_its_reads() -> None:
    work = mixed([(0.0, [1] * 10, 3, 0), (2.0, [1] * 10, 3, 0)], extra=3)
    setup = Setup(2, RouterSettings("cache_aware"), PROFILE, tiers=Tiers(redis=REDIS), failures=(Failure(0, 1.0, 9.0),))
    one = Simulation(work, setup)
    second = one.run().fates[1]
    assert second.worker == "worker-1"
    assert second.predicted_tokens in (0, 100)


def test_a_restarted_router_knows_the_caches_from_snapshots() -> None:
    work = mixed([(0.0, [1] * 10, 3, 0), (5.0, [1] * 10, 3, 0)], extra=3)
    setup = Setup(4, RouterSettings("cache_aware"), PROFILE, restarts=(RouterRestart(0, 2.0, 1.0),))
    first, second = Simulation(work, setup).run().fates
    assert (second.worker, second.predicted_tokens, second.cached) == (first.worker, 100, 100)


def test_a_router_that_is_down_cannot_restart() -> None:
    work = mixed([(0.0, [1] * 10, 3, 0), (5.0, [1] * 10, 3, 0)], extra=3)
    setup = Setup(2, RouterSettings("cache_aware"), PROFILE, routers=2)
    for at_s in (2.0, 3.0, 4.0):
        overlapping = (RouterRestart(0, 2.0, 2.0), RouterRestart(0, at_s, 1.0))
        with pytest.raises(ValueError, match="down"):
            simulate(work, replace(setup, restarts=overlapping))
    apart = (RouterRestart(0, 2.0, 1.0), RouterRestart(0, 3.5, 1.0), RouterRestart(1, 2.0, 1.0))
    assert not any(fate.failed for fate in simulate(work, replace(setup, restarts=apart)).fates)


def test_requests_of_a_restarted_router_are_asked_again() -> None:
    work = mixed([(0.0, [1] * 20, 50, 0), (0.4, [2] * 20, 3, 0)], extra=3)
    setup = Setup(1, RouterSettings("cache_aware"), PROFILE, restarts=(RouterRestart(0, 0.45, 1.0),))
    begun, waiting = Simulation(work, setup).run().fates
    assert begun.failed
    assert begun.ended_s == pytest.approx(0.45)
    assert not waiting.failed
    assert waiting.attempts == 2
    assert waiting.first_token_s is not None
    assert waiting.first_token_s > 1.45
