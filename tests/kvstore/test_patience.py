"""How long a request waits for a load that stalls, stutters or crawls: on a clock that only the tier moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import patience
from kvstore.blocks import BlockHash
from kvstore.device import DeviceTier
from kvstore.errors import MissReason
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.patience import DEFAULT_SLACK_S, FIRST_TRY_S, KEPT_SHARE, MIN_LIMIT_S, limits, pieces, slack_of
from kvstore.store import Acquisition, ReadTiers, TieredStore
from kvstore.tier import BlockMeta, Delivery
from tests.kvstore.blocks_for_tests import LAYOUT, ROOT, ManualClock, chain, names, payload, payloads
from tests.kvstore.fake_tier import FakeSharedTier

torch.set_num_threads(1)
REDIS = TierName.REDIS
PIECE = 4  # blocks
EPSILON = 1e-6


class PacedTier(FakeSharedTier):
    """Takes `block_ms` of the clock for each block, and is silent from block `stalls_at` on; keeps its deadline."""

    clock: ManualClock
    block_ms = 0.0
    stalls_at = 10**9
    delivered = 0

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        assert deadline_s is not None
        self.deadlines.append(deadline_s)
        fits = len(hashes) if not self.block_ms else min(len(hashes), int(1e3 * deadline_s / self.block_ms + EPSILON))
        count = max(0, min(fits, self.stalls_at - self.delivered))
        super().read(hashes[:count], into[:count])
        self.delivered += count
        is_short = count < len(hashes)
        self.clock.now += deadline_s if is_short else count * self.block_ms / 1e3
        return Delivery(count, MissReason.DEADLINE if is_short else None)


@dataclass
class Rig:
    """A store without host RAM over a paced tier of which `measured_ms` a block is expected; None: never read."""

    measured_ms: float | None
    compute_ms: float
    slack_s: float = DEFAULT_SLACK_S

    def __post_init__(self) -> None:
        self.clock = ManualClock()
        self.tier = PacedTier(self.clock)
        self.tier.clock = self.clock
        device = DeviceTier(LAYOUT, 64 * LAYOUT.block_nbytes, clock=self.clock)
        self.store = TieredStore(
            LAYOUT, device, None, self.tier, clock=self.clock, default_ttl_s=None, load_slack_s=self.slack_s
        )
        if self.measured_ms is not None:
            for count in (1, 8, 32):
                self.store._promoter.sources[REDIS].observe(count, self.measured_ms * count)

    def start(self, count: int) -> Acquisition:
        metas = chain(count)
        self.tier.write(metas, payloads(metas))
        return self.store.acquire(
            names(metas), reads=ReadTiers(), compute_ms=lambda first, blocks: self.compute_ms * blocks, root=ROOT
        )

    def get(self, count: int) -> tuple[int, float]:
        """Blocks that came, and seconds that they took."""
        started, acquisition = self.clock(), self.start(count)
        while not acquisition.done:
            self.store.wait(0.02)
            self.store.pump()
        found = [bytes(view) for view in self.store.device.payloads(acquisition.block_ids)]
        assert found == [bytes(payload(name)) for name in names(chain(count))[: len(found)]]
        self.store.release(acquisition.block_ids)
        took_s = self.clock() - started
        self.store.check()
        self.store.close()
        return len(found), took_s


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PIECE_NBYTES", PIECE * LAYOUT.block_nbytes)


def test_a_silent_tier_costs_what_a_healthy_piece_takes_and_the_slack() -> None:
    rig = Rig(measured_ms=2.0, compute_ms=100.0)
    rig.tier.stalls_at = 0
    count, took_s = rig.get(32)
    assert count == 0
    assert took_s == pytest.approx(0.002 * PIECE + DEFAULT_SLACK_S, abs=0.011)


def test_the_slack_can_be_set() -> None:
    rig = Rig(measured_ms=2.0, compute_ms=1000.0, slack_s=1.0)
    rig.tier.stalls_at = 0
    assert rig.get(32)[1] == pytest.approx(0.002 * PIECE + 1.0, abs=0.011)


def test_what_came_before_the_silence_is_used() -> None:
    rig = Rig(measured_ms=2.0, compute_ms=4.0)
    rig.tier.block_ms, rig.tier.stalls_at = 2.0, 13
    count, took_s = rig.get(32)
    assert count == 13
    assert took_s <= 0.004 * 12 + DEFAULT_SLACK_S + EPSILON


def test_a_slow_tier_that_is_faster_than_computing_is_read_to_the_end() -> None:
    rig = Rig(measured_ms=1.0, compute_ms=20.0)
    rig.tier.block_ms = 10.0  # ten times slower than it was
    assert rig.get(32) == (32, pytest.approx(0.32))


def test_a_tier_slower_than_computing_is_left_when_it_is_behind_by_the_slack() -> None:
    rig = Rig(measured_ms=1.0, compute_ms=10.0)
    rig.tier.block_ms = 20.0
    count, took_s = rig.get(32)
    assert 0 < count < 10
    assert took_s - 0.010 * count <= DEFAULT_SLACK_S + 0.001 * PIECE + EPSILON


def test_a_hiccup_within_the_slack_cuts_nothing() -> None:
    rig = Rig(measured_ms=10.0, compute_ms=12.0)
    rig.tier.block_ms = 10.7  # more than 20 ms late in all
    assert rig.get(32)[0] == 32


def test_a_tier_that_was_never_read_gets_one_longer_try() -> None:
    rig = Rig(measured_ms=None, compute_ms=1000.0)
    rig.tier.stalls_at = 0
    assert rig.get(32)[1] == pytest.approx(FIRST_TRY_S, abs=0.011)


def test_what_came_is_used_though_the_tier_hangs_past_its_limit() -> None:
    rig = Rig(measured_ms=2.0, compute_ms=4.0)
    metas = chain(12)

    def hang(hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None) -> Delivery:
        if hashes[0] != metas[0].hash:
            rig.tier.reads_open.clear()
        return FakeSharedTier.read(rig.tier, hashes, into, deadline_s=deadline_s)

    rig.tier.read = hang  # type: ignore[method-assign, assignment]
    owner, waiter = rig.start(12), rig.start(12)
    while not rig.store._promoter._loader.get(metas[0].hash).arrived or len(rig.tier.reads) < 2:  # type: ignore[union-attr]
        rig.store.wait(0.01)
    rig.store.pump()
    assert not owner.done
    assert not waiter.done
    rig.clock.now += 0.004 * PIECE + DEFAULT_SLACK_S + EPSILON
    rig.store.pump()
    for each in (owner, waiter):
        assert (each.done, each.fates) == (True, [REDIS] * PIECE)
    rig.tier.reads_open.set()
    while rig.store._promoter.metas():
        rig.store.wait(1.0)
        rig.store.pump()
    rig.store.check()
    rig.store.release([*owner.block_ids, *waiter.block_ids])
    assert not any(rig.store.device.refs(block) for block in range(64))
    rig.store.close()


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    measured_ms=st.floats(0.1, 20),
    compute_ms=st.floats(0.1, 50),
    block_ms=st.just(0.0) | st.floats(0.01, 60),
    stalls_at=st.integers(0, 50),
)
def test_a_request_is_never_behind_computing_by_more_than_a_piece_and_the_slack(
    count: int, measured_ms: float, compute_ms: float, block_ms: float, stalls_at: int
) -> None:
    rig = Rig(measured_ms, compute_ms)
    rig.tier.block_ms, rig.tier.stalls_at = block_ms, stalls_at
    came, took_s = rig.get(count)
    behind_s = took_s - came * compute_ms / 1e3
    piece_s = PIECE * measured_ms / 1e3
    assert behind_s <= max(piece_s + DEFAULT_SLACK_S, came * measured_ms / 1e3 + piece_s + DEFAULT_SLACK_S) + EPSILON
    assert took_s <= max(MIN_LIMIT_S, count * compute_ms / 1e3) + EPSILON
    if block_ms <= measured_ms < compute_ms and stalls_at >= count:
        assert came == count, "a healthy load was cut"


@given(
    count=st.integers(1, 5000),
    nbytes=st.integers(1, 1 << 25),
    load_ms=st.none() | st.floats(0, 100),
    compute_ms=st.none() | st.floats(0.01, 100),
    slack_s=st.floats(0.001, 1),
)
def test_limits_grow_piece_by_piece_and_end_at_computing(
    count: int, nbytes: int, load_ms: float | None, compute_ms: float | None, slack_s: float
) -> None:
    found = limits(
        pieces(count, nbytes),
        load_ms=lambda blocks: None if load_ms is None else load_ms * blocks,
        compute_ms=lambda blocks: None if compute_ms is None else compute_ms * blocks,
        slack_s=slack_s,
    )
    assert [limit.stop for limit in found] == sorted({limit.stop for limit in found})
    assert found[-1].stop == count
    assert [limit.seconds for limit in found] == sorted(limit.seconds for limit in found)
    most = 10.0 if compute_ms is None else max(MIN_LIMIT_S, min(10.0, compute_ms * count / 1e3))
    assert all(0 < limit.told_s <= limit.seconds <= most + EPSILON for limit in found)


class PacedDisk(HostTier):
    """Delivers nothing and keeps its deadline while it stalls."""

    name = TierName.DISK
    time: ManualClock
    stalls = True

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        if not self.stalls:
            return super().read(hashes, into)
        assert deadline_s is not None
        self.time.now += deadline_s
        return Delivery(0, MissReason.DEADLINE)


def over_disk(rig: Rig, metas: list[BlockMeta]) -> tuple[PacedDisk, TieredStore]:
    """A store over the rig's tier and a disk that is as fast and holds these, too; close it."""
    nbytes = LAYOUT.block_nbytes
    disk = PacedDisk(LAYOUT, 64 * nbytes, clock=rig.clock)
    disk.time = rig.clock
    for tier in (disk, rig.tier):
        tier.write(metas, payloads(metas))
    device = DeviceTier(LAYOUT, 64 * nbytes, clock=rig.clock)
    store = TieredStore(LAYOUT, device, None, rig.tier, disk=disk, clock=rig.clock, default_ttl_s=None)
    for source in store._promoter.sources.values():
        for count in (1, 8, 32):
            source.observe(count, (rig.measured_ms or 0.0) * count)
    return disk, store


