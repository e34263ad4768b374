"""PrefixIndex believes nobody about order: against sets, with lists that are chains and lists that are not."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import router.run
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause, TierName
from router.index import NO_OVERLAP, Overlap, PrefixIndex
from router.runs import LEAST_BYTES
from tests.router.test_index import Clock, chain, joined, name

DEVICE, HOST, DISK, REDIS = TierName.DEVICE, TierName.HOST, TierName.DISK, TierName.REDIS
LOCAL = (DEVICE, HOST, DISK)
WORKERS = ("a", "b", "c")
# A tree: every chain shares a beginning with the one before it, up to another depth.
STEM = chain(0, length=14)
CHAINS = (STEM, *((*STEM[:depth], *chain(depth, length=14 - depth)) for depth in (4, 5, 9)))
BLOCKS = tuple(dict.fromkeys(block for c in CHAINS for block in c))


def fresh(block: bytes) -> bytes:
    """The same name as another object, as every message and every hasher makes them."""
    return bytes(bytearray(block))


def leading(have: set[bytes], c: tuple[bytes, ...]) -> int:
    return next((n for n, block in enumerate(c) if block not in have), len(c))


stretches = st.tuples(st.sampled_from(CHAINS), st.integers(0, 13), st.integers(1, 14)).map(
    lambda t: (t[0][t[1] : t[1] + t[2]], t[0][t[1] - 1] if t[1] else None)
)
lies = st.one_of(
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=9).map(lambda blocks: (tuple(blocks), None)),
    st.tuples(stretches, st.sampled_from(BLOCKS)).map(lambda t: (t[0][0], t[1])),  # a false parent
    st.tuples(stretches, st.integers(0, 8), st.sampled_from(BLOCKS)).map(  # a chain with one wrong block
        lambda t: ((*t[0][0][: t[1]], t[2], *t[0][0][t[1] + 1 :]), t[0][1])
    ),
    stretches.map(lambda t: (t[0][::-1], None)),
)
removals = st.one_of(
    stretches.map(lambda t: t[0]),
    stretches.map(lambda t: t[0][::-1]),
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=9).map(tuple),
)


class AgainstSets(RuleBasedStateMachine):
    """Events of any shape against sets of (owner, tier, block)."""

    LONGEST = 512

    @initialize()
    def start(self) -> None:
        self.longest, router.run.LONGEST_RUN = router.run.LONGEST_RUN, self.LONGEST
        self.clock = Clock()
        self.index = PrefixIndex(self.clock)
        self.holds: dict[tuple[str, TierName], set[bytes]] = {(w, t): set() for w in WORKERS for t in LOCAL}
        self.shared: dict[bytes, float] = {}
        for worker in WORKERS:
            joined(self.index, worker)

    def teardown(self) -> None:
        if hasattr(self, "longest"):
            router.run.LONGEST_RUN = self.longest

    workers = st.sampled_from(WORKERS)
    tiers = st.sampled_from([*LOCAL, REDIS])

    def stored(self, worker: str, tier: TierName, blocks: tuple[bytes, ...], ttl: float | None) -> None:
        if tier is REDIS:
            self.shared.update(dict.fromkeys(blocks, float("inf") if ttl is None else self.clock.now + ttl))
        else:
            self.holds[worker, tier] |= set(blocks)

    def tell(
        self, worker: str, tier: TierName, told: tuple[tuple[bytes, ...], bytes | None], ttl: float | None
    ) -> None:
        blocks, parent = tuple(map(fresh, told[0])), told[1]
        assert self.index.apply(worker, 1, [BlockStored(tier, blocks, parent, ttl)])
        self.stored(worker, tier, blocks, ttl)

    @rule(worker=workers, tier=tiers, told=stretches, ttl=st.sampled_from([None, 5.0, 50.0]))
    def store(
        self, worker: str, tier: TierName, told: tuple[tuple[bytes, ...], bytes | None], ttl: float | None
    ) -> None:
        self.tell(worker, tier, told, ttl)

    @rule(worker=workers, tier=tiers, told=lies, ttl=st.sampled_from([None, 5.0]))
    def lie(self, worker: str, tier: TierName, told: tuple[tuple[bytes, ...], bytes | None], ttl: float | None) -> None:
        self.tell(worker, tier, told, ttl)

    @rule(worker=workers, tier=tiers, blocks=removals)
    def remove(self, worker: str, tier: TierName, blocks: tuple[bytes, ...]) -> None:
        self.index.apply(worker, 1, [BlockRemoved(tier, tuple(map(fresh, blocks)), RemovalCause.EVICTED)])
        for block in blocks:
            self.shared.pop(block, None) if tier is REDIS else self.holds[worker, tier].discard(block)

    @rule(worker=workers, tier=tiers)
    def clear(self, worker: str, tier: TierName) -> None:
        self.index.apply(worker, 1, [AllBlocksCleared(tier)])
        (self.shared if tier is REDIS else self.holds[worker, tier]).clear()

    @rule(worker=workers)
    def lose(self, worker: str) -> None:
        self.index.drop(worker)
        joined(self.index, worker)
        for tier in LOCAL:
            self.holds[worker, tier].clear()

    @rule(worker=workers, tier=st.sampled_from(LOCAL), told=st.lists(stretches, max_size=3), gone=removals)
    def snapshot(
        self, worker: str, tier: TierName, told: list[tuple[tuple[bytes, ...], bytes | None]], gone: tuple[bytes, ...]
    ) -> None:
        self.index.begin_snapshot(worker, 1)
        self.index.apply(worker, 1, [BlockRemoved(tier, gone, RemovalCause.EVICTED)])
        self.index.snapshot(worker, 1, [BlockStored(tier, blocks, parent) for blocks, parent in told])
        self.index.end_snapshot(worker, 1)
        for each in LOCAL:
            self.holds[worker, each].clear()
        self.holds[worker, tier] = {block for blocks, _ in told for block in blocks} - set(gone)

    @rule(seconds=st.sampled_from([1.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.shared = {b: at for b, at in self.shared.items() if at > self.clock.now}

    @rule(limit=st.integers(1, 9))
    def sweep(self, limit: int) -> None:
        self.index.sweep(limit)

    @rule(c=st.sampled_from(CHAINS))
    def placed(self, c: tuple[bytes, ...]) -> None:
        self.index.placed(c)

    @rule(c=st.sampled_from(CHAINS), length=st.integers(0, 14))
    def a_question_that_ends_anywhere(self, c: tuple[bytes, ...], length: int) -> None:
        self.answers(c[:length])

    @precondition(lambda self: hasattr(self, "index"))
    @invariant()
    def answers_like_sets(self) -> None:
        for c in CHAINS:
            self.answers(c)
        assert self.index.shared_blocks() == len(self.shared)
        self.index.check()

    def answers(self, c: tuple[bytes, ...]) -> None:
        asked = [fresh(block) for block in c]
        found = self.index.match(asked)
        assert found == {worker: self.expected(worker, c) for worker in WORKERS}
        assert self.index.shared_run(asked) == leading(set(self.shared), c)

    def expected(self, worker: str, c: tuple[bytes, ...]) -> Overlap:
        have: set[bytes] = set()
        depths = []
        for tier in LOCAL:
            have = have | self.holds[worker, tier]
            depths.append(leading(have, c))
        return Overlap(*depths, leading(have | set(self.shared), c))


class WithShortRuns(AgainstSets):
    """The same where runs end often."""

    LONGEST = 3


_SETTINGS = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = _SETTINGS
TestWithShortRuns = WithShortRuns.TestCase
TestWithShortRuns.settings = _SETTINGS


@pytest.fixture
def index() -> Iterator[PrefixIndex]:
    index = PrefixIndex(Clock())
    joined(index, "a")
    joined(index, "b")
    yield index
    index.check()


def test_a_list_that_is_no_chain_never_lends_its_ends_to_what_lies_between(index: PrefixIndex) -> None:
    c = chain(1, length=3)
    index.apply("a", 1, [BlockStored(DEVICE, (c[0], name(2, 1), c[2]))])
    for _ in range(2):  # the second time, what the first one learnt is used
        assert index.match(c)["a"].device == 1


def test_a_false_parent_joins_nothing_that_a_question_believes(index: PrefixIndex) -> None:
    c, other = chain(1, length=4), chain(2, length=4)
    index.apply("a", 1, [BlockStored(DEVICE, c[:2]), BlockStored(DEVICE, other[2:], c[1])])
    assert index.match((*c[:2], *c[2:3], *other[3:]))["a"].device == 2
    assert index.match(c)["a"].device == 2
    assert index.match(other)["a"].device == 0


def test_events_of_one_block_grow_one_run(index: PrefixIndex) -> None:
    c = chain(1, length=40)
    for n, block in enumerate(c):
        index.apply("a", 1, [BlockStored(DEVICE, (block,), c[n - 1] if n else None)])
    assert index.runs == 1
    for n, block in enumerate(c):
        index.apply("b", 1, [BlockStored(DEVICE, (block,), c[n - 1] if n else None)])
    assert index.runs == 1
    assert index.match(c) == {"a": Overlap(40, 40, 40, 40), "b": Overlap(40, 40, 40, 40)}


@pytest.mark.parametrize("step", [1, 3])
def test_removals_from_the_tail_or_the_head_leave_two_runs(index: PrefixIndex, step: int) -> None:
    c = chain(1, length=40)
    for worker in ("a", "b"):
        index.apply(worker, 1, [BlockStored(DEVICE, c)])
    for at in range(39, 20, -step):
        index.apply("a", 1, [BlockRemoved(DEVICE, c[max(21, at - step + 1) : at + 1][::-1], RemovalCause.EVICTED)])
        index.check()
    assert index.runs == 2
    for at in range(0, 9, step):
        index.apply("a", 1, [BlockRemoved(DEVICE, c[at : at + step], RemovalCause.EVICTED)])
        index.check()
    assert index.runs == 3
    assert index.match(c)["b"].device == 40


def test_a_question_looks_at_so_many_runs_and_answers_a_lower_bound() -> None:
    index = PrefixIndex(Clock(), max_probes=10)
    joined(index, "a")
    joined(index, "b")
    c = chain(1, length=40)
    index.apply("a", 1, [BlockStored(DEVICE, c)])
    index.apply("b", 1, [BlockStored(DEVICE, (block,)) for block in c[::2]])
    assert index.match(c) == {"a": Overlap(10, 10, 10, 10), "b": Overlap(1, 1, 1, 1)}
    assert index.lower_bounds(c) == {"a"}
    assert index.lower_bounds(c[:10]) == frozenset()
    index.apply("a", 1, [BlockRemoved(DEVICE, c[10:11], RemovalCause.EVICTED)])
    assert index.match(c)["a"].device == 10
    assert index.lower_bounds(c) == frozenset(), "it holds no more"


def test_blocks_that_were_moved_in_front_of_a_proved_run_are_not_believed_with_it(index: PrefixIndex) -> None:
    c = chain(1, length=7)
    told = (c[0], name(2, 1), *c[2:])  # one is no block of the chain
    index.apply("a", 1, [BlockStored(DEVICE, told)])
    index.apply("b", 1, [BlockStored(DEVICE, told[:3])])
    assert index.match(c[3:])["a"].device == 4
    index.apply("b", 1, [BlockRemoved(DEVICE, told[:3], RemovalCause.EVICTED)])
    assert index.runs == 1
    assert index.match(c[:4])["a"].device == 1


def test_removals_while_a_snapshot_is_read_take_of_the_same_memory_and_never_more() -> None:
    index = PrefixIndex(Clock(), limit_bytes=LEAST_BYTES)
    joined(index, "a")
    c = chain(1, length=4)
    index.begin_snapshot("a", 1)
    empty = index.nbytes
    index.apply("a", 1, [BlockRemoved(DEVICE, chain(2, length=500), RemovalCause.EVICTED)])
    assert index.nbytes > empty + 500 * 100
    index.snapshot("a", 1, [BlockStored(DEVICE, c[:1])])
    index.apply("a", 1, [BlockStored(DEVICE, chain(2, length=500))])
    for n in range(3, 23):
        index.apply("a", 1, [BlockRemoved(DEVICE, chain(n, length=500), RemovalCause.EVICTED)])
        assert index.nbytes <= index.limit_bytes
        index.check()
    index.snapshot("a", 1, [BlockStored(DEVICE, c[1:]), BlockStored(DEVICE, chain(3))])
    index.end_snapshot("a", 1)
    assert index.match(c)["a"].device == 1, "what a snapshot says when it cannot be checked is not believed"
    assert index.match(chain(3))["a"].device == 0
    index.begin_snapshot("a", 1)
    index.snapshot("a", 1, [BlockStored(DEVICE, c)])
    index.end_snapshot("a", 1)
    assert index.match(c)["a"].device == 4
    index.check()


def test_names_of_another_length_are_refused(index: PrefixIndex) -> None:
    with pytest.raises(ValueError, match="give the index short hashes"):
        index.apply("a", 1, [BlockStored(DEVICE, (b"x" * 16, b"y" * 15))])
    assert index.match(chain(1))["a"] == NO_OVERLAP


def test_a_removal_against_the_chains_order_ends_where_it_departs_from_it(index: PrefixIndex) -> None:
    c, other = chain(1, length=12), chain(2, length=2)
    for worker in ("a", "b"):
        index.apply(worker, 1, [BlockStored(DEVICE, c)])
    index.apply("a", 1, [BlockRemoved(DEVICE, (c[11], c[10], *other), RemovalCause.EVICTED)])
    assert {worker: overlap.device for worker, overlap in index.match(c).items()} == {"a": 10, "b": 12}
    index.apply("b", 1, [BlockRemoved(DEVICE, (c[11], c[10], c[9], c[7]), RemovalCause.EVICTED)])
    assert {worker: overlap.device for worker, overlap in index.match(c).items()} == {"a": 10, "b": 7}
