"""The paged pool: a state machine against a naive model, and what its tensor looks like."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.blocks import BlockHash, short
from kvstore.device import DeviceTier
from kvstore.errors import InvariantError, TierError
from kvstore.events import BlockStored, RemovalCause
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, ROOT, ManualClock, chain, names, payload, payloads

torch.set_num_threads(1)
BLOCKS = 6


def make(clock: ManualClock, blocks: int = BLOCKS, *, poison: bool = True) -> DeviceTier:
    return DeviceTier(LAYOUT, blocks * LAYOUT.block_nbytes, clock=clock, poison=poison)


def bytes_of(tier: DeviceTier, block_ids: list[int]) -> list[bytes]:
    return [bytes(view) for view in tier.payloads(block_ids)]


@dataclass(slots=True)
class _Cached:
    block_id: int
    meta: BlockMeta
    used: float
    refs: int


class PoolMachine(RuleBasedStateMachine):
    """Handles are what sequences hold: lists of blocks with a reference each."""

    CHAINS = (chain(4, ttl_s=5.0), chain(4, first_token=1), chain(3, root=OTHER_ROOT, ttl_s=2.0))

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(0.0)
        self.tier = make(self.clock)
        self.cached: dict[BlockHash, _Cached] = {}  # in order of use
        self.private: list[int] = []  # one entry a reference
        self.handles: list[list[int]] = []
        self.known: set[bytes] = set()  # what a reader of the events believes

    def live(self, name: BlockHash) -> bool:
        entry = self.cached.get(name)
        if entry is None or entry.refs > 0 or entry.meta.ttl_s is None:
            return entry is not None
        return entry.used + entry.meta.ttl_s > self.clock.now

    def renew(self, name: BlockHash) -> None:
        entry = self.cached.pop(name)
        entry.used = self.clock.now
        self.cached[name] = entry

    def forget(self, name: BlockHash) -> None:
        entry = self.cached.pop(name)
        self.private += [entry.block_id] * entry.refs

    @rule(which=st.sampled_from(CHAINS), length=st.integers(1, 4))
    def acquire(self, which: list[BlockMeta], length: int) -> None:
        wanted = names(which[:length])
        expected = 0
        while expected < len(wanted) and self.live(wanted[expected]):
            expected += 1
        assert self.tier.match(wanted) == expected
        block_ids = self.tier.acquire(wanted)
        assert block_ids == [self.cached[name].block_id for name in wanted[:expected]]
        assert bytes_of(self.tier, block_ids) == [bytes(payload(name)) for name in wanted[:expected]]
        for name in wanted[:expected]:
            self.cached[name].refs += 1
        self.handles.append(block_ids)

    @rule(
        which=st.sampled_from(CHAINS),
        start=st.integers(0, 3),
        count=st.integers(1, 4),
        commits=st.sampled_from([True, True, False]),
    )
    def compute(self, which: list[BlockMeta], start: int, count: int, commits: bool) -> None:
        metas = which[start : start + count]
        evictable = [name for name, entry in self.cached.items() if entry.refs == 0]
        free = BLOCKS - len(set(self.private)) - len(self.cached)
        block_ids = self.tier.allocate(len(metas))
        if len(metas) > free + len(evictable):
            assert block_ids is None
            return
        assert block_ids is not None
        expired = [name for name in self.cached if not self.live(name)] if len(metas) > free else []
        alive = [name for name in evictable if name not in expired]
        for name in expired + alive[: max(0, len(metas) - free - len(expired))]:
            self.forget(name)
        self.tier.inject(block_ids, payloads(metas))
        self.private += block_ids
        if commits:
            self.commit(block_ids, metas)
        self.handles.append(block_ids)

    def commit(self, block_ids: list[int], metas: list[BlockMeta]) -> None:
        named = self.tier.commit(block_ids, metas)
        expected = [(b, m) for b, m in zip(block_ids, metas, strict=True) if m.hash not in self.cached]
        assert named == expected
        for block_id, meta in zip(block_ids, metas, strict=True):
            if meta.hash not in self.cached:
                self.cached[meta.hash] = _Cached(block_id, meta, self.clock.now, 1)
                self.private.remove(block_id)
            elif self.cached[meta.hash].refs == 0:
                self.renew(meta.hash)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if not self.handles:
            return
        block_ids = self.handles.pop(data.draw(st.integers(0, len(self.handles) - 1)))
        self.tier.release(block_ids)
        by_id = {entry.block_id: name for name, entry in self.cached.items()}
        for block_id in reversed(block_ids):
            if block_id not in by_id:
                self.private.remove(block_id)
                continue
            entry = self.cached[by_id[block_id]]
            entry.refs -= 1
            if entry.refs == 0:
                self.renew(by_id[block_id])

    @rule(which=st.sampled_from(CHAINS))
    def touch(self, which: list[BlockMeta]) -> None:
        self.tier.touch(names(which))
        for name in reversed(names(which)):
            if self.live(name) and self.cached[name].refs == 0:
                self.renew(name)

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3))
    def remove(self, which: list[BlockMeta], start: int) -> None:
        gone = [name for name in names(which[start:]) if name in self.cached]
        assert self.tier.remove(names(which[start:]), RemovalCause.CLEARED) == len(gone)
        for name in gone:
            self.forget(name)

    @rule(root=st.sampled_from([None, ROOT, OTHER_ROOT]))
    def clear(self, root: BlockHash | None) -> None:
        gone = [name for name, entry in self.cached.items() if root in (None, entry.meta.root)]
        assert self.tier.clear(root=root) == len(gone)
        for name in gone:
            self.forget(name)

    @rule(seconds=st.sampled_from([0.5, 1.5, 4.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def sweep(self) -> None:
        self.tier.sweep()
        for name in [name for name in self.cached if not self.live(name)]:
            self.forget(name)

    @invariant()
    def agrees(self) -> None:
        self.tier.check()
        assert {meta.hash for meta in self.tier.metas()} == set(self.cached)
        for name in (name for which in self.CHAINS for name in names(which)):
            assert self.tier.holds(name) == self.live(name)
        in_order = [entry.block_id for entry in self.cached.values() if entry.refs == 0]
        assert list(self.tier._lru.oldest_first()) == in_order
        evictable = sum(entry.refs == 0 for entry in self.cached.values())
        assert self.tier.available == BLOCKS - len(set(self.private)) - len(self.cached) + evictable
        for name, entry in self.cached.items():
            assert self.tier.refs(entry.block_id) == entry.refs
            assert bytes_of(self.tier, [entry.block_id]) == [bytes(payload(name))]

    @invariant()
    def a_reader_of_the_events_knows_what_is_cached(self) -> None:
        for event in self.tier.drain_events():
            match event:
                case BlockStored(hashes=hashes):
                    self.known |= set(hashes)
                case _:
                    self.known -= set(getattr(event, "hashes", self.known))
        assert self.known == {short(name) for name in self.cached}
        assert self.known == {name for event in self.tier.snapshot() for name in event.hashes}


PoolMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestPoolAgainstANaiveModel = PoolMachine.TestCase


def test_k_and_v_are_views_of_the_blocks_own_bytes() -> None:
    tier = make(ManualClock(), poison=False)
    block_ids = tier.allocate(2)
    assert block_ids is not None
    k, v = tier.kv(1)
    assert k.shape == (BLOCKS + 1, LAYOUT.block_size, LAYOUT.kv_heads, LAYOUT.k_dim)
    assert v.shape == (BLOCKS + 1, LAYOUT.block_size, LAYOUT.kv_heads, LAYOUT.v_dim)
    k[block_ids[1]] = 3.0
    v[block_ids[1]] = 5.0
    values = torch.frombuffer(bytearray(tier.payloads(block_ids)[1]), dtype=torch.float32).view(LAYOUT.layers, -1)
    assert values[0].eq(0).all()
    assert values[1, :8].eq(3).all()
    assert values[1, 8:].eq(5).all()


def test_the_scratch_block_is_no_block_that_can_be_allocated() -> None:
    tier = make(ManualClock())
    assert tier.allocate(BLOCKS + 1) is None
    block_ids = tier.allocate(BLOCKS)
    assert block_ids is not None
    assert tier.scratch_block not in block_ids
    tier.kv(0)[0][tier.scratch_block] = 1.0


def test_free_blocks_are_poisoned_and_the_scratch_block_is_not() -> None:
    tier = make(ManualClock())
    k, _ = tier.kv(0)
    assert k[:BLOCKS].isnan().all()
    assert not k[tier.scratch_block].isnan().any()
    block_ids = tier.allocate(1)
    assert block_ids is not None
    k[block_ids[0]] = 1.0
    tier.release(block_ids)
    assert k[block_ids[0]].isnan().all()


def test_cleared_blocks_stay_with_who_holds_them_and_nobody_finds_them() -> None:
    tier = make(ManualClock())
    metas = chain(2)
    block_ids = tier.allocate(2)
    assert block_ids is not None
    tier.inject(block_ids, payloads(metas))
    tier.commit(block_ids, metas)
    tier.clear()
    assert tier.match(names(metas)) == 0
    assert bytes_of(tier, block_ids) == [bytes(payload(name)) for name in names(metas)]
    tier.release(block_ids)
    assert tier.available == BLOCKS
    tier.check()


def test_referenced_blocks_are_never_evicted() -> None:
    tier = make(ManualClock())
    metas = chain(4)
    tier.write(metas, payloads(metas))
    held = tier.acquire(names(metas[:3]))
    assert tier.allocate(4) is None
    assert tier.allocate(3) is not None
    assert tier.match(names(metas)) == 3
    assert bytes_of(tier, held) == [bytes(payload(name)) for name in names(metas[:3])]


def test_a_block_released_too_often_is_a_defect_that_shows() -> None:
    tier = make(ManualClock())
    block_ids = tier.allocate(1)
    assert block_ids is not None
    tier.release(block_ids)
    with pytest.raises(InvariantError):
        tier.release(block_ids)


def test_a_block_cannot_have_two_names() -> None:
    tier = make(ManualClock())
    block_ids = tier.allocate(1)
    assert block_ids is not None
    tier.commit(block_ids, chain(1))
    with pytest.raises(InvariantError):
        tier.commit(block_ids, chain(1, first_token=1))


def test_a_tier_smaller_than_a_block_says_what_to_do() -> None:
    with pytest.raises(TierError, match="give it more bytes"):
        DeviceTier(LAYOUT, LAYOUT.block_nbytes - 1, clock=ManualClock())


def test_check_finds_a_lost_reference() -> None:
    tier = make(ManualClock())
    assert tier.allocate(1) is not None
    tier._refs[0] = 0
    with pytest.raises(InvariantError):
        tier.check()
