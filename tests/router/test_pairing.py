"""When one worker prefills for another one, and who."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.events import TierName
from router.cost import PrefillFit, Price, TierRead
from router.pairing import DECODE, NO_ROLE, PREFILL, Maker, best_pair, may_make
from router.policies.protocol import Candidate
from warmkv.v1 import worker_pb2

FIT = PrefillFit(5.0, 0.1)
READS = {TierName.PEER: TierRead(1.0, 0.2)}  # 16 tokens in 0.2 ms, computed in 1.6 ms
TOKENS = 8000
BOTH = worker_pb2.WORKER_ROLE_BOTH


def candidate(
    worker: str, *, queue: float = 0.0, cached: Mapping[TierName, int] | None = None, decoding: int = 0
) -> Candidate:
    found = dict(cached or {})
    total = sum(found.values())
    price = Price(queue, 0.0, FIT.ms(TOKENS - total, total), FIT.ms(TOKENS), found, total)
    return Candidate(worker, price, 1.0, 0, 0.0, decoding=decoding, only_answers=True)


def maker(worker: str = "p0", **options: object) -> Maker:
    return Maker(candidate(worker, **options), f"{worker}:1")  # type: ignore[arg-type]


def pair(answering: Candidate, *makers: Maker, interference: float = 0.1, reads: object = READS):  # type: ignore[no-untyped-def]
    return best_pair(
        answering,
        makers,
        prompt_tokens=TOKENS,
        block_size=16,
        fit=FIT,
        reads=reads,  # type: ignore[arg-type]
        interference=interference,
    )


def test_an_idle_worker_answers_alone() -> None:
    assert pair(candidate("d0"), maker()) is None, "moving blocks would only cost"


def test_who_would_hold_up_many_answers_is_sent_the_blocks() -> None:
    found = pair(candidate("d0", decoding=8), maker())
    assert found is not None
    assert (found.worker, found.blocks) == ("p0", 499)
    assert found.alone_cost == pytest.approx(805 + 8 * 805 * 0.1)
    assert found.margin_ms == pytest.approx(8 * 805 * 0.1)
    last_piece, tail = 1.0 + 0.2 * 128, 5.0 + 0.1 * 16
    assert found.price.ttft_ms == pytest.approx(805 + last_piece + tail)
    assert found.cost == pytest.approx(found.price.ttft_ms + 8 * tail * 0.1)
    assert (found.ready_ms, found.tail_ms) == (pytest.approx(805), pytest.approx(tail))


def test_a_long_queue_to_prefill_is_not_waited_for() -> None:
    busy = candidate("d0", decoding=8)
    assert pair(busy, maker(queue=500.0)) is not None
    assert pair(busy, maker(queue=700.0)) is None


def test_what_is_cached_where_the_answer_is_given_needs_nobody() -> None:
    assert pair(candidate("d0", decoding=50, cached={TierName.DEVICE: 7984}), maker()) is None
    nearly = candidate("d0", decoding=50, cached={TierName.DEVICE: 7840})
    assert pair(nearly, maker()) is None, "160 tokens are computed sooner than all of them elsewhere"


def test_what_the_maker_has_cached_is_a_hit_and_what_it_makes_is_not() -> None:
    here, there = {TierName.DEVICE: 1600}, {TierName.DEVICE: 4000}
    found = pair(candidate("d0", decoding=8, cached=here), maker(cached=there))
    assert found is not None
    assert dict(found.price.cached) == {TierName.DEVICE: 1600, TierName.PEER: 2400}
    assert found.price.cached_tokens == 4000


def test_a_slow_way_between_them_is_counted() -> None:
    busy = candidate("d0", decoding=10)
    found = pair(busy, maker(), reads={TierName.PEER: TierRead(1.0, 3.0)})
    assert found is not None
    assert found.price.ttft_ms == pytest.approx(1 + 499 * 3.0 + 5.0 + 1.6), "it cannot be faster than its transfer"
    assert pair(busy, maker(), reads={TierName.PEER: TierRead(1.0, 4.0)}) is None
    assert pair(busy, maker(), reads={}) is not None, "what was never read is tried"


@given(st.lists(st.tuples(st.floats(0, 900), st.integers(0, 40)), min_size=1, max_size=4), st.integers(0, 40))
def test_the_cheapest_of_all_is_chosen_whatever_their_order(told: list[tuple[float, int]], decoding: int) -> None:
    makers = [maker(f"p{n}", queue=queue, decoding=others) for n, (queue, others) in enumerate(told)]
    answering = candidate("d0", decoding=decoding)
    alone = [pair(answering, each) for each in makers]
    costs = [(each.cost, each.worker) for each in alone if each is not None]
    for order in permutations(makers):
        found = pair(answering, *order)
        assert (None if found is None else (found.cost, found.worker)) == min(costs, default=None)
        if found is not None:
            assert found.cost < found.alone_cost
            assert found.price.ttft_ms >= found.ready_ms


def test_who_may_prefill_for_whom() -> None:
    assert may_make(PREFILL, DECODE)
    assert may_make(PREFILL, BOTH)
    assert may_make(BOTH, DECODE)
    assert not may_make(BOTH, BOTH), "it would answer itself"
    assert not may_make(DECODE, DECODE)
    assert not may_make(NO_ROLE, DECODE), "a version that knows no roles"
    assert not may_make(PREFILL, NO_ROLE)
