"""PrefixIndex against a naive model of sets, and its rules one by one."""

from __future__ import annotations

import hashlib
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.errors import InvariantError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause, TierName
from router.holders import Gone
from router.index import NO_OVERLAP, Overlap, PrefixIndex

DEVICE, HOST, DISK, REDIS = TierName.DEVICE, TierName.HOST, TierName.DISK, TierName.REDIS
LOCAL = [DEVICE, HOST, DISK]


def name(*path: int) -> bytes:
    return hashlib.sha256(repr(path).encode()).digest()[:16]


def chain(*path: int, length: int = 4) -> tuple[bytes, ...]:
    return tuple(name(*path, n) for n in range(length))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def joined(index: PrefixIndex, worker: str, incarnation: int = 1, shared_id: str = "r") -> None:
    assert index.join(worker, incarnation, shared_id=shared_id)
    index.begin_snapshot(worker, incarnation)
    index.end_snapshot(worker, incarnation)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(clock: Clock) -> PrefixIndex:
    index = PrefixIndex(clock)
    joined(index, "a")
    joined(index, "b")
    return index


def test_an_unknown_prompt_is_held_by_nobody(index: PrefixIndex) -> None:
    assert index.match(chain(1)) == {"a": NO_OVERLAP, "b": NO_OVERLAP}


def test_runs_are_leading_and_cumulative_over_tiers(index: PrefixIndex) -> None:
    c = chain(1, length=8)
    index.apply("a", 1, [BlockStored(DEVICE, c[:2]), BlockStored(HOST, c[2:4]), BlockStored(DISK, c[4:5])])
    index.apply("b", 1, [BlockStored(REDIS, c[:7]), BlockStored(DEVICE, c[3:4])])
    assert index.match(c) == {"a": Overlap(2, 4, 5, 7), "b": Overlap(0, 0, 0, 7)}
    assert index.shared_run(c) == 7
    assert index.shared_blocks() == 7


def test_a_hole_ends_the_run(index: PrefixIndex) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(DEVICE, c), BlockRemoved(DEVICE, c[1:2], RemovalCause.EVICTED)])
    assert index.match(c)["a"].device == 1


def test_eviction_from_the_device_leaves_the_host_copy(index: PrefixIndex) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(DEVICE, c), BlockStored(HOST, c), BlockRemoved(DEVICE, c, RemovalCause.EVICTED)])
    assert index.match(c)["a"] == Overlap(0, 4, 4, 4)


def test_a_new_incarnation_has_no_credit_for_old_blocks_and_the_old_one_is_not_heard(index: PrefixIndex) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(DEVICE, c)])
    joined(index, "a", 2)
    assert index.match(c)["a"] == NO_OVERLAP
    assert not index.apply("a", 1, [BlockStored(DEVICE, c)])
    assert index.match(c)["a"] == NO_OVERLAP
    assert not index.join("a", 1)
    assert index.apply("a", 2, [BlockStored(DEVICE, c[:1])])
    assert index.match(c)["a"].device == 1


def test_who_takes_the_place_of_a_lost_worker_is_credited_under_its_own_name(index: PrefixIndex) -> None:
    held = [BlockStored(TierName.DEVICE, chain(1))]
    index.apply("a", 1, held)
    assert index.match(chain(1)) == {"a": Overlap(4, 4, 4, 4), "b": NO_OVERLAP}
    index.drop("a")
    joined(index, "c")
    index.apply("c", 1, held)
    assert index.match(chain(1)) == {"b": NO_OVERLAP, "c": Overlap(4, 4, 4, 4)}


def test_a_snapshot_counts_only_when_complete(index: PrefixIndex) -> None:
    c = chain(1)
    index.begin_snapshot("a", 1)
    index.snapshot("a", 1, [BlockStored(DEVICE, c)])
    assert index.match(c)["a"] == NO_OVERLAP
    index.end_snapshot("a", 1)
    assert index.match(c)["a"].device == 4


def test_a_snapshot_forgets_what_it_does_not_name(index: PrefixIndex) -> None:
    index.apply("a", 1, [BlockStored(DEVICE, chain(1))])
    joined(index, "a", 1)
    assert index.match(chain(1))["a"] == NO_OVERLAP