def end(rig: Rig, store: TieredStore, count: int) -> tuple[list[TierName], float]:
    """The fates of the blocks that came, and seconds that they took."""
    started = rig.clock()
    acquisition = store.acquire(
        names(chain(count)), reads=ReadTiers(), compute_ms=lambda first, blocks: rig.compute_ms * blocks, root=ROOT
    )
    while not acquisition.done:
        store.wait(0.02)
        store.pump()
    store.release(acquisition.block_ids)
    return acquisition.fates, rig.clock() - started


def test_two_tiers_that_stall_one_after_the_other_cost_one_slack() -> None:
    rig = Rig(measured_ms=1.0, compute_ms=100.0)
    _, store = over_disk(rig, chain(4))
    rig.tier.stalls_at = 0
    fates, took_s = end(rig, store, 4)
    assert fates == []
    assert rig.tier.deadlines, "the second one is tried, too"
    assert took_s <= 2 * 4 * 0.001 + DEFAULT_SLACK_S + EPSILON
    store.close()


def test_behind_a_tier_that_stalls_a_healthy_one_has_time_to_deliver() -> None:
    rig = Rig(measured_ms=4.0, compute_ms=100.0)
    rig.tier.block_ms = 4.0
    disk, store = over_disk(rig, chain(4))
    assert end(rig, store, 4)[0] == [REDIS] * 4
    assert rig.tier.deadlines[0] >= 4 * 0.004
    assert disk.stalls
    store.close()


