"""Policies: each rule's choice, and what no policy may do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.cost import Price
from router.errors import InvalidRequest
from router.policy import POLICIES, Candidate, Decision, RouteRequest, checked_weights, find_policy


def candidate(
    worker: str,
    *,
    queue: float = 0.0,
    load: float = 0.0,
    compute: float = 100.0,
    cached: int = 0,
    active: int = 0,
    recent: float = 0.0,
    share: float = 1.0,
    cold: float = 1000.0,
    new: bool = False,
) -> Candidate:
    return Candidate(worker, Price(queue, load, compute, cold, {}, cached), share, active, recent, new=new)


def ask(digest: bytes = b"d", **fields: object) -> RouteRequest:
    return replace(RouteRequest((b"h1", b"h2"), 16, digest, "", 0, 0.0), **fields)  # type: ignore[arg-type]


def choose(
    policy: str, candidates: Sequence[Candidate], request: RouteRequest | None = None, **weights: float
) -> Decision:
    rule = find_policy(policy)
    return rule.choose(request or ask(), candidates, checked_weights(rule, weights))


candidates = st.lists(
    st.builds(
        candidate,
        worker=st.sampled_from("abcdefgh"),
        queue=st.floats(0, 1e4),
        load=st.floats(0, 1e4),
        compute=st.floats(0, 1e4),
        cached=st.integers(0, 1000),
        active=st.integers(0, 50),
        recent=st.floats(0, 1e5),
        share=st.floats(0.01, 1),
        cold=st.floats(1, 1e4),
        new=st.booleans(),
    ),
    min_size=1,
    unique_by=lambda c: c.worker,
)
requests = st.builds(
    ask,
    digest=st.binary(max_size=4),
    affinity=st.sampled_from(["", "k"]),
    turn=st.integers(0, 9),
    utilisation=st.floats(0, 2),
)


@given(st.sampled_from(sorted(POLICIES)), candidates, requests, st.randoms())
def test_no_policy_depends_on_the_order_of_the_list(
    policy: str, given_candidates: list[Candidate], request: RouteRequest, random: object
) -> None:
    shuffled = list(given_candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = choose(policy, given_candidates, request), choose(policy, shuffled, request)
    assert first.chosen is second.chosen
    assert first.reason == second.reason
    assert dict(zip([c.worker for c in given_candidates], first.costs, strict=True)) == dict(
        zip([c.worker for c in shuffled], second.costs, strict=True)
    )


@given(candidates, requests)
def test_the_terms_of_explain_sum_to_the_cost(given_candidates: list[Candidate], request: RouteRequest) -> None:
    rule = find_policy("cache_aware")
    weights = checked_weights(rule, {"queue": 0.5, "load": 2.0})
    decision = rule.choose(request, given_candidates, weights)
    for one, cost in zip(given_candidates, decision.costs, strict=True):
        terms = rule.terms(request, given_candidates, one, weights)
        assert sum(t.ms * t.weight for t in terms) == pytest.approx(cost)


def test_a_new_worker_is_owed_a_share_of_the_others_work_and_no_more() -> None:
    """It has 300 ms more to compute, which are priced at 450; the others were given 4 s each."""

    def taken(recent: float, *, new: bool = True, **weights: float) -> bool:
        others = [candidate("a", compute=10, recent=4000, cached=900), candidate("b", compute=10, recent=4000)]
        there = candidate("c", compute=310, recent=recent, new=new)
        return choose("cache_aware", [*others, there], **weights).chosen.worker == "c"

    assert taken(0)
    assert taken(500)
    assert not taken(600)
    assert taken(600, warm_up=0.5)
    assert not taken(0, warm_up=0.0)
    assert not taken(0, new=False)


def test_a_new_worker_is_owed_nothing_by_others_that_are_idle() -> None:
    def taken(recent: float) -> bool:
        two = [candidate("a", compute=1, recent=recent, cached=900), candidate("b", compute=20, new=True)]
        return choose("cache_aware", two).chosen.worker == "b"

    assert not taken(299)
    assert taken(301)


def test_where_all_are_new_nobody_is_owed_anything() -> None:
    two = [candidate("a", compute=10, recent=4000, new=True), candidate("b", compute=310, new=True)]
    assert choose("cache_aware", two).costs == (15.0, 465.0)


def test_round_robin_takes_one_after_the_other() -> None:
    three = [candidate(name) for name in "cab"]
    assert [choose("round_robin", three, ask(turn=n)).chosen.worker for n in range(4)] == ["a", "b", "c", "a"]


def test_least_loaded_takes_the_fewest_requests_then_the_quietest() -> None:
    assert choose("least_loaded", [candidate("a", active=2), candidate("b", active=1)]).chosen.worker == "b"
    assert choose("least_loaded", [candidate("a", recent=9), candidate("b", recent=3)]).chosen.worker == "b"


def test_prefix_hash_keeps_prompts_that_begin_alike_together_and_spreads_others() -> None:
    four = [candidate(name) for name in "abcd"]
    hit = Counter(
        choose("prefix_hash", four, ask(hashes=(b"%d" % n, b"x"), digest=b""), prefix_tokens=16).chosen.worker
        for n in range(400)
    )
    assert len(hit) == 4
    same = {
        choose("prefix_hash", four, ask(hashes=(b"1", b"%d" % n)), prefix_tokens=16).chosen.worker for n in range(20)
    }
    assert len(same) == 1


def test_prefix_hash_moves_only_the_keys_of_a_worker_that_left() -> None:
    four = [candidate(name) for name in "abcd"]
    for n in range(100):
        request = ask(hashes=(b"%d" % n,))
        before = choose("prefix_hash", four, request).chosen.worker
        after = choose("prefix_hash", [c for c in four if c.worker != "d"], request).chosen.worker
        assert after == before or before == "d"


def test_prefix_hash_passes_a_full_worker_by() -> None:
    four = [candidate(name) for name in "abcd"]
    home = choose("prefix_hash", four).chosen.worker
    full = [c._replace(active=8 if c.worker == home else 0) for c in four]
    decision = choose("prefix_hash", full)
    assert decision.chosen.worker != home
    assert decision.reason == "balance"


def test_prefix_hash_follows_the_affinity_key() -> None:
    four = [candidate(name) for name in "abcd"]
    homes = {choose("prefix_hash", four, ask(affinity="k", hashes=(b"%d" % n,))).chosen.worker for n in range(20)}
    assert len(homes) == 1
    assert choose("prefix_hash", four, ask(affinity="k")).reason == "affinity"


def test_cache_aware_takes_the_fewest_milliseconds() -> None:
    warm, cold = candidate("warm", compute=100, cached=500), candidate("cold", compute=600)
    decision = choose("cache_aware", [warm, cold])
    assert (decision.chosen.worker, decision.reason) == ("warm", "prefix")
    busy = warm._replace(price=warm.price._replace(queue_ms=2000))
    decision = choose("cache_aware", [busy, cold])
    assert (decision.chosen.worker, decision.reason) == ("cold", "balance")


def test_computing_is_dearer_the_busier_the_fleet() -> None:
    queued, idle = candidate("queued", queue=300, compute=10, cached=9), candidate("idle", compute=150)
    assert choose("cache_aware", [queued, idle], ask(utilisation=0.0)).chosen.worker == "idle"
    assert choose("cache_aware", [queued, idle], ask(utilisation=0.8)).chosen.worker == "queued"
    # Above saturation the price stays at its cap.
    assert choose("cache_aware", [queued, idle], ask(utilisation=5.0), price_cap=2.0, price_floor=1.0).costs[1] == 300


def test_near_ties_go_to_the_worker_that_was_given_least_work() -> None:
    pair = [candidate("a", compute=100, recent=900), candidate("b", compute=110, recent=10)]
    assert choose("cache_aware", pair).chosen.worker == "b"
    assert choose("cache_aware", pair, tie_ms=0).chosen.worker == "a"


def test_a_tie_is_never_wider_than_a_share_of_the_prompt() -> None:
    warm, quiet = candidate("warm", compute=2, cached=90, recent=50, cold=10), candidate("quiet", compute=10, cold=10)
    assert choose("cache_aware", [warm, quiet]).chosen.worker == "warm"


def test_equal_and_never_used_workers_are_all_found() -> None:
    four = [candidate(name) for name in "abcd"]
    assert len({choose("cache_aware", four, ask(digest=b"%d" % n)).chosen.worker for n in range(100)}) == 4


def test_a_hot_block_is_charged_its_share() -> None:
    holder, other = candidate("holder", queue=200, compute=5, cached=99), candidate("other", compute=560)
    assert choose("cache_aware", [holder, other]).chosen.worker == "holder"
    assert choose("cache_aware", [holder, other._replace(share=0.05)]).chosen.worker == "other"


def test_an_affinity_key_decides_between_equals_only() -> None:
    four = [candidate(name) for name in "abcd"]
    homes = Counter(
        choose("cache_aware", four, ask(affinity="k", digest=b"%d" % n), affinity_ms=200).chosen.worker
        for n in range(50)
    )
    assert len(homes) == 1
    home = next(iter(homes))
    dear = [c._replace(price=c.price._replace(queue_ms=5000 if c.worker == home else 0)) for c in four]
    assert choose("cache_aware", dear, ask(affinity="k")).chosen.worker != home


def test_reasons_name_the_only_worker_and_a_miss() -> None:
    assert choose("cache_aware", [candidate("a")]).reason == "only_one"
    assert choose("cache_aware", [candidate("a"), candidate("b")]).reason == "no_hit"


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        InvalidRequest,
        match="cache_aware, dynamo_cost, least_loaded, lowest_ttft, power_of_two, prefix_hash, round_robin, sglang",
    ):
        find_policy("magic")


@pytest.mark.parametrize(
    ("policy", "weights", "words"),
    [
        ("cache_aware", {"quue": 1.0}, "has no weight 'quue'; set some of .*queue"),
        ("cache_aware", {"queue": -1.0}, "set it from 0 to 100"),
        ("cache_aware", {"queue": float("nan")}, "set it from 0 to 100"),
        ("round_robin", {"queue": 1.0}, "it has none"),
    ],
)
def test_weights_that_are_not_allowed_are_refused_with_what_is(
    policy: str, weights: dict[str, float], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        checked_weights(find_policy(policy), weights)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda p: p.name)
def test_defaults_are_in_range_and_explained(policy) -> None:  # type: ignore[no-untyped-def]
    assert checked_weights(policy, {}) == {w.name: w.default for w in policy.weights}
    assert policy.help
    for weight in policy.weights:
        assert weight.min <= weight.default <= weight.max
        assert weight.help