def test_a_block_removed_while_the_snapshot_is_read_stays_removed(index: PrefixIndex) -> None:
    c = chain(1)
    index.begin_snapshot("a", 1)
    index.apply("a", 1, [BlockRemoved(DEVICE, c[2:], RemovalCause.EVICTED)])
    index.apply("a", 1, [BlockStored(DEVICE, c[3:])])
    index.snapshot("a", 1, [BlockStored(DEVICE, c)])
    index.end_snapshot("a", 1)
    assert index.match(c)["a"].device == 2
    assert index.held(c[3])


def test_a_tier_cleared_while_the_snapshot_is_read_stays_cleared_but_for_what_was_stored_since(
    index: PrefixIndex,
) -> None:
    c, other = chain(1), chain(2)
    index.begin_snapshot("a", 1)
    index.snapshot("a", 1, [BlockStored(DEVICE, c[:1])])
    index.apply("a", 1, [AllBlocksCleared(DEVICE), BlockStored(DEVICE, c[:2])])
    index.snapshot("a", 1, [BlockStored(DEVICE, c), BlockStored(HOST, other)])
    index.end_snapshot("a", 1)
    assert index.match(c)["a"].device == 2
    assert index.match(other)["a"].host == 4
    joined(index, "a", 1)  # the next snapshot is believed
    index.begin_snapshot("a", 1)
    index.snapshot("a", 1, [BlockStored(DEVICE, c)])
    index.end_snapshot("a", 1)
    assert index.match(c)["a"].device == 4


def test_a_distrusted_worker_has_no_credit_until_its_next_snapshot(index: PrefixIndex) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(DEVICE, c)])
    index.distrust("a")
    assert index.match(c)["a"] == NO_OVERLAP


def test_a_workers_death_never_touches_the_shared_tier(index: PrefixIndex) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(DEVICE, c), BlockStored(REDIS, c)])
    index.drop("a")
    assert index.match(c) == {"b": Overlap(0, 0, 0, 4)}


def test_another_run_id_of_the_shared_tier_drops_its_credit(index: PrefixIndex) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(REDIS, c)])
    index.join("b", 2, shared_id="another server")
    assert index.match(c)["a"].shared == 0
    assert index.gone(c[0]) is Gone.CLEARED


def test_any_workers_removal_counts_for_the_shared_tier(index: PrefixIndex) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(REDIS, c)])
    index.apply("b", 1, [BlockRemoved(REDIS, c[1:], RemovalCause.ABSENT)])
    assert index.match(c)["a"].shared == 1


def test_a_worker_without_the_shared_tier_gets_no_credit_for_it(index: PrefixIndex) -> None:
    c = chain(1)
    joined(index, "c", shared_id="")
    index.apply("c", 1, [BlockStored(DEVICE, c[:1])])
    index.apply("a", 1, [BlockStored(REDIS, c)])
    assert index.match(c)["c"] == Overlap(1, 1, 1, 1)
    assert index.match(c)["a"].shared == 4


def test_shared_blocks_expire_unless_they_were_refreshed(index: PrefixIndex, clock: Clock) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(REDIS, c, ttl_s=10.0)])
    clock.now = 6.0
    index.apply("a", 1, [BlockStored(REDIS, c[:2], ttl_s=10.0)])
    clock.now = 10.0
    assert index.match(c)["b"].shared == 2
    assert index.gone(c[2]) is Gone.EXPIRED
    index.check()
    clock.now = 16.0
    assert index.match(c)["b"].shared == 0


def test_the_end_of_a_life_is_no_cause_for_what_was_gone_before(index: PrefixIndex, clock: Clock) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(REDIS, c, ttl_s=10.0), AllBlocksCleared(REDIS)])
    clock.now = 20.0
    assert index.gone(c[0]) is Gone.CLEARED


