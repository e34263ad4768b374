"""Host RAM: a state machine against a naive model, two-phase writes, room. Views and leases: `test_host_views`."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.blocks import BlockHash, short
from kvstore.errors import TierError
from kvstore.events import BlockStored, RemovalCause
from kvstore.eviction.policies import POLICIES, Hint, hint_of
from kvstore.host import tier as host_module
from kvstore.host.tier import BlockView, HostTier
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
        self.leases: dict[BlockHash, float] = {}  # until when
        self.views: list[BlockView] = []
        self.removed_views: list[BlockView] = []  # their block is gone, their slot is not
        self.aside: set[BlockHash] = set()  # spared by an eviction for a view's sake
        self.known: set[bytes] = set()

    def leased(self, name: BlockHash) -> bool:
        return self.leases.get(name, 0.0) > self.clock.now

    def viewed(self, name: BlockHash) -> bool:
        return any(view.meta.hash == name for view in self.views)

    def live(self, name: BlockHash) -> bool:
        ttl_s = self.metas[name].ttl_s
        if name not in self.used:
            return False
        return ttl_s is None or self.used[name] + ttl_s > self.clock.now or self.leased(name) or name in self.aside

    def leading(self, hashes: list[BlockHash]) -> int:
        return next((i for i, name in enumerate(hashes) if not self.live(name)), len(hashes))

    def renew(self, hashes: list[BlockHash]) -> None:
        for name in reversed(hashes):
            self.used.pop(name, None)
            self.used[name] = self.clock.now

    def forget(self, name: BlockHash) -> None:
        del self.used[name]
        self.leases.pop(name, None)
        self.aside.discard(name)
        self.removed_views += [view for view in self.views if view.meta.hash == name]
        self.views = [view for view in self.views if view.meta.hash != name]

    def taken_slots(self) -> int:
        return len({id(view.slot) for view in self.removed_views}) + len(self.used)

    def expire(self, kept: set[BlockHash]) -> None:
        for name in [name for name in self.used if not self.live(name) and name not in kept]:
            self.forget(name)

    def make_room(self, kept: set[BlockHash]) -> bool:
        continued = {self.metas[name].parent for name in self.used}
        for name in list(self.used):
            if name in kept | continued | self.aside or self.leased(name):
                continue
            if not self.viewed(name):
                self.forget(name)
                return True
            self.aside.add(name)
        return False

    @rule(which=st.sampled_from(CHAINS))
    def write_all(self, which: list[BlockMeta]) -> None:
        self.write_some(which)

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3), count=st.integers(1, 4))
    def write(self, which: list[BlockMeta], start: int, count: int) -> None:
        self.write_some(which[start : start + count])

    def write_some(self, metas: list[BlockMeta]) -> None:
        wanted, expected = names(metas), 0
        protected, fresh, held = set[BlockHash](), [], []
        for name in wanted:
            if self.taken_slots() + len(fresh) >= SLOTS and name not in self.used:
                self.expire(protected)
            if name in self.used:
                protected.add(name)
                held.append(name)
            elif self.taken_slots() + len(fresh) < SLOTS or self.make_room(protected):
                fresh.append(name)
            else:
                break
            expected += 1
        assert self.tier.write(metas, payloads(metas)) == expected
        self.renew(fresh)
        self.renew(held)

    @rule(which=st.sampled_from(CHAINS), length=st.integers(1, 4))
    def read(self, which: list[BlockMeta], length: int) -> None:
        wanted, into = names(which[:length]), buffers(length)
        expected = self.leading(wanted)
        assert self.tier.match(wanted) == expected
        assert self.tier.read(wanted, into).count == expected
        assert [bytes(b) for b in into[:expected]] == [bytes(payload(name)) for name in wanted[:expected]]
        self.renew(wanted[:expected])

    @rule(which=st.sampled_from(CHAINS))
    def touch(self, which: list[BlockMeta]) -> None:
        self.tier.touch(names(which))
        self.renew([name for name in names(which) if self.live(name)])

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3), for_s=st.sampled_from([1.0, 3.0, 8.0, None]))
    def lease(self, which: list[BlockMeta], start: int, for_s: float | None) -> None:
        live = [name for name in names(which[start:]) if self.live(name)]
        assert self.tier.lease(names(which[start:]), for_s) == len(live)
        until = float("inf") if for_s is None else self.clock.now + for_s
        for name in live:
            self.leases[name] = max(self.leases.get(name, 0.0), until)

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3))
    def end_leases(self, which: list[BlockMeta], start: int) -> None:
        leased = [name for name in names(which[start:]) if self.leased(name)]
        assert self.tier.end_leases(names(which[start:])) == len(leased)
        for name in names(which[start:]):
            self.leases.pop(name, None)

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3))
    def view(self, which: list[BlockMeta], start: int) -> None:
        live = [name for name in names(which[start:]) if self.live(name)]
        views = self.tier.view(names(which[start:]), owner="model", for_s=1e9)
        assert [view.meta.hash for view in views] == live
        self.views += views

    @rule(count=st.integers(1, SLOTS), which=st.sampled_from(CHAINS))
    def view_the_oldest_and_write(self, count: int, which: list[BlockMeta]) -> None:
        views = self.tier.view(list(self.used)[:count], owner="model", for_s=1e9)
        assert [view.meta.hash for view in views] == [name for name in list(self.used)[:count] if self.live(name)]
        self.views += views
        self.write_some(which)

    @rule(data=st.data())
    def end_view(self, data: st.DataObject) -> None:
        every = self.views + self.removed_views
        if not every:
            return
        view = data.draw(st.sampled_from(every))
        assert bytes(view.payload) == bytes(payload(view.meta.hash))
        with view:
            assert view.is_valid
        if view in self.removed_views:
            self.removed_views.remove(view)
            assert view.is_valid == any(other.slot is view.slot for other in self.removed_views)
        else:
            self.views.remove(view)
            assert view.is_valid
            if not self.viewed(view.meta.hash):
                self.aside.discard(view.meta.hash)

    @rule()
    def end_all_views(self) -> None:
        for view in self.views + self.removed_views:
            self.tier.end_view(view)
        self.views, self.removed_views, self.aside = [], [], set()

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3))
    def remove(self, which: list[BlockMeta], start: int) -> None:
        gone = [name for name in names(which[start:]) if name in self.used]
        assert self.tier.remove(names(which[start:]), RemovalCause.INVALID) == len(gone)
        for name in gone:
            self.forget(name)

    @rule(root=st.sampled_from([None, ROOT, OTHER_ROOT, OTHER_ROOT, OTHER_ROOT]))
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
            self.expire(set())

    @invariant()
    def agrees(self) -> None:
        self.tier.check()
        assert {meta.hash for meta in self.tier.metas()} == set(self.used)
        assert self.tier.stats().leased == sum(self.leased(name) for name in self.used)
        assert self.tier.pins == len(self.views + self.removed_views)
        for name in self.metas:
            assert self.tier.holds(name) == self.live(name)
        for view in self.views + self.removed_views:
            assert view.is_valid
            assert bytes(view.payload) == bytes(payload(view.meta.hash))

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
    assert tier.view(names(metas)) == []
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


@pytest.mark.parametrize("eviction", POLICIES)
def test_whatever_the_policy_room_is_made_and_a_chain_loses_its_tail_first(eviction: str) -> None:
    tier = HostTier(LAYOUT, SLOTS * LAYOUT.block_nbytes, clock=ManualClock(), eviction=eviction)
    for first_token in range(6):
        metas = chain(3, first_token=first_token)
        assert tier.write(metas, payloads(metas)) == 3
        for other in range(first_token + 1):
            held = names(chain(3, first_token=other))
            assert tier.match(held) == sum(tier.holds(name) for name in held)
        tier.check()
    assert tier.stats().blocks == SLOTS


def test_priority_and_turn_of_blocks_reach_the_policy() -> None:
    tier = HostTier(LAYOUT, 3 * LAYOUT.block_nbytes, clock=ManualClock(), eviction="priority")
    metas = [replace(chain(1, first_token=n)[0], priority=p) for n, p in enumerate([70, 10, 40])]
    tier.write(metas, payloads(metas))
    newcomers = [replace(chain(1, first_token=9 + n)[0], priority=99) for n in range(2)]
    tier.write(newcomers, payloads(newcomers))
    assert [tier.holds(meta.hash) for meta in metas] == [True, False, False]
    assert hint_of(replace(metas[0], turn=3)) == Hint(metas[0].hash, None, metas[0].root, 70, turn=3)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        HostTier(LAYOUT, SLOTS * LAYOUT.block_nbytes, clock=ManualClock(), eviction="random")


def test_a_root_may_borrow_and_gives_back_under_pressure() -> None:
    nbytes = LAYOUT.block_nbytes
    tier = HostTier(LAYOUT, 4 * nbytes, clock=ManualClock(), shares={ROOT: 2 * nbytes, OTHER_ROOT: 2 * nbytes + 1})
    mine, others, more = chain(3), chain(2, root=OTHER_ROOT), chain(2, root=OTHER_ROOT, first_token=1)
    assert tier.write(mine, payloads(mine)) == 3
    assert tier.write(others, payloads(others)) == 2  # the third block of `mine` was borrowed room
    assert (tier.match(names(mine)), tier.match(names(others))) == (2, 2)
    assert tier.write(more, payloads(more)) == 2  # now only its own blocks may go
    assert (tier.match(names(mine)), tier.match(names(others)), tier.match(names(more))) == (2, 0, 2)
    tier.check()


def test_shares_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        HostTier(LAYOUT, 4 * LAYOUT.block_nbytes, clock=ManualClock(), shares={ROOT: 5 * LAYOUT.block_nbytes})
