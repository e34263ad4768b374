"""The disk tier: a state machine with restarts and crashes against a naive model, restarts, times, the folder."""

from __future__ import annotations

import shutil
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.blocks import BlockHash, short
from kvstore.buffers import aligned
from kvstore.codec import BlockCodec
from kvstore.crypto import Keyring, Protection
from kvstore.disk import index as index_module
from kvstore.disk import space as space_module
from kvstore.disk.tier import DiskTier
from kvstore.errors import LayoutError, TierError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause
from kvstore.layout import KVLayout
from kvstore.lifetime import Lifetime
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
    read_verified,
)
from tests.kvstore.disk.disk_for_tests import SLOT, FaultyFiles, NoDirectFiles, Place, capacity, log_file, slab_file

SLOTS = 6


def read_back(tier: DiskTier, hashes: list[BlockHash]) -> int:
    return read_verified(tier, hashes)


class DiskMachine(RuleBasedStateMachine):
    """A naive model: a dict of last uses in order, and of ends of leases."""

    CHAINS = (chain(4, ttl_s=5.0), chain(4, first_token=1), chain(3, root=OTHER_ROOT, ttl_s=2.0))
    LOADED_BY_STARTER = 0  # restored blocks are loaded in the background, or by whoever needs them

    def __init__(self) -> None:
        super().__init__()
        self.loaded_by_starter = space_module.LOADED_BY_STARTER
        space_module.LOADED_BY_STARTER = self.LOADED_BY_STARTER
        self.folder = Path(tempfile.mkdtemp(prefix="warmkv-disk-"))
        self.place = Place(self.folder / "blocks", SLOTS, ManualClock(0.0))
        self.metas = {meta.hash: meta for metas in self.CHAINS for meta in metas}
        self.used: dict[BlockHash, float] = {}  # in order of use; on the wall clock
        self.leases: dict[BlockHash, float] = {}
        self.known: set[bytes] = set()

    def teardown(self) -> None:
        space_module.LOADED_BY_STARTER = self.loaded_by_starter
        self.place.tier.close()
        shutil.rmtree(self.folder)

    @property
    def now(self) -> float:
        return self.place.wall.now

    def leased(self, name: BlockHash) -> bool:
        return self.leases.get(name, self.now) > self.now

    def live(self, name: BlockHash) -> bool:
        ttl_s = self.metas[name].ttl_s
        return name in self.used and (ttl_s is None or self.used[name] + ttl_s > self.now or self.leased(name))

    def leading(self, hashes: list[BlockHash]) -> int:
        return next((i for i, name in enumerate(hashes) if not self.live(name)), len(hashes))

    def renew(self, hashes: list[BlockHash]) -> None:
        for name in reversed(hashes):
            self.used.pop(name, None)
            self.used[name] = self.now

    def forget(self, name: BlockHash) -> None:
        del self.used[name]
        self.leases.pop(name, None)

    def victim(self, protected: set[BlockHash]) -> BlockHash | None:
        """The oldest block that is no prefix of one that stays."""
        stay = {name for name in self.used if name in protected or self.leased(name)}
        for name in list(self.used):
            if name not in stay and not self.continued(name):
                return name
        return None

    def continued(self, name: BlockHash) -> bool:
        return any(self.metas[other].before == name for other in self.used)

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3), count=st.integers(1, 4))
    def write(self, which: list[BlockMeta], start: int, count: int) -> None:
        metas = which[start : start + count]
        protected, fresh, held = set[BlockHash](), [], []
        taken, expected = len(self.used), 0
        for name in names(metas):
            if name in self.used:
                protected.add(name)
                held.append(name)
                self.renew([name])
            elif taken < SLOTS or self.expire():
                taken = len(self.used) + len(fresh) + 1
                fresh.append(name)
            else:
                victim = self.victim(protected)
                if victim is None:
                    break
                self.forget(victim)
                fresh.append(name)
            expected += 1
        assert self.place.tier.write(metas, payloads(metas)) == expected
        self.renew(fresh)
        self.renew(held)

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3), count=st.integers(1, 4))
    def read(self, which: list[BlockMeta], start: int, count: int) -> None:
        wanted = names(which[start : start + count])
        expected = self.leading(wanted)
        assert read_back(self.place.tier, wanted) == expected
        self.renew(wanted[:expected])

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3))
    def touch(self, which: list[BlockMeta], start: int) -> None:
        wanted = names(which[start:])
        self.place.tier.touch(wanted)
        self.renew([name for name in wanted if self.live(name)])

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3), for_s=st.sampled_from([1.0, 4.0, None]))
    def lease(self, which: list[BlockMeta], start: int, for_s: float | None) -> None:
        wanted = [name for name in names(which[start:]) if self.live(name)]
        assert self.place.tier.lease(names(which[start:]), for_s) == len(wanted)
        until = float("inf") if for_s is None else self.now + for_s
        for name in wanted:
            self.leases[name] = max(until, self.leases.get(name, until))

    @rule(which=st.sampled_from(CHAINS))
    def end_leases(self, which: list[BlockMeta]) -> None:
        had = [name for name in names(which) if name in self.used and self.leased(name)]
        assert self.place.tier.end_leases(names(which)) == len(had)
        for name in names(which):
            self.leases.pop(name, None)

    @rule(which=st.sampled_from(CHAINS), start=st.integers(0, 3))
    def remove(self, which: list[BlockMeta], start: int) -> None:
        held = [name for name in names(which[start:]) if name in self.used]
        assert self.place.tier.remove(names(which[start:]), RemovalCause.INVALID) == len(held)
        for name in held:
            self.forget(name)

    @rule(root=st.sampled_from([ROOT, OTHER_ROOT, None]))
    def clear(self, root: BlockHash | None) -> None:
        gone = [name for name in self.used if root in (None, self.metas[name].root)]
        assert self.place.tier.clear(root=root) == len(gone)
        for name in gone:
            self.forget(name)

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.place.wait(seconds)

    @rule()
    def sweep(self) -> None:
        self.place.tier._space.index.load()
        next_s = self.place.tier.sweep()
        self.expire()
        ends = [
            max(self.used[name] + ttl, self.leases.get(name, 0.0)) - self.now
            for name in self.used
            if (ttl := self.metas[name].ttl_s) is not None
        ]
        ends = [end for end in ends if end != float("inf")]
        assert next_s == (pytest.approx(min(ends), abs=1e-5) if ends else None)

    def expire(self) -> bool:
        """Whether something had expired."""
        gone = [name for name in self.used if not self.live(name)]
        for name in gone:
            self.forget(name)
        return bool(gone)

    @rule(down_s=st.sampled_from([0.0, 1.0, 3.0]))
    def restart(self, down_s: float) -> None:
        self.place.restart(down_s=down_s)
        self.come_back()

    @rule(down_s=st.sampled_from([0.0, 1.0]))
    def crash(self, down_s: float) -> None:
        """What was written or removed before is safe; uses are, once somebody has swept."""
        self.sweep()
        self.place.crash(down_s=down_s)
        self.come_back()

    @rule(down_s=st.sampled_from([0.0, 1.0]))
    def crash_at_once(self, down_s: float) -> None:
        """Without a sweep uses are lost: what is held is told by the tier, and must have been held before."""
        before = {name for name in self.used if self.metas[name].ttl_s is None}
        self.place.crash(down_s=down_s)
        self.place.tier._space.index.load()
        self.place.tier.sweep()
        held = {meta.hash for meta in self.place.tier.metas()}
        assert before <= held <= set(self.used)
        self.restore_model(held)

    def restore_model(self, held: set[BlockHash]) -> None:
        """Begin with what is there, used in a known order."""
        for name in [name for name in self.used if name not in held]:
            self.forget(name)
        self.known = {short(name) for name in held}
        self.place.tier.drain_events()
        for metas in self.CHAINS:
            self.touch(metas, 0)

    def come_back(self) -> None:
        self.sweep()
        self.place.tier.drain_events()
        self.known = {short(name) for name in self.used}

    @rule()
    def rewrite_the_log(self) -> None:
        self.place.tier._space.index.rewrite()

    @invariant()
    def agrees_with_the_model(self) -> None:
        tier = self.place.tier
        tier.check()
        for which in self.CHAINS:
            for start in range(len(which)):
                wanted = names(which[start:])
                assert tier.match(wanted) == self.leading(wanted)
        assert {meta.hash for meta in tier.metas()} == set(self.used)
        assert tier.stats().blocks == len(self.used)
        assert tier.stats().leased == sum(self.leased(name) for name in self.used)
        assert tier.stats().problem == ""

    @invariant()
    def events_tell_what_it_holds(self) -> None:
        for event in self.place.tier.drain_events():
            if isinstance(event, BlockStored):
                self.known |= set(event.hashes)
            elif isinstance(event, BlockRemoved):
                self.known -= set(event.hashes)
            elif isinstance(event, AllBlocksCleared):
                self.known.clear()
        assert self.known == {short(name) for name in self.used}
        stored = {name for event in self.place.tier.snapshot() for name in event.hashes}
        assert stored == self.known


