"""The scheduler against a naive store: budgets kept, nobody starves, nothing leaks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence as Items
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.blocks import BlockHash, block_hashes
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from kvstore.store import ReadTiers
from workers.protocol import Job, SamplingParams
from workers.scheduler import Chunk, Scheduler
from workers.sequence import Sequence

BLOCK_SIZE = 4
ROOT = BlockHash(hashlib.sha256(b"root").digest())


class FakeAcquisition:
    def __init__(self, store: FakeStore, names: Items[BlockHash], *, slow: bool) -> None:
        self._store, self._names = store, names
        self.block_ids: list[int] = []
        self.fates: list[TierName] = []
        self.load_ms, self.done, self.made_elsewhere = 0.0, False, 0
        self.tail: FakeTail | None = None
        if not slow:
            self.arrive()

    def arrive(self, most: int | None = None) -> None:
        """What is there comes; `most`: a tier that fails cuts it short."""
        for name in self._names[:most]:
            block = self._store.names.get(name)
            if block is None:
                break
            self._store.refs[block] += 1
            self.block_ids.append(block)
            self.fates.append(TierName.DEVICE)
        self.done = True

    def cancel(self) -> None:
        self._store.release(self.block_ids)
        self.block_ids, self.done = [], True
        if self.tail is not None:
            self.tail.cancel()


class FakeTail:
    """Places `first` to `stop` of a prompt; blocks come when a test says so, and nobody knows how fast."""

    def __init__(self, store: FakeStore, names: Items[BlockHash], first: int) -> None:
        self._store, self._names, self.first, self.stop = store, names, first, len(names)
        self.held: dict[int, int] = {}
        self.floor, self.edge = first, self.stop
        self.ended = self.cancelled = False

    @property
    def block_ids(self) -> list[int]:
        return list(self.held.values())

    @property
    def is_over(self) -> bool:
        return not self.held and (self.ended or self.cancelled or self.floor >= self.edge)

    @property
    def expected(self) -> int:
        return len(self.held)

    def come(self, count: int) -> None:
        """The next piece from the back, if there is room for it."""
        first = max(self.floor, self.edge - count)
        if self.cancelled or self.ended or first >= self.edge:
            return
        fresh = [place for place in range(first, self.edge) if self._names[place] not in self._store.names]
        blocks = self._store.allocate(len(fresh))
        if blocks is None:
            self.ended = True
            return
        self._store.commit(blocks, [self._names[place] for place in fresh])
        for place in range(first, self.edge):
            self.held[place] = self._store.names[self._names[place]]
        for place in set(range(first, self.edge)) - set(fresh):
            self._store.refs[self.held[place]] += 1
        self.edge = first

    def take(self, place: int) -> tuple[list[int], list[TierName]]:
        blocks = []
        while place + len(blocks) in self.held:
            blocks.append(self.held.pop(place + len(blocks)))
        return blocks, [TierName.REDIS] * len(blocks)

    def reach(self, place: int) -> int | None:
        there = min((each for each in self.held if each >= place), default=None)
        if there is not None:
            return there - place
        return None if self.is_over else max(1, (self.edge - place) // 2)

    def passed(self, place: int) -> None:
        assert not any(each < place for each in self.held), "the front went past what is there"
        self.floor = max(self.floor, place)

    def cancel(self) -> None:
        self.cancelled = True
        self._store.release(self.block_ids)
        self.held = {}


class FakeStore:
    """Blocks as numbers, names in order of use, loads that end when a test says so."""

    def __init__(self, num_blocks: int) -> None:
        self.refs = [0] * num_blocks
        self.names: dict[BlockHash, int] = {}
        self.on_the_way: list[FakeAcquisition] = []
        self.slow = self.meets = False
        self.tails: list[FakeTail] = []
        self.prefetched: list[list[BlockHash]] = []

    def match(self, hashes: Items[BlockHash], reads: ReadTiers | None = None) -> list[TierName]:
        found = next((i for i, name in enumerate(hashes) if name not in self.names), len(hashes))
        return [TierName.DEVICE] * found

    def prefetch(self, hashes: Items[BlockHash], **_: object) -> int:
        self.prefetched.append(list(hashes))
        return 0

    def acquire(self, hashes: Items[BlockHash], **_: object) -> FakeAcquisition:
        acquisition = FakeAcquisition(self, hashes, slow=self.slow)
        if self.slow:
            self.on_the_way.append(acquisition)
        return acquisition

    def acquire_from_both_ends(self, hashes: Items[BlockHash], **_: object) -> FakeAcquisition:
        """Where `meets`, what is not here lies in a slower tier, all of it."""
        acquisition = self.acquire(hashes)
        first = len(acquisition.block_ids)
        if self.meets and acquisition.done and first < len(hashes) and hashes[first] not in self.names:
            acquisition.tail = FakeTail(self, hashes, first)
            self.tails.append(acquisition.tail)
        return acquisition

    def allocate(self, count: int) -> list[int] | None:
        unused = [block for block, refs in enumerate(self.refs) if refs == 0]
        if len(unused) < count:
            return None
        cached = set(self.names.values())
        chosen = sorted(unused, key=lambda block: block in cached)[:count]
        self.names = {name: block for name, block in self.names.items() if block not in chosen}
        for block in chosen:
            self.refs[block] = 1
        return chosen

    def commit(self, block_ids: Items[int], names: Items[BlockHash]) -> None:
        for block, name in zip(block_ids, names, strict=True):
            self.names.setdefault(name, block)

    def release(self, block_ids: Items[int]) -> None:
        for block in block_ids:
            assert self.refs[block] > 0
            self.refs[block] -= 1


class Fixture:
    """A scheduler, and an engine's share of the work without a model."""

    def __init__(self, *, num_blocks: int = 12, max_batch_tokens: int = 10, max_running: int = 4) -> None:
        self.store = FakeStore(num_blocks)
        self.max_batch_tokens, self.max_running = max_batch_tokens, max_running
        self.capacity = num_blocks * BLOCK_SIZE
        self.scheduler = Scheduler(
            self.store,
            block_size=BLOCK_SIZE,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            compute_ms=lambda first, count: math.inf,
            lifetime=lambda sequence: Lifetime(None),
        )
        self.arrivals = 0
        self.ended: list[Sequence] = []
        self.computed: dict[Sequence, int] = {}

    def add(self, prompt: Items[int], *, max_tokens: int = 3, **options: object) -> Sequence:
        self.arrivals += 1
        names = block_hashes(prompt, ROOT, BLOCK_SIZE)
        job = Job(self.arrivals, prompt, ROOT, names, SamplingParams(max_tokens=max_tokens), **options)
        text = SimpleNamespace()
        sequence = Sequence(job, self.arrivals, 0.0, list(prompt), list(names), text)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Chunk]:
        is_full = len(self.scheduler.running) + len(self.scheduler._loading) >= self.max_running
        chunks = self.scheduler.schedule()
        self.check(chunks)
        self.check_blocks()
        self.check_turns(chunks, is_full=is_full)
        for chunk in chunks:
            self._advance(chunk)
        return chunks

    def _advance(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        sequence.num_computed += chunk.length
        self.computed[sequence] = self.computed.get(sequence, 0) + chunk.length
        start, stop = sequence.num_committed, sequence.num_computed // BLOCK_SIZE
        if not sequence.job.no_store and stop > start:
            self.store.commit(sequence.block_table[start:stop], sequence.names(stop, BLOCK_SIZE)[start:])
            sequence.committed(stop)
            self.scheduler.made(sequence, start, sequence.num_committed)
        if sequence.remaining == 0:
            sequence.token_ids.append(1000 + sequence.arrival)
            if sequence.num_generated >= sequence.job.sampling.max_tokens or len(sequence.token_ids) >= self.capacity:
                self.scheduler.remove(sequence)
                self.ended.append(sequence)

    def check(self, chunks: Items[Chunk]) -> None:
        assert sum(chunk.length for chunk in chunks) <= self.max_batch_tokens
        assert len(self.scheduler.running) <= self.max_running
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        lengths = [chunk.sequence.remaining for chunk in chunks]
        assert lengths == sorted(lengths, key=lambda remaining: remaining > 1), "decodes come first"
        for chunk in chunks:
            sequence = chunk.sequence
            assert 1 <= chunk.length <= sequence.remaining
            assert sequence in self.scheduler.running
            assert len(sequence.block_table) * BLOCK_SIZE >= sequence.num_computed + chunk.length
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            assert all(self.store.refs[block] > 0 for block in sequence.block_table)
            fresh = sequence.block_table[sequence.num_computed // BLOCK_SIZE :]
            assert all(self.store.refs[block] == 1 for block in fresh), "what is written belongs to one sequence"

    def check_blocks(self) -> None:
        """Each block is free, or referenced exactly by those who hold it."""
        held = [0] * len(self.store.refs)
        for sequence in self.scheduler:
            coming = [] if sequence.acquisition is None else sequence.acquisition.block_ids
            coming = coming + ([] if sequence.tail is None else sequence.tail.block_ids)
            for block in (*sequence.block_table, *coming):
                held[block] += 1
        assert held == self.store.refs

    def check_turns(self, chunks: Items[Chunk], *, is_full: bool) -> None:
        """Nobody is passed over: who ranks first goes on, unless its blocks are on their way or there was no slot.

        `is_full`: at the step's begin, when slots are given. A preemption within the step frees one for the next step.
        So the first ends within as many steps as it has tokens left, then the next one: a wait is bounded by the tokens
        of those that rank higher.
        """
        loading = self.scheduler._loading
        everyone = sorted(self.scheduler, key=lambda each: each.rank)
        if not everyone:
            return
        works = {chunk.sequence for chunk in chunks}
        assert everyone[0] in works or everyone[0] in loading or is_full
        if self.scheduler.running:
            assert self.scheduler.running[0] in works

    def finish(self) -> None:
        """Step until all have ended, and audit what is left."""
        self.arrive()
        # One token of the first in rank a step at least, and what was preempted is computed again.
        most = sum(len(each.token_ids) + each.job.sampling.max_tokens for each in self.scheduler) * (
            1 + len(self.scheduler)
        )
        for _ in range(most + 1):
            if len(self.scheduler) == 0:
                break
            self.step()
        self.settle()
        self.arrive()  # what was given up comes late
        assert len(self.scheduler) == 0, "a sequence starved"
        assert self.store.refs == [0] * len(self.store.refs), "a block leaked"
        assert not self.scheduler._in_the_making

    def settle(self) -> None:
        """Take in what is in flight: here nothing is."""

    def arrive(self) -> None:
        self.store.slow = False
        for acquisition in self.store.on_the_way:
            if not acquisition.done:
                acquisition.arrive()
        self.store.on_the_way = []


class SchedulerMachine(RuleBasedStateMachine):
    make = Fixture

    def __init__(self) -> None:
        super().__init__()
        self.fixture = self.make()

    # As few tokens as sequences decode, and fewer: who prefills must have a turn all the same.
    @initialize(max_batch_tokens=st.sampled_from([1, 2, 3, 10]), max_running=st.sampled_from([1, 2, 4]))
    def begin(self, max_batch_tokens, max_running):
        self.fixture = self.make(max_batch_tokens=max_batch_tokens, max_running=max_running)

    @rule(
        stem=st.integers(0, 2),
        shared=st.sampled_from([0, 0, 3, 12, 20]),
        own=st.sampled_from([1, 2, 5, 14, 27]),
        priority=st.sampled_from([0, 0, 1]),
        max_tokens=st.integers(1, 20),
        no_store=st.booleans(),
        no_read=st.booleans(),
    )
    def submit(self, stem, shared, own, priority, max_tokens, no_store, no_read):
        prompt = [stem] * shared + [100 + self.fixture.arrivals] * own
        options = {"priority": priority, "no_store": no_store, "no_read": no_read}
        self.fixture.add(prompt, max_tokens=max_tokens, **options)

    @rule(count=st.sampled_from([1, 2, 4, 12]))
    def step(self, count):
        for _ in range(count):
            self.fixture.step()

    @rule(slow=st.booleans())
    def loads_take_their_time(self, slow):
        self.fixture.store.slow = slow

    @rule()
    def loads_arrive(self):
        slow = self.fixture.store.slow
        self.fixture.arrive()
        self.fixture.store.slow = slow

    @precondition(lambda self: self.fixture.store.on_the_way)
    @rule(data=st.data(), most=st.integers(0, 3))
    def a_load_fails(self, data, most):
        """It ends with a part of what it was to bring, or with nothing."""
        acquisition = data.draw(st.sampled_from(self.fixture.store.on_the_way))
        self.fixture.store.on_the_way.remove(acquisition)
        if not acquisition.done:
            acquisition.arrive(most)

    @rule(meets=st.booleans())
    def backs_come_while_fronts_are_computed(self, meets):
        self.fixture.store.meets = meets

    @rule(number=st.integers(0, 5), count=st.integers(1, 3))
    def a_piece_comes(self, number, count):
        tails = self.fixture.store.tails
        if tails:
            tails[number % len(tails)].come(count)

    @rule(number=st.integers(0, 5))
    def a_tail_ends_early(self, number):
        tails = self.fixture.store.tails
        if tails:
            tails[number % len(tails)].ended = True

    @rule()
    def what_comes_is_cleared(self):
        for tail in self.fixture.store.tails:
            tail.cancel()

    @precondition(lambda self: len(self.fixture.scheduler))
    @rule(data=st.data())
    def cancel(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.fixture.scheduler, key=lambda each: each.arrival)))
        before = len(self.fixture.scheduler)
        self.fixture.scheduler.remove(sequence)
        assert len(self.fixture.scheduler) == before - 1

    @invariant()
    def groups_are_sorted_and_fates_sum_to_the_prompt(self):
        for group in (self.fixture.scheduler.running, self.fixture.scheduler._waiting):
            assert [each.rank for each in group] == sorted(each.rank for each in group)
        for sequence in self.fixture.scheduler:
            assert sequence.fates is None or sum(sequence.fates.values()) == sequence.num_prompt

    def teardown(self):
        self.fixture.finish()


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase


