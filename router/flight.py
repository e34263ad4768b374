"""A job on its way: what its worker said and its caller has not taken yet.

Covers: merging what waits, so that a slow caller costs at most its own answer; the end, told once. Does not cover:
sending the job (`link`) or retrying it (`core`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from warmkv.v1 import common_pb2, worker_pb2


class FlightLost(Exception):
    """The worker was lost."""


class FlightGap(Exception):
    """The stream lost something of this job, or ended before the job was sent: no sign that it kills workers."""


@dataclass(frozen=True, slots=True)
class FlightEnd:
    """How a job ended: the worker's last word, or why there is none.

    Attributes:
        generated: tokens that were received, those before it was resumed included.
        fates, resumed_fates: as in `SequenceOutput`, whenever they were told; None: they were not.
    """

    last: worker_pb2.SequenceOutput | None
    lost: str
    generated: int
    fates: common_pb2.TokensByFate | None = None
    resumed_fates: common_pb2.TokensByFate | None = None


class Flight:
    """One job on one worker. Owned by the event loop.

    `on_tokens` is called with the number of tokens whenever some came, `on_end` exactly once; both also when nobody
    reads any more.

    Attributes:
        sent: whether the worker may have some of the job; until then it waits in this router for its stream.
    """

    def __init__(
        self,
        worker: str,
        job: worker_pb2.Job,
        *,
        on_tokens: Callable[[int], None],
        on_end: Callable[[FlightEnd], None],
        sent_at: float = 0.0,
    ) -> None:
        self.worker = worker
        self.sent_at = sent_at
        self.sent = False
        self.job = job
        self._on_tokens = on_tokens
        self._on_end = on_end
        self._waiting: worker_pb2.SequenceOutput | None = None
        self._arrived = asyncio.Event()
        self._generated = job.resumed_tokens
        self._fates: common_pb2.TokensByFate | None = None
        self._resumed_fates: common_pb2.TokensByFate | None = None
        self._lost: FlightLost | FlightGap | None = None
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the worker has nothing more to say."""
        return self._ended

    @property
    def is_lost(self) -> bool:
        """Whether its worker was lost; a gap is no loss."""
        return isinstance(self._lost, FlightLost)

    def leaves(self) -> None:
        """It is being sent."""
        self.sent = True

    def deliver(self, output: worker_pb2.SequenceOutput) -> None:
        """The worker said something."""
        if self._ended:
            return
        missing = output.completion_tokens - self._generated - len(output.token_ids)
        if missing > 0 and output.completion_tokens:
            self.miss(f"{missing} tokens of the stream from {self.worker} were lost")
            return
        if output.token_ids:
            self._on_tokens(len(output.token_ids))
        self._generated += len(output.token_ids)
        self._note_fates(output)
        self._add(output)
        if output.finish_reason:
            self._end(output, "")

    def lose(self, why: str) -> None:
        """The worker is lost: nothing more will come."""
        self._break(FlightLost(why))

    def miss(self, why: str) -> None:
        """Something of the stream is missing: what still comes is of no use."""
        self._break(FlightGap(why))

    async def next(self) -> worker_pb2.SequenceOutput:
        """All that came since the last call, in one message; waits for some.

        Raises:
            FlightLost: the worker is gone, and all that came before was handed out.
            FlightGap: the stream has a gap, and all that came before it was handed out.
        """
        while self._waiting is None:
            if self._lost is not None:
                raise self._lost
            self._arrived.clear()
            await self._arrived.wait()
        output, self._waiting = self._waiting, None
        if output.finish_reason == common_pb2.FINISH_REASON_ERROR and output.token_ids:
            self._waiting = _error_alone(output)  # what came before it is handed out first
        return output

    def _note_fates(self, output: worker_pb2.SequenceOutput) -> None:
        if output.HasField("fates"):
            self._fates = output.fates
        if output.HasField("resumed_fates"):
            self._resumed_fates = output.resumed_fates

    def _add(self, output: worker_pb2.SequenceOutput) -> None:
        if self._waiting is None:
            self._waiting = output
        else:
            text = self._waiting.text + output.text
            self._waiting.MergeFrom(output)  # ids and log-probabilities are appended, later numbers win
            self._waiting.text = text
        self._arrived.set()

    def _break(self, loss: FlightLost | FlightGap) -> None:
        if self._ended:
            return
        self._lost = loss
        self._arrived.set()
        self._end(None, str(loss))

    def _end(self, last: worker_pb2.SequenceOutput | None, lost: str) -> None:
        self._ended = True
        self._on_end(FlightEnd(last, lost, self._generated, self._fates, self._resumed_fates))


def _error_alone(output: worker_pb2.SequenceOutput) -> worker_pb2.SequenceOutput:
    """Takes the end out of an output, and returns it as one of its own."""
    end = worker_pb2.SequenceOutput(
        job_id=output.job_id, finish_reason=output.finish_reason, completion_tokens=output.completion_tokens
    )
    end.error.CopyFrom(output.error)
    output.ClearField("finish_reason")
    output.ClearField("error")
    return end
