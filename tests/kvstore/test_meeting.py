"""Where load and compute meet: against trying all places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.meeting import is_worthwhile, meeting


@given(
    count=st.integers(0, 60),
    compute=st.lists(st.integers(0, 50), min_size=60, max_size=60),
    load=st.lists(st.integers(0, 50), min_size=60, max_size=60),
    queued=st.integers(0, 300),
)
def test_no_other_place_is_sooner(count: int, compute: list[int], load: list[int], queued: int) -> None:
    def compute_ms(blocks: int) -> float:
        return float(sum(compute[:blocks]))

    def load_ms(blocks: int) -> float:
        return float(queued + sum(load[:blocks]))

    found = meeting(count, compute_ms=compute_ms, load_ms=load_ms)
    assert 0 <= found <= count
    # The first place at which computing has caught up, if there is one.
    wanted = next((at for at in range(count) if compute_ms(at) >= load_ms(count - at)), count)
    assert found == wanted
    ends = [max(compute_ms(at), load_ms(count - at)) for at in range(count + 1)]
    # One block more or less is the granularity of it.
    assert max(compute_ms(found), 0.0) <= min(ends) + max(compute[:count], default=0)


@pytest.mark.parametrize(
    ("block_load_ms", "meets"),
    [
        (1.0, False),  # loading is ten times as fast: wait for it
        (4.9, False),
        (6.0, True),
        (10.0, True),
        (40.0, True),
        (200.0, False),  # it would bring hardly anything
    ],
)
def test_it_is_done_where_neither_is_far_better(block_load_ms: float, meets: bool) -> None:
    times = {"compute_ms": lambda blocks: 10.0 * blocks, "load_ms": lambda blocks: block_load_ms * blocks}
    assert is_worthwhile(100, meeting(100, **times), **times, all_ms=100 * block_load_ms) == meets


def test_it_is_not_done_for_a_few_milliseconds() -> None:
    times = {"compute_ms": lambda blocks: 1.0 * blocks, "load_ms": lambda blocks: 1.0 * blocks}
    assert not is_worthwhile(30, 15, **times, all_ms=30.0)
    assert is_worthwhile(60, 30, **times, all_ms=60.0)


def test_a_tier_that_takes_long_only_by_the_piece_is_read_at_once() -> None:
    """All of it takes one latency; in pieces, one each."""
    times = {"compute_ms": lambda blocks: 10.0 * blocks, "load_ms": lambda blocks: 12.0 * blocks}
    assert not is_worthwhile(30, meeting(30, **times), **times, all_ms=12.0)