@pytest.mark.parametrize(
    ("events", "cause"),
    [
        ([BlockRemoved(DEVICE, chain(1), RemovalCause.EVICTED)], Gone.EVICTED),
        ([BlockRemoved(DEVICE, chain(1), RemovalCause.EXPIRED)], Gone.EXPIRED),
        ([BlockRemoved(DEVICE, chain(1), RemovalCause.CLEARED)], Gone.CLEARED),
        ([BlockRemoved(DEVICE, chain(1), RemovalCause.INVALID)], Gone.EVICTED),
        ([AllBlocksCleared(DEVICE)], Gone.CLEARED),
    ],
)
def test_the_index_remembers_why_a_block_is_gone(index: PrefixIndex, events: list[Any], cause: Gone) -> None:
    c = chain(1)
    index.apply("a", 1, [BlockStored(DEVICE, c)])
    assert index.gone(c[0]) is None
    index.apply("a", 1, events)
    assert index.gone(c[0]) is cause
    while index.sweep(2):
        index.check()
    assert index.gone(c[0]) is cause
    index.apply("b", 1, [BlockStored(DEVICE, c)])
    assert index.gone(c[0]) is None


def test_blocks_of_a_lost_worker_are_swept_in_slices_and_remembered(index: PrefixIndex) -> None:
    c = chain(1, length=10)
    index.apply("a", 1, [BlockStored(DEVICE, c)])
    index.apply("b", 1, [BlockStored(DEVICE, c[:3])])
    index.drop("a")
    assert index.match(c)["b"].device == 3
    assert len(index) == 10
    while index.sweep(4):
        index.check()
    assert len(index) == 3
    assert index.gone(c[5]) is Gone.WORKER_LOST


def test_tombstones_are_bounded() -> None:
    index = PrefixIndex(Clock(), max_tombstones=3)
    joined(index, "a")
    c = chain(1, length=5)
    index.apply("a", 1, [BlockStored(DEVICE, c), BlockRemoved(DEVICE, c, RemovalCause.EVICTED)])
    assert [index.gone(h) for h in c] == [None, None, Gone.EVICTED, Gone.EVICTED, Gone.EVICTED]
    index.check()


def test_a_fleet_may_grow_past_any_number_of_slots() -> None:
    index = PrefixIndex(Clock())
    c = chain(1, length=40)
    for n in range(40):
        joined(index, f"w{n}")
        index.apply(f"w{n}", 1, [BlockStored(DEVICE, c[:n]), BlockStored(REDIS, c[:1])])
    assert {w: o.device for w, o in index.match(c).items()} == {f"w{n}": n for n in range(40)}
    assert index.match(c)["w0"].shared == 1
    index.check()


def test_check_notices_a_wrong_book(index: PrefixIndex) -> None:
    index.apply("a", 1, [BlockStored(DEVICE, chain(1))])
    index._workers.remove("a")
    with pytest.raises(InvariantError, match="worker that is gone"):
        index.check()