class EagerDiskMachine(DiskMachine):
    LOADED_BY_STARTER = 1000


DiskMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
EagerDiskMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestDiskAgainstANaiveModel = DiskMachine.TestCase
TestDiskLoadedAtOnceAgainstANaiveModel = EagerDiskMachine.TestCase


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "blocks")


def test_after_a_restart_all_is_found_read_and_known_by_the_metadata(place: Place) -> None:
    metas = [BlockMeta(m.hash, m.parent, m.root, 60.0, priority=7) for m in chain(4)]
    place.tier.write(metas, payloads(metas))
    tier = place.restart()
    assert tier.match(names(metas)) == 4
    assert [tier.find(name) for name in names(metas)] == metas
    assert read_back(tier, names(metas)) == 4
    assert tier.drain_events() == []
    assert [event.hashes for event in tier.snapshot()] == [tuple(short(name) for name in names(metas))]


def test_recency_is_kept_over_a_restart(place: Place) -> None:
    old, kept = chain(4), chain(4, first_token=1)
    for metas in (kept, old):
        place.tier.write(metas, payloads(metas))
    read_back(place.tier, names(kept))
    tier, new = place.restart(), chain(3, first_token=2)
    tier.write(new, payloads(new))
    assert (tier.match(names(old)), tier.match(names(kept)), tier.match(names(new))) == (1, 4, 3)