def test_a_tier_that_fails_at_once_costs_the_next_one_nothing() -> None:
    rig = Rig(measured_ms=1.0, compute_ms=100.0)
    disk, store = over_disk(rig, chain(4))
    disk.read = lambda hashes, into, *, deadline_s=None: Delivery(0, MissReason.ERROR)  # type: ignore[method-assign]
    assert end(rig, store, 4)[0] == [REDIS] * 4
    assert rig.tier.deadlines[0] == pytest.approx(0.004 + DEFAULT_SLACK_S - 0.01)
    store.close()


@given(late_s=st.lists(st.floats(0, 1), min_size=1, max_size=3), slack_s=st.floats(0, 1))
def test_what_all_tiers_are_granted_together_is_one_slack(late_s: list[float], slack_s: float) -> None:
    spent_s = 0.0
    for place, wanted_s in enumerate(late_s):
        granted_s = slack_of(slack_s, spent_s, len(late_s) - place - 1)
        assert granted_s >= slack_s / KEPT_SHARE
        spent_s += min(wanted_s, granted_s)
    assert spent_s <= slack_s + EPSILON


def test_pieces_begin_small_and_double_up_to_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PIECE_NBYTES", 32 << 20)
    assert pieces(100, 2 << 20) == [2, 6, 14, 30, 46, 62, 78, 94, 100]
    assert pieces(2, 2 << 20) == [2]
    assert pieces(3, 64 << 20) == [1, 2, 3]
