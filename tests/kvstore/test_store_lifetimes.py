"""Lifetimes across tiers: what a named one reaches, and what ends while it is on its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from kvstore.acquisition import Acquisition, ReadTiers
from kvstore.device import DeviceTier
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.lifetime import Lifetime
from kvstore.store import TieredStore
from kvstore.tier import BlockMeta, arrived_as
from tests.kvstore.blocks_for_tests import LAYOUT, ROOT, ManualClock, chain, names, payloads
from tests.kvstore.fake_tier import FakeSharedTier

torch.set_num_threads(1)
NBYTES = LAYOUT.block_nbytes
TTL, DAY = 300.0, 86400.0
DISK, REDIS = TierName.DISK, TierName.REDIS


class Disk(HostTier):
    name = DISK


class Rig:
    def __init__(self) -> None:
        self.clock, self.wall = ManualClock(), ManualClock(1e9)
        times = {"clock": self.clock, "wall_clock": self.wall}
        self.device = DeviceTier(LAYOUT, 40 * NBYTES, poison=True, **times)
        self.host = HostTier(LAYOUT, 16 * NBYTES, **times)
        self.disk = Disk(LAYOUT, 60 * NBYTES, **times)
        self.shared = FakeSharedTier(self.clock)
        self.store = TieredStore(
            LAYOUT, self.device, self.host, self.shared, disk=self.disk, default_ttl_s=TTL, load_slack_s=60.0, **times
        )

    def cache(self, metas: Sequence[BlockMeta]) -> None:
        block_ids = self.store.allocate(len(metas))
        assert block_ids is not None
        self.device.inject(block_ids, payloads(metas))
        self.store.commit(block_ids, metas)
        self.store.release(block_ids)
        self.settle()

    def settle(self) -> None:
        for _ in range(3):
            self.store.pump()
            assert self.store.flush(60)

    def acquire(self, metas: Sequence[BlockMeta], lifetime: Lifetime | None = None) -> Acquisition:
        return self.store.acquire(
            names(metas), reads=ReadTiers(), compute_ms=lambda first, count: 1e9, root=ROOT, lifetime=lifetime
        )

    def pass_s(self, seconds: float) -> None:
        self.clock.now += seconds
        self.wall.now += seconds


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.store.check()
    made.store.close()


@pytest.mark.parametrize("lies", ["device", "host", "below"])
def test_a_lifetime_that_warming_names_reaches_every_tier(rig: Rig, lies: str) -> None:
    metas = chain(3, ttl_s=TTL)
    rig.cache(metas)
    if lies != "device":
        rig.device.clear()
    if lies == "below":
        rig.host.clear()
    started = rig.store.prefetch(names(metas), root=ROOT, lifetime=Lifetime(DAY))
    assert started == (3 if lies == "below" else 0)
    while rig.store._promoter.metas():
        rig.store.wait(60)
        rig.store.pump()
    rig.settle()
    rig.device.clear()
    rig.host.clear()
    rig.pass_s(DAY - 1.0)
    assert rig.disk.match(names(metas)) == 3
    assert rig.shared.match(names(metas)) == 3


def test_warming_that_names_no_lifetime_promises_nothing(rig: Rig) -> None:
    metas = chain(3, ttl_s=10.0)
    rig.cache(metas)
    rig.pass_s(9.0)
    rig.store.prefetch(names(metas), root=ROOT)
    rig.settle()
    rig.pass_s(2.0)
    assert rig.disk.match(names(metas)) == rig.shared.match(names(metas)) == 0


@pytest.mark.parametrize("leaves", ["lands", "gives up"])
def test_who_waits_for_a_load_gets_what_ends_while_it_is_on_its_way(rig: Rig, leaves: str) -> None:
    fixed = Lifetime(0.0, rig.wall.now + 50.0)
    metas = chain(3, ttl_s=0.0, until=fixed.until)
    rig.disk.write(metas, payloads(metas))
    assert rig.store.prefetch(names(metas), root=ROOT, lifetime=fixed) == 3
    acquisition = rig.acquire(metas, fixed)
    assert not acquisition.done
    loader = rig.store._promoter._loader
    rig.store.wait(60)
    rig.wall.now += 51.0
    if leaves == "gives up":
        finished, loader._finished = list(loader._finished), type(loader._finished)()
        rig.clock.now += 1e6
        rig.store.pump()
        loader._finished.extend(finished)
    rig.store.pump()
    assert acquisition.done
    assert acquisition.fates == [DISK] * 3
    rig.store.release(acquisition.block_ids)
    rig.settle()
    assert rig.device.match(names(metas)) == 0


@pytest.mark.parametrize(
    ("stored", "reader", "lives"),
    [
        (Lifetime(0.0, 900.0), Lifetime(TTL, is_default=True), Lifetime(TTL)),
        (Lifetime(0.0, 900.0), Lifetime(0.0, 2000.0), Lifetime(0.0, 2000.0)),
        (Lifetime(40.0, 900.0), Lifetime(20.0), Lifetime(40.0)),
        (Lifetime(0.0, 1100.0), Lifetime(TTL, is_default=True), Lifetime(0.0, 1100.0)),
    ],
)
def test_a_fixed_end_that_has_passed_says_nothing_of_a_block_that_arrives(
    stored: Lifetime, reader: Lifetime, lives: Lifetime
) -> None:
    meta = chain(1, ttl_s=stored.ttl_s, until=stored.until)[0]
    assert arrived_as(meta, reader, 1000.0).lifetime == lives
