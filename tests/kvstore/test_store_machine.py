"""TieredStore against a naive model: whatever happens below, bytes are right, books balance, what is there is found.

The oracle is that a block's bytes follow from its name. The model knows little more: which handles are out. What must
be found is asked of the tiers themselves, naively: the longest prefix whose blocks lie anywhere.
"""

from __future__ import annotations

import time
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.admission import make_admission
from kvstore.blocks import BlockHash, block_hashes, short
from kvstore.device import DeviceTier
from kvstore.errors import MissReason
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.source import ABSENT_S
from kvstore.store import Acquisition, ReadTiers, TieredStore
from kvstore.tier import BlockMeta, LocalTier, chain_metas
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, ROOT, ManualClock, names, payload, payloads
from tests.kvstore.fake_tier import FakeSharedTier

DEVICE_BLOCKS, HOST_SLOTS, DISK_SLOTS, TTL = 6, 7, 9, 20.0


class Disk(HostTier):
    """A local tier below host, without a disk."""

    name = TierName.DISK


def chain_of(root: BlockHash, *tokens: int) -> list[BlockMeta]:
    hashes = block_hashes([token for token in tokens for _ in range(LAYOUT.block_size)], root, LAYOUT.block_size)
    return chain_metas(hashes, before=root, root=root, ttl_s=None)


CHAINS = [chain_of(ROOT, 1, 2, 3, 4), chain_of(ROOT, 1, 2, 5, 6), chain_of(ROOT, 7, 8), chain_of(OTHER_ROOT, 1, 2, 3)]
SOME_CHAIN = st.sampled_from(CHAINS)
SCOPES = st.sampled_from(
    [{"root": ROOT}, {"root": OTHER_ROOT}, {"prefix": CHAINS[0][1].hash}, {"prefix": CHAINS[1][2].hash}, {}]
)
READS = st.sampled_from(
    [
        ReadTiers(),
        ReadTiers(),
        ReadTiers(device=False),
        ReadTiers(host=False),
        ReadTiers(disk=False),
        ReadTiers(shared=False),
    ]
)


