"""Hit rate against size in one pass: equal to a cache of every size that is replayed block by block."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.eviction import KNOWN_LRU
from replay.capacity import enough_for
from replay.pool import Pool
from replay.stack_distance import curves
from replay.traces import load, shipped
from replay.workload import Workload, workload
from tests.replay.made import BLOCK, made_work

PROMPTS = st.lists(st.tuples(st.floats(0, 100), st.lists(st.integers(0, 2), max_size=8)), min_size=1, max_size=25).map(
    sorted
)


def brute_force(prompts: list[tuple[float, list[int]]], blocks: int, ttl_s: float, extra: int) -> int:
    """Tokens found by a cache of so many blocks: a dictionary of prefixes, one at a time."""
    held: OrderedDict[tuple[int, ...], float] = OrderedDict()  # the least recently used first
    found = 0
    for at, prompt in prompts:
        prefixes = [tuple(prompt[: end + 1]) for end in range(len(prompt))]
        for gone in [name for name, used in held.items() if at - used > ttl_s]:
            del held[gone]
        leading = next((n for n, name in enumerate(prefixes) if name not in held), len(prefixes))
        found += min(leading * BLOCK, len(prompt) * BLOCK + extra)
        for name in reversed(prefixes):
            held[name] = at
            held.move_to_end(name)
        while len(held) > blocks:
            held.popitem(last=False)
    return found


@settings(max_examples=200, deadline=None)
@given(prompts=PROMPTS, ttl_s=st.sampled_from([math.inf, 0.0, 5.0, 40.0]), extra=st.sampled_from([0, 3, -4]))
def test_every_size_has_the_hits_of_a_cache_of_that_size(
    prompts: list[tuple[float, list[int]]], ttl_s: float, extra: int
) -> None:
    prompts = [(at, blocks) for at, blocks in prompts if blocks]
    if not prompts:
        return
    work = made_work(prompts, extra=extra)
    (curve,) = curves(work, ttls_s=[ttl_s], warm_up=0.0)
    tokens = sum(request.input_length for request in work.requests)
    assert curve.prompt_tokens == tokens
    for blocks in range(40):
        expected = brute_force(prompts, blocks, ttl_s, extra)
        assert curve.hit_rate(blocks * BLOCK) * tokens == pytest.approx(expected)
    assert curve.most * tokens == pytest.approx(brute_force(prompts, 10**6, ttl_s, extra))
    assert curve.hit_rate(curve.enough_tokens) == curve.most


def replayed(work: Workload, capacity_tokens: int) -> float:
    """With the simulator's pool, which keeps segments."""
    pool, found, tokens = Pool(capacity_tokens // work.block_size, work.lengths), 0, 0
    for number, (request, chain) in enumerate(zip(work.requests, work.chains, strict=True)):
        if number >= len(work.requests) // 10:
            found += min(pool.leading(chain.segments) * work.block_size, request.input_length)
            tokens += request.input_length
        pool.take(chain.segments)
    return found / tokens


@pytest.mark.parametrize("name", ["mooncake_synthetic", "ragpulse", "tau_airline"])
def test_recorded_traces_have_the_same_curve_as_the_simulators_pool(name: str) -> None:
    work = workload(load(shipped()[name]))
    (curve,) = curves(work)
    for capacity in (5_000, 60_000, 1_600_000, 12_800_000):
        assert curve.hit_rate(capacity) == pytest.approx(replayed(work, capacity), abs=1e-12)


def test_recorded_traces_have_the_hit_rates_that_are_known() -> None:
    found = {name: curves(workload(load(shipped()[name])))[0] for name, _ in KNOWN_LRU if name in shipped()}
    for (name, thousands), hit in KNOWN_LRU.items():
        if name in found:
            assert found[name].hit_rate(thousands * 1000) == pytest.approx(hit, abs=0.0006)


def test_the_smallest_size_for_a_hit_rate() -> None:
    (curve,) = curves(made_work([(float(n), [n % 4]) for n in range(8)]), warm_up=0.0)
    assert (curve.hit_rate(3 * BLOCK), curve.hit_rate(4 * BLOCK)) == (0.0, 0.5)
    assert enough_for(curve, 0.5) == 4 * BLOCK
    assert enough_for(curve, 0.6) == math.inf


def test_a_trace_of_which_nothing_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="longer trace"):
        curves(made_work([(0.0, [1])]), warm_up=1.0)
