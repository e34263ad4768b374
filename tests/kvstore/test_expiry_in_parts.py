"""Many blocks that expire at once are dropped in parts, so that nobody waits long for a lock; none is delivered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.device import DeviceTier
from kvstore.disk.files import PAGE_NBYTES
from kvstore.disk.slab import slot_nbytes
from kvstore.disk.tier import DiskTier
from kvstore.events import BlockRemoved, RemovalCause, TierName
from kvstore.eviction.entries import EXPIRED_AT_ONCE
from kvstore.eviction.policies import LRU
from kvstore.host.tier import HostTier
from kvstore.spill import WriteBehind
from kvstore.tier import BlockMeta, Tier
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, chain, names, payloads

LASTING = 10
BLOCKS = 2 * EXPIRED_AT_ONCE + 8 + LASTING
NBYTES = LAYOUT.block_nbytes

Make = Callable[[ManualClock, Path], Tier]


def device(clock: ManualClock, folder: Path) -> Tier:
    return DeviceTier(LAYOUT, BLOCKS * NBYTES, clock=clock)


def host(clock: ManualClock, folder: Path) -> Tier:
    return HostTier(LAYOUT, BLOCKS * NBYTES, clock=clock)


def disk(clock: ManualClock, folder: Path) -> Tier:
    capacity = PAGE_NBYTES + BLOCKS * slot_nbytes(NBYTES)
    return DiskTier(folder / "blocks", capacity, codec=BlockCodec(LAYOUT, b"n" * 32), clock=clock)


@pytest.fixture(params=[device, host, disk], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


def removals(tier: Tier) -> int:
    return tier.stats().removals.get(RemovalCause.EXPIRED, 0)


def full(make: Make, clock: ManualClock, folder: Path) -> tuple[Tier, list[BlockHash], list[BlockHash]]:
    """A full tier, the blocks that live for ever, and those that die after 5 s; these were used last."""
    tier, lasting, dying = make(clock, folder), list[BlockHash](), list[BlockHash]()
    for start in range(0, BLOCKS, LASTING):
        metas = chain(LASTING, first_token=start, ttl_s=5.0 if start else None)
        assert tier.write(metas, payloads(metas)) == LASTING
        (dying if start else lasting).extend(names(metas))
    return tier, lasting, dying


def test_a_sweep_drops_so_many_at_most_and_says_whether_more_are_due(make: Make, tmp_path: Path) -> None:
    clock = ManualClock()
    tier, lasting, dying = full(make, clock, tmp_path)
    tier.drain_events()
    clock.now += 6.0
    dropped, said = list[int](), list[float | None]()
    for _ in range(3):
        before = removals(tier)
        said.append(tier.sweep())
        dropped.append(removals(tier) - before)
        assert not any(tier.match([name]) for name in dying)
        tier.check()
    assert (dropped, said) == ([EXPIRED_AT_ONCE, EXPIRED_AT_ONCE, 8], [0.0, 0.0, None])
    told = [event for event in tier.drain_events() if isinstance(event, BlockRemoved)]
    assert sorted(len(event.hashes) for event in told) == sorted(dropped)
    assert tier.match(lasting) == LASTING
    tier.close()


def test_what_has_expired_makes_room_before_what_has_not(make: Make, tmp_path: Path) -> None:
    clock = ManualClock()
    tier, lasting, dying = full(make, clock, tmp_path)
    clock.now += 6.0
    for start in range(BLOCKS, 2 * BLOCKS - LASTING, LASTING):
        metas = chain(LASTING, first_token=start)
        assert tier.write(metas, payloads(metas)) == LASTING
        tier.check()
    assert tier.match(lasting) == LASTING, "the oldest of all, and alive"
    assert removals(tier) == len(dying)
    assert RemovalCause.EVICTED not in tier.stats().removals
    tier.close()


@given(ttls=st.lists(st.sampled_from([None, 1.0, 2.0, 3.0]), max_size=12), limit=st.integers(1, 4))
def test_parts_add_up_to_what_was_due_soonest_first(ttls: list[float | None], limit: int) -> None:
    clock = ManualClock(0.0)
    lru: LRU[int] = LRU(clock)
    for key, ttl_s in enumerate(ttls):
        lru.add(key, ttl_s)
    clock.now = 2.5
    due = sorted((ttl_s, key) for key, ttl_s in enumerate(ttls) if ttl_s is not None and ttl_s <= 2.5)
    parts = list[list[int]]()
    while lru.next_expiry_s() == 0.0:
        parts.append(lru.pop_expired(limit))
        lru.check()
    gone = [key for part in parts for key in part]
    assert [ttls[key] for key in gone] == [ttl_s for ttl_s, _ in due]
    assert sorted(gone) == sorted(key for _, key in due)
    assert all(len(part) == limit for part in parts[:-1])


class LongSweep:
    """A tier whose sweep has so many parts."""

    name = TierName.DISK

    def __init__(self, parts: int) -> None:
        self.left = parts
        self.done = threading.Event()

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        return len(metas)

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        return 0

    def refresh(self, metas: Sequence[BlockMeta]) -> list[BlockHash] | None:
        return []

    def sweep(self) -> float | None:
        self.left -= 1
        if self.left == 0:
            self.done.set()
        return 0.0 if self.left > 0 else None


def test_write_behind_comes_back_at_once_for_the_rest_of_a_sweep() -> None:
    tier = LongSweep(100)
    writer = WriteBehind(tier, max_blocks=1, end_view=lambda view: None)
    assert tier.done.wait(60), "with a second between the parts it would take 100"
    writer.close(10)