def test_decodes_go_before_prefills_and_share_one_budget():
    rig = Fixture(max_batch_tokens=6)
    rig.add([1] * 5)
    rig.step()
    rig.add([2] * 20)
    assert [(chunk.sequence.arrival, chunk.length) for chunk in rig.step()] == [(1, 1), (2, 5)]
    rig.finish()


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 3])
def test_the_first_in_rank_computes_though_others_decode_without_end(max_batch_tokens):
    rig = Fixture(num_blocks=60, max_batch_tokens=max_batch_tokens)
    rig.add([7] * 16 + [1], max_tokens=1)
    rig.finish()  # what follows finds its prompt in the cache, and decodes at once
    first = rig.add([1] * 40, priority=1, max_tokens=1)
    for number in range(45):
        while len(rig.scheduler) < 4:
            rig.add([7] * 16 + [100 + number], max_tokens=30)
        chunks = rig.step()
        assert len(chunks) == min(4, max_batch_tokens), "what the first leaves is used"
        if first in rig.ended:
            break
    assert first in rig.ended
    rig.finish()


def test_higher_priority_is_admitted_first_then_earlier_arrival():
    rig = Fixture(max_running=1)
    for priority in (0, 0, 5):
        rig.add([rig.arrivals + 1] * 4, priority=priority)
    rig.finish()
    assert [sequence.arrival for sequence in rig.ended] == [3, 1, 2]


