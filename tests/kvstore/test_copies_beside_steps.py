"""Copies between device and host that end late: nobody sees a block before its bytes; none goes while it is read."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.acquisition import Acquisition
from kvstore.device import DeviceTier
from kvstore.events import RemovalCause, TierName
from kvstore.store import ReadTiers, TieredStore
from tests.kvstore.blocks_for_tests import LAYOUT, chain, names, payloads
from tests.kvstore.fake_tier import FakeSharedTier
from tests.kvstore.late_copier import LateCopier
from tests.kvstore.test_store import TTL, Rig

HOST_ONLY = ReadTiers(shared=False)


class LateRig(Rig):
    """Device and host tier whose copies a test makes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store.close()
        self.copier = LateCopier()
        nbytes = LAYOUT.block_nbytes
        clocks = {"clock": self.clock, "wall_clock": self.clock}
        self.shared = FakeSharedTier(self.clock)
        self.device = DeviceTier(LAYOUT, self.device_blocks * nbytes, **clocks, poison=True, copier=self.copier)
        self.copier.device = self.device
        if self.host is not None:
            self.host = type(self.host)(LAYOUT, self.host_slots * nbytes, **clocks)
        self.store = TieredStore(
            LAYOUT, self.device, self.host, self.shared, **clocks, default_ttl_s=TTL, queue_bytes=self.queue_bytes
        )

    def finish(self, acquisition: Acquisition) -> Acquisition:
        while not acquisition.done:
            self.copier.make_all()
            self.store.wait(0.01)
            self.store.pump()
        return acquisition

    def settle(self) -> None:
        self.copier.make_all()
        self.store.pump()

    def in_host(self, count: int) -> list:
        """A chain that host holds, and the shared tier, but not the device."""
        metas = chain(count)
        self.store.release(self.compute(metas))
        self.settle()
        assert self.store.flush(30)
        self.device.clear()
        return metas

    def in_shared(self, count: int, first_token: int = 0) -> list:
        """A chain that the shared tier holds, and nobody else."""
        metas = chain(count, first_token=first_token)
        self.shared.write(metas, payloads(metas))
        self.store.pump()
        return metas

    def loaded(self, metas: list, **options: object) -> Acquisition:
        """Acquire them, up to where the shared tier has delivered and the copies to the device have begun."""
        acquisition, before = self.acquire(metas, **options), len(self.copier.running)
        while len(self.copier.running) == before:
            self.store.wait(0.01)
            self.store.pump()
        return acquisition

    def held(self) -> list[int]:
        return [block for block in range(self.device.num_blocks) if self.device.refs(block)]


@pytest.fixture
def rig() -> Iterator[LateRig]:
    made = LateRig()
    yield made
    made.settle()
    made.store.check()
    assert made.held() == []
    made.store.close()


def test_a_promoted_block_is_handed_over_when_its_bytes_are_there_and_not_before(rig: LateRig):
    metas = rig.in_host(4)
    acquisition = rig.acquire(metas)
    rig.store.pump()
    assert not acquisition.done
    assert acquisition.block_ids == []
    assert rig.store.match(names(metas), ReadTiers(host=False)) == []
    rig.settle()
    assert acquisition.done
    assert acquisition.fates == [TierName.HOST] * 4
    rig.same_bytes(acquisition, metas)
    rig.store.release(acquisition.block_ids)


def test_a_block_that_is_coming_is_not_copied_twice(rig: LateRig):
    metas = rig.in_host(4)
    first, second = rig.acquire(metas), rig.acquire(metas)
    assert len(rig.copier.running) == 1
    rig.settle()
    assert first.done
    assert second.done
    assert first.block_ids == second.block_ids
    assert second.fates == [TierName.HOST] * 4
    rig.store.release(first.block_ids)
    rig.store.release(second.block_ids)


def test_a_computed_block_is_in_host_when_its_bytes_are_and_is_not_freed_before(rig: LateRig):
    metas = chain(3)
    rig.store.release(rig.compute(metas))
    assert rig.host.match(names(metas)) == 0
    assert rig.store.allocate(rig.device_blocks) is None
    others = rig.store.allocate(rig.device_blocks - 3)
    assert others is not None
    rig.device.clear()  # even where nobody finds it any more
    assert rig.store.allocate(1) is None
    rig.store.release(others)
    rig.settle()
    rig.device.clear()
    acquisition = rig.acquire(metas)
    rig.settle()
    rig.same_bytes(acquisition, metas)
    assert acquisition.fates == [TierName.HOST] * 3
    rig.store.release(acquisition.block_ids)


