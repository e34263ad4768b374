"""Host RAM: a state machine against a naive model, two-phase writes, leases."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore import host as host_module
from kvstore.blocks import BlockHash, short
from kvstore.errors import TierError
from kvstore.events import BlockStored, RemovalCause
from kvstore.host import HostTier, Lease
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import (
    LAYOUT,
    OTHER_ROOT,
    ROOT,
    ManualClock,
    buffers,
    chain,
    names,
    payload,
    payloads,
)

SLOTS = 5


def make(clock: ManualClock, slots: int = SLOTS) -> HostTier:
    return HostTier(LAYOUT, slots * LAYOUT.block_nbytes, clock=clock)


class HostMachine(RuleBasedStateMachine):
    CHAINS = (chain(4, ttl_s=5.0), chain(4, first_token=1), chain(3, root=OTHER_ROOT, ttl_s=2.0))

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock(0.0)
        self.tier = make(self.clock)
        self.used: dict[BlockHash, float] = {}  # in order of use
        self.metas = {meta.hash: meta for metas in self.CHAINS for meta in metas}
        self.leases: list[Lease] = []
        self.removed_leases: list[Lease] = []  # their block is gone, their slot is not
        self.known: set[bytes] = set()

    def leased(self, name: BlockHash) -> bool:
        return any(lease.meta.hash == name for lease in self.leases)

    def live(self, name: BlockHash) -> bool:
        ttl_s = self.metas[name].ttl_s
        return name in self.used and (ttl_s is None or self.used[name] + ttl_s > self.clock.now)

    def leading(self, hashes: list[BlockHash]) -> int:
        return next((i for i, name in enumerate(hashes) if not self.live(name)), len(hashes))

    def renew(self, hashes: list[BlockHash]) -> None:
        for name in reversed(hashes):
            self.used.pop(name, None)
            self.used[name] = self.clock.now

    def forget(self, name: BlockHash) -> None:
        del self.used[name]
        self.removed_leases += [lease for lease in self.leases if lease.meta.hash == name]
        self.leases = [lease for lease in self.leases if lease.meta.hash != name]

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3), count=st.integers(1, 4))
    def write(self, which: list[BlockMeta], start: int, count: int) -> None:
        metas = which[start : start + count]
        wanted, expected = names(metas), 0
        taken = len({id(lease._slot) for lease in self.removed_leases}) + len(self.used)
        protected, fresh, held = set[BlockHash](), [], []
        for name in wanted:
            if name in self.used:
                protected.add(name)
                held.append(name)
            elif taken < SLOTS:
                taken += 1
                fresh.append(name)
            else:
                victim = next((n for n in self.used if n not in protected and not self.leased(n)), None)
                if victim is None:
                    break
                self.forget(victim)
                fresh.append(name)
            expected += 1
        assert self.tier.write(metas, payloads(metas)) == expected
        self.renew(fresh)
        self.renew(held)

    @rule(which=st.sampled_from(CHAINS), length=st.integers(1, 4))
    def read(self, which: list[BlockMeta], length: int) -> None:
        wanted, into = names(which[:length]), buffers(length)
        expected = self.leading(wanted)
        assert self.tier.match(wanted) == expected
        assert self.tier.read(wanted, into) == expected
        assert [bytes(b) for b in into[:expected]] == [bytes(payload(name)) for name in wanted[:expected]]
        self.renew(wanted[:expected])

    @rule(which=st.sampled_from(CHAINS))
    def touch(self, which: list[BlockMeta]) -> None:
        self.tier.touch(names(which))
        self.renew([name for name in names(which) if self.live(name)])

    @rule(which=st.sampled_from(CHAINS), number=st.integers(0, 2))
    def lease(self, which: list[BlockMeta], number: int) -> None:
        live = self.live(which[number].hash)
        leases = self.tier.lease([which[number].hash])
        assert len(leases) == live
        self.leases += leases

    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        every = self.leases + self.removed_leases
        if not every:
            return
        lease = data.draw(st.sampled_from(every))
        assert bytes(lease.payload) == bytes(payload(lease.meta.hash))
        self.tier.end_lease(lease)
        if lease in self.removed_leases:
            self.removed_leases.remove(lease)
        else:
            self.leases.remove(lease)

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3))
    def remove(self, which: list[BlockMeta], start: int) -> None:
        gone = [name for name in names(which[start:]) if name in self.used]
        assert self.tier.remove(names(which[start:]), RemovalCause.INVALID) == len(gone)
        for name in gone:
            self.forget(name)

    @rule(root=st.sampled_from([None, ROOT, OTHER_ROOT]))
    def clear(self, root: BlockHash | None) -> None:
        gone = [name for name in self.used if root in (None, self.metas[name].root)]
        assert self.tier.clear(root=root) == len(gone)
        for name in gone:
            self.forget(name)

    @rule(seconds=st.sampled_from([0.5, 1.5, 4.0]), sweeps=st.booleans())
    def pass_time(self, seconds: float, sweeps: bool) -> None:
        self.clock.now += seconds
        if sweeps:
            self.tier.sweep()
            for name in [name for name in self.used if not self.live(name)]:
                self.forget(name)

    @invariant()
    def agrees(self) -> None:
        self.tier.check()
        assert {meta.hash for meta in self.tier.metas()} == set(self.used)
        assert list(self.tier._lru.oldest_first()) == list(self.used)
        for name in self.metas:
            assert self.tier.holds(name) == self.live(name)
        for lease in self.leases + self.removed_leases:
            assert bytes(lease.payload) == bytes(payload(lease.meta.hash))

    @invariant()
    def a_reader_of_the_events_knows_what_is_held(self) -> None:
        for event in self.tier.drain_events():
            match event:
                case BlockStored(hashes=hashes):
                    self.known |= set(hashes)
                case _:
                    self.known -= set(getattr(event, "hashes", self.known))
        assert self.known == {short(name) for name in self.used}


HostMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestHostAgainstANaiveModel = HostMachine.TestCase


class _PausedCopy:
    """Stands in for the copy of bytes: waits in the middle until told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def copyto(self, into: np.ndarray, source: np.ndarray) -> None:
        self.begun.set()
        assert self.go_on.wait(30)
        np.copyto(into, source)

    def __getattr__(self, name: str) -> object:
        return getattr(np, name)


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> _PausedCopy:
    copy = _PausedCopy()
    monkeypatch.setattr(host_module, "np", copy)
    return copy


