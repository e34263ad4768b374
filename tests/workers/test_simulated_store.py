"""The simulated tier's books against a naive list, and the events against a set."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.blocks import BlockHash, block_hashes, short
from kvstore.errors import InvariantError
from kvstore.events import BlockRemoved, BlockStored, RemovalCause, TierName
from kvstore.tier import BlockMeta
from workers.protocol import CachedBlock
from workers.simulated_listing import listed
from workers.simulated_store import Block, EventLog, SimulatedTier

ROOT = BlockHash(b"r" * 32)
CAPACITY = 6


def chain(*tokens: int, ttl_s: float | None = None) -> list[BlockMeta]:
    names = block_hashes(tokens, ROOT, 1)
    return [BlockMeta(name, parent, ROOT, ttl_s) for parent, name in pairwise([ROOT, *names])]


class Now:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def tier(capacity: int = CAPACITY) -> tuple[SimulatedTier, EventLog, Now]:
    log, now = EventLog(), Now()
    return SimulatedTier(TierName.DEVICE, capacity, 64, now, log), log, now


def test_neighbouring_blocks_of_a_chain_become_one_event() -> None:
    books, log, _ = tier()
    metas = chain(1, 2, 3)
    for meta in metas:
        books.add(meta)
    assert log.drain() == [BlockStored(TierName.DEVICE, tuple(short(meta.hash) for meta in metas), None)]
    assert log.drain() == []


def test_a_suffix_is_evicted_before_its_prefix() -> None:
    books, log, _ = tier(capacity=3)
    metas = chain(1, 2, 3)
    held = [books.name_private(meta) for meta in metas if books.allocate(1)]
    books.release(held)
    log.drain()
    assert books.add(chain(9)[0])
    assert BlockRemoved(TierName.DEVICE, (short(metas[2].hash),), RemovalCause.EVICTED) in log.drain()
    assert books.match([meta.hash for meta in metas]) == 2


def test_pinned_blocks_are_neither_evicted_nor_expired() -> None:
    books, _, now = tier(capacity=2)
    (meta,) = chain(1, ttl_s=5.0)
    books.add(meta)
    held = books.pin([meta.hash])
    now.s = 100.0
    books.sweep()
    assert not books.allocate(2)
    assert meta.hash in books
    books.release(held)
    assert books.next_expiry_s() == pytest.approx(5.0)


def test_a_cleared_block_stays_with_its_user_and_nobody_else_finds_it() -> None:
    books, _, _ = tier(capacity=2)
    (meta,) = chain(1)
    books.add(meta)
    held = books.pin([meta.hash])
    assert books.clear(None, None) == 1
    assert meta.hash not in books
    assert not books.allocate(2)
    books.add(meta)  # its successor is another block
    books.release(held)
    assert meta.hash in books
    books.check()


def test_clear_by_prefix_drops_what_follows_it_only() -> None:
    books, _, _ = tier()
    trunk = chain(1, 2, 3)
    branch = chain(1, 7)
    for meta in [*trunk, branch[1]]:
        books.add(meta)
    assert books.clear(ROOT, trunk[1].hash) == 2
    assert trunk[0].hash in books
    assert branch[1].hash in books


def test_a_leased_block_is_cleared_all_the_same_and_its_lease_is_gone() -> None:
    books, _, _ = tier(capacity=2)
    (meta,) = chain(1)
    books.add(meta)
    assert books.lease([meta.hash], None) == 1
    assert not books.allocate(2)
    assert books.clear(None, None) == 1
    assert books.stats().leased == 0
    assert books.allocate(2)
    books.check()


@pytest.mark.parametrize("leases", [(100.0, 10.0), (10.0, 100.0), (None, 10.0), (10.0, None)])
def test_of_several_leases_the_longest_holds(leases: tuple[float | None, ...]) -> None:
    books, _, now = tier()
    (meta,) = chain(1, ttl_s=5.0)
    books.add(meta)
    assert [books.lease([meta.hash], for_s) for for_s in leases] == [1, 1]
    now.s = 50.0
    books.sweep()
    assert books.leased(meta.hash)
    now.s = 200.0
    books.sweep()
    assert books.leased(meta.hash) == (None in leases)


def test_at_most_half_of_a_tier_is_leased() -> None:
    books, _, _ = tier(capacity=5)
    metas = chain(1, 2, 3, 4, 5)
    for meta in metas:
        books.add(meta)
    assert books.lease([meta.hash for meta in metas], 60.0) == 2
    assert [books.leased(meta.hash) for meta in metas] == [True, True, False, False, False]


def test_blocks_are_listed_in_the_order_of_their_names_with_what_every_tier_knows() -> None:
    log, now = EventLog(), Now()
    device, host = (SimulatedTier(name, 8, 64, now, log) for name in (TierName.DEVICE, TierName.HOST))
    metas = chain(1, 2, 3, ttl_s=10.0)
    others = [BlockMeta(BlockHash(b"o" * 32), BlockHash(b"p" * 32), BlockHash(b"p" * 32), None, priority=7)]
    for meta in metas[:2] + others:
        device.add(meta)
    now.s = 4.0
    for meta in metas:
        host.add(meta)
    host.lease([metas[2].hash], None)

    def ask(
        root: BlockHash | None = None, prefix: BlockHash | None = None, after: BlockHash | None = None, limit: int = 9
    ) -> list[CachedBlock]:
        return listed([device, host], root=root, prefix=prefix, after=after, limit=limit)

    names = sorted(meta.hash for meta in metas + others)
    assert [block.hash for block in ask()] == names
    assert [block.hash for block in ask(limit=2)] == names[:2]
    assert [block.hash for block in ask(after=names[1])] == names[2:]
    assert {block.hash for block in ask(ROOT, metas[1].hash)} == {metas[1].hash, metas[2].hash}
    known = {block.hash: block for block in ask()}
    both = (TierName.DEVICE, TierName.HOST)
    assert known[metas[0].hash] == CachedBlock(metas[0].hash, None, ROOT, both, ttl_s=10.0, ttl_left_s=10.0, position=0)
    pinned = CachedBlock(metas[2].hash, metas[1].hash, ROOT, (TierName.HOST,), ttl_s=10.0, leased=True, position=2)
    assert known[metas[2].hash] == pinned
    assert known[others[0].hash].priority == 7
    now.s = 13.0  # gone from device, and nobody has swept
    assert known.keys() - {block.hash for block in ask()} == set()
    assert {block.hash: block.tiers for block in ask()}[metas[0].hash] == (TierName.HOST,)


def test_check_finds_a_tier_that_holds_more_than_it_may() -> None:
    books, _, _ = tier(capacity=1)
    books.private = 2
    with pytest.raises(InvariantError):
        books.check()


class NaiveTier:
    """A list from the least to the most recently used; everything by scanning."""

    def __init__(self) -> None:
        self.order: list[bytes] = []
        self.pins: dict[bytes, int] = {}
        self.deadlines: dict[bytes, float] = {}
        self.leases: dict[bytes, float | None] = {}
        self.private = 0

    def use(self, name: bytes, deadline: float) -> None:
        if self.pins.get(name, 0) == 0:
            if name in self.order:
                self.order.remove(name)
            self.order.append(name)
            self.deadlines[name] = deadline

    def make_room(self, count: int) -> bool:
        free = [name for name in self.order if not self.pins.get(name, 0)]
        excess = len(self.order) + self.private + count - CAPACITY
        if excess > len(free):
            return False
        for name in free[: max(0, excess)]:
            self.forget(name)
        return True

    def forget(self, name: bytes) -> None:
        self.order.remove(name)
        self.deadlines.pop(name, None)
        self.pins.pop(name, None)

    def lease(self, name: bytes, until: float | None) -> bool:
        if name in self.leases:
            ends = [self.leases[name], until]
            self.leases[name] = None if None in ends else max(end for end in ends if end is not None)
            return True
        if name not in self.order or len(self.leases) == CAPACITY // 2:
            return False
        self.leases[name] = until
        self.pins[name] = self.pins.get(name, 0) + 1
        return True

    def end_lease(self, name: bytes, now: float) -> None:
        del self.leases[name]
        self.pins[name] -= 1
        self.use(name, now + 10.0)

    def expire(self, now: float) -> None:
        for name in [name for name, end in self.leases.items() if end is not None and end <= now][::-1]:
            self.end_lease(name, now)
        for name in [name for name in self.order if self.deadlines[name] <= now and not self.pins.get(name, 0)]:
            self.forget(name)


class BooksMachine(RuleBasedStateMachine):
    """Random histories of a tier with a TTL of 10 s, in step with the naive one."""

    def __init__(self) -> None:
        super().__init__()
        self.books, self.log, self.now = tier()
        self.naive = NaiveTier()
        self.held: list[list[Block]] = []
        self.mirror: set[bytes] = set()

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def add(self, tokens: list[int]) -> None:
        for meta in chain(*tokens, ttl_s=10.0):
            self.naive.expire(self.now.s)
            known = meta.hash in self.naive.order
            fits = known or self.naive.make_room(1)
            assert self.books.add(meta) == fits
            if fits:
                self.naive.use(meta.hash, self.now.s + 10.0)

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def pin(self, tokens: list[int]) -> None:
        names = [meta.hash for meta in chain(*tokens)]
        count = self.books.match(names)
        self.naive.expire(self.now.s)
        assert count == next((at for at, name in enumerate(names) if name not in self.naive.order), len(names))
        self.books.sweep()
        self.held.append(self.books.pin(names[:count]))
        for name in names[:count]:
            self.naive.pins[name] = self.naive.pins.get(name, 0) + 1

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 1 << 16))
    def release(self, which: int) -> None:
        blocks = self.held.pop(which % len(self.held))
        self.books.release(blocks)
        for block in reversed(blocks):
            name = block.meta.hash
            self.naive.pins[name] -= 1
            if self.naive.pins[name] == 0:
                self.naive.use(name, self.now.s + 10.0)

    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        for_s=st.sampled_from([None, 3.0, 20.0]),
    )
    def lease(self, tokens: list[int], for_s: float | None) -> None:
        names = [meta.hash for meta in chain(*tokens)]
        self.naive.expire(self.now.s)
        until = None if for_s is None else self.now.s + for_s
        assert self.books.lease(names, for_s) == sum([self.naive.lease(name, until) for name in names])

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def end_leases(self, tokens: list[int]) -> None:
        names = [meta.hash for meta in chain(*tokens)]
        self.naive.expire(self.now.s)
        leased = [name for name in names if name in self.naive.leases]
        assert self.books.end_leases(names) == len(leased)
        for name in reversed(leased):
            self.naive.end_lease(name, self.now.s)

    @rule(count=st.integers(1, CAPACITY))
    def allocate(self, count: int) -> None:
        fits = self.naive.make_room(count)
        assert self.books.allocate(count) == fits
        self.naive.private += count if fits else 0

    @precondition(lambda self: self.naive.private)
    @rule()
    def free(self) -> None:
        self.books.free(self.naive.private)
        self.naive.private = 0

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.now.s += seconds
        self.books.sweep()
        self.naive.expire(self.now.s)

    @invariant()
    def same(self) -> None:
        for event in self.log.drain():
            assert isinstance(event, BlockStored | BlockRemoved)
            changed = set(event.hashes)
            if isinstance(event, BlockStored):
                assert not changed & self.mirror
                self.mirror |= changed
            else:
                assert changed <= self.mirror
                self.mirror -= changed
        assert self.mirror == {short(BlockHash(name)) for name in self.naive.order}
        assert self.books.stats().leased == len(self.naive.leases)
        assert all(self.books.leased(BlockHash(name)) for name in self.naive.leases)
        self.books.check()


BooksMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
test_the_books_keep_step_with_a_naive_list = BooksMachine.TestCase