def test_the_last_in_rank_is_preempted_and_resumes_from_its_cached_blocks_with_what_it_generated():
    rig = Fixture(num_blocks=8, max_batch_tokens=64)
    first, last = rig.add([1] * 12, max_tokens=20), rig.add([2] * 11, max_tokens=14)
    for _ in range(30):
        rig.step()
        if rig.scheduler.preemptions:
            break
    assert last in rig.scheduler.waiting
    assert first in rig.scheduler.running
    assert last.num_generated > 1
    assert last.block_table == []
    computed, known = rig.computed[last], len(last.token_ids)
    rig.finish()
    # It came back only when the first had ended, which may have evicted some, but not all, of its blocks.
    assert rig.ended == [first, last]
    assert rig.computed[last] - computed < known + 14 - 1
    assert rig.scheduler.preemptions == 1
    assert last.fates == {"computed": 11}


def test_a_newcomer_never_takes_blocks_from_those_before_it():
    rig = Fixture(num_blocks=4, max_batch_tokens=64)
    rig.add([1] * 12, max_tokens=4)
    rig.step()
    rig.add([2] * 12)
    for _ in range(2):
        assert [chunk.sequence.arrival for chunk in rig.step()] == [1]
    assert rig.scheduler.preemptions == 0
    rig.finish()


