"""The peers' rules against a naive restatement of each, and what holds for any load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given

from router.cost import Price
from router.index import Overlap
from router.policy import (
    POLICIES,
    BlockLoad,
    Candidate,
    Decision,
    RouteRequest,
    checked_weights,
    find_policy,
)

BLOCK = 16


def choose(policy: str, request: RouteRequest, candidates: Sequence[Candidate], **weights: float) -> Decision:
    rule = find_policy(policy)
    return rule.choose(request, candidates, checked_weights(rule, weights))


def ask(prompt: int = 0, *, blocks: int = 10, affinity: str = "", turn: int = 0) -> RouteRequest:
    """A prompt of its own, all of it full blocks."""
    hashes = [b"%d/%d" % (prompt, n) for n in range(blocks)]
    return RouteRequest(hashes, BLOCK, b"prompt %d" % prompt, affinity, turn, 0.0, blocks * BLOCK)


def idle(worker: str, **facts: object) -> Candidate:
    return Candidate(worker, Price(0, 0, 100, 1000, {}, 0), 1.0, 0, 0.0)._replace(**facts)


def overlap_of(tiers: Sequence[int]) -> Overlap:
    """From how many blocks lie in each tier."""
    return Overlap(*(sum(tiers[: n + 1]) for n in range(4)))


def decoded(worker: str, b: bytes) -> Candidate:
    """A worker from 13 bytes: small numbers, so that ties are frequent, and far-apart loads."""
    price = Price(b[0] % 5 * 25, b[1] % 3 * 10, b[2] % 8 * 25, 1000, {}, b[3] % 11 * BLOCK)
    recent, overlap = (0.0, 5.0, 1e4)[b[6] % 3], overlap_of([n % 4 for n in b[7:11]])
    blocks = BlockLoad(float(b[11] % 40), b[12] % 40)
    return Candidate(worker, price, (b[4] % 10 + 1) / 10, b[5] % 200, recent, overlap, b[3] % 7, blocks)


# Decoding bytes takes a tenth of the time of building the fields one by one.
candidates = st.lists(st.binary(min_size=13, max_size=13), min_size=1, max_size=5).map(
    lambda drawn: [decoded(worker, b) for worker, b in zip("abcde", drawn, strict=False)]
)
requests = st.builds(ask, st.integers(0, 50), turn=st.integers(0, 5), affinity=st.sampled_from(["", "k"]))


def most_matched(c: Candidate) -> int:
    return max(c.overlap.disk, c.arriving)


def naive_sglang(request: RouteRequest, workers: Sequence[Candidate]) -> set[str]:
    """Those that the rule allows, ties not yet broken."""
    loads = [c.active for c in workers]
    calm = {c.worker for c in workers if c.active == min(loads)}
    if max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads):
        return calm
    matches = {c.worker: most_matched(c) * BLOCK / request.prompt_tokens for c in workers}
    best = max(matches.values())
    return {name for name, share in matches.items() if share == best} if best > 0.3 else calm


def dynamo_blocks(request: RouteRequest, c: Candidate) -> float:
    """Block by block, each where it lies fastest."""
    tiers = [n for n, depth in enumerate(c.overlap) for _ in range(depth - (c.overlap[n - 1] if n else 0))]
    credit = sum((1.0, 0.75, 0.25, 0.5)[tier] for tier in tiers)
    return max(0.0, c.blocks.pending + len(request.hashes) - credit) + c.blocks.active


def naive_dynamo(request: RouteRequest, workers: Sequence[Candidate]) -> set[str]:
    costs = {c.worker: dynamo_blocks(request, c) for c in workers}
    return {name for name, cost in costs.items() if cost == min(costs.values())}


def naive_lowest_ttft(_: RouteRequest, workers: Sequence[Candidate]) -> set[str]:
    times = {c.worker: c.price.queue_ms + c.price.load_ms + c.price.compute_ms for c in workers}
    return {name for name, time in times.items() if time == min(times.values())}


@pytest.mark.parametrize(
    ("policy", "naive"),
    [("sglang_cache_aware", naive_sglang), ("dynamo_cost", naive_dynamo), ("lowest_ttft", naive_lowest_ttft)],
)
@given(candidates, requests)
def test_a_rule_chooses_what_its_naive_restatement_allows_and_the_quietest_of_that(
    policy: str, naive: object, workers: list[Candidate], request: RouteRequest
) -> None:
    allowed = naive(request, workers)  # type: ignore[operator]
    chosen = choose(policy, request, workers).chosen
    assert chosen.worker in allowed
    if policy == "sglang_cache_aware" and chosen.active == min(c.active for c in workers):
        return  # among the least loaded, or matched: the scenarios tell them apart
    assert chosen.recent_work_ms == min(c.recent_work_ms for c in workers if c.worker in allowed)


@given(candidates, requests)
def test_the_costs_of_dynamo_are_the_blocks_counted_one_by_one(workers: list[Candidate], request: RouteRequest) -> None:
    costs = choose("dynamo_cost", request, workers).costs
    assert costs == pytest.approx([dynamo_blocks(request, c) for c in workers])


@given(candidates, requests, st.sampled_from(["least_loaded", "power_of_two", "dynamo_cost", "lowest_ttft"]))
def test_more_load_on_a_worker_that_was_not_chosen_changes_nothing(
    workers: list[Candidate], request: RouteRequest, policy: str
) -> None:
    chosen = choose(policy, request, workers).chosen
    for n, other in enumerate(workers):
        if other is not chosen:
            price = other.price._replace(queue_ms=other.price.queue_ms + 100)
            blocks = BlockLoad(other.blocks.pending + 5, other.blocks.active + 5)
            busier = other._replace(active=other.active + 5, price=price, blocks=blocks)
            assert choose(policy, request, [*workers[:n], busier, *workers[n + 1 :]]).chosen is chosen


@given(candidates, requests, st.integers(1, 4))
def test_more_blocks_on_the_chosen_worker_keep_it_chosen(
    workers: list[Candidate], request: RouteRequest, more: int
) -> None:
    for policy in ("dynamo_cost", "sglang_cache_aware"):
        chosen = choose(policy, request, workers).chosen
        richer = chosen._replace(overlap=Overlap(*(depth + more for depth in chosen.overlap)))
        again = choose(policy, request, [richer if c is chosen else c for c in workers])
        if policy == "dynamo_cost":
            assert again.chosen is richer
        elif again.reason == "prefix":  # else its match is too short still, or the fleet is out of balance
            assert most_matched(again.chosen) == max(most_matched(c) for c in [*workers, richer] if c is not chosen)


@given(candidates, requests)
def test_a_session_stays_within_the_bound_and_spills_to_the_same_worker(
    workers: list[Candidate], request: RouteRequest
) -> None:
    mean = sum(c.active for c in workers) / len(workers)
    bound = max(1.5 * mean, mean + 4)
    home = choose("sticky", request, [c._replace(active=0) for c in workers]).chosen.worker
    decision = choose("sticky", request, workers)
    if next(c for c in workers if c.worker == home).active <= bound:
        assert decision.chosen.worker == home
    else:
        assert decision.chosen.active <= bound
        without = [c._replace(active=0) for c in workers if c.active <= bound]
        assert decision.chosen.worker == choose("sticky", request, without).chosen.worker


def test_a_conversation_that_grows_stays_where_its_beginning_put_it() -> None:
    four = [idle(name) for name in "abcd"]
    for prompt in range(20):
        homes = {
            choose("sticky", ask(prompt, blocks=blocks), four, first_tokens=64).chosen.worker for blocks in range(4, 30)
        }
        assert len(homes) == 1


@given(candidates, requests)
def test_two_choices_never_take_the_one_that_is_busier_than_all_others(
    workers: list[Candidate], request: RouteRequest
) -> None:
    assume(len(workers) > 1)
    busiest = max(workers, key=lambda c: c.active)
    assume(sum(c.active == busiest.active for c in workers) == 1)
    assert choose("power_of_two", request, workers).chosen is not busiest


def test_two_choices_are_drawn_evenly_even_for_one_prompt() -> None:
    """Loads 0, 1, 2, 3: of six pairs the idlest is in three and wins them, the next wins two, the next one."""
    four = [idle(name, active=n) for n, name in enumerate("abcd")]
    won = Counter(choose("power_of_two", ask(turn=turn), four).chosen.worker for turn in range(1200))
    assert [won[name] / 1200 for name in "abcd"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0], abs=0.04)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_traffic_with_one_request_in_flight_uses_all_workers(policy: str) -> None:
    """Sixteen conversations of three turns, one request after the other: nobody is ever busy when a choice is made."""
    workers = {name: idle(name) for name in "abcd"}
    held: dict[str, dict[int, int]] = {name: {} for name in workers}
    used: Counter[str] = Counter()
    for turn in range(3):
        for prompt in range(16):
            request = ask(prompt, blocks=10 + turn, turn=sum(used.values()))
            blocks = len(request.hashes)
            for name, worker in workers.items():
                has = held[name].get(prompt, 0)
                price = Price(0, 0, (blocks - has) * 10, blocks * 10, {}, has * BLOCK)
                now = worker._replace(price=price, overlap=Overlap(has, has, has, has), blocks=BlockLoad(0, blocks))
                workers[name] = now
            chosen = choose(policy, request, list(workers.values())).chosen
            used[chosen.worker] += 1
            held[chosen.worker][prompt] = blocks
            workers[chosen.worker] = chosen._replace(recent_work_ms=chosen.recent_work_ms + chosen.price.compute_ms)
    assert len(used) == 4
    if policy not in ("sticky", "prefix_hash", "power_of_two"):  # those three go by chance
        assert max(used.values()) <= 2 * 48 / 4


@given(st.sampled_from(sorted(POLICIES)), candidates, requests)
def test_costs_are_one_each_and_the_chosen_one_of_a_rank_is_least(
    policy: str, workers: list[Candidate], request: RouteRequest
) -> None:
    decision = choose(policy, request, workers)
    assert len(decision.costs) == len(workers)
    if policy != "cache_aware":  # which breaks near-ties
        assert decision.costs[workers.index(decision.chosen)] == min(decision.costs)


@given(candidates, requests)
def test_the_terms_of_lowest_ttft_are_the_prediction_unweighted(
    workers: list[Candidate], request: RouteRequest
) -> None:
    rule = find_policy("lowest_ttft")
    for one, cost in zip(workers, choose("lowest_ttft", request, workers).costs, strict=True):
        terms = rule.terms(request, workers, one, {})
        assert [(t.name, t.weight) for t in terms] == [("queue", 1.0), ("load", 1.0), ("compute", 1.0)]
        assert sum(t.ms for t in terms) == pytest.approx(cost)