def test_a_block_that_is_read_for_a_promotion_is_not_evicted_from_host(rig: LateRig):
    metas = rig.in_host(4)
    acquisition = rig.acquire(metas)
    assert rig.host.pins == 4
    for start in range(20, 60, 4):  # many times what host holds
        rig.host.write(chain(4, first_token=start), [memoryview(bytes(LAYOUT.block_nbytes))] * 4)
    rig.settle()
    rig.same_bytes(acquisition, metas)
    assert len(acquisition.block_ids) == 4
    assert rig.host.pins == 0
    rig.store.release(acquisition.block_ids)


def test_blocks_cleared_on_their_way_down_arrive_nowhere(rig: LateRig):
    metas = chain(3)
    rig.store.release(rig.compute(metas))
    rig.store.clear()
    rig.settle()
    assert rig.store.flush(30)
    assert rig.host.match(names(metas)) == 0
    assert rig.written() == []


def test_blocks_cleared_on_their_way_up_are_not_handed_over(rig: LateRig):
    metas = rig.in_host(4)
    acquisition = rig.acquire(metas, reads=HOST_ONLY)
    rig.store.clear()
    rig.settle()
    assert acquisition.done
    assert acquisition.block_ids == []
    assert rig.store.match(names(metas)) == []


def test_a_promotion_that_is_given_up_leaves_its_blocks_to_others(rig: LateRig):
    metas = rig.in_host(4)
    acquisition = rig.acquire(metas)
    acquisition.cancel()
    rig.settle()
    assert rig.held() == []
    assert rig.store.match(names(metas)) == [TierName.DEVICE] * 4


def test_slow_tiers_get_blocks_whose_bytes_have_arrived(rig: LateRig):
    metas = chain(3)
    rig.store.release(rig.compute(metas))
    assert rig.store.flush(30)  # waits for the copies, too
    assert sorted(rig.written()) == sorted(names(metas))
    rig.device.clear()
    rig.host.clear()
    assert rig.get(metas) == [TierName.REDIS] * 3


def test_without_host_the_bytes_for_slow_tiers_lie_apart():
    rig = LateRig(host_slots=0)
    metas = chain(3)
    rig.store.release(rig.compute(metas))
    assert rig.written() == []
    assert rig.store.flush(30)
    assert rig.copier.rows_apart == 3
    rig.device.clear()
    assert rig.get(metas) == [TierName.REDIS] * 3
    rig.store.close()


def test_without_host_blocks_cleared_on_their_way_down_are_not_written_either():
    rig = LateRig(host_slots=0)
    rig.store.release(rig.compute(chain(3)))
    rig.store.clear()
    rig.settle()
    assert rig.store.flush(30)
    assert rig.written() == []
    rig.store.close()


def test_closing_waits_for_copies():
    rig = LateRig()
    metas = rig.in_host(4)
    acquisition = rig.acquire(metas)
    rig.store.release(rig.compute(chain(2, first_token=50)))
    rig.store.close(flush_s=30)
    assert acquisition.done
    assert not rig.copier.running
    assert len(rig.written()) == 6


def test_waiting_ends_when_a_copy_does(rig: LateRig):
    metas = rig.in_host(2)
    acquisition = rig.acquire(metas)
    rig.copier.make_all()
    rig.store.wait(30.0)
    rig.store.pump()
    assert acquisition.done
    rig.store.release(acquisition.block_ids)


def test_what_a_slow_tier_brings_is_copied_beside_the_steps_too(rig: LateRig):
    metas = rig.in_shared(4)
    acquisition = rig.loaded(metas)
    assert rig.copier.locked == 4  # read into memory that the device copies from
    assert not acquisition.done
    assert rig.store.match(names(metas), ReadTiers(host=False, shared=False)) == []
    others = rig.store.allocate(rig.device_blocks - 4)
    assert others is not None
    assert rig.store.allocate(1) is None  # its blocks are nobody else's meanwhile
    rig.store.release(others)
    rig.settle()
    assert acquisition.done
    assert acquisition.fates == [TierName.REDIS] * 4
    rig.same_bytes(acquisition, metas)
    rig.store.release(acquisition.block_ids)


@pytest.mark.parametrize("host_slots", [0, 12])
def test_memory_that_is_being_copied_is_not_read_into_again(host_slots: int):
    rig = LateRig(host_slots=host_slots)
    chains = [rig.in_shared(3, first_token=50 * number) for number in range(2)]
    waiting = [rig.loaded(metas) for metas in chains]
    rig.settle()
    for acquisition, metas in zip(waiting, chains, strict=True):
        assert acquisition.fates == [TierName.REDIS] * 3
        rig.same_bytes(acquisition, metas)
        rig.store.release(acquisition.block_ids)
    assert rig.get(rig.in_shared(3, first_token=200)) == [TierName.REDIS] * 3
    assert rig.copier.locked == 6  # and afterwards it is
    rig.store.close()