def in_thread(target: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_a_half_written_block_is_invisible(paused: _PausedCopy) -> None:
    tier, metas = make(ManualClock()), chain(2)
    thread = in_thread(tier.write, metas, payloads(metas))
    assert paused.begun.wait(30)
    assert tier.match(names(metas)) == 0
    assert tier.lease(names(metas)) == []
    assert tier.drain_events() == []
    tier.check()
    paused.go_on.set()
    thread.join()
    assert tier.match(names(metas)) == 2


@pytest.mark.parametrize("by", ["clear", "remove"])
def test_a_block_that_is_cleared_while_it_is_written_does_not_appear(paused: _PausedCopy, by: str) -> None:
    tier, metas = make(ManualClock()), chain(2)
    thread = in_thread(tier.write, metas, payloads(metas))
    assert paused.begun.wait(30)
    if by == "clear":
        tier.clear(root=ROOT)
    else:
        tier.remove(names(metas), RemovalCause.CLEARED)
    paused.go_on.set()
    thread.join()
    assert tier.match(names(metas)) == 0
    tier.check()
    assert tier.stats().used_bytes == 0


def test_slots_that_are_being_read_are_not_evicted(paused: _PausedCopy) -> None:
    tier, metas, others = make(ManualClock()), chain(SLOTS), chain(SLOTS, first_token=1)
    paused.go_on.set()
    tier.write(metas, payloads(metas))
    paused.go_on.clear()
    paused.begun.clear()
    into = buffers(2)
    reader = in_thread(tier.read, names(metas[:2]), into)
    assert paused.begun.wait(30)
    writer = in_thread(tier.write, others, payloads(others))
    while tier.stats().store_failures != {"full": 1}:
        pass
    paused.go_on.set()
    reader.join()
    writer.join()
    assert [bytes(buffer) for buffer in into] == [bytes(payload(name)) for name in names(metas[:2])]
    assert (tier.match(names(metas)), tier.match(names(others))) == (2, SLOTS - 2)
    tier.check()


def test_a_payload_of_the_wrong_size_leaves_no_trace() -> None:
    tier, metas = make(ManualClock()), chain(2)
    with pytest.raises(ValueError):
        tier.write(metas, [payload(metas[0].hash), memoryview(b"short")])
    tier.check()
    assert tier.match(names(metas)) == 1


def test_a_tier_smaller_than_a_block_says_what_to_do() -> None:
    with pytest.raises(TierError, match="zero for no host tier"):
        HostTier(LAYOUT, 3, clock=ManualClock())