def test_only_who_has_to_wait_is_prefetched():
    rig = Fixture(num_blocks=60, max_batch_tokens=100, max_running=1)
    rig.add([1] * 12)
    assert rig.scheduler._store.prefetched == []
    rig.step()
    second = rig.add([2] * 12)
    assert rig.scheduler._store.prefetched == [second.hashes[:2]]
    rig.finish()


def test_a_burst_over_one_prefix_computes_it_once():
    rig = Fixture(num_blocks=60, max_batch_tokens=100, max_running=8)
    sequences = [rig.add([7] * 16 + [n] * 4, max_tokens=1) for n in range(6)]
    rig.finish()
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 16, 16, 16, 16, 16]


def test_nobody_waits_for_blocks_that_will_not_be_kept():
    rig = Fixture(num_blocks=60, max_batch_tokens=100)
    rig.add([7] * 16, no_store=True)
    other = rig.add([7] * 16)
    assert other in [chunk.sequence for chunk in rig.step()]
    rig.finish()


def test_nobody_waits_for_a_sequence_that_comes_after_it():
    rig = Fixture(num_blocks=60, max_batch_tokens=4)
    rig.add([7] * 32)
    rig.step()
    urgent = rig.add([7] * 32, priority=1)
    assert urgent in [chunk.sequence for chunk in rig.step()]
    rig.finish()


