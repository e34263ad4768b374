"""Which sequences of a simulated engine run, and on which blocks: the rules of the real scheduler, in segments.

Covers: rank, admission, loading, chunks, waiting for a block that another one computes, preemption by recomputation.
Does not cover: time (`batched_engine`). See `workers.scheduler`, or with `reserves_prompt` `workers.simulated`.

One simplification: where the real scheduler lets the lowest in rank hold its blocks and stand still while there is no
room for its next token, here it is preempted at once.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from kvstore.errors import InvariantError
from replay.batched_profile import BatchedProfile
from replay.batched_sequence import Rank, Sequence, SequenceBlocks
from replay.decoding import Decoding


class BatchedScheduler:
    """Owns the sequences from `add` to `remove`. A sequence waits, or loads, or prefills, or decodes.

    Attributes:
        decoding: those past their prefill. pending: prompt tokens that are still to be computed.
        preemptions: so far.
    """

    def __init__(self, profile: BatchedProfile, block_size: int, blocks: SequenceBlocks) -> None:
        self.decoding = Decoding(block_size)
        self.pending = self.preemptions = 0
        self._profile = profile
        self._blocks = blocks
        self._waiting: list[Sequence] = []  # by rank
        self._loading: list[Sequence] = []  # by rank
        self._prefilling: list[Sequence] = []  # by rank, or as they came
        self._admitted: dict[Sequence, None] = {}  # those that hold blocks, as they came
        self._short_of_blocks = False  # since a preemption, until a sequence ended
        self._taken = 0  # decode steps to come whose blocks are taken

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._admitted or sequence in self._waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All."""
        yield from (*self._admitted, *self._waiting)

    @property
    def running(self) -> int:
        """Those that compute."""
        return len(self._prefilling) + len(self.decoding)

    @property
    def waiting(self) -> int:
        """Those that do not compute yet, for want of room or of blocks on their way."""
        return len(self._loading) + len(self._waiting)

    @property
    def next_arrival(self) -> float | None:
        """When the next reads are done; None: nothing loads."""
        return min((sequence.ready_at for sequence in self._loading), default=None)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that holds nothing."""
        insort(self._waiting, sequence, key=_rank)
        self.pending += sequence.pending
        self._blocks.expect(sequence)

    def remove(self, sequence: Sequence, now: float) -> None:
        """Forget it, and give its blocks back."""
        self._take_out(sequence, now)
        self._blocks.settle(sequence)
        self._short_of_blocks = False

    def admit(self, now: float) -> bool:
        """Start reads while there is room, and let those compute whose reads are done; whether there were any."""
        if not self._admitted:
            self._short_of_blocks = False
        if self._waiting:
            if self._profile.reserves_prompt:
                self._admit_in_turn(now)
            else:
                self._admit_by_rank(now)
        ready = [each for each in self._loading if each.ready_at <= now]
        for sequence in ready:
            self._enter(sequence, now)
        return bool(ready)

    def chunks(self, now: float) -> list[tuple[Sequence, int]]:
        """Prefills of the next step with their tokens. Takes all blocks of the step, those of its decodes included."""
        self._taken = 0  # for a step that came to nothing there was nothing to take
        while self.decoding and self.decoding.blocks_for(1) > self._blocks.pool.available:
            self._preempt(self._last_holder(), now)
        self.take_decode_blocks(1)
        found: list[tuple[Sequence, int]] = []
        budget = self._profile.max_batch_tokens - len(self.decoding)
        for sequence in list(self._prefilling):
            length = min(sequence.remaining, budget)
            if length < 1:
                break
            if sequence in self._admitted and self._grow(sequence, length, now):
                found.append((sequence, length))
                budget -= length
        return [chunk for chunk in found if chunk[0] in self._admitted]

    def prefilled(self, sequence: Sequence, length: int, now: float) -> bool:
        """A chunk was computed; whether it was the last one, so that the sequence gets a token."""
        whole = length == sequence.remaining
        sequence.computed += length
        self.pending -= length
        self._commit(sequence, now)
        if whole:
            sequence.tokens += 1
            self._prefilling.remove(sequence)
            if sequence.generated < sequence.output:
                self._decode(sequence)
        elif sequence.remaining == 1:
            self.pending -= 1
            self._prefilling.remove(sequence)
            self._decode(sequence)
        return whole

    def decode_room(self, most: int) -> int:
        """How many decode steps find blocks without a preemption, at most so many. The next one has its blocks."""
        return self.decoding.steps_within(self._blocks.pool.available + self.decoding.blocks_for(1), most)

    def take_decode_blocks(self, steps: int) -> None:
        """Take the blocks of so many steps from now."""
        need = self.decoding.blocks_for(steps - self._taken, after=self._taken)
        if need and not self._blocks.pool.reserve(need):
            raise InvariantError("decode steps were planned that have no blocks; please report this with the workload")
        self._taken = max(self._taken, steps)

    def decoded(self, steps: int) -> None:
        """So many decode steps were made; their blocks were taken before."""
        self.decoding.step(steps)
        self._taken -= steps

    def ended(self, now: float) -> list[Sequence]:
        """Forget those whose answers are complete."""
        done = self.decoding.ended()
        for sequence in done:
            self.remove(sequence, now)
        return done

    # Admission

    def _admit_in_turn(self, now: float) -> None:
        for sequence in list(self._waiting):
            if len(self._admitted) >= self._profile.max_running:
                return
            if self._blocks.awaits_another(sequence):
                continue
            if not self._blocks.take(sequence, now):
                return
            self._blocks.announce(sequence)
            self._start(sequence)

    def _admit_by_rank(self, now: float) -> None:
        for sequence in list(self._waiting):
            if len(self._admitted) >= self._profile.max_running or not self._may_enter(sequence.rank):
                return
            if not self._blocks.awaits_another(sequence):
                self._blocks.take(sequence, now)
                self._blocks.announce(sequence)
                self._start(sequence)

    def _may_enter(self, rank: Rank) -> bool:
        """While short of blocks only those may enter that outrank one that holds some."""
        return not self._short_of_blocks or any(rank < holder.rank for holder in self._admitted)

    def _start(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._admitted[sequence] = None
        insort(self._loading, sequence, key=_rank)

    def _enter(self, sequence: Sequence, now: float) -> None:
        self._loading.remove(sequence)
        self.pending -= sequence.pending
        self._blocks.enter(sequence, now)
        if sequence.remaining == 1:
            self._decode(sequence)
            return
        self.pending += sequence.remaining
        if self._profile.reserves_prompt:
            self._prefilling.append(sequence)
        else:
            insort(self._prefilling, sequence, key=_rank)

    def _decode(self, sequence: Sequence) -> None:
        self._blocks.settle(sequence)
        self.decoding.add(sequence)

    # Blocks

    def _commit(self, sequence: Sequence, now: float) -> None:
        self._blocks.commit(sequence, self._blocks.full(sequence), now)

    def _grow(self, sequence: Sequence, length: int, now: float) -> bool:
        """Give it blocks for that many more tokens, from those below it if need be; False when it must wait."""
        count = self._blocks.extra(sequence, length)
        while not self._blocks.grow(sequence, count):
            victim = self._last_holder()
            if victim.rank <= sequence.rank:
                return False
            self._preempt(victim, now)
        return True

    def _last_holder(self) -> Sequence:
        """The lowest in rank, or the youngest, of those that hold blocks."""
        if self._profile.reserves_prompt:
            return next(reversed(self._admitted))
        return max(self._admitted, key=_rank)

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self._take_out(sequence, now)
        insort(self._waiting, sequence, key=_rank)
        self.pending += sequence.pending
        self._blocks.expect(sequence)
        self._short_of_blocks = not self._profile.reserves_prompt
        self.preemptions += 1

    def _take_out(self, sequence: Sequence, now: float) -> None:
        """Of wherever it is, with its blocks."""
        if sequence not in self._admitted:
            self._waiting.remove(sequence)
            self.pending -= sequence.pending
            return
        del self._admitted[sequence]
        if sequence in self.decoding:
            taken = self.decoding.blocks_for(self._taken)
            grown = self.decoding.remove(sequence)
            sequence.table += grown
            sequence.nameless += grown
            self._blocks.pool.free(taken - self.decoding.blocks_for(self._taken))
        elif sequence in self._loading:
            self._loading.remove(sequence)
            self.pending -= sequence.pending
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
            self.pending -= sequence.remaining
        self._blocks.give_back(sequence, now)


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
