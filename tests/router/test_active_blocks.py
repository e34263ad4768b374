"""The union of chains, against a plain counter of blocks."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given

from router.active_blocks import ActiveBlocks


def chain(*path: int) -> list[bytes]:
    """A block's hash tells its whole beginning."""
    return [repr(path[: n + 1]).encode() for n in range(len(path))]


paths = st.lists(st.integers(0, 2), max_size=6).map(tuple)


@given(st.lists(paths, max_size=12), st.lists(paths, min_size=1, max_size=4), st.randoms())
def test_it_counts_what_a_set_of_all_blocks_counts(
    added: list[tuple[int, ...]], asked: list[tuple[int, ...]], random: object
) -> None:
    active, expected = ActiveBlocks(), Counter[bytes]()
    for path in added:
        active.add(chain(*path))
        expected.update(chain(*path))
        assert active.distinct == len(expected)
    random.shuffle(added)  # type: ignore[attr-defined]
    for path in added:
        for other in asked:
            assert active.new(chain(*other)) == len(set(chain(*other)) - set(expected))
        active.remove(chain(*path))
        expected -= Counter(chain(*path))
        assert active.distinct == len(expected)
    assert active.distinct == 0


def test_a_long_shared_beginning_is_compared_by_halving() -> None:
    class Counted(list[bytes]):
        reads = 0

        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            Counted.reads += 1
            return super().__getitem__(at)

    long = [n.to_bytes(4, "big") for n in range(50_000)]
    active = ActiveBlocks()
    for n in range(16):
        active.add(Counted([*long, b"end%d" % n]))
    Counted.reads = 0
    assert active.new(Counted([*long, b"other"])) == 1
    assert Counted.reads < 1000
