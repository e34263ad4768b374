"""The batched engine does what a naive one does, which takes one step and one block at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.events import TierName
from replay.batched_engine import BatchedEngine
from replay.batched_profile import BatchedProfile
from replay.outcome import Outcome
from replay.simulated_router import RouterSettings
from replay.simulation import Setup, Simulation
from replay.tiers import NO_TIERS, TierProfile, Tiers
from replay.workload import Workload, workload
from router.cost import PrefillFit
from tests.replay.made import BLOCK, made
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
REDIS = TierProfile(tokens=900, latency_ms=2.0, token_ms=0.5)


def mixed(prompts: list[tuple[float, list[int], int, int]], *, extra: int) -> Workload:
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
    assert outcome.end_s == pytest.approx(max(job.end_s for job in jobs))
    for job in jobs:
        fate = outcome.fates[job.number]
        assert fate.cached == sum(job.cached.values())
        for tier, tokens in job.cached.items():
            assert fate.tiers.get(TierName(tier), 0) == tokens
    assert engine.scheduler.preemptions == oracle.preemptions
    for chain in work.chains:
        assert engine._blocks.pool.leading(chain) == oracle.pool.run(list(chain))
    assert engine._blocks.pool.used == len(oracle.pool.idle)


def prompts(*, longest: int, priorities: int = 0) -> st.SearchStrategy[list[tuple[float, list[int], int, int]]]:
    one = st.tuples(
        st.floats(0, 4), st.lists(st.integers(0, 2), max_size=longest), st.integers(1, 60), st.integers(0, priorities)
    )
    return st.lists(one, min_size=1, max_size=14)


@settings(max_examples=300, deadline=None)
@given(given_=prompts(longest=20), pool=st.sampled_from([300, 420, 5000]), budget=st.sampled_from([12, 40, 1000]))
def test_steps_blocks_and_preemptions(given_: list[tuple[float, list[int], int, int]], pool: int, budget: int) -> None:
    assert_same(mixed(given_, extra=3), replace(PROFILE, pool_tokens=pool, max_batch_tokens=budget), NO_TIERS)
