"""Write-back: what host evicts goes down, and what it still holds at the end; nothing else does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.acquisition import ReadTiers
from kvstore.admission import make_admission
from kvstore.blocks import BlockHash
from kvstore.chains import prefixes_first
from kvstore.device import DeviceTier
from kvstore.events import RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.store import TieredStore
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, ROOT, ManualClock, chain, names, payload, payloads
from tests.kvstore.fake_tier import FakeSharedTier

torch.set_num_threads(1)
HOST, DISK, REDIS = TierName.HOST, TierName.DISK, TierName.REDIS
NBYTES = LAYOUT.block_nbytes
HOST_SLOTS = 6
TTL = 100.0


class Disk(HostTier):
    """A local tier below host that remembers in which order it was written."""

    name = TierName.DISK

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        count = super().write(metas, payloads)
        self.written = [*getattr(self, "written", []), *names(metas)[:count]]
        return count


class Rig:
    def __init__(self, *, disk: str = "on_eviction", shared: str | None = None, queue_blocks: int = 64) -> None:
        self.clock = ManualClock()
        self.device = DeviceTier(LAYOUT, 40 * NBYTES, clock=self.clock, poison=True)
        self.host = HostTier(LAYOUT, HOST_SLOTS * NBYTES, clock=self.clock)
        self.disk = Disk(LAYOUT, 60 * NBYTES, clock=self.clock)
        self.disk.written = []
        self.shared = FakeSharedTier(self.clock)
        self.store = TieredStore(
            LAYOUT,
            self.device,
            self.host,
            self.shared,
            disk=self.disk,
            clock=self.clock,
            default_ttl_s=TTL,
            admission=make_admission(disk),
            shared_admission=None if shared is None else make_admission(shared),
            queue_bytes=queue_blocks * NBYTES,
        )
        self.closed = False

    def compute(self, metas: Sequence[BlockMeta]) -> None:
        """Compute, release, and forget in the device."""
        block_ids = self.store.allocate(len(metas))
        assert block_ids is not None
        self.device.inject(block_ids, payloads(metas))
        self.store.commit(block_ids, metas)
        self.store.release(block_ids)
        self.device.clear()

    def settle(self) -> None:
        for _ in range(3):
            self.store.pump()
            assert self.store.flush(60)

    def load(self, metas: Sequence[BlockMeta]) -> list[TierName]:
        acquisition = self.store.acquire(
            names(metas), reads=ReadTiers(), compute_ms=lambda first, count: 1e9, root=metas[0].root
        )
        while not acquisition.done:
            self.store.wait(60)
            self.store.pump()
        found = [bytes(view) for view in self.device.payloads(acquisition.block_ids)]
        assert found == [bytes(payload(name)) for name in names(metas)[: len(found)]]
        self.store.release(acquisition.block_ids)
        self.device.clear()
        return acquisition.fates

    def below(self) -> set[BlockHash]:
        held = set(names(self.disk.metas()))
        for view in self.disk.view(held):
            with view:
                assert bytes(view.payload) == bytes(payload(view.meta.hash))
        return held

    def failures(self, tier: TierName) -> int:
        return self.store.stats()[tier].store_failures.get("queue_full", 0)

    def close(self, flush_s: float) -> None:
        self.closed = True
        self.store.close(flush_s=flush_s)


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def new(**options: object) -> Rig:
        made.append(Rig(**options))  # type: ignore[arg-type]
        return made[-1]

    yield new
    for rig in made:
        rig.shared.writes_open.set()
        if not rig.closed:
            rig.store.check()
            rig.close(0.0)


def test_nothing_is_written_while_everything_fits_and_then_what_had_to_go(make: Callable[..., Rig]) -> None:
    rig, old, new = make(), chain(4), chain(4, first_token=50)
    rig.compute(old)
    rig.settle()
    assert (rig.below(), rig.shared.held()) == (set(), {})
    rig.compute(new)
    rig.settle()
    assert rig.below() == set(names(old[2:])) == set(rig.shared.held())
    rig.compute(chain(2, first_token=90))
    rig.settle()
    assert rig.below() == set(names(old)), "now the prefix too, which makes them worth reading"
    assert rig.load(old) == [DISK] * 4


def test_using_a_block_writes_nothing_and_losing_it_below_neither(make: Callable[..., Rig]) -> None:
    rig, metas = make(), chain(3)
    rig.compute(metas)
    for _ in range(3):
        rig.load(metas)
        rig.settle()
        rig.clock.now += TTL / 3
    assert rig.below() == set()
    assert rig.shared.touched == [], "it need not be asked for what it was never given"
    rig.compute(chain(HOST_SLOTS, first_token=50))
    rig.settle()
    rig.load(metas)
    rig.disk.remove(names(metas), RemovalCause.EVICTED)
    rig.clock.now += TTL / 3
    rig.load(metas)
    rig.settle()
    assert not rig.below() & set(names(metas))


def test_what_is_held_below_already_is_not_written_again(make: Callable[..., Rig]) -> None:
    rig, one, other = make(), chain(HOST_SLOTS), chain(HOST_SLOTS, first_token=50)
    rig.compute(one)
    for _ in range(3):
        for metas in (other, one):
            rig.load(metas) or rig.compute(metas)
            rig.settle()
    assert sorted(rig.disk.written) == sorted(names(one) + names(other))


@pytest.mark.parametrize("way", ["evicted", "closed"])
def test_a_block_goes_down_with_its_whole_lifetime_and_a_hit_below_renews_it(
    make: Callable[..., Rig], way: str
) -> None:
    day = 864 * TTL
    rig, metas = make(), chain(2, ttl_s=day)
    rig.compute(metas)
    rig.clock.now += day - 1.0
    if way == "evicted":
        rig.compute(chain(HOST_SLOTS, first_token=50))
        rig.settle()
        assert rig.load(metas) == [DISK] * 2
        rig.clock.now += day - 1.0
        rig.settle()
    else:
        assert rig.store._write_back is not None
        rig.store._write_back.finish(time.monotonic() + 60)
        rig.settle()
    assert rig.disk.match(names(metas)) == 2
    assert {meta.ttl_s for meta in rig.disk.metas() if meta.hash in names(metas)} == {day}
    assert set(rig.disk.ttl_left_s(names(metas)).values()) <= {1.0, day}


def test_what_has_expired_does_not_come_back_by_being_evicted(make: Callable[..., Rig]) -> None:
    rig, metas = make(), chain(HOST_SLOTS)
    rig.compute(metas)
    rig.clock.now += TTL + 1
    rig.compute(chain(HOST_SLOTS, first_token=50))
    rig.settle()
    assert rig.below() == set()


def test_blocks_that_a_load_drives_out_of_host_go_down_too(make: Callable[..., Rig]) -> None:
    rig, metas, loaded = make(), chain(HOST_SLOTS), chain(HOST_SLOTS, first_token=50)
    rig.shared.write(loaded, payloads(loaded))
    rig.compute(metas)
    assert rig.load(loaded) == [REDIS] * HOST_SLOTS
    rig.settle()
    assert set(names(metas)) <= rig.below()
    assert rig.disk.match(names(loaded)) == 0, "host holds these now"


def test_too_many_at_once_are_counted_and_not_kept(make: Callable[..., Rig]) -> None:
    rig = make(queue_blocks=2)
    rig.shared.writes_open.clear()
    for start in range(0, 300, 10):
        rig.compute(chain(HOST_SLOTS, first_token=start))
        rig.store.pump()
        assert len(rig.host.gone()) <= 2
    evicted = rig.host.stats().removals[RemovalCause.EVICTED]
    rig.shared.writes_open.set()
    rig.settle()
    assert len(rig.shared.held()) + rig.failures(REDIS) + rig.failures(HOST) == evicted
    assert len(rig.below()) + rig.failures(DISK) + rig.failures(HOST) == evicted
    assert rig.failures(HOST) == rig.host.lost_evicted > 0, "what host had no room to keep counts once"


@pytest.mark.parametrize("scope", [{}, {"root": ROOT}, {"prefix": chain(4)[0].hash}])
def test_what_is_cleared_after_it_was_evicted_arrives_nowhere(
    make: Callable[..., Rig], scope: dict[str, bytes]
) -> None:
    rig, metas, other = make(), chain(4), chain(2, root=OTHER_ROOT)
    rig.compute(other)
    rig.compute(metas)
    rig.compute(chain(HOST_SLOTS, root=OTHER_ROOT, first_token=50))
    assert len(rig.host.gone()) == HOST_SLOTS
    rig.store.clear(**scope)  # type: ignore[arg-type]
    rig.settle()
    assert rig.below() == (set(names(other)) if scope else set())


def test_what_is_cleared_while_it_is_copied_arrives_nowhere(make: Callable[..., Rig]) -> None:
    rig, metas, others = make(), chain(HOST_SLOTS), chain(HOST_SLOTS, first_token=50)
    rig.compute(metas)
    copying, cleared = threading.Event(), threading.Event()
    ask = rig.host._wanted

    def wanted(name: BlockHash) -> bool:
        copying.set()
        assert cleared.wait(30)
        return ask(name)

    rig.host.keep_evicted(8, wanted)
    writer = threading.Thread(target=rig.host.write, args=(others, payloads(others)))  # as an I/O thread does
    writer.start()
    assert copying.wait(30)
    assert set(names(rig.host.gone())) == set(names(metas))
    rig.store.clear()
    cleared.set()
    writer.join()
    assert rig.host.gone() == []
    rig.settle()
    assert rig.below() == set()


def test_a_leased_block_that_only_the_device_holds_is_sent_to_disk_at_once(make: Callable[..., Rig]) -> None:
    rig, metas = make(), chain(2)
    block_ids = rig.store.allocate(2)
    assert block_ids is not None
    rig.device.inject(block_ids, payloads(metas))
    rig.store.commit(block_ids, metas)
    rig.host.remove(names(metas), RemovalCause.EVICTED)
    rig.store.lease(names(metas), None)
    rig.settle()
    assert rig.below() == set(names(metas))
    rig.store.release(block_ids)


def test_each_tier_can_have_a_rule_of_its_own(make: Callable[..., Rig]) -> None:
    rig, metas = make(shared="always"), chain(1)
    rig.compute(metas)
    rig.settle()
    assert (len(rig.below()), len(rig.shared.held())) == (0, 1)
    rig.compute(chain(HOST_SLOTS, first_token=50))
    rig.settle()
    assert rig.below() == set(names(metas))
    other = make(disk="always", shared="on_eviction")
    other.compute(metas)
    other.settle()
    assert (len(other.below()), len(other.shared.held())) == (1, 0)


def test_a_store_that_is_closed_writes_the_rest_latest_chains_first_and_prefixes_first(
    make: Callable[..., Rig],
) -> None:
    rig = make(queue_blocks=2)
    left, right = chain(3), chain(2, first_token=50)
    rig.compute(left)
    rig.compute(right)
    rig.load(left)
    rig.close(60.0)
    assert rig.disk.written == names(left) + names(right)
    assert set(rig.shared.held()) == set(names(left) + names(right))


def test_a_store_that_is_closed_at_once_writes_nothing(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.compute(chain(3))
    rig.close(0.0)
    assert (rig.disk.written, rig.shared.held()) == ([], {})


def test_a_tier_that_hangs_at_the_end_holds_back_no_other_and_no_longer_than_allowed(make: Callable[..., Rig]) -> None:
    rig, metas = make(queue_blocks=2), chain(HOST_SLOTS)
    rig.compute(metas)
    rig.shared.writes_open.clear()
    opener = threading.Timer(20.0, rig.shared.writes_open.set)  # `close` itself waits for the write that runs
    opener.start()
    started = time.monotonic()
    rig.store._write_back.finish(started + 3.0)  # type: ignore[union-attr]
    assert time.monotonic() - started < 15.0
    assert rig.store._lanes[DISK].flush(60)
    assert rig.disk.written == names(metas)
    rig.shared.writes_open.set()
    opener.cancel()


LINKS = st.lists(st.integers(-1, 11), max_size=12)


@given(parents=LINKS, order=st.randoms(use_true_random=False))
def test_every_block_comes_after_its_prefix(parents: list[int], order: object) -> None:
    def named(number: int) -> BlockHash:
        return BlockHash(bytes([number % 256]) * 32)

    metas = [BlockMeta(named(n), named(p if p < n else -1), ROOT, None) for n, p in enumerate(parents)]
    order.shuffle(metas)  # type: ignore[attr-defined]
    found = list(prefixes_first(metas))
    assert sorted(names(found)) == sorted(names(metas))
    place = {meta.hash: at for at, meta in enumerate(found)}
    assert all(place[meta.parent] < place[meta.hash] for meta in metas if meta.parent in place)
    assert list(prefixes_first(found)) == found, "what is in order stays in order"


def test_a_chain_is_shared_on_demand_piece_by_piece_as_the_queue_has_room(make: Callable[..., Rig]) -> None:
    rig, metas, other = make(queue_blocks=2), chain(5), chain(2, first_token=70)
    rig.compute(metas)
    rig.settle()
    assert rig.shared.held() == {}
    for _ in range(50):
        if rig.store.share(names(metas)):
            break
        rig.settle()
        rig.store.drain_events()
    assert set(rig.shared.held()) == set(names(metas))
    assert (rig.below(), rig.failures(REDIS)) == (set(), 0), "disk is of no use to others, and nothing is dropped"
    assert rig.store.share(names(other)), "what this worker does not have is nothing to wait for"


def test_a_tier_that_does_not_answer_is_not_waited_for(make: Callable[..., Rig]) -> None:
    rig, metas = make(), chain(3)
    rig.compute(metas)
    assert not rig.store.share(names(metas))
    rig.shared.healthy = False
    assert rig.store.share(names(metas))
