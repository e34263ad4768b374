"""TieredStore: each promise of its interface, with a shared tier that the test controls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from kvstore.blocks import BlockHash, short
from kvstore.device import DeviceTier
from kvstore.errors import TierError
from kvstore.events import BlockRemoved, BlockStored, TierName
from kvstore.host.tier import HostTier
from kvstore.lifetime import Lifetime
from kvstore.patience import DEFAULT_SLACK_S, FIRST_TRY_S
from kvstore.store import Acquisition, ReadTiers, TieredStore
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, ROOT, ManualClock, chain, names, payload, payloads
from tests.kvstore.fake_tier import FakeSharedTier

torch.set_num_threads(1)
DEVICE, HOST, REDIS = TierName.DEVICE, TierName.HOST, TierName.REDIS
TTL = 100.0


def slow_compute(first: int, count: int) -> float:
    return 1e9


@dataclass
class Rig:
    """A store over small tiers, and the moves that tests make."""

    device_blocks: int = 8
    host_slots: int = 12
    queue_bytes: int = 1 << 20
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        nbytes = LAYOUT.block_nbytes
        self.shared = FakeSharedTier(self.clock)
        clocks = {"clock": self.clock, "wall_clock": self.clock}
        self.device = DeviceTier(LAYOUT, self.device_blocks * nbytes, **clocks, poison=True)
        self.host = HostTier(LAYOUT, self.host_slots * nbytes, **clocks) if self.host_slots else None
        self.store = TieredStore(
            LAYOUT,
            self.device,
            self.host,
            self.shared,
            **clocks,
            default_ttl_s=TTL,
            queue_bytes=self.queue_bytes,
        )

    def compute(self, metas: list[BlockMeta]) -> list[int]:
        """Fill blocks as an engine does, and commit them."""
        block_ids = self.store.allocate(len(metas))
        assert block_ids is not None
        self.device.inject(block_ids, payloads(metas))
        self.store.commit(block_ids, metas)
        return block_ids

    def cache(self, metas: list[BlockMeta]) -> None:
        """Compute, release, and wait until the shared tier has it."""
        self.store.release(self.compute(metas))
        assert self.store.flush(30)

    def acquire(self, metas: list[BlockMeta], **options: object) -> Acquisition:
        arguments: dict[str, object] = {"reads": ReadTiers(), "compute_ms": slow_compute, "root": metas[0].root}
        if "ttl_s" in options:
            options["lifetime"] = Lifetime(options.pop("ttl_s"))  # type: ignore[arg-type]
        return self.store.acquire(names(metas), **(arguments | options))  # type: ignore[arg-type]

    def finish(self, acquisition: Acquisition) -> Acquisition:
        while not acquisition.done:
            self.store.wait(30)
            self.store.pump()
        return acquisition

    def get(self, metas: list[BlockMeta], **options: object) -> list[TierName]:
        """Acquire, check every byte, release; the fates."""
        acquisition = self.finish(self.acquire(metas, **options))
        self.same_bytes(acquisition, metas)
        self.store.release(acquisition.block_ids)
        return acquisition.fates

    def same_bytes(self, acquisition: Acquisition, metas: list[BlockMeta]) -> None:
        found = [bytes(view) for view in self.device.payloads(acquisition.block_ids)]
        assert found == [bytes(payload(name)) for name in names(metas)[: len(found)]]

    def settle_refreshes(self) -> None:
        """Let due refreshes run, and what they found missing be written."""
        self.store.pump()
        assert self.store.flush(30)
        self.store.pump()
        assert self.store.flush(30)

    def written(self) -> list[BlockHash]:
        """Blocks written to the shared tier, in order; into how many writes the queue cuts them is a race."""
        return [name for names in self.shared.writes for name in names]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.shared.reads_open.set()
    made.shared.writes_open.set()
    made.store.check()
    made.store.close()


def test_committed_blocks_are_in_every_tier(rig: Rig) -> None:
    metas = chain(3)
    rig.cache(metas)
    assert rig.host is not None
    assert rig.store.match(names(metas)) == [DEVICE] * 3
    assert rig.host.match(names(metas)) == 3
    assert rig.shared.held() == {name: bytes(payload(name)) for name in names(metas)}


def test_the_prefix_comes_from_the_fastest_tier_of_each_block(rig: Rig) -> None:
    metas = chain(6)
    rig.cache(metas)
    assert rig.host is not None
    rig.device.remove(names(metas[2:]), cause="evicted")  # type: ignore[arg-type]
    rig.host.remove(names(metas[4:]), cause="evicted")  # type: ignore[arg-type]
    assert rig.store.match(names(metas)) == [DEVICE] * 2 + [HOST] * 2
    assert rig.get(metas) == [DEVICE] * 2 + [HOST] * 2 + [REDIS] * 2


def test_a_block_in_the_device_behind_a_hole_is_found_once_the_hole_is_filled(rig: Rig) -> None:
    metas = chain(6)
    rig.cache(metas)
    assert rig.host is not None
    rig.device.remove([metas[1].hash, metas[3].hash], cause="evicted")  # type: ignore[arg-type]
    rig.host.remove([metas[3].hash], cause="evicted")  # type: ignore[arg-type]
    assert rig.get(metas) == [DEVICE, HOST, DEVICE, REDIS, DEVICE, DEVICE]


def test_room_for_an_earlier_block_is_not_made_by_evicting_a_later_one_in_the_device() -> None:
    rig = Rig(device_blocks=4)
    metas = chain(2)
    rig.device.write(metas[1:], payloads(metas[1:]))
    for token in range(1, 4):
        rig.store.release(rig.compute(chain(1, first_token=token)))
    assert rig.host is not None
    rig.host.write(metas[:1], payloads(metas[:1]))
    assert rig.get(metas) == [HOST, DEVICE]
    rig.store.close()


def test_room_for_an_earlier_block_is_not_made_by_evicting_a_later_one_in_host() -> None:
    rig = Rig(host_slots=4)
    metas = chain(2)
    assert rig.host is not None
    rig.host.write(metas[1:], payloads(metas[1:]))
    others = [chain(1, first_token=token)[0] for token in range(1, 4)]
    rig.host.write(others, payloads(others))
    rig.shared.write(metas[:1], payloads(metas[:1]))
    assert rig.get(metas) == [REDIS, HOST]
    rig.store.close()


def test_what_was_read_from_the_shared_tier_is_in_device_and_host_afterwards(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    assert rig.get(metas) == [REDIS] * 3
    assert rig.host is not None
    assert rig.host.match(names(metas)) == 3
    assert rig.get(metas) == [DEVICE] * 3


def test_a_waiting_sequence_sees_no_block_before_its_bytes_are_whole(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    acquisition = rig.acquire(metas)
    rig.store.pump()
    assert not acquisition.done
    assert rig.store.match(names(metas)) == []
    rig.store.check()
    rig.shared.reads_open.set()
    assert rig.finish(acquisition).fates == [REDIS] * 3
    rig.same_bytes(acquisition, metas)
    rig.store.release(acquisition.block_ids)


def test_a_short_read_shortens_the_prefix_and_frees_the_rest(rig: Rig) -> None:
    metas = chain(5)
    rig.shared.write(metas, payloads(metas))
    rig.shared.read_limit = 2
    assert rig.get(metas) == [REDIS] * 2
    assert rig.device.available == rig.device_blocks
    assert rig.store.match(names(metas)) == [DEVICE] * 2


def test_a_shared_tier_that_raises_is_a_miss(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    metas = chain(2)
    rig.shared.raises = RuntimeError("broken")
    assert rig.get(metas) == []
    assert "load failed" in caplog.text


def test_a_block_lost_between_tiers_shortens_the_prefix(rig: Rig) -> None:
    metas = chain(4)
    rig.shared.write(metas, payloads(metas))
    rig.shared.lose([metas[1].hash])
    assert rig.get(metas) == [REDIS]


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        (ReadTiers(device=False, host=False, shared=False), []),
        (ReadTiers(device=False, shared=False), [HOST] * 3),
        (ReadTiers(device=False, host=False), [REDIS] * 3),
        (ReadTiers(host=False, shared=False), [DEVICE] * 3),
    ],
)
def test_only_the_tiers_that_may_be_read_are_read(rig: Rig, reads: ReadTiers, expected: list[TierName]) -> None:
    metas = chain(3)
    rig.cache(metas)
    assert rig.get(metas, reads=reads) == expected
    rig.store.check()


def test_two_sequences_that_miss_the_same_blocks_load_them_once(rig: Rig) -> None:
    metas = chain(4)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    first, second = rig.acquire(metas), rig.acquire(metas[:3])
    rig.shared.reads_open.set()
    for acquisition in (rig.finish(first), rig.finish(second)):
        rig.same_bytes(acquisition, metas)
        assert set(acquisition.fates) == {REDIS}
    assert (len(first.block_ids), second.block_ids) == (4, first.block_ids[:3])
    assert rig.shared.reads == [names(metas)]
    rig.store.release(first.block_ids)
    rig.store.release(second.block_ids)


def test_a_longer_prompt_waits_for_the_common_part_and_loads_its_own(rig: Rig) -> None:
    metas = chain(5)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    first, second = rig.acquire(metas[:2]), rig.acquire(metas)
    rig.shared.reads_open.set()
    assert len(rig.finish(first).block_ids) == 2
    assert rig.finish(second).fates == [REDIS] * 5
    rig.same_bytes(second, metas)
    assert rig.shared.reads == [names(metas[:2]), names(metas[2:])]
    rig.store.release(first.block_ids)
    rig.store.release(second.block_ids)


def test_who_waits_for_a_load_that_comes_short_does_not_ask_again(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.reads_open.clear()
    first, second = rig.acquire(metas), rig.acquire(metas)
    rig.shared.reads_open.set()
    assert rig.finish(first).block_ids == rig.finish(second).block_ids == []
    assert len(rig.shared.reads) == 1


def test_a_cancelled_acquisition_gives_everything_back(rig: Rig) -> None:
    metas = chain(4)
    rig.store.release(rig.compute(metas[:1]))
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    acquisition = rig.acquire(metas)
    acquisition.cancel()
    acquisition.cancel()
    assert acquisition.done
    assert acquisition.block_ids == []
    rig.store.check()
    rig.shared.reads_open.set()
    rig.store.wait(30)
    rig.store.pump()
    assert rig.device.available == rig.device_blocks
    assert rig.store.match(names(metas), ReadTiers(host=False)) == [DEVICE]


def test_who_waits_for_a_cancelled_load_still_gets_it(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    first, second = rig.acquire(metas), rig.acquire(metas)
    first.cancel()
    rig.shared.reads_open.set()
    assert rig.finish(second).fates == [REDIS] * 3
    rig.same_bytes(second, metas)
    rig.store.release(second.block_ids)
    assert rig.device.available == rig.device_blocks


def test_with_little_room_fewer_blocks_are_loaded(rig: Rig) -> None:
    metas = chain(6)
    rig.cache(metas)
    rig.device.clear()
    held = rig.store.allocate(rig.device_blocks - 2)
    assert held is not None
    assert rig.get(metas) == [HOST] * 2
    rig.store.release(held)


def test_a_name_that_is_held_already_stays_where_it_is(rig: Rig) -> None:
    metas = chain(2)
    first, second = rig.compute(metas), rig.compute(metas)
    again = rig.acquire(metas)
    assert again.block_ids == first
    for block_ids in (first, second, again.block_ids):
        rig.store.release(block_ids)
    rig.store.check()
    assert rig.device.stats().blocks == 2


def test_blocks_that_load_slower_than_they_compute_are_computed(rig: Rig) -> None:
    metas = chain(4)
    rig.cache(metas)
    rig.device.clear()
    assert rig.host is not None
    rig.host.clear()
    for tier in (HOST, REDIS):
        rig.store._promoter.sources[tier].observe(4, 8.0)
    assert rig.get(metas, compute_ms=lambda first, count: 1.0 * count) == []
    assert rig.get(metas, compute_ms=lambda first, count: 3.0 * count) == [REDIS] * 4


def test_an_old_estimate_is_measured_again_by_a_few_blocks(rig: Rig) -> None:
    metas = chain(6)
    rig.shared.write(metas, payloads(metas))
    rig.store._promoter.sources[REDIS].observe(1, 1e6)
    fast = {"compute_ms": lambda first, count: 1.0 * count}
    assert rig.get(metas, **fast) == []
    rig.clock.now += 11.0
    assert rig.get(metas, **fast) == [REDIS] * 6
    assert [len(read) for read in rig.shared.reads] == [4, 2], "the rest follows once it has shown to be fast"


def test_a_read_may_be_late_by_a_slack_but_not_take_longer_than_computing(rig: Rig) -> None:
    rig.get(chain(4), compute_ms=lambda first, count: 500.0 * count)
    rig.store._promoter.sources[REDIS].observe(4, 40.0)
    for token, block_ms in enumerate((500.0, 0.0, 15.0), start=1):
        rig.get(chain(4, first_token=token), compute_ms=lambda first, count, block_ms=block_ms: block_ms * count)
    told = [FIRST_TRY_S, 0.04 + DEFAULT_SLACK_S, 0.04 + DEFAULT_SLACK_S, 0.06]
    assert rig.shared.deadlines == pytest.approx([seconds - 0.01 for seconds in told], rel=0.3)


def test_a_full_queue_drops_the_tail_and_says_so(rig: Rig) -> None:
    rig.shared.writes_open.clear()
    metas = chain(8)
    rig.store.release(rig.compute(metas))
    assert rig.store.stats()[REDIS].store_failures == {"queue_full": 2}  # of 8, half of 12 slots fit
    rig.shared.writes_open.set()
    assert rig.store.flush(30)
    assert set(rig.shared.held()) == set(names(metas[:6]))


def test_without_a_host_tier_copies_wait_for_the_shared_one() -> None:
    rig = Rig(host_slots=0)
    rig.shared.writes_open.clear()
    metas = chain(3)
    rig.store.release(rig.compute(metas))
    rig.store.allocate(rig.device_blocks)  # overwrites the blocks, with NaN
    rig.shared.writes_open.set()
    assert rig.store.flush(30)
    assert rig.shared.held() == {name: bytes(payload(name)) for name in names(metas)}
    rig.store.close()


def test_close_flushes_what_is_queued(rig: Rig) -> None:
    metas = chain(3)
    rig.store.release(rig.compute(metas))
    rig.store.close(flush_s=30)
    assert len(rig.shared._stored) == 3


def test_the_default_ttl_and_a_blocks_own_ttl_hold(rig: Rig) -> None:
    own, default = chain(1, ttl_s=10.0), chain(1, first_token=1)
    rig.cache(own)
    rig.cache(default)
    rig.clock.now += 11.0
    rig.store.pump()
    assert rig.store.match(names(own)) == []
    assert rig.store.match(names(default)) == [DEVICE]
    rig.clock.now += TTL
    rig.store.pump()
    assert rig.store.match(names(default)) == []


def test_a_block_hit_only_in_the_device_for_three_ttls_is_still_in_the_shared_tier(rig: Rig) -> None:
    metas = chain(3)
    rig.cache(metas)
    for _ in range(10):
        rig.clock.now += 0.3 * TTL
        assert rig.get(metas) == [DEVICE] * 3
        rig.settle_refreshes()
    assert set(rig.shared.held()) == set(names(metas))
    assert rig.host is not None
    assert rig.host.match(names(metas)) == 3


def test_a_use_shortly_after_a_refresh_still_lengthens_the_shared_ttl(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    rig.clock.now += 0.2 * TTL
    rig.get(metas)
    rig.settle_refreshes()
    assert rig.shared.touched == []
    rig.clock.now += 0.1 * TTL
    rig.settle_refreshes()
    assert rig.shared.touched == [names(metas)]
    rig.clock.now += 0.8 * TTL
    assert set(rig.shared.held()) == set(names(metas))


def test_refreshes_are_at_most_one_in_a_quarter_of_the_ttl(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    for _ in range(100):
        rig.clock.now += 0.01 * TTL
        rig.get(metas)
        rig.settle_refreshes()
    assert len(rig.shared.touched) == 4


def test_a_block_that_the_shared_tier_lost_is_written_again_when_it_is_used(rig: Rig) -> None:
    metas = chain(3)
    rig.cache(metas)
    rig.shared.lose(names(metas[1:]))
    rig.clock.now += 0.3 * TTL
    rig.get(metas)
    rig.settle_refreshes()
    assert rig.shared.held() == {name: bytes(payload(name)) for name in names(metas)}
    assert BlockRemoved(REDIS, tuple(short(name) for name in names(metas[1:])), "absent") in rig.store.drain_events()


def test_a_device_hit_keeps_the_block_recent_in_host(rig: Rig) -> None:
    metas = chain(4)
    rig.cache(metas)
    for token in range(1, 4):
        rig.get(metas)
        rig.cache(chain(4, first_token=token))
    assert rig.host is not None
    assert rig.host.match(names(metas)) == 4


def test_pieces_of_a_chain_committed_one_by_one_leave_from_the_tail(rig: Rig) -> None:
    metas = chain(6)
    block_ids = [block_id for meta in metas for block_id in rig.compute([meta])]
    rig.store.release(block_ids)
    other = rig.store.allocate(5)
    assert other is not None
    assert rig.store.match(names(metas), ReadTiers(host=False)) == [DEVICE] * 3
    assert rig.host is not None
    others = [chain(1, first_token=token)[0] for token in range(1, 10)]
    assert rig.store.flush(30)
    rig.host.write(others, payloads(others))
    assert rig.host.match(names(metas)) == 3


def test_clear_drops_local_blocks_and_leaves_the_shared_tier(rig: Rig) -> None:
    metas = chain(3)
    rig.cache(metas)
    assert rig.store.clear() == {DEVICE: 3, HOST: 3}
    assert rig.store.match(names(metas)) == []
    assert rig.get(metas) == [REDIS] * 3


def test_clear_of_a_root_in_all_tiers_spares_the_others(rig: Rig) -> None:
    mine, others = chain(3), chain(2, root=OTHER_ROOT)
    rig.cache(mine)
    rig.cache(others)
    assert rig.store.clear(root=OTHER_ROOT, shared=True) == {DEVICE: 2, HOST: 2, REDIS: 2}
    assert rig.get(others) == []
    assert rig.get(mine) == [DEVICE] * 3


def test_clear_of_a_prefix_finds_followers_whose_predecessor_left_the_tier(rig: Rig) -> None:
    metas = chain(5)
    rig.cache(metas)
    rig.device.remove([metas[2].hash], cause="evicted")  # type: ignore[arg-type]
    assert rig.store.clear(prefix=metas[1].hash) == {DEVICE: 3, HOST: 4}
    assert rig.store.match(names(metas)) == [DEVICE]


def test_blocks_loaded_without_a_known_root_are_dropped_by_a_clear_of_any(rig: Rig) -> None:
    metas = chain(2)
    rig.shared.write(metas, payloads(metas))
    rig.get(metas, root=None)
    rig.store.clear(root=ROOT)
    assert rig.store.match(names(metas)) == []


@pytest.mark.parametrize("scope", [{}, {"root": ROOT}, {"prefix": chain(1)[0].hash}])
def test_queued_writes_of_cleared_blocks_are_dropped(
    rig: Rig, scope: dict[str, BlockHash], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.lane.CANCEL_WAIT_S", 0.0)  # nothing settles before the gate opens
    busy, metas = chain(1, first_token=7), chain(3)
    rig.shared.writes_open.clear()
    rig.store.release(rig.compute(busy))
    while not rig.store._lanes[REDIS]._writer._writing:
        pass
    rig.store.release(rig.compute(metas))
    rig.store.clear(**scope)
    rig.shared.writes_open.set()
    assert rig.store.flush(30)
    assert set(rig.shared.held()) == (set(names(busy)) if "prefix" in scope else set())


def test_a_write_that_clear_overtakes_leaves_nothing_in_the_shared_tier(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.lane.CANCEL_WAIT_S", 0.0)  # the worst case: clear gives up waiting
    metas = chain(2)
    rig.shared.writes_open.clear()
    rig.store.release(rig.compute(metas))
    while not rig.store._lanes[REDIS]._writer._writing:
        pass
    rig.store.clear(shared=True)
    rig.shared.writes_open.set()
    assert rig.store.flush(30)
    assert rig.shared.held() == {}


def test_a_load_that_clear_overtakes_arrives_nowhere(rig: Rig) -> None:
    metas = chain(3)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    acquisition = rig.acquire(metas)
    while not rig.shared.reads:
        pass
    rig.store.clear(root=ROOT)
    rig.shared.reads_open.set()
    assert rig.finish(acquisition).block_ids == []
    assert rig.store.match(names(metas)) == []


def test_a_running_sequence_keeps_its_blocks_when_they_are_cleared(rig: Rig) -> None:
    metas = chain(2)
    block_ids = rig.compute(metas)
    rig.store.clear()
    assert [bytes(view) for view in rig.device.payloads(block_ids)] == [bytes(payload(name)) for name in names(metas)]
    rig.store.release(block_ids)
    assert rig.device.available == rig.device_blocks


def test_events_and_snapshot_tell_the_same(rig: Rig) -> None:
    rig.cache(chain(3))
    rig.cache(chain(2, first_token=1))
    from_events = {
        (event.tier, name)
        for event in rig.store.drain_events()
        if isinstance(event, BlockStored)
        for name in event.hashes
    }
    from_snapshot = {(event.tier, name) for event in rig.store.snapshot() for name in event.hashes}
    assert from_events == from_snapshot
    assert len(from_snapshot) == 15


def test_a_snapshot_keeps_the_events_for_others_and_includes_them(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    rig.store.drain_events()
    rig.device.remove(names(metas), cause="evicted")  # type: ignore[arg-type]
    rig.cache(chain(1, first_token=1))
    known = {(event.tier, name) for event in rig.store.snapshot() for name in event.hashes}
    before, events = set(known), rig.store.drain_events()
    assert BlockRemoved(DEVICE, tuple(short(name) for name in names(metas)), "evicted") in events
    for event in events:
        names_told = {(event.tier, name) for name in getattr(event, "hashes", ())}
        known = known | names_told if isinstance(event, BlockStored) else known - names_told
    assert known == before


def test_a_block_read_from_the_shared_tier_becomes_known_there_with_its_ttl(rig: Rig) -> None:
    metas = chain(2, ttl_s=50.0)
    rig.shared.write(metas, payloads(metas))
    rig.shared.drain_events()
    rig.get(metas, ttl_s=5.0)
    stored = [event for event in rig.store.drain_events() if event.tier is REDIS]
    assert stored == [BlockStored(REDIS, tuple(short(name) for name in names(metas)), None, 50.0)]
    assert [meta.ttl_s for meta in rig.device.metas()] == [50.0, 50.0]
    assert [event.ttl_s for event in rig.store.snapshot() if event.tier is REDIS] == [50.0]


def test_a_block_that_is_known_to_be_in_the_shared_tier_is_not_written_again(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    assert rig.host is not None
    rig.store.drain_events()
    rig.device.clear()
    rig.host.clear()
    rig.cache(metas)
    assert rig.written() == names(metas)


@pytest.mark.parametrize("scope", [{}, {"root": ROOT}, {"prefix": chain(1)[0].hash}])
def test_after_a_clear_blocks_are_written_again_as_another_worker_cleared_the_shared_tier(
    rig: Rig, scope: dict[str, BlockHash]
) -> None:
    metas = chain(2)
    rig.cache(metas)
    rig.store.drain_events()
    rig.store.clear(**scope)
    rig.shared.lose(names(metas))
    assert not [event for event in rig.store.snapshot() if event.tier is REDIS]
    rig.cache(metas)
    assert rig.written() == names(metas) * 2


def test_a_clear_of_a_root_forgets_nothing_of_another(rig: Rig) -> None:
    mine, others = chain(2), chain(2, root=OTHER_ROOT)
    rig.cache(mine)
    rig.cache(others)
    rig.store.clear(root=OTHER_ROOT)
    known = [event.hashes for event in rig.store.snapshot() if event.tier is REDIS]
    assert known == [tuple(short(name) for name in names(mine))]


def test_a_shared_tier_that_cannot_be_cleared_is_told_after_the_local_ones_were(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> int:
        raise TierError("down")

    metas = chain(2)
    rig.cache(metas)
    monkeypatch.setattr(rig.shared, "clear", fail)
    with pytest.raises(TierError, match="down"):
        rig.store.clear(shared=True)
    assert rig.store.match(names(metas)) == []
    assert [rig.store.stats()[tier].removals for tier in (DEVICE, HOST)] == [{"cleared": 2}] * 2
    assert names(metas)[0] not in rig.store._lanes[REDIS]._schedule._uses
    assert not [event for event in rig.store.snapshot() if event.tier is REDIS]


def test_a_hit_with_a_longer_ttl_prolongs_the_block_in_every_tier(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    rig.get(metas, ttl_s=10 * TTL)
    rig.settle_refreshes()
    rig.get(metas, ttl_s=1.0)
    rig.clock.now += 9 * TTL
    rig.store.pump()
    assert rig.host is not None
    assert rig.store.match(names(metas)) == [DEVICE] * 2
    assert rig.host.match(names(metas)) == 2
    assert set(rig.shared.held()) == set(names(metas))


def fixed(rig: Rig, left_s: float) -> Lifetime:
    return Lifetime(0.0, rig.clock.now + left_s)


def with_lifetime(metas: list[BlockMeta], lifetime: Lifetime) -> list[BlockMeta]:
    return [replace(meta, ttl_s=lifetime.ttl_s, until=lifetime.until) for meta in metas]


def everywhere(rig: Rig, metas: list[BlockMeta]) -> tuple[int, int, int]:
    """How many of them device, host and shared tier hold."""
    rig.store.pump()
    assert rig.host is not None
    held = set(rig.shared.held())
    return rig.device.match(names(metas)), rig.host.match(names(metas)), sum(name in held for name in names(metas))


def test_hits_that_name_no_lifetime_leave_a_fixed_end_in_every_tier(rig: Rig) -> None:
    metas = with_lifetime(chain(2), fixed(rig, TTL))
    rig.cache(metas)
    for _ in range(3):
        rig.clock.now += 0.3 * TTL
        assert rig.get(metas) == [DEVICE] * 2
        rig.settle_refreshes()
    rig.clock.now += 0.15 * TTL
    assert everywhere(rig, metas) == (0, 0, 0)


def test_a_hit_that_names_a_later_end_moves_it_in_every_tier_and_an_earlier_one_does_not(rig: Rig) -> None:
    metas = with_lifetime(chain(2), fixed(rig, TTL))
    rig.cache(metas)
    rig.get(metas, lifetime=fixed(rig, 3 * TTL))
    rig.get(metas, lifetime=fixed(rig, 2 * TTL))
    rig.settle_refreshes()
    rig.clock.now += 2.9 * TTL
    assert everywhere(rig, metas) == (2, 2, 2)
    rig.clock.now += 0.2 * TTL
    assert everywhere(rig, metas) == (0, 0, 0)


def test_a_block_read_from_the_shared_tier_keeps_its_end_and_tells_what_is_left(rig: Rig) -> None:
    metas = with_lifetime(chain(2), fixed(rig, 50.0))
    rig.shared.write(metas, payloads(metas))
    rig.shared.drain_events()
    rig.clock.now += 20.0
    rig.get(metas)
    assert rig.device.metas() == metas
    stored = [event for event in rig.store.drain_events() if event.tier is REDIS]
    assert stored == [BlockStored(REDIS, tuple(short(name) for name in names(metas)), None, 30.0)]


def test_a_block_that_is_loaded_gets_the_longer_lifetime_of_its_own_and_its_readers(rig: Rig) -> None:
    metas = chain(2, ttl_s=50.0)
    rig.shared.write(metas, payloads(metas))
    ends = rig.clock.now + 900.0
    assert rig.get(metas, lifetime=Lifetime(20.0, ends)) == [REDIS] * 2
    assert rig.host is not None
    for tier in (rig.device, rig.host):
        assert [meta.lifetime for meta in tier.metas()] == [Lifetime(50.0, ends)] * 2


def test_the_list_tells_how_long_the_last_copy_lives(rig: Rig) -> None:
    metas = with_lifetime(chain(1), fixed(rig, 50.0))
    endless, short_lived = chain(1, first_token=1), chain(1, first_token=2, ttl_s=10.0)
    for each in (metas, short_lived):
        rig.cache(each)
    rig.clock.now += 5.0
    assert rig.host is not None
    rig.host.touch(names(short_lived))
    rig.host.write(with_lifetime(endless, Lifetime(None)), payloads(endless))
    left = {block.meta.hash: block.ttl_left_s for block in rig.store.list_blocks()}
    assert left == {metas[0].hash: 45.0, short_lived[0].hash: 10.0, endless[0].hash: None}


def test_committing_a_held_block_with_a_longer_ttl_prolongs_it_in_every_tier(rig: Rig) -> None:
    metas, longer = chain(1), chain(1, ttl_s=10 * TTL)
    rig.cache(metas)
    rig.store.release(rig.compute(longer))
    rig.settle_refreshes()
    rig.clock.now += 9 * TTL
    rig.store.pump()
    assert rig.host is not None
    assert (rig.store.match(names(metas)), rig.host.match(names(metas))) == ([DEVICE], 1)
    assert set(rig.shared.held()) == set(names(metas))


def test_a_question_that_finds_nothing_evicts_nothing(rig: Rig) -> None:
    metas = chain(8)
    rig.cache(metas[:8])
    assert rig.get(chain(8, first_token=1)) == []
    assert rig.store.match(names(metas), ReadTiers(host=False)) == [DEVICE] * 8


def test_a_load_leaves_a_few_blocks_to_sequences_that_run() -> None:
    rig = Rig(device_blocks=128, host_slots=0)
    metas = chain(128)
    rig.shared.write(metas, payloads(metas))
    assert len(rig.get(metas)) == 126
    rig.store.close()


def test_a_cancelled_load_frees_its_blocks_at_once(rig: Rig) -> None:
    metas = chain(8)
    rig.shared.write(metas, payloads(metas))
    rig.shared.reads_open.clear()
    acquisition = rig.acquire(metas)
    acquisition.cancel()
    whole = rig.store.allocate(rig.device_blocks)
    assert whole is not None
    rig.shared.reads_open.set()
    rig.store.wait(30)
    rig.store.pump()
    rig.store.release(whole)


def test_a_refresh_without_an_answer_says_nothing_and_is_tried_again_soon(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    rig.store.drain_events()
    rig.clock.now += 0.3 * TTL
    rig.shared.healthy = False
    rig.get(metas)
    rig.settle_refreshes()
    assert not [event for event in rig.store.drain_events() if event.tier is REDIS]
    rig.shared.healthy = True
    rig.clock.now += 6.0
    rig.settle_refreshes()
    assert rig.shared.touched == [names(metas)]
    assert rig.written() == names(metas)


def test_after_the_shared_tier_was_emptied_a_hot_block_is_written_again_at_its_next_use(rig: Rig) -> None:
    metas = chain(2)
    rig.cache(metas)
    rig.get(metas)
    rig.shared.clear()
    rig.store.pump()
    rig.get(metas)
    rig.settle_refreshes()
    assert set(rig.shared.held()) == set(names(metas))


def test_a_block_whose_write_failed_is_written_at_its_next_use(rig: Rig) -> None:
    metas = chain(2)
    rig.shared.raises = RuntimeError("broken")
    rig.cache(metas)
    rig.shared.raises = None
    rig.store.pump()
    rig.get(metas)
    rig.settle_refreshes()
    assert set(rig.shared.held()) == set(names(metas))


def test_an_answer_of_the_breaker_is_no_measurement(rig: Rig) -> None:
    rig.shared.healthy = False
    rig.get(chain(2))
    assert not rig.store._promoter.sources[REDIS].estimate.measured
    rig.shared.healthy = True
    rig.get(chain(2))
    assert rig.store._promoter.sources[REDIS].estimate.measured


def test_measured_reads_are_reported(rig: Rig) -> None:
    assert rig.store.read_ms() == {HOST: (0.0, 0.0), REDIS: (0.0, 0.0)}
    rig.store._promoter.sources[REDIS].observe(2, 4.0)
    latency_ms, block_ms = rig.store.read_ms()[REDIS]
    assert latency_ms + 2 * block_ms == pytest.approx(4.0)


def test_wait_returns_when_a_read_has_finished(rig: Rig) -> None:
    rig.shared.reads_open.clear()
    acquisition = rig.acquire(chain(2))
    rig.store.wait(0.0)
    assert not acquisition.done
    rig.shared.reads_open.set()
    rig.store.wait(30)
    rig.store.pump()
    assert acquisition.done


def test_the_time_of_a_load_is_told(rig: Rig) -> None:
    rig.shared.reads_open.clear()
    acquisition = rig.acquire(chain(2))
    rig.clock.now += 0.25
    rig.shared.reads_open.set()
    assert rig.finish(acquisition).load_ms == pytest.approx(250.0)
