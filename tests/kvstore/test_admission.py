"""Which blocks a hop writes, and that remembering them costs bounded memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.admission import ADMISSIONS, Moment, SecondHit, make_admission


@given(names=st.lists(st.integers(0, 9), max_size=60), memory=st.integers(1, 6))
def test_second_hit_writes_what_is_among_the_names_seen_last(names: list[int], memory: int) -> None:
    rule = make_admission("second_hit", memory=memory)
    seen: list[int] = []
    for name in names:
        assert rule.admits(name) == (name in seen)
        seen = [*(known for known in seen if known != name), name][-memory:]


def test_always_and_on_eviction_write_at_their_moment() -> None:
    always, evicted = make_admission("always"), make_admission("on_eviction")
    assert (always.moment, always.admits(1)) == (Moment.USE, True)
    assert (evicted.moment, evicted.admits(1)) == (Moment.EVICTION, True)


def test_strangers_do_not_grow_the_memory() -> None:
    rule = SecondHit(100)
    for name in range(10_000):
        rule.admits(name)
    assert len(rule._seen) == 100


def test_unknown_rules_and_empty_memories_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of always, second_hit, on_eviction"):
        make_admission("never")
    with pytest.raises(ValueError, match="holds none"):
        make_admission("second_hit", memory=0)
    assert [make_admission(name) for name in ADMISSIONS]