@pytest.mark.parametrize("writer_loads", [True, False])
def test_blocks_used_before_all_are_loaded_are_not_evicted_for_those_loaded_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, writer_loads: bool
) -> None:
    monkeypatch.setattr(space_module, "LOADED_BY_STARTER", 0)
    used, idle = chain(4), chain(4, first_token=1)
    for metas in (used, idle):
        place.tier.write(metas, payloads(metas))
    place.tier.close()
    monkeypatch.setattr(index_module.DiskIndex, "load_gently", lambda index: None)  # the background has no time
    if not writer_loads:
        monkeypatch.setattr(index_module.DiskIndex, "load", lambda index: None)
    tier, new = place.open(), chain(3, first_token=2)
    assert tier._space.books.is_loading
    assert read_back(tier, names(used)) == 4
    tier.write(new, payloads(new))
    assert (tier.match(names(used)), tier.match(names(idle))) == (4, 1)
    monkeypatch.undo()
    tier.check()


def test_the_time_that_passed_while_down_counts(place: Place) -> None:
    metas, longer = chain(2, ttl_s=10.0), chain(2, ttl_s=30.0, first_token=1)
    place.tier.write(metas + longer, payloads(metas + longer))
    place.wait(4.0)
    tier = place.restart(down_s=7.0)
    assert (tier.match(names(metas)), tier.match(names(longer))) == (0, 2)
    place.wait(18.0)
    assert tier.match(names(longer)) == 2
    place.wait(1.1)
    assert tier.match(names(longer)) == 0
    assert tier.stats().removals == {"expired": 2}