def test_whoever_waits_for_a_cancelled_maker_goes_on():
    rig = Fixture(num_blocks=60, max_batch_tokens=8)
    maker, waiter = rig.add([7] * 32), rig.add([7] * 32)
    rig.step()
    assert waiter in rig.scheduler.waiting
    rig.scheduler.remove(maker)
    assert [chunk.sequence for chunk in rig.step()] == [waiter]
    assert waiter.num_cached_tokens == 8
    rig.finish()


def test_a_load_delays_only_its_own_sequence():
    rig = Fixture()
    rig.store.slow = True
    slow = rig.add([1] * 8)
    rig.step()
    rig.store.slow = False
    quick = rig.add([2] * 8)
    assert [chunk.sequence for chunk in rig.step()] == [quick]
    rig.arrive()
    assert slow in [chunk.sequence for chunk in rig.step()]
    rig.finish()


def test_a_load_that_is_given_up_leaves_nothing_behind():
    rig = Fixture()
    rig.add([1] * 16, max_tokens=1)
    rig.finish()
    rig.store.slow = True
    cancelled = rig.add([1] * 16)
    rig.step()
    assert cancelled in rig.scheduler.waiting
    rig.scheduler.remove(cancelled)
    rig.finish()


def test_whoever_loads_and_holds_no_block_is_not_preempted():
    rig = Fixture(num_blocks=4, max_batch_tokens=64)
    rig.add([1] * 7, max_tokens=8)
    rig.add([2] * 7, max_tokens=8)
    rig.step()
    rig.store.slow = True
    loading = rig.add([3] * 8)
    for _ in range(3):
        rig.step()
    assert rig.scheduler.preemptions == 1  # the one that holds blocks
    assert loading.acquisition is not None
    rig.finish()


def meeting_rig(**options: int) -> Fixture:
    rig = Fixture(**{"num_blocks": 40, "max_batch_tokens": 8, **options})
    rig.store.meets = True
    return rig


