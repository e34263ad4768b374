"""The scheduler as steps that run ahead use it: asked while a step is in flight, and what is given back is held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tests.workers.test_scheduler import BLOCK_SIZE, FakeStore, Fixture, SchedulerMachine
from workers.scheduler import Chunk
from workers.sequence import Sequence


class HoldingStore(FakeStore):
    """What is given back while a step is in flight is free when that has ended; as `workers.stepping.holds`."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.given_back: list[int] | None = None

    def release(self, block_ids: Items[int]) -> None:
        if self.given_back is None:
            super().release(block_ids)
        else:
            self.given_back += block_ids

    def end(self, given_back: Items[int]) -> None:
        super().release(given_back)


@dataclass
class Flown:
    """A step in flight: how far it brings each sequence, who gets a token, its blocks, what was given back since."""

    stops: dict[Sequence, int]
    ready: list[Sequence]
    blocks: list[int]
    given_back: list[int] = field(default_factory=list)


class RunningAhead(Fixture):
    """The same, where a step is scheduled and launched while the one before is in flight, as the engine does it.

    `stops`: who is found to end with its next token, one step late.
    """

    def __init__(self, **limits: int) -> None:
        super().__init__(**limits)
        self.store = self.scheduler._store = HoldingStore(len(self.store.refs))
        self.flight: Flown | None = None
        self.stops: set[Sequence] = set()

    def step(self) -> list[Chunk]:
        if self.scheduler.is_starved:
            self.settle()
        chunks = self._scheduled()
        if not chunks and self.flight is not None:
            self.settle()
            chunks = self._scheduled()
        if chunks:
            before, self.flight, self.store.given_back = self.flight, None, None
            self._launch(chunks)
            self._take_in(before)
        return chunks

    def settle(self) -> None:
        flight, self.flight, self.store.given_back = self.flight, None, None
        self._take_in(flight)

    def _scheduled(self) -> list[Chunk]:
        is_full = len(self.scheduler.running) + len(self.scheduler._loading) >= self.max_running
        preemptions = self.scheduler.preemptions
        self.scheduler.is_ahead = self.flight is not None
        chunks = self.scheduler.schedule()
        assert not self.scheduler.is_ahead or self.scheduler.preemptions == preemptions, "nothing is free yet"
        assert not self.scheduler.is_starved or self.scheduler.is_ahead
        self.check(chunks)
        self.check_blocks()
        self.check_flight()
        if self.flight is None:  # else who comes first may await its token, or its blocks, until the step has ended
            self.check_turns(chunks, is_full=is_full)
        return chunks

    def _launch(self, chunks: list[Chunk]) -> None:
        flight = Flown({}, [], [block for chunk in chunks for block in chunk.sequence.block_table])
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.length
            flight.stops[sequence] = sequence.num_computed
            if sequence.remaining == 0:
                flight.ready.append(sequence)
                if not self._ends_with(sequence, sequence.num_computed + 1):
                    sequence.ahead = sequence.num_computed + 1
        self.flight, self.store.given_back = flight, flight.given_back

    def _take_in(self, flight: Flown | None) -> None:
        if flight is None:
            return
        for sequence, computed in flight.stops.items():
            if sequence in set(self.scheduler):
                self._commit(sequence, computed)
        for sequence in flight.ready:
            if sequence in set(self.scheduler):
                self._append(sequence)
        self.store.end(flight.given_back)

    def _commit(self, sequence: Sequence, computed: int) -> None:
        start, stop = sequence.num_committed, computed // BLOCK_SIZE
        if not sequence.job.no_store and stop > start:
            self.store.commit(sequence.block_table[start:stop], sequence.names(stop, BLOCK_SIZE)[start:])
            sequence.num_committed = stop
            self.scheduler.made(sequence, start, stop)

    def _append(self, sequence: Sequence) -> None:
        sequence.token_ids.append(1000 + sequence.arrival)
        if self._ends_with(sequence, len(sequence.token_ids)) or sequence in self.stops:
            self.scheduler.remove(sequence)
            self.ended.append(sequence)

    def _ends_with(self, sequence: Sequence, tokens: int) -> bool:
        return tokens - sequence.num_prompt >= sequence.job.sampling.max_tokens or tokens >= self.capacity

    def check_blocks(self) -> None:
        """Each block is free, or referenced by those who hold it and by the step in flight for those who did."""
        held = Counter(self.store.given_back or ())
        for sequence in self.scheduler:
            held.update(sequence.block_table)
            held.update([] if sequence.acquisition is None else sequence.acquisition.block_ids)
        assert held == {block: refs for block, refs in enumerate(self.store.refs) if refs}

    def check_flight(self) -> None:
        if self.flight is not None:
            assert all(self.store.refs[block] for block in self.flight.blocks), "a step in flight uses a free block"


class AheadMachine(SchedulerMachine):
    make = RunningAhead

    @precondition(lambda self: len(self.fixture.scheduler))
    @rule(data=st.data())
    def ends_with_its_next_token(self, data):
        everyone = sorted(self.fixture.scheduler, key=lambda each: each.arrival)
        self.fixture.stops.add(data.draw(st.sampled_from(everyone)))


AheadMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAheadMachine = AheadMachine.TestCase


def test_who_is_short_of_blocks_waits_for_the_step_in_flight_and_preempts_behind_it():
    rig = RunningAhead(num_blocks=8, max_batch_tokens=64)
    first, last = rig.add([1] * 12, max_tokens=20), rig.add([2] * 11, max_tokens=14)
    starved = 0
    for _ in range(30):
        rig.step()
        starved += rig.scheduler.is_starved
        if rig.scheduler.preemptions:
            break
    assert starved == 1
    assert rig.scheduler.preemptions == 1
    assert last in rig.scheduler.waiting
    rig.finish()
    assert rig.ended == [first, last]
