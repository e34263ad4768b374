"""TieredStore over a disk tier and a shared one: lanes, prefetch, plans, leases, lists.

The disk is a host tier under another name: what is tested is the store's part, and `test_disk` tests the disk's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from kvstore.acquisition import Acquisition, ReadTiers
from kvstore.admission import Moment
from kvstore.blocks import BlockHash, short
from kvstore.device import DeviceTier
from kvstore.errors import MissReason
from kvstore.events import BlockRemoved, RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.inventory import LISTING_S
from kvstore.store import TieredStore
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, ManualClock, chain, names, payload, payloads
from tests.kvstore.fake_tier import FakeSharedTier

torch.set_num_threads(1)
DEVICE, HOST, DISK, REDIS = TierName.DEVICE, TierName.HOST, TierName.DISK, TierName.REDIS
EVICTED = RemovalCause.EVICTED
TTL = 100.0


class Disk(HostTier):
    """Keeps the contract of a local tier, and lies below host."""

    name = TierName.DISK


@dataclass
class Whether:
    """Admits what the rig says."""

    rig: Rig
    moment: Moment = Moment.USE

    def admits(self, name: Hashable) -> bool:
        return self.rig.admitted


def dear(first: int, count: int) -> float:
    return 1e9


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, "what was waited for did not come"
        time.sleep(0.001)


@dataclass
class Rig:
    device_blocks: int = 16
    host_slots: int = 40
    disk_slots: int = 60
    admitted: bool = True
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        nbytes = LAYOUT.block_nbytes
        self.shared = FakeSharedTier(self.clock)
        self.device = DeviceTier(LAYOUT, self.device_blocks * nbytes, clock=self.clock, poison=True)
        self.host = HostTier(LAYOUT, self.host_slots * nbytes, clock=self.clock)
        self.disk = Disk(LAYOUT, self.disk_slots * nbytes, clock=self.clock)
        self.store = TieredStore(
            LAYOUT,
            self.device,
            self.host,
            self.shared,
            disk=self.disk,
            clock=self.clock,
            default_ttl_s=TTL,
            admission=Whether(self),
        )

    def cache(self, metas: list[BlockMeta]) -> None:
        block_ids = self.store.allocate(len(metas))
        assert block_ids is not None
        self.device.inject(block_ids, payloads(metas))
        self.store.commit(block_ids, metas)
        self.store.release(block_ids)
        self.settle()

    def settle(self) -> None:
        """Let all that is queued and due be done."""
        for _ in range(2):
            self.store.pump()
            assert self.store.flush(60)

    def start(self, metas: list[BlockMeta], **options: object) -> Acquisition:
        arguments: dict[str, object] = {"reads": ReadTiers(), "compute_ms": dear, "root": metas[0].root}
        return self.store.acquire(names(metas), **(arguments | options))  # type: ignore[arg-type]

    def finish(self, acquisition: Acquisition, metas: list[BlockMeta]) -> list[TierName]:
        """Wait for it, check every byte, release; the fates."""
        while not acquisition.done:
            self.store.wait(60)
            self.store.pump()
        found = [bytes(view) for view in self.device.payloads(acquisition.block_ids)]
        assert found == [bytes(payload(name)) for name in names(metas)[: len(found)]]
        self.store.release(acquisition.block_ids)
        return acquisition.fates

    def get(self, metas: list[BlockMeta], **options: object) -> list[TierName]:
        return self.finish(self.start(metas, **options), metas)

    def finish_loads(self) -> None:
        while self.store._promoter.metas():
            self.store.wait(60)
            self.store.pump()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.shared.reads_open.set()
    made.shared.writes_open.set()
    made.store.check()
    made.store.close()


def test_committed_blocks_reach_every_tier(rig: Rig) -> None:
    metas = chain(3)
    rig.cache(metas)
    assert (rig.host.match(names(metas)), rig.disk.match(names(metas)), len(rig.shared.held())) == (3, 3, 3)


def test_each_block_comes_from_the_fastest_tier_that_holds_it(rig: Rig) -> None:
    metas = chain(8)
    rig.cache(metas)
    rig.device.remove(names(metas[2:]), EVICTED)
    rig.host.remove(names(metas[4:]), EVICTED)
    rig.disk.remove(names(metas[6:]), EVICTED)
    assert rig.get(metas) == [DEVICE] * 2 + [HOST] * 2 + [DISK] * 2 + [REDIS] * 2
    assert rig.get(metas) == [DEVICE] * 8
    assert rig.host.match(names(metas)) == 8


def test_disk_is_not_read_when_the_request_may_not(rig: Rig) -> None:
    metas = chain(3)
    rig.disk.write(metas, payloads(metas))
    assert rig.get(metas, reads=ReadTiers(disk=False)) == []
    assert rig.get(metas) == [DISK] * 3


def test_a_known_slow_tier_that_takes_less_time_is_preferred(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    rig.device.clear()
    rig.host.clear()
    for _ in range(5):
        rig.store._promoter.sources[DISK].observe(2, 50.0)
        rig.store._promoter.sources[REDIS].observe(2, 1.0)
    assert rig.get(metas) == [REDIS] * 2


def test_what_nobody_knows_in_redis_does_not_beat_what_lies_on_disk(rig: Rig) -> None:
    metas = chain(2)
    rig.disk.write(metas, payloads(metas))
    rig.store._promoter.sources[DISK].observe(2, 50.0)
    rig.store._promoter.sources[REDIS].observe(2, 1.0)
    assert rig.get(metas) == [DISK] * 2
    assert rig.shared.reads == []


def test_a_stalled_shared_tier_does_not_delay_the_disk(rig: Rig) -> None:
    stuck, near = chain(2), chain(2, first_token=900)
    rig.disk.write(near, payloads(near))
    rig.shared.reads_open.clear()
    waiting = [rig.start(stuck), rig.start(chain(1, first_token=500)), rig.start(chain(1, first_token=600))]
    assert rig.get(near) == [DISK] * 2
    rig.shared.reads_open.set()
    for acquisition in waiting:
        assert rig.finish(acquisition, stuck) == []


def test_a_prefetch_ends_in_host_and_its_use_tells_where_it_came_from_once(rig: Rig) -> None:
    metas = chain(4)
    rig.disk.write(metas[:2], payloads(metas[:2]))
    rig.shared.write(metas[2:], payloads(metas[2:]))
    assert rig.store.prefetch(names(metas), root=metas[0].root) == 2
    rig.finish_loads()
    assert rig.host.match(names(metas)) == 4
    assert rig.device.match(names(metas)) == 0
    assert rig.get(metas) == [DISK] * 2 + [REDIS] * 2
    rig.device.clear()
    assert rig.get(metas) == [HOST] * 4


def test_a_tier_that_does_not_keep_the_limit_is_given_up_and_what_comes_late_is_not_wasted(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    rig.store._promoter.sources[REDIS].observe(3, 30.0)
    owner = rig.start(metas, compute_ms=lambda first, count: 100.0 * count)
    waiter = rig.start(metas, compute_ms=lambda first, count: 100.0 * count)
    until(lambda: bool(rig.shared.reads))
    rig.clock.now += 0.075
    rig.store.pump()
    assert not owner.done
    rig.clock.now += 0.01
    rig.store.pump()
    assert (owner.done, waiter.done, owner.fates, waiter.fates) == (True, True, [], [])
    rig.shared.reads_open.set()
    rig.finish_loads()
    assert rig.host.match(names(metas)) == 3


def test_a_tier_that_hangs_is_not_asked_again_until_it_answers(rig: Rig) -> None:
    metas, others = chain(3), chain(3, first_token=700)
    for each in (metas, others):
        rig.shared.write(each, payloads(each))
    rig.shared.reads_open.clear()
    first = rig.start(metas, compute_ms=lambda first, count: 100.0 * count)
    until(lambda: bool(rig.shared.reads))
    rig.clock.now += 0.5
    rig.store.pump()
    assert first.done
    assert rig.start(others, compute_ms=lambda first, count: 100.0 * count).done
    assert rig.start(others, compute_ms=lambda first, count: 0.0).done, "even if nobody knows what computing takes"
    assert rig.store.stats()[REDIS].bad_hits == 1
    rig.shared.reads_open.set()
    rig.finish_loads()
    rig.device.clear()
    for _ in range(8):
        rig.clock.now += 11.0
        rig.get(others, compute_ms=lambda first, count: 100.0 * count)
    assert rig.device.match(names(others)) == 3


def test_who_joins_a_load_waits_no_longer_than_computing_takes(rig: Rig) -> None:
    metas = chain(6)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    patient = rig.start(metas)
    hasty = rig.start(metas[:1], compute_ms=lambda first, count: 30.0 * count)
    assert not hasty.done
    rig.clock.now += 0.1
    rig.store.pump()
    assert (hasty.done, hasty.fates, patient.done) == (True, [], False)
    rig.shared.reads_open.set()
    assert rig.finish(patient, metas) == [REDIS] * 6


@pytest.mark.parametrize("in_the_way", ["nothing", "leases"])
def test_a_prefetch_that_host_cannot_hold_ends(in_the_way: str) -> None:
    rig = Rig(host_slots=8)
    metas = chain(30)
    rig.disk.write(metas, payloads(metas))
    if in_the_way == "leases":
        others = chain(8, first_token=5000)
        rig.host.write(others, payloads(others))
        rig.host.lease(names(others), None)
    reads: list[int] = []
    read = rig.disk.read
    rig.disk.read = lambda hashes, *rest, **more: reads.append(len(hashes)) or read(hashes, *rest, **more)  # type: ignore
    assert rig.store.prefetch(names(metas), root=metas[0].root) > 0
    rig.finish_loads()
    assert sum(reads) <= 2
    rig.store.close()


def test_a_prefetch_goes_no_further_than_what_stayed_in_host() -> None:
    rig = Rig(host_slots=40)
    metas, others = chain(8), chain(40, first_token=5000)
    rig.disk.write(metas[:4], payloads(metas[:4]))
    rig.shared.write(metas[4:], payloads(metas[4:]))
    rig.host.write(others, payloads(others))
    rig.host.lease(names(others), None)
    assert rig.store.prefetch(names(metas), root=metas[0].root) == 4
    rig.finish_loads()
    assert (rig.store.stats()[DISK].hits, rig.shared.reads) == (4, [])
    rig.store.close()


def test_a_cleared_block_is_not_sought_elsewhere_by_who_waited_for_it(rig: Rig) -> None:
    metas = chain(3)
    rig.disk.write(metas, payloads(metas))
    rig.shared.write(metas, payloads(metas))
    opened = threading.Event()
    read = rig.disk.read
    rig.disk.read = lambda *args, **more: opened.wait(60) and read(*args, **more)  # type: ignore[method-assign]
    waiting = rig.start(metas)
    rig.store.clear(root=metas[0].root)
    opened.set()
    assert rig.finish(waiting, metas) == []
    assert rig.shared.reads == []
    assert rig.host.match(names(metas)) == 0


def closed_tiers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[TierName]:
    """A list that grows with each tier that is closed."""
    closed: list[TierName] = []
    for tier in (rig.device, rig.host, rig.disk, rig.shared):
        monkeypatch.setattr(tier, "close", lambda tier=tier, close=tier.close: (closed.append(tier.name), close()))
    return closed


def test_closing_while_a_prefetch_runs_closes_every_tier(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = closed_tiers(rig, monkeypatch)
    metas = chain(8)
    rig.disk.write(metas[:4], payloads(metas[:4]))
    rig.shared.write(metas[4:], payloads(metas[4:]))
    opened = threading.Event()
    read = rig.disk.read
    rig.disk.read = lambda *args, **more: opened.wait(60) and read(*args, **more)  # type: ignore[method-assign]
    rig.store.prefetch(names(metas), root=metas[0].root)  # would go on with the shared tier
    waiting = [rig.start(chain(2, first_token=number)) for number in range(100, 1000, 100)]
    threading.Timer(0.2, opened.set).start()
    rig.store.close()
    assert all(acquisition.done for acquisition in waiting)
    assert closed == [REDIS, DISK, HOST, DEVICE]


def test_a_read_that_never_ends_does_not_keep_the_store_from_closing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.promotion.CLOSE_WAIT_S", 0.1)
    closed = closed_tiers(rig, monkeypatch)
    rig.shared.reads_open.clear()
    stuck = rig.start(chain(2))
    until(lambda: bool(rig.shared.reads))
    rig.store.close()
    assert (stuck.done, stuck.block_ids) == (True, [])
    assert closed == [REDIS, DISK, HOST, DEVICE]


def test_what_was_prefetched_and_then_computed_or_waited_for_is_told_once(rig: Rig) -> None:
    metas = chain(2)
    rig.shared.write(metas, payloads(metas))
    rig.store.prefetch(names(metas), root=metas[0].root)
    rig.finish_loads()
    rig.cache(metas)  # computed by somebody who may not read
    rig.device.clear()
    assert rig.get(metas) == [HOST] * 2
    rig.device.clear()
    rig.host.clear()
    rig.shared.reads_open.clear()
    rig.disk.clear()
    rig.store.prefetch(names(metas), root=metas[0].root)
    acquisition = rig.start(metas)
    rig.shared.reads_open.set()
    assert rig.finish(acquisition, metas) == [REDIS] * 2
    rig.device.clear()
    assert rig.get(metas) == [HOST] * 2


def test_who_comes_during_a_prefetch_waits_for_it(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    assert rig.store.prefetch(names(metas), root=metas[0].root) == 3
    acquisition = rig.start(metas)
    assert not acquisition.done
    rig.shared.reads_open.set()
    assert rig.finish(acquisition, metas) == [REDIS] * 3
    assert rig.shared.reads == [names(metas)]


def test_nothing_is_prefetched_twice_nor_what_is_near(rig: Rig) -> None:
    metas = chain(3)
    rig.cache(metas)
    assert rig.store.prefetch(names(metas), root=metas[0].root) == 0
    rig.device.clear()
    rig.host.clear()
    rig.shared.reads_open.clear()
    assert rig.store.prefetch(names(metas), root=metas[0].root) == 3
    assert rig.store.prefetch(names(metas), root=metas[0].root) == 0


def test_a_prefetch_that_is_cleared_lands_nowhere(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    rig.store.prefetch(names(metas), root=metas[0].root)
    until(lambda: bool(rig.shared.reads))
    rig.store.clear(root=metas[0].root)
    rig.shared.reads_open.set()
    rig.finish_loads()
    assert rig.host.match(names(metas)) == 0


def test_a_look_up_that_found_nothing_is_not_repeated_for_a_second(rig: Rig) -> None:
    metas = chain(3)
    assert rig.get(metas) == []
    assert rig.get(metas) == []
    assert len(rig.shared.reads) == 1
    rig.shared.write(metas, payloads(metas))
    rig.clock.now += 1.1
    assert rig.get(metas) == [REDIS] * 3


def test_a_tier_that_failed_is_asked_again_at_once(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    rig.shared.read_limit, rig.shared.healthy = 0, False
    assert rig.get(metas) == []
    rig.shared.read_limit, rig.shared.healthy = None, True
    assert rig.get(metas) == [REDIS] * 3


@pytest.mark.parametrize("why", MissReason)
def test_only_a_tier_that_says_so_has_lost_a_block(rig: Rig, why: MissReason) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    rig.store.drain_events()
    rig.shared.read_limit, rig.shared.ends = 1, why
    assert rig.get(metas) == [REDIS]
    gone = [event for event in rig.store.drain_events() if isinstance(event, BlockRemoved)]
    is_gone = why in ("absent", "expired", "corrupt", "truncated", "foreign", "unreadable")
    assert [event.hashes for event in gone] == ([(short(metas[1].hash),)] if is_gone else [])
    rig.shared.read_limit = None
    assert rig.get(metas) == [DEVICE] + ([] if is_gone else [REDIS, REDIS])  # what is gone is not asked for at once


def test_blocks_that_are_not_admitted_are_written_at_their_first_use(rig: Rig) -> None:
    rig.admitted = False
    metas = chain(3)
    rig.cache(metas)
    assert rig.shared.held() == {}
    assert rig.disk.match(names(metas)) == 0
    assert rig.get(metas) == [DEVICE] * 3
    rig.settle()
    rig.settle()
    assert set(rig.shared.held()) == set(names(metas))
    assert rig.disk.match(names(metas)) == 3


def test_a_plan_tells_tier_times_and_choice_of_each_run(rig: Rig) -> None:
    metas = chain(9)
    rig.cache(metas[:8])
    rig.device.remove(names(metas[1:]), EVICTED)
    rig.host.remove(names(metas[3:]), EVICTED)
    rig.disk.remove(names(metas[5:]), EVICTED)
    rig.store.pump()  # hears what lies in the shared tier
    sources = rig.store._promoter.sources
    sources[HOST].observe(1, 1.0)
    sources[DISK].observe(1, 10.0)
    sources[REDIS].observe(1, 1000.0)
    plan = rig.store.plan(names(metas), reads=ReadTiers(), compute_ms=lambda first, count: 100.0 * count)
    told = [(run.tier, run.first, run.count, run.load) for run in plan]
    assert told == [(DEVICE, 0, 1, True), (HOST, 1, 2, True), (DISK, 3, 2, True), (REDIS, 5, 4, False)]
    assert [run.load_ms for run in plan] == pytest.approx([0.0, 2.0, 20.0, 3000.0])
    assert [run.compute_ms for run in plan] == pytest.approx([100.0, 200.0, 200.0, 400.0])
    assert rig.shared.reads == []


def test_a_plan_for_an_unknown_prefix_is_to_compute_it(rig: Rig) -> None:
    plan = rig.store.plan(names(chain(4)), reads=ReadTiers(), compute_ms=dear)
    assert [(run.tier, run.count, run.load) for run in plan] == [(None, 4, False)]
    assert rig.store.plan([], reads=ReadTiers(), compute_ms=dear) == []


def test_what_is_queued_before_it_is_in_the_predicted_time_of_a_load(rig: Rig) -> None:
    rig.store._promoter.sources[REDIS].observe(1, 10.0)
    metas = chain(4)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    waiting = rig.start(chain(6, first_token=700))
    rig.store.pump()  # hears of the blocks in the shared tier
    plan = rig.store.plan(names(metas), reads=ReadTiers(), compute_ms=lambda first, count: 1e6)
    assert plan[0].load_ms == pytest.approx(100.0)
    rig.shared.reads_open.set()
    rig.finish(waiting, metas)


def test_a_tier_that_was_slow_is_read_again_within_a_few_requests_once_it_is_fast(rig: Rig) -> None:
    source = rig.store._promoter.sources[DISK]
    for _ in range(20):
        source.observe(4, 4000.0)
    rig.clock.now += 11.0
    fates = []
    for number in range(12):
        metas = chain(4, first_token=1000 * number)
        rig.disk.write(metas, payloads(metas))
        fates.append(len(rig.get(metas, compute_ms=lambda first, count: 25.0 * count)))
        rig.device.clear()
        rig.host.clear()
    assert fates[-1] == 4
    assert source.estimate.predict_ms(4 * LAYOUT.block_nbytes) < 100.0


def test_loads_are_scored_against_computing(rig: Rig) -> None:
    for first_token, load_s, compute_ms in ((0, 0.5, 100.0), (300, 0.01, 100.0)):
        metas = chain(2, first_token=first_token)
        rig.shared.write(metas, payloads(metas))
        rig.clock.now += 20.0  # the first one was dear; it is measured again
        rig.shared.reads_open.clear()
        rig.shared.reads.clear()
        acquisition = rig.start(metas, compute_ms=lambda first, count, ms=compute_ms: ms * count)
        until(lambda: bool(rig.shared.reads))
        rig.clock.now += load_s
        rig.shared.reads_open.set()
        rig.finish(acquisition, metas)
    stats = rig.store.stats()[REDIS]
    assert (stats.loads, stats.bad_hits) == (2, 1)
    assert (stats.load_ms, stats.compute_ms) == (pytest.approx(510.0), pytest.approx(400.0))


def test_a_leased_block_survives_eviction_and_ttl_until_the_lease_ends(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    promised = rig.store.lease(names(metas), 1000.0)
    assert promised == {DISK: 2}
    for first_token in range(1000, 1000 + 16 * 80, 16):
        rig.cache(chain(1, first_token=first_token))
    rig.clock.now += TTL * 2
    rig.settle()
    assert rig.get(metas) == [DISK] * 2
    rig.clock.now += 1001.0
    rig.settle()
    assert rig.disk.match(names(metas)) == 0


def test_a_lease_moves_down_when_its_block_does(rig: Rig) -> None:
    metas = chain(2)
    rig.host.write(metas, payloads(metas))
    assert rig.store.lease(names(metas), None) == {HOST: 2}
    rig.settle()
    rig.clock.now += 2.0
    rig.settle()
    assert (rig.disk.stats().leased, rig.host.stats().leased) == (2, 0)
    assert rig.store.end_leases(names(metas)) == {DISK: 2}
    assert rig.store.end_leases(names(metas)) == {}


def test_what_lies_nowhere_is_not_promised(rig: Rig) -> None:
    assert rig.store.lease(names(chain(2)), 10.0) == {}


def test_a_list_shows_every_block_once_with_its_tiers_page_by_page(rig: Rig) -> None:
    mine, other = chain(5), chain(3, root=OTHER_ROOT)
    rig.cache(mine)
    rig.cache(other)
    rig.device.remove(names(mine[3:]), EVICTED)
    rig.store.lease(names(mine[:1]), None)
    blocks, after = [], None
    while page := rig.store.list_blocks(root=mine[0].root, after=after, limit=2):
        assert len(page) <= 2
        blocks += page
        after = page[-1].meta.hash
    assert [block.meta.hash for block in blocks] == sorted(names(mine))
    tiers = {block.meta.hash: block.tiers for block in blocks}
    assert tiers[mine[0].hash] == (DEVICE, HOST, DISK, REDIS)
    assert tiers[mine[4].hash] == (HOST, DISK, REDIS)
    assert [block.meta.hash for block in blocks if block.leased] == names(mine[:1])
    assert {b.meta.hash for b in rig.store.list_blocks(prefix=mine[2].hash)} == set(names(mine[2:]))
    assert len(rig.store.list_blocks()) == 8


def test_a_listing_that_nobody_goes_on_with_keeps_no_names(rig: Rig) -> None:
    rig.cache(chain(5))
    rig.store.list_blocks(limit=2)
    rig.store.pump()
    assert rig.store._inventory._last is not None
    rig.clock.now += LISTING_S
    rig.store.pump()
    assert rig.store._inventory._last is None


def test_clear_drops_from_disk_too_and_tells_how_many(rig: Rig) -> None:
    mine, other = chain(3), chain(2, root=OTHER_ROOT)
    rig.cache(mine)
    rig.cache(other)
    assert rig.store.clear(root=OTHER_ROOT) == {DEVICE: 2, HOST: 2, DISK: 2}
    assert rig.disk.match(names(mine)) == 3
    assert rig.store.clear(shared=True) == {DEVICE: 3, HOST: 3, DISK: 3, REDIS: 5}
    assert rig.get(mine) == []


def test_disowned_blocks_and_their_followers_leave_every_tier_without_waiting_for_one_that_stalls(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    metas, others = chain(8), chain(3, first_token=700)
    rig.cache(metas)
    rig.cache(others)
    rig.store.drain_events()
    asked, answers, remove = threading.Event(), threading.Event(), rig.shared.remove

    def stalled(hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        asked.set()
        assert answers.wait(60)
        return remove(hashes, cause)

    monkeypatch.setattr(rig.shared, "remove", stalled)
    monkeypatch.setattr(rig.shared, "clear", None)  # nobody scans a server for names that are known
    rig.store.disown(names(metas[3:5]))
    assert asked.wait(60)
    assert set(rig.shared.held()) == set(names(metas + others)), "the caller did not wait"
    gone = [name for event in rig.store.drain_events() if isinstance(event, BlockRemoved) for name in event.hashes]
    assert {short(name) for name in names(metas[3:])} <= set(gone)
    assert rig.get(metas) == [DEVICE] * 3
    assert rig.shared.reads == []
    answers.set()
    rig.settle()
    assert set(rig.shared.held()) == set(names(metas[:3] + others))
    assert set(names(rig.disk.metas())) == set(names(metas[:3] + others))
    assert rig.get(others) == [DEVICE] * 3
    rig.cache(metas)
    assert set(rig.shared.held()) == set(names(metas + others)), "they may be computed and stored again"
    rig.device.clear()
    rig.host.clear()
    rig.disk.clear()
    assert rig.get(metas) == [REDIS] * 8


def test_disowned_blocks_are_removed_once_a_tier_that_was_down_answers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.spill.IDLE_S", 0.01)
    metas, remove = chain(3), rig.shared.remove
    rig.cache(metas)
    rig.shared.healthy = False
    tries: list[int] = []
    monkeypatch.setattr(
        rig.shared, "remove", lambda names, cause: remove(names, cause) if rig.shared.healthy else tries.append(1)
    )
    rig.store.disown(names(metas))
    until(lambda: len(tries) > 1)
    assert len(rig.shared.held()) == 3
    assert rig.get(metas) == []
    rig.shared.healthy = True
    until(lambda: not rig.shared.held())
    until(lambda: rig.store.pump() or not rig.store._promoter.sources[REDIS].absent.barred)


def test_a_block_that_the_disk_lost_is_written_again_at_its_next_use(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    rig.disk.remove(names(metas), EVICTED)
    rig.clock.now += TTL / 4 + 1
    rig.get(metas)
    rig.settle()
    rig.settle()
    assert rig.disk.match(names(metas)) == 2


def test_events_and_snapshot_tell_of_the_disk(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    assert DISK in {event.tier for event in rig.store.drain_events()}
    assert {event.tier for event in rig.store.snapshot()} == {DEVICE, HOST, DISK, REDIS}


def test_names_of_absent_blocks_are_bounded() -> None:
    from kvstore import source

    clock = ManualClock()
    absent = source.Absent(clock)
    for number in range(source.MAX_ABSENT + 10):
        absent.add(BlockHash(number.to_bytes(32, "big")))
    assert len(absent._until) == source.MAX_ABSENT
    assert BlockHash((0).to_bytes(32, "big")) not in absent