def test_a_sequence_runs_at_once_and_goes_on_behind_the_blocks_that_it_meets():
    rig = meeting_rig()
    sequence = rig.add([1] * 41, max_tokens=1)
    rig.step()
    (tail,) = rig.store.tails
    assert sequence.num_computed == 8
    tail.come(5)
    rig.step()
    rig.step()
    assert sequence.num_computed == 20
    assert [chunk.length for chunk in rig.step()] == [1]
    assert rig.computed[sequence] == 21
    assert sequence.fates == {"computed": 21, "redis": 20}
    assert sequence.tail is None
    assert (sequence.num_cached_tokens, sequence.first_outside) == (0, 5)
    rig.finish()


def test_a_chunk_ends_where_blocks_are_though_its_front_ended_within_a_block():
    rig = meeting_rig(max_batch_tokens=7)
    sequence = rig.add([1] * 33, max_tokens=1)
    rig.step()
    (tail,) = rig.store.tails
    tail.come(4)
    assert [rig.step()[0].length for _ in range(3)] == [7, 2, 1]
    assert sequence.fates == {"computed": 17, "redis": 16}
    rig.finish()


def test_nothing_waits_for_a_tail_that_brings_nothing():
    rig = meeting_rig()
    rig.add([1] * 41, max_tokens=1)
    steps = 0
    while len(rig.scheduler):
        rig.step()
        steps += 1
    assert steps <= 9
    assert rig.ended[0].fates == {"computed": 41}
    rig.finish()


def test_a_tail_is_given_up_before_anybody_is_preempted():
    rig = meeting_rig(num_blocks=12, max_batch_tokens=64)
    rig.store.meets = False
    first = rig.add([1] * 16, max_tokens=20)
    rig.step()
    rig.store.meets = True
    second = rig.add([2] * 33, max_tokens=1)
    rig.scheduler.max_batch_tokens = 4
    rig.step()
    (tail,) = rig.store.tails
    tail.come(6)
    held = list(tail.block_ids)
    while not tail.cancelled:
        rig.step()
    assert len(held) == 6
    assert second.num_computed < 3 * BLOCK_SIZE
    assert first in rig.scheduler.running
    assert second in rig.scheduler.running
    assert rig.scheduler.preemptions == 0
    rig.scheduler.max_batch_tokens = 64
    rig.finish()


@pytest.mark.parametrize("pieces", [0, 1, 9])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_who_is_removed_while_its_tail_comes_leaves_nothing(pieces: int, steps: int):
    rig = meeting_rig()
    sequence = rig.add([1] * 41)
    for _ in range(steps):
        rig.step()
        rig.store.tails[0].come(pieces)
    rig.scheduler.remove(sequence)
    assert rig.store.refs == [0] * 40


def test_what_a_tail_brings_after_a_preemption_changes_no_fate():
    rig = meeting_rig()
    sequence = rig.add([1] * 41, max_tokens=2)
    rig.step()
    rig.scheduler._preempt(sequence)
    rig.store.names = {}
    rig.step()
    rig.store.tails[1].come(5)
    rig.finish()
    assert sequence.fates == {"computed": 41}
    assert rig.computed[sequence] < 8 + 41


def test_what_is_not_kept_is_not_met():
    rig = meeting_rig()
    rig.add([1] * 41, no_store=True)
    rig.step()
    assert rig.store.tails == []
    rig.finish()


def test_a_full_hit_leaves_a_token_to_compute():
    rig = Fixture(num_blocks=40)
    rig.add([1] * 16, max_tokens=1)
    rig.finish()
    again = rig.add([1] * 16, max_tokens=1)
    chunks = rig.step()
    assert [chunk.length for chunk in chunks] == [4]  # the last block: what is shared is never written
    assert again.fates == {"computed": 4, "device": 12}
    rig.finish()


@pytest.mark.parametrize("name", ["block_size", "max_batch_tokens", "max_running"])
def test_limits_must_be_positive(name: str):
    limits = {"block_size": 1, "max_batch_tokens": 1, "max_running": 1} | {name: 0}
    with pytest.raises(ValueError, match=name):
        Scheduler(FakeStore(1), **limits, compute_ms=lambda first, count: 0.0, lifetime=lambda sequence: Lifetime(None))