class StoreMachine(RuleBasedStateMachine):
    has_disk = False
    admission = "always"

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(0.0)
        self.shared = FakeSharedTier(self.clock)
        self.shared.ends = MissReason.DEADLINE  # a read that is cut short says nothing of what is left
        self.device = DeviceTier(LAYOUT, DEVICE_BLOCKS * LAYOUT.block_nbytes, clock=self.clock, poison=True)
        self.host = HostTier(LAYOUT, HOST_SLOTS * LAYOUT.block_nbytes, clock=self.clock)
        self.disk = Disk(LAYOUT, DISK_SLOTS * LAYOUT.block_nbytes, clock=self.clock) if self.has_disk else None
        self.local = [self.device, self.host, *([] if self.disk is None else [self.disk])]
        self.store = TieredStore(
            LAYOUT,
            self.device,
            self.host,
            self.shared,
            disk=self.disk,
            clock=self.clock,
            default_ttl_s=TTL,
            admission=make_admission(self.admission),
        )
        self.pending: list[tuple[Acquisition, list[BlockMeta]]] = []
        self.handles: list[tuple[list[int], list[BlockMeta]]] = []
        self.believed: dict[TierName, set[bytes]] = {tier: set() for tier in TierName}

    def teardown(self) -> None:
        self.shared.reads_open.set()
        self.shared.writes_open.set()
        self.settle()
        for block_ids, _ in self.handles:
            self.store.release(block_ids)
        assert self.device.available == DEVICE_BLOCKS
        self.store.close()

    def settle(self) -> None:
        """Let everything end that is not held back."""
        while self.shared.reads_open.is_set() and self.loading():
            self.store.wait(30)
            self.store.pump()
        self.collect()
        for tier, lane in self.store._lanes.items():
            if tier is not TierName.REDIS or self.shared.writes_open.is_set():
                assert lane.flush(30)

    def loading(self) -> bool:
        return bool(self.store._promoter.metas())

    def collect(self) -> None:
        for acquisition, metas in [entry for entry in self.pending if entry[0].done]:
            self.pending.remove((acquisition, metas))
            self.handles.append((acquisition.block_ids, metas))

    def anywhere(self, metas: list[BlockMeta]) -> int:
        """The length of the prefix whose blocks lie in some tier."""
        shared = self.shared.held()
        for count, name in enumerate(names(metas)):
            if not (name in shared or any(tier.find(name) for tier in self.local)):
                return count
        return len(metas)

    @rule(metas=SOME_CHAIN, reads=READS, knows_root=st.booleans())
    def acquire(self, metas: list[BlockMeta], reads: ReadTiers, knows_root: bool) -> None:
        available, expected = self.device.available, self.anywhere(metas)
        is_loading = bool(self.store._promoter.metas())  # it may be of a tier that is let be until it answers
        nothing_else_runs = not (self.pending or is_loading) and self.shared.reads_open.is_set()
        acquisition = self.store.acquire(
            names(metas), reads=reads, compute_ms=lambda first, count: 1e9, root=metas[0].root if knows_root else None
        )
        self.pending.append((acquisition, metas))
        self.settle()
        plain = reads == ReadTiers() and self.shared.read_limit is None and self.shared.raises is None
        if nothing_else_runs and plain and available >= len(metas):
            assert len(acquisition.block_ids) == expected

    @initialize()
    def earlier_workers_filled_the_shared_tier(self) -> None:
        for metas in CHAINS:
            timed = [replace(meta, ttl_s=TTL) for meta in metas]
            self.shared.write(timed, payloads(timed))

    @rule(metas=SOME_CHAIN, keeps=st.booleans())
    def serve(self, metas: list[BlockMeta], keeps: bool) -> None:
        """A whole request: load what there is, compute the rest, commit it."""
        self.acquire(metas, ReadTiers(), knows_root=True)
        if self.pending or not self.handles:
            return
        block_ids, _ = self.handles[-1]
        rest = metas[len(block_ids) :]
        computed = self.store.allocate(len(rest))
        if computed is not None:
            self.device.inject(computed, payloads(rest))
            self.store.commit(computed, rest)
            block_ids += computed
        if not keeps:
            self.handles.pop()
            self.store.release(block_ids)

    @rule(metas=SOME_CHAIN, start=st.integers(0, 3), count=st.integers(1, 3), ttl_s=st.sampled_from([None, 5.0]))
    def compute(self, metas: list[BlockMeta], start: int, count: int, ttl_s: float | None) -> None:
        part = [BlockMeta(m.hash, m.parent, m.root, ttl_s) for m in metas[start : start + count]]
        block_ids = self.store.allocate(len(part))
        if block_ids is None:
            return
        self.device.inject(block_ids, payloads(part))
        self.store.commit(block_ids, part)
        self.handles.append((block_ids, part))

    # How far a thread got when a gate closed may differ from run to run, and with it the number of handles. So nothing
    # that is drawn depends on it.
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        if self.handles:
            block_ids, _ = self.handles.pop(number % len(self.handles))
            self.store.release(block_ids)

    @rule(number=st.integers(0, 9))
    def cancel(self, number: int) -> None:
        if self.pending:
            acquisition, _ = self.pending.pop(number % len(self.pending))
            acquisition.cancel()

    @rule()
    def hold_reads_back(self) -> None:
        self.shared.reads_open.clear()

    @rule()
    def hold_writes_back(self) -> None:
        self.shared.writes_open.clear()

    @rule()
    def let_go(self) -> None:
        self.shared.reads_open.set()
        self.shared.writes_open.set()
        self.settle()

    @rule(limit=st.sampled_from([None, None, 1, 0]))
    def deliver_at_most(self, limit: int | None) -> None:
        self.shared.read_limit = limit
        self.clock.now += ABSENT_S  # what was not found is not asked for again before

    @rule(metas=SOME_CHAIN, start=st.integers(0, 3))
    def lose(self, metas: list[BlockMeta], start: int) -> None:
        self.shared.lose(names(metas[start : start + 2]))

    @rule(metas=SOME_CHAIN, reads=READS)
    def prefetch(self, metas: list[BlockMeta], reads: ReadTiers) -> None:
        self.store.prefetch(names(metas), reads=reads, root=metas[0].root)
        self.settle()

    @rule(metas=SOME_CHAIN, start=st.integers(0, 3), count=st.integers(1, 3), seconds=st.sampled_from([None, 30.0]))
    def lease(self, metas: list[BlockMeta], start: int, count: int, seconds: float | None) -> None:
        self.store.lease(names(metas[start : start + count]), seconds)

    @rule(metas=SOME_CHAIN)
    def end_leases(self, metas: list[BlockMeta]) -> None:
        self.store.end_leases(names(metas))

    @rule(metas=SOME_CHAIN, start=st.integers(0, 2), tiers=st.integers(1, 3))
    def push_out(self, metas: list[BlockMeta], start: int, tiers: int) -> None:
        """As if others had needed the room."""
        for tier in self.local[:tiers]:
            tier.remove(names(metas[start:]), RemovalCause.EVICTED)

    @rule(scope=SCOPES, shared=st.booleans())
    def clear(self, scope: dict[str, BlockHash], shared: bool) -> None:
        self.shared.writes_open.set()  # clear waits for the write that runs
        self.store.clear(**scope, shared=shared)
        # Of a prefix, what follows it is found while the blocks between the two lie somewhere; itself it always is.
        dropped = {scope["prefix"]} if "prefix" in scope else set(self.of_root(scope.get("root")))
        assert not any(tier.find(name) for tier in self.local for name in dropped)
        self.settle()
        assert not any(tier.find(name) for tier in self.local for name in dropped)
        if shared:
            assert not set(self.shared.held()) & dropped

    def of_root(self, root: BlockHash | None) -> list[BlockHash]:
        return [meta.hash for metas in CHAINS for meta in metas if root in (None, meta.root)]

    @rule(seconds=st.sampled_from([1.0, 6.0, 15.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def pump(self) -> None:
        self.store.pump()
        self.collect()

    @invariant()
    def the_books_balance(self) -> None:
        self.store.check()
        # Whatever the test does not hold back has ended before the next step, so that a run can be repeated.
        self.settle()
        self.store.check()

    @invariant()
    def every_byte_is_right(self) -> None:
        for block_ids, metas in self.handles:
            found = [bytes(view) for view in self.device.payloads(block_ids)]
            assert found == [bytes(payload(name)) for name in names(metas)[: len(found)]]
        for meta in self.device.metas():
            assert bytes(self.device.payloads([self.device._held[meta.hash]])[0]) == bytes(payload(meta.hash))
        for tier in (self.host, self.disk):
            for meta in [] if tier is None else tier.metas():
                for view in tier.view([meta.hash]):
                    assert bytes(view.payload) == bytes(payload(meta.hash))
                    tier.end_view(view)
        for name, stored in self.shared.held().items():
            assert stored == bytes(payload(name))

    @invariant()
    def events_tell_what_local_tiers_hold(self) -> None:
        patience = time.monotonic() + 5.0  # what a thread writes after the events were drained is told by the next ones
        while True:
            self._believe_events()
            wrong = [] if self.loading() else [tier.name for tier in self.local if not self._is_believed(tier)]
            if not wrong or time.monotonic() > patience:
                break
            time.sleep(0.01)
        assert not wrong

    def _is_believed(self, tier: LocalTier) -> bool:
        return self.believed[tier.name] == {short(meta.hash) for meta in tier.metas()}

    def _believe_events(self) -> None:
        for event in self.store.drain_events():
            known = self.believed[event.tier]
            if isinstance(event, BlockStored):
                known |= set(event.hashes)
            elif isinstance(event, BlockRemoved):
                known -= set(event.hashes)
            elif isinstance(event, AllBlocksCleared):
                known.clear()


StoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestStoreAgainstANaiveModel = StoreMachine.TestCase


class StoreWithDiskMachine(StoreMachine):
    has_disk = True


StoreWithDiskMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestStoreWithADiskAgainstANaiveModel = StoreWithDiskMachine.TestCase


class StoreWithWriteBackMachine(StoreMachine):
    has_disk = True
    admission = "on_eviction"


StoreWithWriteBackMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestStoreThatWritesBackAgainstANaiveModel = StoreWithWriteBackMachine.TestCase
