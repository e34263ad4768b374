"""The replay behind `bench.eviction`: against caches of plain lists, and against the figures that it must reproduce."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.cache_replay import Replay, told
from bench.eviction import KNOWN_LRU, TwoTiers
from kvstore.admission import ADMISSIONS
from kvstore.eviction.policies import POLICIES, Hint
from replay.traces import Request, Trace, load, shipped
from tests.replay.test_traces import prompts_to_ids, runs_of

BLOCK = 4
PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=10), min_size=1, max_size=30)


def trace(prompts: list[list[int]]) -> Trace:
    requests = [
        Request(float(time), len(ids) * BLOCK + 1, 1, runs_of(ids), None, None, None, None, None)
        for time, ids in enumerate(prompts_to_ids(prompts))
    ]
    return Trace("random", BLOCK, tuple(requests))


def naive_lru(prompts: list[list[int]], capacity: int) -> float:
    held: list[int] = []  # most recently used last
    hits = tokens = 0
    for number, ids in enumerate(prompts_to_ids(prompts)):
        leading = next((n for n, block in enumerate(ids) if block not in held), len(ids))
        if number >= len(prompts) // 10:
            hits += min(leading * BLOCK, len(ids) * BLOCK + 1)
            tokens += len(ids) * BLOCK + 1
        for block in reversed(ids):
            held = [*(other for other in held if other != block), block]
        held = held[max(0, len(held) - capacity) :]
    return hits / tokens


def naive_belady(prompts: list[list[int]], capacity: int) -> float:
    ids = prompts_to_ids(prompts)
    held: dict[int, tuple[float, int]] = {}  # block to its next use and its depth
    hits = tokens = 0
    for number, blocks in enumerate(ids):
        leading = next((n for n, block in enumerate(blocks) if block not in held), len(blocks))
        if number >= len(ids) // 10:
            hits += min(leading * BLOCK, len(blocks) * BLOCK + 1)
            tokens += len(blocks) * BLOCK + 1
        for depth, block in enumerate(blocks):
            later = (n for n in range(number + 1, len(ids)) if block in ids[n])
            held[block] = float(next(later, float("inf"))), depth
        while len(held) > capacity:
            del held[max(held, key=lambda block: held[block])]
    return hits / tokens


@settings(deadline=None)
@given(prompts=PROMPTS, capacity=st.integers(1, 20), longest=st.sampled_from([None, 1, 2]))
def test_lru_by_segments_is_lru_by_blocks(prompts: list[list[int]], capacity: int, longest: int | None) -> None:
    replay = Replay(trace(prompts), longest=longest)
    assert replay.hit("lru", capacity * BLOCK) == pytest.approx(naive_lru(prompts, capacity))


@settings(deadline=None)
@given(prompts=PROMPTS, capacity=st.integers(1, 20))
def test_belady_knows_the_future(prompts: list[list[int]], capacity: int) -> None:
    replay = Replay(trace(prompts), longest=1)
    assert replay.hit("belady", capacity * BLOCK) == pytest.approx(naive_belady(prompts, capacity))


@settings(deadline=None, max_examples=30)
@given(prompts=PROMPTS, policy=st.sampled_from(POLICIES))
def test_a_cache_that_holds_all_has_every_hit(prompts: list[list[int]], policy: str) -> None:
    replay = Replay(trace(prompts), longest=1)
    assert replay.hit(policy, 1000 * BLOCK) == replay.hit("belady", 1000 * BLOCK)


@pytest.mark.parametrize("name", ["mooncake_conversation", "mooncake_synthetic", "ragpulse"])
def test_lru_is_what_it_was_measured_to_be(name: str) -> None:
    replay = Replay(load(shipped()[name]))
    known = {thousands: hit for (trace, thousands), hit in KNOWN_LRU.items() if trace == name}
    assert len(known) == 3
    for thousands, hit in known.items():
        assert replay.hit("lru", thousands * 1000) == pytest.approx(hit, abs=0.005)


def test_reuse_finds_more_on_chat_than_lru_where_room_is_short() -> None:
    replay = Replay(load(shipped()["mooncake_conversation"]))
    assert replay.hit("reuse", 1_600_000) > replay.hit("lru", 1_600_000) + 0.05
    assert replay.hit("reuse", 3_200_000) > replay.hit("lru", 3_200_000) + 0.03


def test_what_is_told_of_a_request_is_known_when_it_is_served() -> None:
    def request(time_s: float, tokens: int, session: str | None, turn: int | None, stop: str | None) -> Request:
        return Request(time_s, tokens, 1, ((0, 1),), session, turn, stop, None, None)

    requests = [
        request(1.0, 100, "a", 1, "tool_use"),
        request(2.0, 70, "b", 1, "end_turn"),
        request(9.0, 130, "a", 2, None),
        request(11.0, 5, None, None, None),
        request(12.0, 6, None, None, None),
        request(13.0, 135, "a", 3, "end_turn"),
    ]
    assert list(told(requests)) == [
        Hint(turn=1, new_tokens=100, awaits_tool=True),
        Hint(turn=1, new_tokens=70, awaits_tool=False),
        Hint(turn=2, think_s=8.0, new_tokens=30),
        Hint(new_tokens=5),
        Hint(new_tokens=6),
        Hint(turn=3, think_s=4.0, new_tokens=5, awaits_tool=False),
    ]


@settings(deadline=None, max_examples=40)
@given(prompts=PROMPTS, rule=st.sampled_from(ADMISSIONS), upper=st.integers(1, 6))
def test_tiers_hold_what_fits_and_the_lower_one_is_written_once_a_stay(
    prompts: list[list[int]], rule: str, upper: int
) -> None:
    replay = Replay(trace(prompts), longest=1)
    tiers = TwoTiers(replay, rule, upper, 3 * upper)
    for chain in replay.segments.chains:
        tiers.take(chain)
        assert (len(tiers._upper) <= upper, len(tiers._lower) <= 3 * upper) == (True, True)
    blocks = len(replay.segments.lengths)
    if rule == "always" and 3 * upper >= blocks:
        assert tiers.writes == blocks
    if rule == "on_eviction" and upper >= blocks:
        assert tiers.writes == 0


def test_a_trace_without_prefixes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knows no prefixes"):
        Replay(Trace("lengths", None, ()))