def test_a_clock_that_was_set_back_lets_a_block_live_one_more_ttl_at_most(place: Place) -> None:
    metas = chain(2, ttl_s=10.0)
    place.tier.write(metas, payloads(metas))
    place.tier.lease(names(metas)[:1], 20.0)
    tier = place.restart(down_s=-1e6)
    assert tier.match(names(metas)) == 2
    place.wait(5.0)
    tier = place.crash()  # the log was corrected at the first start: the second one knows that five seconds passed
    place.wait(5.1)
    assert (tier.match(names(metas)), tier.match(names(metas)[1:])) == (1, 0)
    place.wait(10.0)
    assert tier.match(names(metas)) == 0


def test_a_clock_that_jumps_forward_expires_blocks_and_corrupts_none(place: Place) -> None:
    metas, endless = chain(2, ttl_s=10.0), chain(2, first_token=1)
    place.tier.write(metas + endless, payloads(metas + endless))
    tier = place.restart(down_s=1e9)
    assert tier.match(names(metas)) == 0
    assert read_back(tier, names(endless)) == 2


def test_leases_hold_over_a_restart_by_the_wall_clock(place: Place) -> None:
    metas = chain(8)
    place.tier.write(metas, payloads(metas))
    place.tier.lease(names(metas), 100.0)
    tier, new = place.restart(down_s=90.0), chain(1, first_token=1)
    assert tier.stats().leased == 8
    assert tier.write(new, payloads(new)) == 0
    place.wait(11.0)
    assert tier.write(new, payloads(new)) == 1


def test_a_prolonged_ttl_is_kept_over_a_restart(place: Place) -> None:
    metas = chain(1, ttl_s=10.0)
    place.tier.write(metas, payloads(metas))
    place.tier.prolong(names(metas), Lifetime(50.0))
    tier = place.restart(down_s=40.0)
    assert tier.find(metas[0].hash) == chain(1, ttl_s=50.0)[0]


def test_a_fixed_end_holds_over_a_restart_and_no_use_moves_it(place: Place) -> None:
    metas = chain(2, ttl_s=0.0, until=place.wall.now + 50.0)
    place.tier.write(metas, payloads(metas))
    tier = place.restart(down_s=40.0)
    assert read_back(tier, names(metas)) == 2
    assert tier.ttl_left_s(names(metas)) == {name: pytest.approx(10.0) for name in names(metas)}
    place.wait(9.0)
    assert tier.match(names(metas)) == 2
    place.wait(1.1)
    assert tier.match(names(metas)) == 0
    assert place.restart().match(names(metas)) == 0


@pytest.mark.parametrize("log_is_lost", [False, True])
def test_lifetime_priority_and_turn_are_found_again_with_and_without_the_log(place: Place, log_is_lost: bool) -> None:
    ends = place.wall.now + 50.0
    metas = [replace(meta, priority=60, turn=3) for meta in chain(2, ttl_s=5.0, until=ends)]
    place.tier.write(metas, payloads(metas))
    if log_is_lost:
        place.abandon()
        log_file(place.folder).unlink()
        tier = place._come_back(30.0)
    else:
        tier = place.crash(down_s=30.0)
    assert [tier.find(name) for name in names(metas)] == metas
    assert tier.match(names(metas)) == 2
    place.wait(21.0)
    assert tier.match(names(metas)) == 0


