from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from kvstore.past_clears import MAX_CLEARS, PastClear, merged

ROOTS = [b"", b"a" * 32, b"b" * 32]
PREFIXES = [b"", b"p" * 32]
WORKERS = ["w0", "w1", "w2"]

# One scope a number: a clear is the same for everybody who heard of it, but for who confirmed.
clears = st.builds(
    lambda number, author, confirmed: PastClear(
        number, author, ROOTS[number % 3], PREFIXES[number % 2] if ROOTS[number % 3] else b"", confirmed
    ),
    st.integers(1, 12),
    st.sampled_from(["r0", "r1"]),
    st.frozensets(st.sampled_from(WORKERS)),
)
memories = st.lists(clears, max_size=6).map(lambda some: merged(some, ()))


@given(memories, memories, memories)
def test_memories_agree_whatever_the_order_in_which_they_meet(
    a: tuple[PastClear, ...], b: tuple[PastClear, ...], c: tuple[PastClear, ...]
) -> None:
    assert merged(a, b) == merged(b, a)
    assert merged(merged(a, b), c) == merged(a, merged(b, c))
    assert merged(a, a) == a
    assert merged(merged(a, b), b) == merged(a, b)


@given(memories, memories)
def test_what_nobody_confirmed_is_still_dropped_by_something_as_young(
    a: tuple[PastClear, ...], b: tuple[PastClear, ...]
) -> None:
    for clear in (*a, *b):
        kept = [one for one in merged(a, b) if one.covers(clear) and one.key >= clear.key]
        assert kept
        same = [one for one in (*a, *b) if one.key == clear.key]
        if any(one.key == clear.key for one in kept):
            (own,) = [one for one in kept if one.key == clear.key]
            assert own.confirmed == frozenset().union(*(one.confirmed for one in same))


def test_the_youngest_are_kept_when_there_are_too_many() -> None:
    many = [PastClear(n, "r0", n.to_bytes(32, "big")) for n in range(1, MAX_CLEARS + 5)]
    assert merged(many[::-1], ()) == tuple(many[4:])
    everything = PastClear(1000, "r0")
    assert merged(many, [everything]) == (everything,)
    older = PastClear(0, "r0")
    assert merged(many[:3], [older]) == (older, *many[:3])
