"""Positions of blocks against a walk from the start, on random forests with holes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.tier import BlockMeta
from workers.chain_positions import positions

ROOT = BlockHash(b"r" * 32)


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


# parents[n]: the block before block n, a smaller number, or -1: it starts a chain.
forests = st.integers(1, 30).flatmap(lambda n: st.tuples(*(st.integers(-1, at - 1) for at in range(n))))


@given(forests, st.sets(st.integers(0, 29)), st.lists(st.integers(0, 29), max_size=12))
def test_a_position_is_told_when_every_block_before_is_held(
    parents: tuple[int, ...], missing: set[int], wanted: list[int]
) -> None:
    held = {n: parent for n, parent in enumerate(parents) if n not in missing}
    metas = {name(n): BlockMeta(name(n), ROOT if p < 0 else name(p), ROOT, None) for n, p in held.items()}

    def walk(number: int) -> int | None:
        depth = -1
        while number >= 0:
            if number not in held:
                return None
            number, depth = held[number], depth + 1
        return depth

    expected = {name(n): depth for n in wanted if (depth := walk(n)) is not None}
    assert positions([name(n) for n in wanted], metas.get) == expected


def test_no_block_is_looked_up_twice_and_steps_are_bounded() -> None:
    metas = {name(n): BlockMeta(name(n), name(n - 1) if n else ROOT, ROOT, None) for n in range(1000)}
    asked: list[BlockHash] = []

    def find(block: BlockHash) -> BlockMeta | None:
        asked.append(block)
        return metas.get(block)

    assert positions([name(n) for n in (999, 500, 998)], find) == {name(999): 999, name(500): 500, name(998): 998}
    assert len(asked) == 1000
    assert positions([name(5), name(999), name(4)], metas.get, max_steps=20) == {name(5): 5, name(4): 4}
