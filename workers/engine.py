"""The engine: one step schedules, fetches, forwards, samples and commits. Without Ray or gRPC.

Covers: the life of a job from `submit` to its last Output. The parts know their business: `scheduler` what to compute,
`kvstore` where blocks lie, `stepping` and `models` how to compute, `sampler` and `answering` what comes out. Does not
cover: which jobs are refused (`refusal`), which failures end the worker (`step_failures`), what operators do
(`engine_cache`).

A launcher that runs ahead lets a step be scheduled and launched while the one before is still being computed. What that
one sampled is taken in afterwards; a sequence that is then found to have ended had one token too many computed, which
is thrown away. So there are at most two steps at a time, and what `step` reports is the one before the one it launched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from kvstore.events import BlockStored
from kvstore.lifetime import Lifetime
from kvstore.store import TieredStore
from kvstore.tier import BlockMeta, Clock
from workers.agreement import ALONE, Agreement, Begun
from workers.answering import Answering, sample_ready
from workers.anteroom import Anteroom
from workers.attention.step import KVViews
from workers.conversations import Conversations
from workers.detokenize import TextStream
from workers.engine_cache import EngineCache
from workers.engine_load import expected_tokens, load_of
from workers.grammars import Grammars
from workers.models import ModelRunner
from workers.prefill_only import PrefillOnly
from workers.protocol import (
    EngineInfo,
    FinishReason,
    Job,
    JobError,
    JobId,
    Load,
    Output,
    StepReport,
)
from workers.proven import Proven
from workers.refusal import refusal
from workers.row_state import row_state
from workers.sampler import Sampled
from workers.scheduler import Chunk, Scheduler
from workers.sequence import Sequence
from workers.step_budget import StepBudget
from workers.step_failures import NOT_FINITE, StepFailures, is_out_of_memory
from workers.step_times import Answers, BusyShare, StepTimes
from workers.stepping.launch import DirectLauncher, Flight, Launcher
from workers.stepping.pipeline import Pipeline
from workers.stepping.work import StepWork

if TYPE_CHECKING:  # what serves and reads other workers is loaded by whoever opens it
    from workers.peers import Peers

log = logging.getLogger(__name__)


class TorchEngine:
    """`workers.protocol.Engine` on a PyTorch model. Everything but `info` belongs to one thread.

    Attributes:
        runner: the model. store: its blocks. cache: what is done with them besides jobs. grammars: of constraints.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: TieredStore,
        kv: KVViews,
        info: EngineInfo,
        *,
        num_blocks: int,
        max_batch_tokens: int,
        max_running: int,
        default_ttl_s: float | None,
        clock: Clock = time.monotonic,
        shared_tier_id: Callable[[], str] = str,
        peers: Peers | None = None,
        times: StepTimes | None = None,
        launcher: Launcher | None = None,
        ranks: Agreement = ALONE,
    ) -> None:
        """Take over a model and a store.

        Args:
            runner: the model. store: its blocks; closed with the engine. kv: views of the device tier's pool.
            info: what routers are told. num_blocks: of the device tier.
            max_batch_tokens: tokens a step. max_running: sequences that hold blocks.
            default_ttl_s: of blocks whose job names none; None: until evicted.
            clock: of deadlines and all times, seconds.
            shared_tier_id: what `info` shall say of the shared tier now; its server may come late, or restart.
            peers: other workers, whose tier the store has; closed with the engine. None: without.
            times: learns how long steps take; None: one that nobody else asks.
            launcher: computes steps, over the same pool; None: a `DirectLauncher`.
            ranks: other engines that compute the same steps, each with a share of the model.

        Raises:
            ValueError: a limit is not positive.
        """
        self.info = info
        self._shared_tier_id, self._peers = shared_tier_id, peers
        self._note_shared_tier()
        self.runner, self.store, self._clock = runner, store, clock
        self._tokenizer = Tokenizer.from_file(str(runner.folder.tokenizer_file))
        self.grammars = Grammars(
            runner.folder.tokenizer_file, vocab_size=info.vocab_size, end_tokens=info.eos_token_ids
        )
        self._anteroom = Anteroom(self.grammars)
        self._block_size = info.scheme.block_size
        self._capacity = num_blocks * self._block_size
        self._default = Lifetime(default_ttl_s, is_default=True)
        self._answering = Answering(info, self._capacity, clock)
        ends_with = self._answering.ends_with
        self._pipeline = Pipeline(launcher or DirectLauncher(runner, kv), store, self._block_size, ends_with)
        self._taken_in_at = 0.0
        self._times, self._prefilling = times or StepTimes(self._block_size), BusyShare()
        self._answers, self._slots, self._ranks = Answers(self._block_size), max_running, ranks
        self._scheduler = Scheduler(
            ranks.blocks(self._pipeline.store),
            block_size=self._block_size,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            compute_ms=self._times.compute_ms,
            lifetime=self._lifetime,
        )
        self._sequences: dict[JobId, Sequence] = {}
        self._conversations = Conversations()
        self._outputs: list[Output] = []  # for the next report
        self._arrivals = self._steps = 0
        self._failures, self._budget = StepFailures(), StepBudget(max_batch_tokens, max_running)
        self._stalled, self._sample = False, sample_ready
        self.cache = EngineCache(store, self._scheduler, peers, self._default)
        self._proven = Proven()
        self._prefill_only = PrefillOnly(None if peers is None else peers.board, self._block_size, store.settled)

    def submit(self, job: Job) -> None:
        """Queue a job; one that cannot run is refused by the next step's report."""
        if (error := refusal(job, self.info, capacity=self._capacity, running=self._sequences)) is not None:
            self._outputs.append(Output(job.job_id, finish=FinishReason.ERROR, error=error))
            return
        now, asked, promised = self._clock(), job.as_asked(self._block_size), 0
        if self._peers is not None:
            self._peers.learn(job)
            if (promise := self._peers.promise(job, now)) is not None:
                self.store.expect(promise)
                promised = promise.blocks
        self._arrivals += 1
        sequence = Sequence(
            job=job,
            arrival=self._arrivals,
            submitted_at=now,
            turn=self._conversations.arrived(asked, now),
            token_ids=list(job.token_ids),
            hashes=list(job.block_hashes),
            text=TextStream(self._tokenizer, asked.token_ids, job.sampling.stop),
        )
        sequence.text.replay(sequence.generated_ids)
        near = len(self.store.match(sequence.readable(self._block_size), self._scheduler.reads))
        before = (*self._scheduler, *self._anteroom)
        sequence.expected_cached = expected_tokens(sequence, near, promised, before, self._block_size)
        self._sequences[job.job_id] = sequence
        self._prefill_only.begin(sequence)
        if job.sampling.constraint is not None:
            self._anteroom.add(sequence)
        else:
            sequence.row = row_state(job.sampling, sequence.prompt_ids, sequence.generated_ids)
            self._scheduler.add(sequence)

    def cancel(self, job_id: JobId) -> None:
        """Free its blocks at once; its last output comes with the next step."""
        sequence = self._sequences.get(job_id)
        if sequence is not None:
            self._end(sequence, FinishReason.CANCELLED)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        waits = self._pipeline.is_flying or self._prefill_only.awaits_copies
        return bool(self._sequences or self._outputs or waits or self.cache.changed)

    def step(self) -> StepReport:
        """Schedule, fetch, forward, sample, commit: once.

        Raises:
            RuntimeError: the device is broken, or so many steps in a row failed that it seems to be.
        """
        self.store.pump()
        self._prefill_only.pump()
        self._note_shared_tier()
        if self._pipeline.must_land or self._scheduler.is_starved:
            self._land()
        begun = self._ranks.begin((*self._scheduler, *self._anteroom), self._clock(), self._anteroom.states())
        self._admit_compiled(begun)
        self._end_overdue(begun.now)
        chunks = self._schedule()
        if not chunks and self._pipeline.is_flying:
            self._land()
            chunks = self._schedule()
        if chunks:
            self._run(chunks)
        self._stalled = not chunks and not self._outputs
        self.cache.changed = False
        outputs, self._outputs = self._outputs, []
        return StepReport(outputs, self.store.drain_events())

    def wait(self, timeout_s: float) -> None:
        """Sleep while all sequences wait for blocks on their way; returns when one arrived, or after the timeout."""
        if self._stalled and (self._sequences or self._prefill_only.awaits_copies):
            self.store.wait(timeout_s)

    def load(self) -> Load:
        """How busy it is."""
        load = load_of(self._scheduler, list(self._anteroom), self._times, self._answers, self.store, self._block_size)
        load.steps, load.slots = self._steps, self._slots
        load.prefill_share = self._prefilling.value(self._clock())
        return load

    def snapshot(self) -> list[BlockStored]:
        """All that the store holds; events not yet reported follow though it includes them: replayed, they agree."""
        return self.store.snapshot()

    def close(self, *, flush_s: float) -> None:
        """End all jobs, flush the store's queued writes for at most that long, give everything back."""
        with ExitStack() as last:  # whatever fails, as a broken device does, the store is closed
            last.callback(self.store.close, flush_s=flush_s)
            last.callback(self.grammars.close)
            if self._peers is not None:
                last.callback(self._peers.close)  # before the host tier, whose blocks it sends
            last.callback(self._pipeline.close)
            for sequence in list(self._sequences.values()):
                self._end(sequence, FinishReason.CANCELLED)

    def _schedule(self) -> list[Chunk]:
        self._scheduler.is_ahead = self._pipeline.is_flying
        return self._scheduler.schedule()

    def _run(self, chunks: list[Chunk]) -> None:
        """Launch these; take in the step before, and this one too unless steps run ahead."""
        started, before = self._clock(), self._pipeline.lift()
        for chunk in chunks:
            if chunk.sequence.first_step_at is None:
                chunk.sequence.first_step_at = started
        failure: RuntimeError | None = None
        try:
            self._pipeline.launch(chunks, started, before)
        except RuntimeError as error:  # torch's errors, out of memory among them
            failure = error
        if before is not None:
            self._take_in(before)
        if failure is not None:
            self._not_computed(chunks, failure)
        elif not self._pipeline.runs_ahead:
            self._land()

    def _land(self) -> None:
        """Take in the step in flight, if there is one."""
        if (flight := self._pipeline.lift()) is not None:
            self._take_in(flight)

    def _take_in(self, flight: Flight) -> None:
        """Wait for a step; what came of it. Sequences that have ended meanwhile get nothing."""
        work = flight.work
        try:
            sampled = flight.sampled(self._sample)
        except RuntimeError as error:
            if is_out_of_memory(error):
                self._pipeline.undo(flight)
            self._not_computed(work.chunks, error)
        else:
            sampled = self._ranks.tokens(sampled)
            self._failures.succeeded()
            self._budget.fitted()
            self._scheduler.max_batch_tokens = self._budget.tokens
            self._scheduler.max_running = self._budget.sequences
            self._commit(work, sampled)
            self._prefill_only.stepped(chunk.sequence for chunk in work.chunks if self._is_under_way(chunk.sequence))
            for sequence, token in sampled.items():
                if self._is_under_way(sequence):
                    self._advance(sequence, token)
            self._steps += 1
            self._learn(work, max(flight.started, self._taken_in_at))
        self._pipeline.end(flight)

    def _learn(self, work: StepWork, started: float) -> None:
        """A step has ended just now that began, or had the device for itself, at that time."""
        ended = self._taken_in_at = self._clock()
        self._times.observe(work.sizes, (ended - started) * 1000)
        if work.longest > 1:
            self._prefilling.add(ended - started, ended)

    def _not_computed(self, chunks: list[Chunk], error: RuntimeError) -> None:
        """A step was not: the next ones are made smaller if that may help, else its jobs end.

        Raises:
            RuntimeError: see `StepFailures.failed`.
        """
        self._ranks.failed(error)
        tokens = sum(chunk.length for chunk in chunks)
        if is_out_of_memory(error) and self._budget.out_of_memory(tokens, len(chunks)):
            self._scheduler.max_batch_tokens = self._budget.tokens
            self._scheduler.hold_fewer(self._budget.sequences)
            if self.runner.device.type == "cuda":
                torch.cuda.empty_cache()  # what other sizes of steps have left unused
            return
        told = self._failures.failed(error, len(chunks))
        for chunk in chunks:
            if self._is_under_way(chunk.sequence):
                self._end(chunk.sequence, FinishReason.ERROR, told)

    def _is_under_way(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.job.job_id) is sequence

    def _commit(self, work: StepWork, sampled: dict[Sequence, Sampled]) -> None:
        """Make blocks findable that the step filled, but none of a sequence whose numbers went wrong, or that ended."""
        block_ids: list[int] = []
        metas: list[BlockMeta] = []
        for chunk, computed in zip(work.chunks, work.stops, strict=True):
            sequence = chunk.sequence
            start, stop = sequence.num_committed, computed // self._block_size
            wrong = sequence in sampled and sampled[sequence].token_id is None
            if stop == start or sequence.job.no_store or wrong or not self._is_under_way(sequence):
                continue
            block_ids += sequence.block_table[start:stop]
            metas += sequence.metas(start, stop, self._block_size, self._lifetime(sequence))
            sequence.committed(stop)
            self._scheduler.made(sequence, start, sequence.num_committed)
        if metas:
            self.store.commit(block_ids, metas)

    def _advance(self, sequence: Sequence, sampled: Sampled) -> None:
        """Append a token; the output that tells of it."""
        if sampled.token_id is None:
            if sampled.error is None and (doubtful := self._proven.doubt(sequence, self._block_size)):
                self.cache.changed = True
                self.store.disown(doubtful)
            self._end(sequence, FinishReason.ERROR, sampled.error or NOT_FINITE)
            return
        if sequence.num_proven < sequence.num_committed:
            self._proven.add(sequence.hashes[sequence.num_proven : sequence.num_committed])
            sequence.num_proven = sequence.num_committed
        if sequence.job.prefill_only:
            self._end(sequence, FinishReason.LENGTH)
            return
        output = self._answering.add(sequence, sampled.token_id, sampled.logprob)
        if output.finish is not None:
            self._finish(sequence, output)
        self._outputs.append(output)

    def _finish(self, sequence: Sequence, output: Output) -> None:
        """Complete a sequence's last output and forget the sequence."""
        self._answering.flush(sequence, output)
        if sequence.turn is not None and sequence.num_committed > sequence.num_prompt // self._block_size:
            self._conversations.answered(sequence.turn, sequence.hashes[sequence.num_committed - 1])
        available = self._pipeline.store.available
        self._scheduler.remove(sequence)
        self._anteroom.remove(sequence)
        if sequence.first_token_at is not None:
            answered_ms = (self._clock() - sequence.first_token_at) * 1000
            generated_here = sequence.num_generated - sequence.job.resumed
            self._answers.ended(answered_ms, generated_here, self._pipeline.store.available - available)
        self._prefill_only.ended(sequence)
        del self._sequences[sequence.job.job_id]

    def _end(self, sequence: Sequence, reason: FinishReason, error: JobError | None = None) -> None:
        """End a sequence without a new token."""
        output = Output(sequence.job.job_id, finish=reason, error=error, completion_tokens=sequence.num_generated)
        self._finish(sequence, output)
        self._outputs.append(output)

    def _note_shared_tier(self) -> None:
        current = self._shared_tier_id()
        if current != self.info.shared_tier_id:
            self.info = replace(self.info, shared_tier_id=current)

    def _admit_compiled(self, begun: Begun) -> None:
        for sequence, error in self._anteroom.leaving(begun.grammars, begun.now):
            if error is None:
                self._scheduler.add(sequence)
            else:
                self._end(sequence, FinishReason.ERROR, error)

    def _end_overdue(self, now: float) -> None:
        for sequence in list(self._sequences.values()):
            if sequence.job.deadline is not None and sequence.job.deadline <= now:
                self._end(sequence, FinishReason.DEADLINE)

    def _lifetime(self, sequence: Sequence) -> Lifetime:
        return sequence.job.lifetime or self._default