@pytest.mark.parametrize("host_slots", [0, 12])
def test_who_comes_while_a_slow_tiers_blocks_are_copied_waits_for_them(host_slots: int):
    rig = LateRig(host_slots=host_slots)
    metas = rig.in_shared(4)
    first, second = rig.loaded(metas), rig.acquire(metas)
    assert (len(rig.copier.running), len(rig.shared.reads)) == (1, 1)
    rig.settle()
    assert first.block_ids == second.block_ids
    assert first.fates == second.fates == [TierName.REDIS] * 4
    for each in (first, second):
        rig.store.release(each.block_ids)
    rig.store.close()


def test_who_must_not_read_from_there_does_not_wait_for_what_comes_from_there():
    rig = LateRig(host_slots=0)
    metas = rig.in_shared(4)
    first, second = rig.loaded(metas), rig.acquire(metas, reads=HOST_ONLY)
    assert second.done
    assert second.fates == []
    rig.store.release(rig.finish(first).block_ids)
    rig.store.close()


def test_a_load_that_came_short_hands_over_what_came_and_ends(rig: LateRig):
    metas = rig.in_shared(4)
    rig.shared.read_limit = 2
    acquisition = rig.loaded(metas)
    rig.finish(acquisition)
    assert acquisition.fates == [TierName.REDIS] * 2
    rig.same_bytes(acquisition, metas)
    rig.store.release(acquisition.block_ids)


def test_a_slow_tiers_blocks_cleared_while_they_are_copied_are_not_handed_over(rig: LateRig):
    metas = rig.in_shared(4)
    acquisition = rig.loaded(metas)
    rig.store.clear()
    rig.settle()
    assert acquisition.done
    assert acquisition.block_ids == []
    assert rig.store.match(names(metas)) == []


def test_a_load_that_is_given_up_while_it_is_copied_leaves_its_blocks_to_others(rig: LateRig):
    metas = rig.in_shared(4)
    first, second = rig.loaded(metas), rig.acquire(metas)
    first.cancel()
    rig.settle()
    assert second.fates == [TierName.REDIS] * 4
    rig.same_bytes(second, metas)
    rig.store.release(second.block_ids)


def test_closing_waits_for_copies_of_what_a_slow_tier_brought():
    rig = LateRig()
    acquisition = rig.loaded(rig.in_shared(4))
    rig.store.close(flush_s=30)
    assert acquisition.done
    assert len(acquisition.block_ids) == 4
    assert not rig.copier.running


def test_who_waits_for_a_prefetch_gets_its_blocks_when_they_are_copied(rig: LateRig):
    metas = rig.in_shared(3)
    rig.shared.reads_open.clear()
    assert rig.store.prefetch(names(metas), root=metas[0].root) == 3
    first, second = rig.acquire(metas[:2]), rig.acquire(metas)
    rig.shared.reads_open.set()
    while not rig.copier.running:
        rig.store.wait(0.01)
        rig.store.pump()
    assert not first.done
    rig.settle()
    assert (first.fates, second.fates) == ([TierName.REDIS] * 2, [TierName.REDIS] * 3)
    rig.same_bytes(second, metas)
    for each in (first, second):
        rig.store.release(each.block_ids)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30))
def test_whatever_happens_meanwhile_bytes_are_right_and_nothing_is_left(seed: int):
    draw, rig = random.Random(seed), LateRig(device_blocks=10, host_slots=14)
    chains = [chain(4, first_token=50 * number) for number in range(4)]
    waiting = []
    for _ in range(60):
        metas = draw.choice(chains)
        move = draw.randrange(8)
        if move == 0 and rig.device.available >= 4:
            rig.store.release(rig.compute(metas))
        elif move in (1, 2):
            waiting.append((rig.acquire(metas), metas))
        elif move == 3 and rig.copier.running:
            rig.copier.make_one()
        elif move == 4 and waiting:
            waiting.pop(draw.randrange(len(waiting)))[0].cancel()
        elif move == 5 and draw.random() < 0.3:
            rig.store.clear()
        elif move == 6:
            rig.device.remove(names(metas), RemovalCause.EVICTED)
            rig.host.remove(names(metas)[draw.randrange(5) :], RemovalCause.EVICTED)
        elif move == 7:
            rig.store.prefetch(names(metas), root=metas[0].root)
        rig.store.pump()
        for acquisition, wanted in [each for each in waiting if each[0].done]:
            rig.same_bytes(acquisition, wanted)
            rig.store.release(acquisition.block_ids)
            waiting.remove((acquisition, wanted))
    for acquisition, wanted in waiting:
        rig.same_bytes(rig.finish(acquisition), wanted)
        rig.store.release(acquisition.block_ids)
    rig.settle()
    rig.store.check()
    assert rig.held() == []
    assert rig.store.flush(30)  # the write-behind queue looks at slots, too
    assert rig.host.pins == 0
    rig.store.close()