def test_a_fixed_end_that_grew_is_kept_over_a_restart(place: Place) -> None:
    metas = chain(1, ttl_s=10.0)
    place.tier.write(metas, payloads(metas))
    ends = place.wall.now + 90.0
    place.tier.prolong(names(metas), Lifetime(0.0, ends))
    place.tier.prolong(names(metas), Lifetime(0.0, ends - 50.0))
    place.tier.sweep()  # writes it down
    tier = place.crash(down_s=80.0)
    assert tier.find(metas[0].hash) == chain(1, ttl_s=10.0, until=ends)[0]
    place.wait(11.0)
    assert tier.match(names(metas)) == 0


def test_a_wall_clock_that_was_set_back_while_down_does_not_move_a_fixed_end(place: Place) -> None:
    ends = place.wall.now + 50.0
    metas = chain(1, ttl_s=0.0, until=ends)
    place.tier.write(metas, payloads(metas))
    tier = place.restart(down_s=-30.0)
    assert tier.match(names(metas)) == 1
    place.wait(81.0)
    assert tier.match(names(metas)) == 0


def test_restored_blocks_know_their_ends_before_eviction_does(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = chain(2, ttl_s=0.0, until=place.wall.now + 50.0)
    place.tier.write(metas, payloads(metas))
    place.tier.close()
    monkeypatch.setattr(space_module, "LOADED_BY_STARTER", 0)
    monkeypatch.setattr(index_module.DiskIndex, "load_gently", lambda index: None)
    tier = place._come_back(30.0)
    assert tier._space.books.is_loading
    assert tier.ttl_left_s(names(metas)) == {name: pytest.approx(20.0) for name in names(metas)}
    assert tier.match(names(metas)) == 2
    place.wait(21.0)
    assert tier.match(names(metas)) == 0
    monkeypatch.undo()
    tier.check()


def test_what_was_removed_stays_removed_after_a_crash_with_and_without_the_log(place: Place) -> None:
    metas = chain(4)
    place.tier.write(metas, payloads(metas))
    place.tier.remove(names(metas)[2:], RemovalCause.CLEARED)
    assert place.crash().match(names(metas)) == 2
    place.abandon()
    log_file(place.folder).unlink()
    assert place.open().match(names(metas)) == 2
    place.tier.clear()
    place.abandon()
    log_file(place.folder).unlink()
    assert place.open().stats().blocks == 0


def test_a_smaller_folder_keeps_what_fits_and_a_larger_one_all(place: Place) -> None:
    metas = chain(8)
    place.tier.write(metas, payloads(metas))
    place.blocks = 5
    tier = place.restart()
    assert (tier.num_slots, tier.stats().blocks) == (5, 5)
    assert slab_file(place.folder).stat().st_size == capacity(5)
    place.blocks = 20
    tier = place.restart()
    assert (tier.num_slots, tier.stats().blocks) == (20, 5)
    for meta in metas[:5]:
        assert read_back(tier, [meta.hash]) == 1


def test_the_folder_never_takes_more_than_its_bytes(place: Place) -> None:
    for token in range(10):
        metas = chain(5, first_token=token)
        place.tier.write(metas, payloads(metas))
    assert slab_file(place.folder).stat().st_size == capacity(8)
    assert slab_file(place.folder).stat().st_blocks * 512 <= capacity(8)


def test_another_models_blocks_are_kept_beside_ours_up_to_half_of_the_folder(tmp_path: Path) -> None:
    place = Place(tmp_path, blocks=4)
    metas = chain(3)
    place.tier.write(metas, payloads(metas))
    place.tier.close()
    other = BlockCodec(LAYOUT, b"o" * 32)
    with_other = DiskTier(tmp_path, capacity(10), codec=other, clock=place.clock)
    assert with_other.match(names(metas)) == 0
    assert slab_file(tmp_path).stat().st_size + with_other.num_slots * SLOT <= capacity(10)
    with_other.close()
    assert place.open().match(names(metas)) == 3
    place.tier.close()
    small = DiskTier(tmp_path, capacity(7), codec=other, clock=place.clock)  # half of it is less than what we have
    assert not slab_file(tmp_path).exists()
    small.close()


def test_another_models_blocks_go_after_a_week(tmp_path: Path) -> None:
    place = Place(tmp_path, blocks=1)
    place.tier.close()
    stamp = slab_file(tmp_path).stat().st_mtime
    for days, is_kept in ((6, True), (8, False)):
        other = BlockCodec(LAYOUT, b"o" * 32)
        wall = ManualClock(stamp + days * 86400)
        DiskTier(tmp_path, capacity(10), codec=other, clock=place.clock, wall_clock=wall).close()
        assert slab_file(tmp_path).exists() == is_kept


LARGE = KVLayout(layers=4, kv_heads=2, k_dim=64, v_dim=64, dtype="float32", block_size=16)  # 64 KiB
ODD = KVLayout(layers=1, kv_heads=1, k_dim=100, v_dim=99, dtype="float16", block_size=13)  # no whole pages


@pytest.mark.parametrize("layout", [LARGE, ODD], ids=["pages", "odd"])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_blocks_of_any_size_in_any_memory_come_back(
    tmp_path: Path, layout: KVLayout, direct: bool, is_aligned: bool
) -> None:
    def memory() -> memoryview:
        whole = aligned(layout.block_nbytes + 8)
        return whole[: layout.block_nbytes] if is_aligned else whole[8:]

    rng = np.random.default_rng(3)
    codec = BlockCodec(layout, b"n" * 32)
    metas, written, read = chain(5), [memory() for _ in range(5)], [memory() for _ in range(5)]
    for buffer in written:
        buffer[:] = rng.bytes(layout.block_nbytes)
    for _ in range(2):
        tier = DiskTier(tmp_path, 4 << 20, codec=codec, clock=ManualClock(), direct=direct)
        assert tier.write(metas, written) == 5
        assert tier.read(names(metas), read).count == 5
        assert [bytes(buffer) for buffer in read] == [bytes(buffer) for buffer in written]
        tier.check()
        tier.close()


def test_with_a_secret_the_bytes_on_disk_are_not_those_of_the_block(tmp_path: Path) -> None:
    codec = BlockCodec(LAYOUT, b"n" * 32, Keyring({"a": bytes(range(32))}), Protection.ENCRYPT)
    metas = chain(3)
    for _ in range(2):
        tier = DiskTier(tmp_path, capacity(4), codec=codec, clock=ManualClock())
        assert tier.write(metas, payloads(metas)) == 3
        assert read_back(tier, names(metas)) == 3
        tier.close()
    assert bytes(payload(metas[0].hash)) not in slab_file(tmp_path).read_bytes()
    stranger = DiskTier(tmp_path, capacity(4), codec=BlockCodec(LAYOUT, b"n" * 32), clock=ManualClock())
    assert read_back(stranger, names(metas)) == 0
    assert stranger.stats().misses == {"foreign": 1}
    stranger.close()


def test_blocks_stay_whole_while_threads_evict_one_another_and_others_clear(tmp_path: Path) -> None:
    place = Place(tmp_path, blocks=10)
    done, wrong = threading.Event(), []
    chains = [chain(4, first_token=token) for token in range(6)]

    def write(seed: int) -> None:
        for turn in range(60):
            metas = chains[(turn * seed + seed) % 6]
            place.tier.write(metas, payloads(metas))
            if turn % 20 == 19:
                place.tier.clear(root=None if turn % 40 == 19 else ROOT)

    def read() -> None:
        while not done.is_set():
            for metas in chains:
                into = buffers(4)
                count = place.tier.read(names(metas), into).count
                wrong.extend(
                    n for n, b in zip(names(metas)[:count], into, strict=False) if bytes(b) != bytes(payload(n))
                )

    writers = [threading.Thread(target=write, args=(seed,)) for seed in (1, 5)]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert wrong == []
    place.tier.check()
    held = {meta.hash for meta in place.tier.metas()}
    tier = place.crash()
    assert {meta.hash for meta in tier.metas()} == held
    assert all(read_back(tier, [name]) == 1 for name in held)


@pytest.mark.parametrize("short", [4096, 8192])
def test_short_writes_and_reads_are_gone_on_with(tmp_path: Path, short: int) -> None:
    codec = BlockCodec(LARGE, b"n" * 32)
    files = FaultyFiles(short=short)
    tier = DiskTier(tmp_path, 1 << 20, codec=codec, clock=ManualClock(), files=files)
    metas, data = chain(2), [memoryview(bytes([n]) * LARGE.block_nbytes) for n in (1, 2)]
    assert tier.write(metas, data) == 2
    read = [aligned(LARGE.block_nbytes) for _ in metas]
    assert tier.read(names(metas), read).count == 2
    assert [bytes(buffer) for buffer in read] == [bytes(buffer) for buffer in data]
    assert files.calls > 2 * LARGE.block_nbytes // short
    tier.close()


def test_a_file_system_without_direct_io_or_reserved_room_does(tmp_path: Path) -> None:
    place = Place(tmp_path, files=NoDirectFiles())
    metas = chain(8)
    place.tier.write(metas, payloads(metas))
    assert not place.tier.is_direct
    assert read_back(place.restart(), names(metas)) == 8


def test_a_payload_of_another_length_is_refused_and_nothing_is_lost(place: Place) -> None:
    metas = chain(2)
    with pytest.raises(LayoutError):
        place.tier.write(metas, [payload(metas[0].hash), memoryview(b"short")])
    place.tier.check()
    assert place.tier.stats().used_bytes == 0
    assert place.tier.write(metas, payloads(metas)) == 2


def test_less_than_a_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="give it more bytes"):
        Place(tmp_path, blocks=0)
    Place(tmp_path, blocks=1).tier.close()  # and the folder is free again


