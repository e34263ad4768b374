"""The project's own SimulatedEngine, paced like every other worker of the comparison (`service`).

SimulatedEngine sleeps through a step, and what arrives meanwhile waits to be noticed; decoding shares its steps with
prefill. The other workers compute one prompt after another and decode beside that. So here SimulatedEngine runs on a
clock of its own, ahead of the real one: a job is computed the moment it comes, the virtual clock tells when that
would have been done, and events, answers and load are reported when the real clock gets there. An answer comes whole,
when its decoding is done, as the mock's does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from bench.peers.service import Constants, WorkerBooks
from kvstore.events import BlockStored, KvEvent
from workers.protocol import Cache, EngineInfo, FinishReason, Job, JobId, Load, Output, StepReport
from workers.simulated import SimulatedEngine
from workers.simulated_sequence import Timing

_ANY_LENGTH = 1 << 30
_EARLY_S = 1e-6  # a timer may ring a rounding error too soon, and rings once
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class _Answer:
    """A job whose end is known: its prefill begins at `started_at` and ends at `first_at`."""

    output: Output
    started_at: float
    first_at: float


@dataclass(order=True, slots=True)
class _Due:
    at: float
    number: int
    outputs: list[Output] = field(compare=False)
    events: Sequence[KvEvent] = field(compare=False, default=())


class PacedEngine:
    """An `Engine` whose answers, of one token each, come when a worker of these constants would give them.

    Args:
        wake_in: called with seconds: the engine's thread shall take a turn then.
    """

    def __init__(
        self, info: EngineInfo, constants: Constants, *, clock: Clock, wake_in: Callable[[float], None]
    ) -> None:
        self.books = WorkerBooks()
        self._constants, self._clock, self._wake_in = constants, clock, wake_in
        self._virtual = 0.0
        self._inner = serial_engine(info, constants, clock=lambda: self._virtual, sleep=self._pass)
        self.info = self._inner.info
        self._numbers = count()
        self._due: list[_Due] = []
        self._answers: dict[JobId, _Answer] = {}

    @property
    def cache(self) -> Cache:
        """The simulated engine's own."""
        return self._inner.cache

    def submit(self, job: Job) -> None:
        """Compute it on the virtual clock; what comes of it is reported in time."""
        now = self._clock()
        self._virtual = started_at = max(self._virtual, now)
        self._inner.submit(job)
        outputs, events = self._run()
        output = outputs[-1]
        if output.fates is None:  # refused
            self._report(now, outputs, events)
            return
        ttft_s = self._virtual - now
        self.books.count(ttft_s, sum(output.fates.values()), output.fates["device"])
        told = replace(output, worker_ttft_ms=ttft_s * 1000, queue_ms=(started_at - now) * 1000)
        self._answers[job.job_id] = _Answer(told, started_at, self._virtual)
        self._report(self._virtual, [], events)
        self._report(self._virtual + self._constants.decode_s, [told])

    def cancel(self, job_id: JobId) -> None:
        """What it computed stays; its last output says that it was cancelled."""
        answer = self._answers.pop(job_id, None)
        if answer is None:
            return
        for due in self._due:
            due.outputs = [output for output in due.outputs if output.job_id != job_id]
        self._report(self._clock(), [Output(job_id, finish=FinishReason.CANCELLED, fates=answer.output.fates)])

    def has_work(self) -> bool:
        """Whether something is due."""
        return bool(self._due) and self._due[0].at <= self._clock() + _EARLY_S

    def step(self) -> StepReport:
        """All that is due."""
        report, now = StepReport(), self._clock() + _EARLY_S
        while self._due and self._due[0].at <= now:
            due = heapq.heappop(self._due)
            report.outputs += due.outputs
            report.events += due.events
        for output in report.outputs:
            if output.finish is not None:
                self._answers.pop(output.job_id, None)
        return report

    def wait(self, timeout_s: float) -> None:
        """Nothing is waited for here: `wake_in` is told of every due time."""

    def load(self) -> Load:
        """As of now on the real clock."""
        now, answers = self._clock(), self._answers.values()
        waiting = sum(each.started_at > now for each in answers)
        return replace(
            self._inner.load(),
            running=len(answers) - waiting,
            waiting=waiting,
            pending_prefill_tokens=round(max(0.0, self._virtual - now) * self._constants.tokens_per_s),
            decoding=sum(each.first_at <= now for each in answers),
            decode_step_ms=0.0,  # prefill does not wait for it
        )

    def snapshot(self) -> list[BlockStored]:
        """All that the virtual clock has computed; some of it is reported again later."""
        return self._inner.snapshot()

    def close(self, *, flush_s: float) -> None:
        """Forget everything."""
        self._inner.close(flush_s=flush_s)

    def _run(self) -> tuple[list[Output], list[KvEvent]]:
        outputs: list[Output] = []
        events: list[KvEvent] = []
        while self._inner.has_work():
            report = self._inner.step()
            outputs += report.outputs
            events += report.events
        return outputs, events

    def _report(self, at: float, outputs: list[Output], events: Sequence[KvEvent] = ()) -> None:
        heapq.heappush(self._due, _Due(at, next(self._numbers), outputs, events))
        self._wake_in(max(0.0, at - self._clock()))

    def _pass(self, seconds: float) -> None:
        self._virtual += seconds


def serial_engine(
    info: EngineInfo, constants: Constants, *, clock: Clock, sleep: Callable[[float], None]
) -> SimulatedEngine:
    """One prompt after another, each in one step, at the service's rate; tiers and accounting are the engine's own.

    A prompt's last token, where all others are cached, is a step of decoding to it: so that costs what a token does.
    """
    token_ms = 1000 / constants.tokens_per_s
    timing = Timing(prefill_fixed_ms=0.0, prefill_token_ms=token_ms, prefill_pair_ms=0.0, decode_step_ms=token_ms)
    return SimulatedEngine(
        info,
        device_blocks=constants.capacity_blocks,
        timing=timing,
        max_batch_tokens=_ANY_LENGTH,
        max_running=1,
        clock=clock,
        sleep=sleep,
    )
