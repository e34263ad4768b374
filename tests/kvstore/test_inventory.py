"""Pages of a store's blocks against a naive sort, and nothing told twice or left out."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.chains import select
from kvstore.events import TierName
from kvstore.inventory import LISTING_S, Inventory, ttl_left_s
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import OTHER_ROOT, ROOT, ManualClock, chain, names


@dataclass
class Tier:
    name: TierName
    blocks: dict[BlockHash, BlockMeta] = field(default_factory=dict)
    asked: int = 0

    def put(self, metas: list[BlockMeta]) -> None:
        self.blocks |= {meta.hash: meta for meta in metas}

    def find(self, name: BlockHash) -> BlockMeta | None:
        return self.blocks.get(name)

    def metas(self) -> list[BlockMeta]:
        self.asked += 1
        return list(self.blocks.values())


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
    tiers = [Tier(tier, {meta.hash: meta for meta in blocks}) for tier, blocks in forest.held]
    inventory = Inventory(tiers, ManualClock())
    while blocks := inventory.page(leased, root=root, prefix=prefix, after=after, limit=limit):
        assert len(blocks) <= limit
        told += [(block.meta, list(block.tiers)) for block in blocks]
        assert all(block.leased == (block.meta.hash in leased) for block in blocks)
        after = blocks[-1].meta.hash
    assert told == naive(forest, root, prefix)


def rig() -> tuple[Tier, ManualClock, Inventory, list[BlockHash]]:
    tier, clock = Tier(TierName.HOST), ManualClock()
    tier.put(chain(9))
    return tier, clock, Inventory([tier], clock), sorted(names(chain(9)))


def told(inventory: Inventory, after: BlockHash | None, root: BlockHash | None = None) -> list[BlockHash]:
    blocks = inventory.page(frozenset(), root=root, prefix=None, after=after, limit=3)
    return [block.meta.hash for block in blocks]


def test_a_page_that_goes_on_with_the_last_one_sorts_nothing_again() -> None:
    tier, _, inventory, hashes = rig()
    assert told(inventory, None) == hashes[:3]
    assert told(inventory, hashes[2]) == hashes[3:6]
    assert told(inventory, hashes[5]) == hashes[6:]
    assert tier.asked == 1
    assert told(inventory, hashes[8]) == []


def test_what_has_gone_since_is_not_told_and_a_new_listing_tells_what_came() -> None:
    tier, _, inventory, hashes = rig()
    assert told(inventory, None) == hashes[:3]
    del tier.blocks[hashes[3]]
    assert told(inventory, hashes[2]) == hashes[4:7]
    tier.put(chain(9))
    assert told(inventory, None) == hashes[:3]
    assert told(inventory, hashes[2]) == hashes[3:6]


def test_names_are_gathered_again_for_another_question_and_after_a_while() -> None:
    tier, clock, inventory, hashes = rig()
    told(inventory, None)
    tier.put(chain(2, root=OTHER_ROOT))
    both = sorted([*hashes, *names(chain(2, root=OTHER_ROOT))])
    after = told(inventory, None)[-1]
    assert told(inventory, after, ROOT) == [name for name in hashes if name > after][:3]
    assert told(inventory, both[4]) == both[5:8]  # where no page has ended
    tier.put(chain(12))
    clock.now += LISTING_S
    now = sorted(tier.blocks)
    assert told(inventory, both[7]) == [name for name in now if name > both[7]][:3]


def test_names_that_nobody_goes_on_with_are_dropped_after_a_while() -> None:
    tier, clock, inventory, hashes = rig()
    told(inventory, None)
    clock.now += LISTING_S - 1
    inventory.sweep()
    assert told(inventory, hashes[2]) == hashes[3:6]
    assert tier.asked == 1
    clock.now += 1
    inventory.sweep()
    assert inventory._last is None


def test_of_several_copies_the_one_that_lives_longest_counts() -> None:
    a, b, c = (BlockHash(letter * 32) for letter in (b"a", b"b", b"c"))
    tiers = [{a: 5.0, b: 9.0, c: None}, {a: 7.0, c: 3.0}, {b: 2.0}]
    assert ttl_left_s(tiers) == ttl_left_s(tiers[::-1]) == {a: 7.0, b: 9.0, c: None}
    assert ttl_left_s([]) == {}