def test_the_log_is_rewritten_when_it_is_long_and_says_the_same(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SPARE_LOG_BYTES", 2000)
    metas = chain(4)
    place.tier.write(metas, payloads(metas))
    longest = 0
    for _ in range(300):
        place.tier.touch(names(metas))
        place.tier.sweep()
        longest = max(longest, log_file(place.folder).stat().st_size)
    assert place.tier._space.index._thread is not None
    place.tier._space.index._thread.join()
    place.tier.check()
    assert longest > 3200  # two times what it must say, and what is spare
    place.tier._space.index._thread = None
    place.tier.sweep()
    if place.tier._space.index._thread is not None:
        place.tier._space.index._thread.join()
    assert log_file(place.folder).stat().st_size < 3500
    assert read_back(place.crash(), names(metas)) == 4


def test_nothing_is_lost_while_the_log_is_rewritten_again_and_again(place: Place) -> None:
    done, chains = threading.Event(), [chain(2, first_token=token) for token in range(6)]

    def rewrite() -> None:
        while not done.is_set():
            place.tier._space.index.rewrite()

    thread = threading.Thread(target=rewrite)
    thread.start()
    for turn in range(150):
        place.tier.write(chains[turn % 6], payloads(chains[turn % 6]))
        place.tier.remove(names(chains[(turn + 3) % 6])[1:], RemovalCause.CLEARED)
    done.set()
    thread.join()
    place.tier.check()
    held = {meta.hash for meta in place.tier.metas()}
    assert {meta.hash for meta in place.crash().metas()} == held


def test_many_restored_blocks_are_found_at_once_and_loaded_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_module, "LOADED_BY_STARTER", 10)
    place = Place(tmp_path, blocks=400)
    metas = chain(400)
    place.tier.write(metas, payloads(metas))
    tier = place.restart()
    assert tier.match(names(metas)) == 400
    assert read_back(tier, names(metas)[:50]) == 50
    assert tier._space._loader is not None
    tier._space._loader.join()
    assert not tier._space.books.is_loading
    tier.check()
    new = chain(20, first_token=1)
    tier.write(new, payloads(new))
    assert tier.match(names(metas)) == 380
