"""SimulatedEngine: the engine's protocol on a timing model. Real block accounting, no tensors, no torch.

Covers: continuous batching with chunked prefill, prefix reuse over device and host, preemption by recomputation,
deadlines, cancellation, load, events; on an injected clock, so that an hour can pass in a millisecond. Does not cover:
a shared tier, stop strings, text that means something. A sampled token follows from the prompt, its position and (with
a temperature) the seed, so a stream is the same cold, warm or preempted. As there are no logits, filters, penalties and
bias change nothing, which the log says once of the latter two; a constraint is refused.

A step lasts `decode_step_ms` when a sequence decodes, plus the fitted prefill time of each chunk, and sleeps for it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from array import array
from bisect import insort
from collections.abc import Callable
from dataclasses import replace

from kvstore.events import BlockStored, TierName
from kvstore.lifetime import Lifetime
from kvstore.tier import Clock
from workers.config import WorkerConfig
from workers.protocol import (
    EngineInfo,
    FinishReason,
    Job,
    JobId,
    Load,
    Output,
    StepReport,
    TokenLogprob,
)
from workers.refusal import empty, needs_text, too_long
from workers.simulated_blocks import SequenceBlocks
from workers.simulated_cache import SimulatedCache
from workers.simulated_info import info_for
from workers.simulated_sequence import Sequence, Timing, pseudo_token
from workers.simulated_store import EventLog, SimulatedTier
from workers.step_times import Answers, BusyShare

Sleep = Callable[[float], None]  # seconds

log = logging.getLogger(__name__)


class SimulatedEngine:
    """See the module. Every method but `info` belongs to one thread."""

    def __init__(
        self,
        info: EngineInfo,
        *,
        device_blocks: int,
        host_blocks: int = 0,
        timing: Timing | None = None,
        max_batch_tokens: int = 2048,
        max_running: int = 64,
        default_ttl_s: float | None = None,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        sleep: Sleep = time.sleep,
    ) -> None:
        self.info = _fitting(info, device_blocks)
        self.timing = timing or Timing()
        self._max_batch_tokens, self._max_running = max_batch_tokens, max_running
        self._default = Lifetime(default_ttl_s, is_default=True)
        self._clock, self._sleep = clock, sleep
        self._log = EventLog()
        self._device = SimulatedTier(
            TierName.DEVICE, device_blocks, info.block_nbytes, clock, self._log, wall_clock=wall_clock
        )
        self._host = SimulatedTier(
            TierName.HOST, host_blocks, info.block_nbytes, clock, self._log, wall_clock=wall_clock
        )
        self._tiers = [self._device, self._host] if host_blocks else [self._device]
        self._blocks = SequenceBlocks(
            self._device,
            self._host,
            block_size=info.scheme.block_size,
            timing=self.timing,
            default=self._default,
            clock=clock,
        )
        self._waiting: list[Sequence] = []  # sorted by rank
        self._running: list[Sequence] = []  # in order of admission
        self._jobs: dict[JobId, Sequence] = {}
        self.cache = SimulatedCache(self._device, self._host, default=self._default, private=self._private)
        self._ended: list[Output] = []  # for the next step's report
        self._orders = 0
        self._steps = 0
        self._preemptions = 0
        self._told = False  # that parameters are not heard
        self._prefilling, self._answers = BusyShare(), Answers(info.scheme.block_size)

    def submit(self, job: Job) -> None:
        """Queue a job; one that cannot run is refused by the next step's report."""
        error = empty(job) or too_long(job, self.info.context_length) or needs_text(job)
        if error is not None:
            self._ended.append(Output(job.job_id, finish=FinishReason.ERROR, error=error))
            return
        self._note_unheard(job)
        self._orders += 1
        sequence = Sequence(
            job=job,
            order=self._orders,
            submitted_at=self._clock(),
            tokens=list(job.token_ids),
            names=list(job.block_hashes),
            digest=hashlib.sha256(array("I", job.token_ids[: job.num_prompt]).tobytes()).digest(),
            generated=job.resumed,
        )
        sequence.expected_cached = self._blocks.expected_cached(sequence, self._jobs.values())
        self._jobs[job.job_id] = sequence
        insort(self._waiting, sequence, key=lambda each: each.rank)

    def cancel(self, job_id: JobId) -> None:
        """Free its blocks at once; its last output comes with the next step."""
        sequence = self._jobs.get(job_id)
        if sequence is not None:
            self._end(sequence, FinishReason.CANCELLED)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._jobs or self._ended or len(self._log))

    def step(self) -> StepReport:
        """Expire, admit, compute for as long as the timing model says, sample, commit."""
        self._expire()
        self._admit()
        chunks = self._schedule()
        if chunks:
            seconds = self._duration_ms(chunks) / 1000
            self._sleep(seconds)
            if any(sequence.missing > 1 for sequence, _ in chunks):
                self._prefilling.add(seconds, self._clock())
            self._steps += 1
        outputs = [output for sequence, count in chunks if (output := self._advance(sequence, count)) is not None]
        ended, self._ended = self._ended, []
        return StepReport(outputs=ended + outputs, events=self._log.drain())

    def wait(self, timeout_s: float) -> None:
        """Sleep until the first sequence's blocks have arrived, if all wait for such."""
        if self._running and all(s.ready_at > self._clock() for s in self._running):
            self._sleep(min(timeout_s, max(0.0, min(s.ready_at for s in self._running) - self._clock())))

    def load(self) -> Load:
        """How busy it is."""
        timing, decoding = self.timing, [sequence for sequence in self._running if sequence.missing == 1]
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            pending_prefill_tokens=sum(s.pending for s in self._jobs.values()),
            decoding=len(decoding),
            prefill_fixed_ms=timing.prefill_fixed_ms,
            prefill_token_ms=timing.prefill_token_ms,
            prefill_pair_ms=timing.prefill_pair_ms,
            decode_step_ms=timing.decode_step_ms,
            steps=self._steps,
            preemptions=self._preemptions,
            prefill_share=self._prefilling.value(self._clock()),
            answer_blocks=self._answer_blocks(decoding),
            slots=self._max_running,
            answer_ms=self._answers.ms,
            freed_blocks=self._answers.blocks,
            tiers={tier.name: (tier.stats(), *self._read_ms(tier)) for tier in self._tiers},
        )

    def snapshot(self) -> list[BlockStored]:
        """All that device and host hold. Events that it includes already may follow it."""
        return self._device.snapshot() + self._host.snapshot()

    def close(self, *, flush_s: float) -> None:
        """Forget everything."""
        for sequence in list(self._jobs.values()):
            self._end(sequence, FinishReason.CANCELLED)

    def _note_unheard(self, job: Job) -> None:
        if not self._told and (job.sampling.penalizes or job.sampling.logit_bias):
            self._told = True
            log.warning("penalties and bias change nothing on a simulated worker: it has no logits")

    def _answer_blocks(self, decoding: list[Sequence]) -> int:
        size = self.info.scheme.block_size
        held = sum(len(s.held) + s.private - s.job.num_prompt // size for s in decoding)
        return held + self._answers.growth_blocks if decoding else 0

    def _private(self) -> int:
        return sum(sequence.private for sequence in self._jobs.values())

    def _read_ms(self, tier: SimulatedTier) -> tuple[float, float]:
        on_device = tier is self._device
        return (0.0, 0.0) if on_device else (self.timing.host_latency_ms, self.timing.host_ms(1))

    def _expire(self) -> None:
        now = self._clock()
        late = [s for s in self._jobs.values() if s.job.deadline is not None and s.job.deadline <= now]
        for sequence in late:
            self._end(sequence, FinishReason.DEADLINE)
        self._device.sweep()
        self._host.sweep()

    def _admit(self) -> None:
        """Like the real scheduler: a prompt whose next block is being computed waits for it, and lets others pass."""
        for sequence in list(self._waiting):
            if len(self._running) == self._max_running:
                return
            if self._awaits_another(sequence):
                continue
            if not self._blocks.acquire(sequence):
                return
            self._waiting.remove(sequence)
            self._running.append(sequence)

    def _awaits_another(self, sequence: Sequence) -> bool:
        found = self._blocks.found(sequence)
        return any(self._makes(other, sequence, found) for other in self._running if other.rank < sequence.rank)

    @staticmethod
    def _makes(other: Sequence, sequence: Sequence, block: int) -> bool:
        """Whether `other` is computing that block of the prompt, which is not its last token's."""
        names, made = sequence.reusable, other.names
        is_computing = other.missing > 1 and other.registered <= block and not other.job.no_store
        return is_computing and block < min(len(names), len(made)) and names[block] == made[block]

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """The step's sequences and how many tokens each computes; decoding ones first."""
        now, budget = self._clock(), self._max_batch_tokens
        chunks: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._running, key=lambda s: s.missing > 1):
            count = min(sequence.missing, budget)
            if count < 1 or sequence.ready_at > now or sequence not in self._running:
                continue
            if not self._grow(sequence, sequence.computed + count):
                continue
            chunks.append((sequence, count))
            budget -= count
        return [chunk for chunk in chunks if chunk[0] in self._running]

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give it blocks for that many tokens, preempting the youngest; False when it was preempted itself."""
        while not self._blocks.grow(sequence, tokens):
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._blocks.give_back(sequence)
        sequence.computed = sequence.registered = 0
        insort(self._waiting, sequence, key=lambda each: each.rank)
        self._preemptions += 1

    def _duration_ms(self, chunks: list[tuple[Sequence, int]]) -> float:
        prefills = [self.timing.prefill_ms(count, s.computed) for s, count in chunks if s.missing > 1]
        return sum(prefills) + (self.timing.decode_step_ms if len(prefills) < len(chunks) else 0.0)

    def _advance(self, sequence: Sequence, count: int) -> Output | None:
        sequence.computed += count
        self._blocks.commit(sequence)
        if sequence.missing:
            return None
        output = self._sample(sequence)
        if output.finish is not None:
            self._forget(sequence)
        return output

    def _sample(self, sequence: Sequence) -> Output:
        job, sampling = sequence.job, sequence.job.sampling
        token = pseudo_token(sequence, self.info.vocab_size)
        sequence.tokens.append(token)
        sequence.generated += 1
        is_first = sequence.generated == job.resumed + 1
        if is_first:
            sequence.first_token_at = self._clock()
        output = Output(job.job_id, token_ids=[token], text=f" {token}", completion_tokens=sequence.generated)
        if sampling.logprobs is not None:
            output.logprobs.append(TokenLogprob(token, -1.0, ((token, -1.0),)[: sampling.logprobs]))
        if is_first and sequence.admitted_at is not None:
            output.worker_ttft_ms = (self._clock() - sequence.submitted_at) * 1000
            output.queue_ms = (sequence.admitted_at - sequence.submitted_at) * 1000
            output.load_ms = sequence.load_ms
        output.finish = self._finish(sequence, token)
        output.fates = sequence.fates if output.finish or is_first else None
        output.resumed_fates = sequence.resumed_fates if is_first else None
        return output

    def _finish(self, sequence: Sequence, token: int) -> FinishReason | None:
        sampling = sequence.job.sampling
        ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else frozenset(self.info.eos_token_ids))
        if token in ends:
            return FinishReason.STOP
        full = len(sequence.tokens) >= self.info.context_length
        return FinishReason.LENGTH if full or sequence.generated >= sampling.max_tokens else None

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._forget(sequence)
        self._ended.append(
            Output(sequence.job.job_id, finish=reason, fates=sequence.fates, completion_tokens=sequence.generated)
        )

    def _forget(self, sequence: Sequence) -> None:
        del self._jobs[sequence.job.job_id]
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        available = self._device.available
        self._blocks.give_back(sequence)
        if sequence.first_token_at is not None:
            answered_ms = (self._clock() - sequence.first_token_at) * 1000
            generated_here = sequence.generated - sequence.job.resumed
            self._answers.ended(answered_ms, generated_here, self._device.available - available)


def build_engine(
    config: WorkerConfig,
    *,
    timing: Timing | None = None,
    clock: Clock = time.monotonic,
    sleep: Sleep = time.sleep,
) -> SimulatedEngine:
    """A simulated engine for a worker's settings; see `simulated_info.info_for`."""
    info = info_for(config)
    return SimulatedEngine(
        info,
        device_blocks=config.device_bytes // info.block_nbytes,
        host_blocks=config.host_bytes // info.block_nbytes,
        timing=timing,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        default_ttl_s=config.default_ttl_s,
        clock=clock,
        sleep=sleep,
    )


def _fitting(info: EngineInfo, device_blocks: int) -> EngineInfo:
    """A sequence must fit the pool alone, or it could never finish."""
    longest = device_blocks * info.scheme.block_size
    if longest < 2:
        raise ValueError(
            f"the device tier has room for {device_blocks} blocks; raise device_bytes to several blocks of "
            f"{info.block_nbytes} bytes"
        )
    return replace(info, context_length=min(info.context_length, longest))