class AgainstSets(RuleBasedStateMachine):
    """Random fleets, events, losses, gaps and time against sets of (owner, tier, block)."""

    WORKERS = ("a", "b", "c")
    # A small forest of chains that share beginnings.
    CHAINS = tuple((*chain(0, length=3), *chain(0, n, length=4)) for n in range(3))

    @initialize()
    def start(self) -> None:
        self.clock = Clock()
        self.index = PrefixIndex(self.clock, max_tombstones=1000)
        self.holds: dict[tuple[str, TierName], set[bytes]] = {}
        self.shared: dict[bytes, float] = {}  # block -> when it expires
        self.incarnations: dict[str, int] = {}
        self.counted: set[str] = set()
        self.shares: set[str] = set()
        self.shared_id = ""

    workers = st.sampled_from(WORKERS)
    blocks = st.tuples(st.sampled_from(CHAINS), st.integers(0, 6), st.integers(1, 7)).map(
        lambda t: t[0][t[1] : t[1] + t[2]]
    )

    @rule(worker=workers, newer=st.booleans(), shared_id=st.sampled_from(["", "r1", "r2"]))
    def join(self, worker: str, newer: bool, shared_id: str) -> None:
        incarnation = self.incarnations.get(worker, 1) + newer
        assert self.index.join(worker, incarnation, shared_id=shared_id)
        self.incarnations[worker] = incarnation
        self.forget(worker)
        (self.shares.add if shared_id else self.shares.discard)(worker)
        if shared_id and shared_id != self.shared_id:
            if self.shared_id:  # else the server that was not known by name until now
                self.shared.clear()
            self.shared_id = shared_id

    def forget(self, worker: str) -> None:
        for tier in LOCAL:
            self.holds[worker, tier] = set()
        self.counted.discard(worker)

    def live(self, worker: str) -> bool:
        return (worker, DEVICE) in self.holds

    @rule(worker=workers, blocks=st.lists(blocks, max_size=3), tier=st.sampled_from(LOCAL))
    def snapshot(self, worker: str, blocks: list[tuple[bytes, ...]], tier: TierName) -> None:
        incarnation = self.incarnations.get(worker, 0)
        self.index.begin_snapshot(worker, incarnation)
        self.index.snapshot(worker, incarnation, [BlockStored(tier, b) for b in blocks])
        self.index.end_snapshot(worker, incarnation)
        if self.live(worker):
            self.forget(worker)
            self.holds[worker, tier] = {h for b in blocks for h in b}
            self.counted.add(worker)

    @rule(worker=workers, tier=st.sampled_from([*LOCAL, REDIS]), blocks=blocks, ttl=st.sampled_from([None, 5.0, 50.0]))
    def store(self, worker: str, tier: TierName, blocks: tuple[bytes, ...], ttl: float | None) -> None:
        heard = self.index.apply(worker, self.incarnations.get(worker, 0), [BlockStored(tier, blocks, ttl_s=ttl)])
        assert heard == self.live(worker)
        if not heard:
            return
        if tier is REDIS:
            self.shared.update(dict.fromkeys(blocks, float("inf") if ttl is None else self.clock.now + ttl))
        else:
            self.holds[worker, tier] |= set(blocks)

    @rule(worker=workers, tier=st.sampled_from([*LOCAL, REDIS]), blocks=blocks, cause=st.sampled_from(RemovalCause))
    def remove(self, worker: str, tier: TierName, blocks: tuple[bytes, ...], cause: RemovalCause) -> None:
        if self.index.apply(worker, self.incarnations.get(worker, 0), [BlockRemoved(tier, blocks, cause)]):
            if tier is REDIS:
                for block in blocks:
                    self.shared.pop(block, None)
            else:
                self.holds[worker, tier] -= set(blocks)

    @rule(worker=workers, tier=st.sampled_from([*LOCAL, REDIS]))
    def clear(self, worker: str, tier: TierName) -> None:
        if self.index.apply(worker, self.incarnations.get(worker, 0), [AllBlocksCleared(tier)]):
            if tier is REDIS:
                self.shared.clear()
            else:
                self.holds[worker, tier].clear()

    @rule(worker=workers)
    def drop(self, worker: str) -> None:
        self.index.drop(worker)
        for tier in LOCAL:
            self.holds.pop((worker, tier), None)
        self.counted.discard(worker)

    @rule(worker=workers)
    def distrust(self, worker: str) -> None:
        self.index.distrust(worker)
        self.counted.discard(worker)

    @rule(worker=workers, blocks=blocks)
    def an_old_incarnation_speaks(self, worker: str, blocks: tuple[bytes, ...]) -> None:
        assert not self.index.apply(worker, self.incarnations.get(worker, 0) - 1, [BlockStored(DEVICE, blocks)])

    @rule(seconds=st.sampled_from([1.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.shared = {b: at for b, at in self.shared.items() if at > self.clock.now}

    @rule(limit=st.integers(1, 5))
    def sweep(self, limit: int) -> None:
        self.index.sweep(limit)

    @precondition(lambda self: hasattr(self, "index"))
    @invariant()
    def answers_like_sets(self) -> None:
        for c in self.CHAINS:
            expected = {w: self.expected(w, c) for w in self.WORKERS if self.live(w)}
            assert self.index.match(c) == expected
            for block in c:
                held = block in self.shared or any(block in blocks for blocks in self.holds.values())
                assert self.index.held(block) == held
                assert self.index.gone(block) is None or not held
        assert self.index.shared_blocks() == len(self.shared)
        self.index.check()

    def expected(self, worker: str, c: tuple[bytes, ...]) -> Overlap:
        if worker not in self.counted:
            return NO_OVERLAP
        have: set[bytes] = set()
        runs = []
        for tier in LOCAL:
            have = have | self.holds[worker, tier]
            runs.append(_run(have, c))
        return Overlap(*runs, _run(have | set(self.shared), c) if worker in self.shares else runs[-1])


def _run(have: set[bytes], c: tuple[bytes, ...]) -> int:
    return next((n for n, block in enumerate(c) if block not in have), len(c))


TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
