"""Retention leases against two tiers of memory: who promises, when that moves, and how much work it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.disk import index as index_module
from kvstore.disk import space as space_module
from kvstore.events import RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.leases import SETTLE_NAMES, SETTLE_S, Leases
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, chain, names, payloads
from tests.kvstore.disk.disk_for_tests import Place

HOST, DISK = TierName.HOST, TierName.DISK


class Counted(HostTier):
    """Counts questions and promises."""

    calls = 0

    def find(self, name: BlockHash) -> BlockMeta | None:
        self.calls += 1
        return super().find(name)

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> int:
        self.calls += 1
        return super().lease(hashes, for_s)


class Disk(Counted):
    name = TierName.DISK


class Rig:
    """Host above disk. What is sent to disk lies in `sent` until `arrive`."""

    def __init__(self, slots: int = 16) -> None:
        self.clock = ManualClock()
        self.host = Counted(LAYOUT, slots * LAYOUT.block_nbytes, clock=self.clock)
        self.disk = Disk(LAYOUT, slots * LAYOUT.block_nbytes, clock=self.clock)
        self.metas: dict[BlockHash, BlockMeta] = {}
        self.sent: dict[BlockHash, None] = {}
        self.near: set[BlockHash] = set()  # what another place holds, from which it can be sent
        self.leases = Leases([self.host, self.disk], self.clock, send=self.send)

    def know(self, metas: list[BlockMeta]) -> list[BlockHash]:
        self.metas.update((meta.hash, meta) for meta in metas)
        return names(metas)

    def put(self, tier: HostTier, hashes: Sequence[BlockHash]) -> None:
        metas = [self.metas[name] for name in hashes]
        assert tier.write(metas, payloads(metas)) == len(metas)

    def send(self, name: BlockHash) -> bool:
        if name in self.sent or self.disk.holds(name):
            return True
        if not (self.host.holds(name) or name in self.near):
            return False
        self.sent[name] = None
        self.leases.queued(name)
        return True

    def arrive(self) -> None:
        self.put(self.disk, list(self.sent))
        self.sent.clear()

    def settle(self) -> None:
        """A whole round."""
        self.clock.now += SETTLE_S
        for _ in range(1 + len(self.metas) // SETTLE_NAMES):
            self.leases.settle()

    def leased(self) -> tuple[int, int]:
        return self.host.stats().leased, self.disk.stats().leased


def test_the_lowest_tier_that_holds_a_block_promises() -> None:
    rig = Rig()
    both, above = rig.know(chain(2)), rig.know(chain(1, first_token=1))
    rig.put(rig.disk, both)
    rig.put(rig.host, [*both, *above])
    assert rig.leases.lease([*both, *above], 10.0) == {DISK: 2, HOST: 1}
    assert rig.leased() == (1, 2)
    assert rig.leases.names() == {*both, *above}


def test_what_lies_nowhere_is_neither_promised_nor_remembered() -> None:
    rig = Rig()
    assert rig.leases.lease(rig.know(chain(3)), None) == {}
    assert (rig.leases.names(), len(rig.leases._until)) == (frozenset(), 0)


def test_without_a_tier_nothing_is_promised() -> None:
    leases = Leases([], ManualClock())
    assert leases.lease(names(chain(1)), None) == {}
    leases.settle()
    assert leases.end(names(chain(1))) == {}


def test_a_block_on_its_way_to_disk_is_promised_when_it_arrives() -> None:
    rig = Rig()
    hashes = rig.know(chain(2))
    rig.near.update(hashes)
    assert rig.leases.lease(hashes, 10.0) == {}
    assert rig.leases.names() == frozenset()
    rig.settle()
    rig.arrive()
    rig.settle()
    assert (rig.leased(), rig.leases.names()) == ((0, 2), set(hashes))


def test_a_block_that_arrives_after_its_lease_is_not_promised() -> None:
    rig = Rig()
    hashes = rig.know(chain(2))
    rig.near.update(hashes)
    rig.leases.lease(hashes, 10.0)
    rig.clock.now += 11.0
    rig.arrive()
    rig.settle()
    assert (rig.leased(), len(rig.leases._until)) == ((0, 0), 0)


def test_a_promise_whose_keeper_lost_the_block_is_placed_again_and_goes_down_again() -> None:
    rig = Rig()
    hashes = rig.know(chain(2))
    rig.put(rig.disk, hashes)
    rig.put(rig.host, hashes)
    rig.leases.lease(hashes, None)
    rig.disk.remove(hashes[:1], RemovalCause.INVALID)
    rig.settle()
    assert rig.leased() == (1, 1)
    assert list(rig.sent) == hashes[:1]
    rig.arrive()
    rig.settle()
    assert rig.leased() == (0, 2)
    assert rig.leases.end(hashes) == {DISK: 2}


def test_a_block_that_was_lost_and_written_again_between_two_rounds_is_promised_again() -> None:
    rig = Rig()
    hashes = rig.know(chain(2))
    rig.put(rig.disk, hashes)
    rig.near.update(hashes)
    rig.leases.lease(hashes, None)
    rig.disk.remove(hashes, RemovalCause.INVALID)
    assert all(rig.send(name) for name in hashes)
    rig.arrive()
    assert rig.leased() == (0, 0)
    rig.settle()
    assert rig.leased() == (0, 2)


def test_a_block_whose_write_failed_is_sent_again() -> None:
    rig = Rig()
    hashes = rig.know(chain(1))
    rig.put(rig.host, hashes)
    assert rig.leases.lease(hashes, 100.0) == {HOST: 1}
    rig.sent.clear()
    rig.settle()
    assert list(rig.sent) == hashes


def test_a_longer_lease_goes_on_where_a_shorter_one_was_given_later() -> None:
    rig = Rig()
    hashes = rig.know(chain(1))
    rig.put(rig.host, hashes)
    rig.leases.lease(hashes, 100.0)
    rig.leases.lease(hashes, 10.0)
    rig.arrive()
    rig.settle()
    rig.clock.now += 50.0
    assert rig.leased() == (0, 1)
    rig.clock.now += 50.0
    rig.settle()
    assert rig.leases.names() == frozenset()


def test_an_ended_lease_is_not_placed_again() -> None:
    rig = Rig()
    hashes = rig.know(chain(2))
    rig.put(rig.host, hashes)
    rig.leases.lease(hashes, None)
    assert rig.leases.end(hashes) == {HOST: 2}
    rig.arrive()
    rig.settle()
    assert rig.leased() == (0, 0)


def test_each_tier_is_asked_to_promise_once_for_all_blocks() -> None:
    rig = Rig(slots=64)
    hashes = rig.know(chain(50))
    rig.put(rig.disk, hashes)
    rig.leases.lease(hashes, 10.0)
    assert rig.disk.calls == 50 + 1


@pytest.mark.parametrize("on_disk", [True, False])
def test_one_call_looks_at_a_bounded_number_of_leases_and_a_round_at_each(on_disk: bool) -> None:
    count = 3 * SETTLE_NAMES
    rig = Rig(slots=count)
    hashes = rig.know(chain(count))
    rig.put(rig.disk if on_disk else rig.host, hashes)
    rig.leases.lease(hashes, None)
    if on_disk:
        rig.disk.remove(hashes, RemovalCause.INVALID)
        rig.near.update(hashes)
    rig.sent.clear()
    rig.clock.now += SETTLE_S
    for number in range(1, 4):
        rig.host.calls = rig.disk.calls = 0
        rig.leases.settle()
        assert rig.host.calls + rig.disk.calls <= 3 * SETTLE_NAMES + 2
        assert len(rig.sent) == number * SETTLE_NAMES
    rig.host.calls = rig.disk.calls = 0
    rig.leases.settle()
    assert rig.host.calls + rig.disk.calls == 0


BLOCKS = [chain(1, first_token=number)[0] for number in range(6)]
STEPS = st.tuples(
    st.sampled_from(["lease", "end", "host", "lose host", "lose disk", "send", "arrive", "settle", "wait"]),
    st.sets(st.integers(0, 5)),
    st.sampled_from([None, 3.0, 30.0]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_after_a_round_the_lowest_holder_and_no_other_promises(steps: list[tuple[str, set[int], float | None]]) -> None:
    rig = Rig()
    rig.know(BLOCKS)
    ends: dict[BlockHash, float] = {}  # of what was promised, or on its way, when it was asked for
    for step, numbers, for_s in steps:
        hashes = [BLOCKS[number].hash for number in sorted(numbers)]
        if step == "lease":
            reach = [name for name in hashes if rig.host.holds(name) or rig.disk.holds(name) or name in rig.sent]
            until = float("inf") if for_s is None else rig.clock.now + for_s
            ends.update((name, max(until, ends.get(name, 0.0))) for name in hashes if name in reach)
            ends.update((name, max(until, ends[name])) for name in hashes if ends.get(name, 0.0) > rig.clock.now)
            rig.leases.lease(hashes, for_s)
        elif step == "end":
            rig.leases.end(hashes)
            for name in hashes:
                ends.pop(name, None)
        elif step == "host":
            rig.put(rig.host, hashes)
        elif step.startswith("lose"):
            (rig.host if step == "lose host" else rig.disk).remove(hashes, RemovalCause.INVALID)
        elif step == "send":
            for name in hashes:
                rig.send(name)
        elif step == "arrive":
            rig.arrive()
        elif step == "settle":
            rig.settle()
        else:
            rig.clock.now += 4.0
    rig.settle()
    live = {name for name, until in ends.items() if until > rig.clock.now}
    on_disk = {name for name in live if rig.disk.holds(name)}
    in_host = {name for name in live - on_disk if rig.host.holds(name)}
    assert rig.leased() == (len(in_host), len(on_disk))
    assert rig.leases.names() == on_disk | in_host


def test_a_tier_that_raises_promises_nothing_and_the_next_one_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig()
    hashes = rig.know(chain(2))
    rig.put(rig.host, hashes)
    rig.put(rig.disk, hashes)

    def fail(hashes: Sequence[BlockHash], for_s: float | None) -> int:
        raise RuntimeError("threads can only be started once")

    monkeypatch.setattr(rig.disk, "lease", fail)
    assert rig.leases.lease(hashes, None) == {HOST: 2}
    assert "report this" in caplog.text
    monkeypatch.undo()
    rig.settle()
    assert rig.leased() == (0, 2)


@pytest.mark.parametrize("loaded", [True, False])
def test_leases_on_disk_are_known_after_a_restart_and_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    place, metas = Place(tmp_path), chain(4)
    place.tier.write(metas, payloads(metas))
    pinned, timed, over, free = names(metas)
    before = Leases([place.tier], place.clock)
    assert before.lease([pinned], None) == {DISK: 1}
    assert before.lease([timed], 60.0) == {DISK: 1}
    assert before.lease([over], 5.0) == {DISK: 1}
    if not loaded:
        monkeypatch.setattr(space_module, "LOADED_BY_STARTER", 0)
        monkeypatch.setattr(index_module.DiskIndex, "load_gently", lambda index: None)
    tier = place.restart(down_s=10.0)
    leases = Leases([tier], place.clock)
    assert leases.names() == {pinned, timed}
    assert tier.leases() == {pinned: None, timed: pytest.approx(50.0)}
    leases.settle()
    assert leases.names() == {pinned, timed}
    place.wait(51.0)
    leases.settle()
    assert leases.names() == {pinned}
    assert leases.end([pinned, free]) == {DISK: 1}
    assert (leases.names(), tier.leases()) == (frozenset(), {})
    monkeypatch.undo()
    tier.close()
