"""Pages of a store's blocks against a naive sort, and nothing told twice or left out."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.chains import select
from kvstore.events import TierName
from kvstore.inventory import page, ttl_left_s
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import OTHER_ROOT, ROOT

TIERS = (TierName.DEVICE, TierName.HOST, TierName.DISK)


@dataclass(frozen=True)
class Forest:
    metas: list[BlockMeta]
    held: list[tuple[TierName, list[BlockMeta]]]


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    metas: list[BlockMeta] = []
    hashes = draw(st.lists(st.binary(min_size=32, max_size=32), unique=True, min_size=1, max_size=12))
    for name in hashes:
        root = draw(st.sampled_from([ROOT, OTHER_ROOT]))
        parents = [root, *(meta.hash for meta in metas if meta.root == root)]
        metas.append(BlockMeta(BlockHash(name), draw(st.sampled_from(parents)), root, None))
    held = [(tier, [meta for meta in metas if draw(st.booleans())]) for tier in TIERS]
    return Forest(metas, held)


def naive(forest: Forest, root: BlockHash | None, prefix: BlockHash | None) -> list[tuple[BlockMeta, list[TierName]]]:
    there = [meta for meta in forest.metas if any(meta in blocks for _, blocks in forest.held)]
    chosen = [meta for meta in there if meta.hash in select(there, root, prefix)]
    tiers = [[tier for tier, blocks in forest.held if meta in blocks] for meta in chosen]
    return sorted(zip(chosen, tiers, strict=True), key=lambda entry: entry[0].hash)


@settings(deadline=None)
@given(forests(), st.sampled_from([None, ROOT]), st.data(), st.integers(1, 5))
def test_pages_put_together_are_everything_once_and_sorted(
    forest: Forest, root: BlockHash | None, data: st.DataObject, limit: int
) -> None:
    prefix = data.draw(st.sampled_from([None, *(meta.hash for meta in forest.metas)]))
    leased = frozenset(meta.hash for meta in forest.metas[::2])
    told, after = [], None
    while blocks := page(forest.held, leased, root=root, prefix=prefix, after=after, limit=limit):
        assert len(blocks) <= limit
        told += [(block.meta, list(block.tiers)) for block in blocks]
        assert all(block.leased == (block.meta.hash in leased) for block in blocks)
        after = blocks[-1].meta.hash
    assert told == naive(forest, root, prefix)


def test_of_several_copies_the_one_that_lives_longest_counts() -> None:
    a, b, c = (BlockHash(letter * 32) for letter in (b"a", b"b", b"c"))
    tiers = [{a: 5.0, b: 9.0, c: None}, {a: 7.0, c: 3.0}, {b: 2.0}]
    assert ttl_left_s(tiers) == ttl_left_s(tiers[::-1]) == {a: 7.0, b: 9.0, c: None}
    assert ttl_left_s([]) == {}
