"""An engine with continuous batching on a virtual clock: chunked prefill, batched decode, memory that runs out.

Covers: steps and how long they take, what the engine tells of itself and when, its failure. Does not cover: who runs
(`batched_scheduler`), the profile (`batched_profile`), the router. Where nothing but decoding happens, all steps up to
the next event are one jump; whoever looks in between makes the engine catch up (`catch_up`), so a jump shows nowhere.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import replace
from typing import NamedTuple

from kvstore.events import TierName
from kvstore.fading_sum import FadingSum
from replay.batched_profile import BatchedProfile
from replay.batched_scheduler import BatchedScheduler
from replay.batched_sequence import Sequence, SequenceBlocks
from replay.batched_steps import Plan
from replay.engine import NO_TIERS, CacheChange, Reuse, Told
from replay.segment_cache import SegmentCache
from replay.tiers import SharedTier, Tiers, WorkerTiers
from replay.timeline import Timeline
from replay.workload import Workload
from router.cost import WorkerLoad
from router.traffic import MEMORY_S
from workers.step_times import Answers


class _Noted(NamedTuple):
    """What a report is made of; sent at `since`. `share`: of the time lately that was prefill."""

    since: float
    known_until: float
    pending: int
    waiting: int
    running: int
    decoding: int
    decode_step_ms: float
    share: float
    answer_blocks: int = 0
    answer_ms: float = 0.0
    freed_blocks: float = 0.0


class Delivered(NamedTuple):
    """What another worker has made for a request: leading blocks, and those of them that it had before."""

    blocks: int
    found: int


class BatchedEngine:
    """One worker's engine. All times are those of the timeline.

    Attributes:
        busy_s: time that steps spent in prefill. scheduler: who runs. gaps: how often which time lay between two tokens
        of an answer, in tenths of a millisecond.
    """

    def __init__(
        self,
        profile: BatchedProfile,
        tiers: Tiers,
        work: Workload,
        timeline: Timeline,
        told: Told,
        *,
        shared: SharedTier | None,
        remember_s: float,
    ) -> None:
        """`shared`: the tier of all workers. `remember_s`: reports are asked for that are at most this old."""
        self._profile = profile
        self._work = work
        self._timeline = timeline
        self._told = told
        self._fit = profile.fit
        self._remember_s = remember_s + profile.heartbeat_s
        self._capacity = profile.pool_tokens // work.block_size * work.block_size
        pool = SegmentCache(TierName.DEVICE, profile.pool_tokens // work.block_size, work.lengths, ttl_s=tiers.ttl_s)
        self._tiers = WorkerTiers(tiers, work, shared)
        self._reads = self._tiers.reads
        self._expires = tiers.ttl_s is not None
        self._blocks = SequenceBlocks(profile, work.block_size, pool, self._tiers, answers_from=len(work.lengths))
        self.busy_s = 0.0
        self.gaps: Counter[int] = Counter()
        self._busy = FadingSum()
        self._orders = 0
        self._lives = 0
        self._start_empty()

    def _start_empty(self) -> None:
        self.scheduler = BatchedScheduler(self._profile, self._work.block_size, self._blocks)
        self._came: list[Sequence] = []
        self._called_off: list[Sequence] = []
        self._came_at = self._taken_until = -math.inf  # when the last request was submitted, and of those taken in
        self._known: dict[int, Sequence] = {}
        self._first_due: list[Sequence] = []  # they decode, and have no token yet
        self._plan: Plan | None = None
        self._done = 0  # steps of the plan
        self._decode_step_ms = self._profile.decode_step_ms(1, 0)  # a worker that has served before knows it
        self._answers = Answers(self._work.block_size)
        self._waking_at: float | None = None
        self._history = deque([_Noted(self._timeline.now, -math.inf, 0, 0, 0, 0, 0.0, 0.0)])

    # What others ask

    def submit(self, number: int, delivered: Delivered | None = None) -> None:
        """Queue a request; it is looked at when the step that runs has ended."""
        request = self._work.requests[number]
        if request.input_length >= self._capacity:
            self._told.refused(number)
            return
        sequence = self._sequence(number, max(1, min(request.output_length, self._capacity - request.input_length)))
        if delivered is not None:
            sequence.delivered, sequence.delivered_found = delivered
        self._queue(sequence)

    def prefill(self, number: int) -> bool:
        """Queue the prompt of a request that another worker answers; False: there is never room for it."""
        if self._work.requests[number].input_length >= self._capacity:
            return False
        sequence = self._sequence(number, 1)
        sequence.only_prefill = True
        self._queue(sequence)
        return True

    def _sequence(self, number: int, output: int) -> Sequence:
        self._orders += 1
        request, chain = self._work.requests[number], self._work.chains[number]
        prompt, rank = request.input_length, (-request.priority, self._orders)
        return Sequence(number, rank, chain, prompt, output, len(chain), prompt)

    def _queue(self, sequence: Sequence) -> None:
        self._known[sequence.number] = sequence
        self._came.append(sequence)
        self._came_at = self._timeline.now
        self._look_soon()

    def cancel(self, number: int) -> None:
        """Forget a request after the step that runs."""
        sequence = self._known.pop(number, None)
        if sequence is not None:
            self._called_off.append(sequence)
            self._look_soon()

    def fail(self) -> tuple[list[int], list[int]]:
        """Lose pool, host and all requests: (those that had no token yet, those that were being answered). Of prompts
        that it prefilled for others nothing is told."""
        self._catch_up()
        for sequence in self.scheduler.decoding:
            since, tokens = sequence.decoding_since or (0, sequence.tokens)
            sequence.tokens = tokens + self.scheduler.decoding.steps - since
        lost = sorted((s for s in self._known.values() if not s.only_prefill), key=lambda sequence: sequence.rank)
        if self._plan is not None:
            self.busy_s += self._plan.prefill_s * self._share_done(self._plan)
        self._tell()
        self._lives += 1
        self._blocks.lose()
        self._start_empty()
        return [s.number for s in lost if not s.generated], [s.number for s in lost if s.generated]

    def catch_up(self) -> None:
        """Tell of what the steps of a jump that are over by now, and the TTL, have changed."""
        plan = self._plan
        if plan is not None and plan.steps > 1:
            steps = plan.done_by(self._timeline.now) - self._done
            if self.scheduler.decoding.blocks_for(steps, after=1):  # else nobody could see a difference
                self._catch_up()
        if self._expires:
            self._expire()
            self._tell()

    def _catch_up(self) -> None:
        """Make the steps of a jump that are over by now."""
        plan, now = self._plan, self._timeline.now
        if plan is not None and plan.steps > 1 and (steps := plan.done_by(now)) > self._done:
            self.scheduler.take_decode_blocks(steps - self._done)
            self.scheduler.decoded(steps - self._done)
            self._done = steps
            self._tell()
            self.scheduler.take_decode_blocks(1)

    def holding(self) -> list[CacheChange]:
        """All that it holds, as changes from nothing."""
        return [self._blocks.pool.all(), *self._tiers.all()]

    def report_time(self, by: float) -> float:
        """When the last report was sent that was sent by that time: at ends of steps, and where it is silent again."""
        noted, plan = self._noted(by), self._plan
        since = noted.since
        if plan is not None and plan.started <= by and plan.steps > 1:
            since = max(since, plan.after(plan.done_by(by)))
        if noted.running or noted.waiting or by < since:
            return since
        beat = self._profile.heartbeat_s  # an idle engine looks at itself anew, a busy one is silent until a step ends
        silent_from = by if plan is None else min(by, plan.started)
        return since + max(0.0, silent_from - since) // beat * beat

    def reported(self, sent: float) -> WorkerLoad:
        """The load as it was told then."""
        noted = self._noted(sent)
        return WorkerLoad(
            self._fit,
            self._reads,
            pending_tokens=noted.pending,
            waiting=noted.waiting,
            running=noted.running,
            decoding=noted.decoding,
            decode_step_ms=noted.decode_step_ms,
            prefill_share=noted.share * math.exp((noted.since - max(sent, noted.since)) / MEMORY_S),
            pool_blocks=self._capacity // self._work.block_size,
            answer_blocks=noted.answer_blocks,
            slots=self._profile.max_running,
            answer_ms=noted.answer_ms,
            freed_blocks=noted.freed_blocks,
        )

    def known_until(self, sent: float) -> float:
        """Requests are taken in when the step that runs has ended: the report of that end does not know them."""
        return self._noted(sent).known_until

    def check(self) -> None:
        """Raises InvariantError when the books are wrong."""
        self._blocks.pool.check()
        self._tiers.check()

    # Steps

    def _look_soon(self) -> None:
        """Begin a step if none runs; cut a jump short after the step that runs."""
        plan = self._plan
        if plan is None:
            self._next()
        elif plan.steps > 1:
            self._catch_up()
            if self._done + 1 < plan.steps:
                self._run(replace(plan, steps=self._done + 1))

    def _next(self) -> None:
        """Take in what came, and plan the steps up to the next event."""
        now, scheduler = self._timeline.now, self.scheduler
        self._take_in(now)
        self._expire()
        entered, preempted = scheduler.admit(now), scheduler.preemptions
        chunks = scheduler.chunks(now)
        decoding = scheduler.decoding
        self._first_due = decoding.tokenless()
        # A first token is an event of its own; and after what has just changed another one may start at the next step.
        one_by_one = bool(self._first_due) or entered or scheduler.preemptions > preempted
        if not chunks and not decoding:
            self._plan = None
            self._tell()
            if self._history[-1].since < now:
                self._note(max(now, self._history[-1].since + self._profile.report_s))
            self._wake_for_reads()
            return
        self._done = 0
        self._run(self._planned(chunks, now, one_by_one=one_by_one))
        self._wake_for_reads()

    def _planned(self, chunks: list[tuple[Sequence, int]], now: float, *, one_by_one: bool) -> Plan:
        profile, decoding = self._profile, self.scheduler.decoding
        sequences, context = len(decoding), decoding.context
        if chunks:
            prefill_ms = profile.prefill.fixed_ms
            prefill_ms += sum(profile.chunk_part_ms(length, sequence.computed) for sequence, length in chunks)
            mixed_ms = profile.mixed_part_ms(sequences, context)
            return Plan(chunks, 1, now, (prefill_ms + mixed_ms) / 1e3, 0.0, prefill_ms / 1e3)
        first_ms = self._decode_step_ms = profile.decode_step_ms(sequences, context)
        steps = 1 if one_by_one else self.scheduler.decode_room(decoding.left())
        growth_ms = profile.decode_context_ms * sequences
        return Plan([], steps, now, first_ms / 1e3, growth_ms / 1e3, 0.0)

    def _run(self, plan: Plan) -> None:
        self._plan = plan
        if self._history[-1].since > plan.started:
            self._history.pop()  # work came before the last step's report was due: the next step's will do
        self._timeline.at(plan.after(plan.steps), lambda: self._end(plan))

    def _end(self, plan: Plan) -> None:
        """The last step of a plan is over: tokens, blocks, events, load, and the next one."""
        if plan is not self._plan:
            return
        now, scheduler = self._timeline.now, self.scheduler
        self._plan = None
        self._expire()
        self.busy_s += plan.prefill_s
        self._busy.add(plan.prefill_s, now)
        newcomers, self._first_due = self._first_due, []
        self._note_gaps(plan, len(scheduler.decoding))
        scheduler.take_decode_blocks(plan.steps - self._done)
        scheduler.decoded(plan.steps - self._done)
        prefilled = [s for s, length in plan.chunks if scheduler.prefilled(s, length, now)]
        room = self._blocks.pool.available
        ended = scheduler.ended(now)
        for sequence in [s for s in prefilled if s.generated >= s.output]:
            scheduler.remove(sequence, now)
            ended.append(sequence)
        freed = (self._blocks.pool.available - room) / max(1, len(ended))
        self._tell()
        for sequence in (*newcomers, *(s for s in prefilled if s.generated == 1)):
            if sequence.only_prefill:
                continue
            sequence.first_token_at = now
            if self._known.get(sequence.number) is sequence:
                self._told.first_token(sequence.number, self._reuse(sequence, now))
        for sequence in ended:
            if sequence.first_token_at is not None:
                self._answers.ended((now - sequence.first_token_at) * 1e3, sequence.generated, freed)
            if self._known.get(sequence.number) is sequence:
                del self._known[sequence.number]
                if sequence.only_prefill:
                    found = sum((sequence.cached or NO_TIERS).values()) // self._work.block_size
                    self._told.made(sequence.number, found, sequence.ready_at)
                else:
                    self._told.ended(sequence.number)
        if now >= self._history[-1].since + self._profile.report_s:
            self._note(now)
        self._next()

    def _note_gaps(self, plan: Plan, decoding: int) -> None:
        """Each sequence that decoded along has waited for these steps."""
        if not decoding:
            return
        middle_s = plan.first_s + plan.growth_s * (plan.steps - 1) / 2  # they grow by microseconds
        self.gaps[round(middle_s * 1e4)] += plan.steps * decoding

    def _take_in(self, now: float) -> None:
        for sequence in self._called_off:
            if sequence in self._came:
                self._came.remove(sequence)
            elif sequence in self.scheduler:
                self.scheduler.remove(sequence, now)
        self._called_off.clear()
        for sequence in self._came:
            sequence.expected_cached = self._blocks.in_reach(sequence)
            self.scheduler.add(sequence)
        if self._came:
            self._taken_until = self._came_at
        self._came.clear()

    def _wake_for_reads(self) -> None:
        due, life = self.scheduler.next_arrival, self._lives
        if due is not None and due != self._waking_at:
            self._waking_at = due
            self._timeline.at(due, lambda: self._look_soon() if life == self._lives else None)

    # What it tells

    def _tell(self) -> None:
        changes = self._tiers.changes()
        if (change := self._blocks.pool.changes()) is not None:
            changes.insert(0, change)
        if changes:
            self._told.cache_changed(changes)

    def _note(self, since: float) -> None:
        """Remember the load for the report of that time."""
        scheduler, history, now = self.scheduler, self._history, self._timeline.now
        history.append(
            _Noted(
                since,
                self._taken_until,
                scheduler.pending,
                scheduler.waiting,
                scheduler.running,
                len(scheduler.decoding),
                self._decode_step_ms,
                self._busy.value(now) / MEMORY_S,
                scheduler.decoding.answer_blocks + (self._answers.growth_blocks if scheduler.decoding else 0),
                self._answers.ms,
                self._answers.blocks,
            )
        )
        while len(history) > 1 and history[1].since <= now - self._remember_s:
            history.popleft()

    def _noted(self, by: float) -> _Noted:
        for noted in reversed(self._history):
            if noted.since <= by:
                return noted
        return self._history[0]

    def _reuse(self, sequence: Sequence, now: float) -> Reuse:
        tiers = sequence.cached or NO_TIERS
        cached = sum(tiers.values())
        return Reuse(cached, sequence.prompt - cached, now, tiers)

    def _expire(self) -> None:
        if self._expires:
            self._blocks.pool.expire(self._timeline.now)
            self._tiers.expire(self._timeline.now)

    def _share_done(self, plan: Plan) -> float:
        """Of a plan that is cut off now."""
        return (self._timeline.now - plan.started) / (plan.after(plan.steps) - plan.started)
