"""What a commit sends down, and what it costs: admission, full queues, silent losses, uses told to host."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence

import pytest
import torch

from kvstore.acquisition import ReadTiers
from kvstore.admission import Moment, make_admission
from kvstore.blocks import BlockHash
from kvstore.device import DeviceTier
from kvstore.events import RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.lane import NearTiers
from kvstore.store import TieredStore
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, chain, names, payloads
from tests.kvstore.fake_tier import FakeSharedTier

torch.set_num_threads(1)
DISK, REDIS = TierName.DISK, TierName.REDIS
NBYTES = LAYOUT.block_nbytes
TTL = 3600.0


class Disk(HostTier):
    name = TierName.DISK


class Only:
    """Admits what a test says, and counts who asks."""

    moment = Moment.USE

    def __init__(self, admitted: Callable[[Hashable], bool]) -> None:
        self._admitted = admitted
        self.asked: list[Hashable] = []

    def admits(self, name: Hashable) -> bool:
        self.asked.append(name)
        return self._admitted(name)


class Rig:
    def __init__(self, *, device_blocks: int = 64, host_slots: int = 0, disk_slots: int = 0, **options: object) -> None:
        self.clock = ManualClock()
        self.device = DeviceTier(LAYOUT, device_blocks * NBYTES, clock=self.clock, poison=True)
        self.host = HostTier(LAYOUT, host_slots * NBYTES, clock=self.clock) if host_slots else None
        self.disk = Disk(LAYOUT, disk_slots * NBYTES, clock=self.clock) if disk_slots else None
        self.shared = FakeSharedTier(self.clock)
        self.store = TieredStore(
            LAYOUT,
            self.device,
            self.host,
            self.shared,
            disk=self.disk,
            clock=self.clock,
            default_ttl_s=TTL,
            **options,  # type: ignore[arg-type]
        )

    def compute(self, metas: Sequence[BlockMeta]) -> list[int]:
        block_ids = self.store.allocate(len(metas))
        assert block_ids is not None
        self.device.inject(block_ids, payloads(metas))
        self.store.commit(block_ids, metas)
        return block_ids

    def settle(self) -> None:
        for _ in range(3):
            self.store.pump()
            assert self.store.flush(60)

    def request(self, metas: Sequence[BlockMeta]) -> int:
        """Load what can be loaded, compute the rest, leave the device empty; how many were loaded."""
        acquisition = self.store.acquire(
            names(metas), reads=ReadTiers(), compute_ms=lambda first, count: 1e9, root=metas[0].root
        )
        while not acquisition.done:
            self.store.wait(60)
            self.store.pump()
        loaded = len(acquisition.block_ids)
        computed = self.compute(metas[loaded:]) if loaded < len(metas) else []
        self.store.release([*acquisition.block_ids, *computed])
        self.settle()
        self.device.clear()
        self.clock.now += 2.0
        return loaded


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def new(**options: object) -> Rig:
        made.append(Rig(**options))  # type: ignore[arg-type]
        return made[-1]

    yield new
    for rig in made:
        rig.shared.writes_open.set()
        rig.store.check()
        rig.store.close()


def test_with_two_slow_tiers_a_block_is_still_written_at_its_second_computation_only(make: Callable[..., Rig]) -> None:
    rig = make(host_slots=40, disk_slots=40, admission=make_admission("second_hit"))
    assert rig.disk is not None
    metas = chain(3)
    rig.store.release(rig.compute(metas))
    rig.settle()
    assert (rig.disk.match(names(metas)), len(rig.shared.held())) == (0, 0)
    rig.device.clear()
    rig.compute(metas)
    rig.settle()
    assert (rig.disk.match(names(metas)), len(rig.shared.held())) == (3, 3)


def test_admission_is_asked_once_a_block(make: Callable[..., Rig]) -> None:
    admission = Only(lambda name: True)
    rig = make(disk_slots=40, admission=admission)
    metas = chain(3)
    rig.compute(metas)
    assert admission.asked == names(metas)


def test_a_rule_that_asks_at_eviction_is_refused_where_no_host_tier_evicts() -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match="choose always or second_hit"):
        Rig(admission=make_admission("on_eviction"))
    assert threading.active_count() == threads


@pytest.mark.parametrize("order", ["one after the other", "in turns"])
def test_a_block_that_is_not_admitted_keeps_back_its_own_chain_only(make: Callable[..., Rig], order: str) -> None:
    left, right = chain(3), chain(3, first_token=50)
    rig = make(disk_slots=40, admission=Only(lambda name: name != left[1].hash))
    assert rig.disk is not None
    in_turns = list(itertools.chain(*zip(left, right, strict=True)))
    rig.compute([*left, *right] if order != "in turns" else in_turns)
    rig.settle()
    expected = {left[0].hash, *names(right)}
    assert set(rig.shared.held()) == expected
    assert {meta.hash for meta in rig.disk.metas()} == expected


def test_what_is_skipped_behind_a_full_queue_is_counted_and_not_copied(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(queue_bytes=4 * NBYTES)
    copied: list[BlockHash] = []
    write_of = NearTiers.write_of

    def counted(near: NearTiers, meta: BlockMeta, payload: memoryview | None = None) -> object:
        copied.append(meta.hash)
        return write_of(near, meta, payload)

    monkeypatch.setattr(NearTiers, "write_of", counted)
    rig.shared.writes_open.clear()
    metas = chain(12)
    rig.compute(metas[:8])
    rig.compute(metas[8:])
    assert rig.store.stats()[REDIS].store_failures == {"queue_full": 8}
    assert copied == names(metas[:4])


def test_all_that_a_server_lost_silently_is_written_again_after_one_request(make: Callable[..., Rig]) -> None:
    rig = make()
    metas = chain(30)
    rig.request(metas)
    assert rig.request(metas) == 30
    rig.shared.lose(names(metas))
    assert rig.request(metas) == 0
    assert set(rig.shared.held()) == set(names(metas))
    assert rig.request(metas) == 30


def test_a_use_of_a_chain_is_one_call_for_each_run_of_equal_ttl(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(host_slots=40)
    assert rig.host is not None
    metas = [*chain(9, ttl_s=10.0)[:3], *chain(9, ttl_s=99.0)[3:7], *chain(9, ttl_s=10.0)[7:]]
    rig.store.release(rig.compute(metas))
    calls: list[tuple[list[BlockHash], float | None]] = []
    monkeypatch.setattr(rig.host, "prolong", lambda hashes, lifetime: calls.append((list(hashes), lifetime.ttl_s)))
    monkeypatch.setattr(rig.host, "touch", lambda hashes: calls.append((list(hashes), -1.0)))
    rig.store._used(names(metas))
    assert calls == [(names(metas[7:]), 10.0), (names(metas[3:7]), 99.0), (names(metas[:3]), 10.0)]


def test_of_a_used_chain_host_evicts_the_tail_first(make: Callable[..., Rig]) -> None:
    rig = make(host_slots=8)
    assert rig.host is not None
    metas = [*chain(6, ttl_s=10.0)[:3], *chain(6, ttl_s=99.0)[3:]]
    rig.store.release(rig.compute(metas))
    rig.settle()
    for number in range(2):
        rig.host.write(chain(1, first_token=90 + number), payloads(chain(1, first_token=90 + number)))
    rig.store._used(names(metas))
    for number in range(2):  # the two others were used longest ago
        rig.host.write(chain(1, first_token=70 + number), payloads(chain(1, first_token=70 + number)))
    for left in (5, 4, 3, 2):
        rig.host.write(chain(1, first_token=left), payloads(chain(1, first_token=left)))
        assert rig.host.match(names(metas)) == left
        assert len([name for name in names(metas) if rig.host.holds(name)]) == left


def test_a_lease_without_host_is_kept_when_the_block_has_reached_the_disk(make: Callable[..., Rig]) -> None:
    rig = make(disk_slots=40)
    assert rig.disk is not None
    metas = chain(2)
    rig.compute(metas)
    rig.settle()
    rig.disk.remove(names(metas), RemovalCause.INVALID)
    assert rig.store.lease(names(metas), None) == {}
    rig.settle()
    rig.clock.now += 2.0
    rig.settle()
    assert rig.disk.stats().leased == 2
    assert rig.store.end_leases(names(metas)) == {DISK: 2}


def test_a_leased_block_that_the_disk_lost_is_brought_back_there(make: Callable[..., Rig]) -> None:
    rig = make(host_slots=40, disk_slots=40)
    assert rig.host is not None
    assert rig.disk is not None
    metas = chain(2)
    rig.store.release(rig.compute(metas))
    rig.settle()
    assert rig.store.lease(names(metas), None) == {DISK: 2}
    rig.disk.remove(names(metas), RemovalCause.INVALID)
    for _ in range(2):
        rig.clock.now += 2.0
        rig.settle()
    assert (rig.host.stats().leased, rig.disk.stats().leased) == (0, 2)


def test_a_leased_block_that_is_lost_and_computed_again_within_a_second_is_promised_again(
    make: Callable[..., Rig],
) -> None:
    rig = make(disk_slots=40)
    assert rig.disk is not None
    metas = chain(2)
    rig.compute(metas)
    rig.settle()
    assert rig.store.lease(names(metas), None) == {DISK: 2}
    rig.disk.remove(names(metas), RemovalCause.INVALID)
    rig.device.clear()
    rig.compute(metas)
    assert rig.store.flush(60)
    assert (rig.disk.match(names(metas)), rig.disk.stats().leased) == (2, 0)
    rig.clock.now += 2.0
    rig.settle()
    assert rig.disk.stats().leased == 2
