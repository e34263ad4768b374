"""What each router is told of the jobs of the others, so that all of them know of the same traffic.

Covers: which jobs run and how far they are, what a router has yet to hear of that. Does not cover: sending it
(`outbox`), what routers make of it. Pure: the time is an argument. A router that reads slowly hears how its neighbours'
jobs stand and not each step on the way, so what waits for it is at most one message for each job that runs, or ran when
it last heard of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count

from kvstore.fading_sum import FadingSum
from warmkv.v1 import worker_pb2

ENDED = worker_pb2.OTHER_JOB_STATE_ENDED
_DECODE = worker_pb2.OTHER_JOB_STATE_DECODE
_PREFILL = worker_pb2.OTHER_JOB_STATE_PREFILL


class RunningJobs:
    """All jobs that run on a worker, by the router's stream and the job's number there."""

    def __init__(self, now: float) -> None:
        self._jobs: dict[tuple[int, int], worker_pb2.OtherJob] = {}
        self._numbers = count(1)
        self._work = FadingSum()
        self._began = now

    def came(self, stream: int, job: worker_pb2.Job, now: float) -> worker_pb2.OtherJob:
        """A job was accepted; what the other routers are to be told."""
        self._work.add(job.work_ms, now)
        told = self._jobs[stream, job.job_id] = worker_pb2.OtherJob(
            number=next(self._numbers),
            state=_PREFILL,
            block_hashes=job.block_hashes,
            cached_blocks=job.cached_blocks,
            work_ms=job.work_ms,
        )
        return told

    def number(self, stream: int, job_id: int) -> int:
        """Its `OtherJob.number`; zero of one that has ended."""
        job = self._jobs.get((stream, job_id))
        return job.number if job is not None else 0

    def has_token(self, stream: int, number: int) -> worker_pb2.OtherJob | None:
        """It has a token; what is to be told, if that is news."""
        job = self._jobs.get((stream, number))
        if job is None or job.state != _PREFILL:
            return None
        job.state = _DECODE
        return job

    def ended(self, stream: int, number: int) -> worker_pb2.OtherJob | None:
        """It ended, however; what is to be told, if that is news."""
        job = self._jobs.pop((stream, number), None)
        if job is not None:
            job.state = ENDED
        return job

    def of_others(self, stream: int) -> Iterator[worker_pb2.OtherJob]:
        """Those of other streams, as told to one that begins: it knows their work from `recent_work_ms`."""
        for (owner, _), job in self._jobs.items():
            if owner != stream:
                known = worker_pb2.OtherJob()
                known.CopyFrom(job)
                known.work_is_known = True
                yield known

    def recent_work_ms(self, now: float) -> float:
        """Of all routers; see `WorkerHello.recent_work_ms`."""
        return self._work.value(now)

    def up_ms(self, now: float) -> int:
        """Since the first job could come."""
        return max(0, round((now - self._began) * 1000))


class News:
    """What one router has yet to hear of the jobs of others, one message a job at most."""

    def __init__(self) -> None:
        self._waiting: dict[int, worker_pb2.OtherJob] = {}
        self._told: set[int] = set()  # may be known there: their end must be told

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self._waiting)

    def add(self, job: worker_pb2.OtherJob) -> None:
        """A job stands so now; of one that ended before the router heard of it there is nothing to say."""
        if job.state == ENDED and job.number not in self._told:
            self._waiting.pop(job.number, None)
        elif job.state != ENDED and job.number in self._waiting:
            self._waiting[job.number].state = job.state
        elif job.number in self._told:
            self._waiting[job.number] = worker_pb2.OtherJob(number=job.number, state=job.state)
        else:
            told = self._waiting[job.number] = worker_pb2.OtherJob()
            told.CopyFrom(job)

    def again(self, running: Iterable[worker_pb2.OtherJob]) -> None:
        """The router may have forgotten everything, or nothing: tell all of these, and the ends that still wait."""
        before, self._waiting = self._waiting, {}
        self._waiting.update((number, job) for number, job in before.items() if job.state == ENDED)
        for job in running:
            if job.number in before and job.number not in self._told:
                job.work_is_known = before[job.number].work_is_known  # it is not told yet, only queued anew
            self._waiting[job.number] = job

    def pop(self, max_bytes: int) -> list[worker_pb2.OtherJob]:
        """The oldest of it, about so many bytes but one message at least; they count as told."""
        popped: list[worker_pb2.OtherJob] = []
        nbytes = 0
        for number, job in self._waiting.items():
            nbytes += len(job.block_hashes) + 32
            if popped and nbytes > max_bytes:
                break
            popped.append(job)
            (self._told.discard if job.state == ENDED else self._told.add)(number)
        for job in popped:
            del self._waiting[job.number]
        return popped
