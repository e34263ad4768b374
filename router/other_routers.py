"""What the other routers of the fleet send, as the workers tell it: this router's memory of traffic covers theirs.

Covers: from a worker's messages about jobs of others to `traffic`. Does not cover: what follows from traffic, or the
messages themselves (`worker.proto`, OtherJob). Each message says how a job stands, so one that comes twice changes
nothing, and one that speaks of a job that this router was never told of is no news.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.kv_wire import short_hashes
from router.traffic import Traffic
from warmkv.v1 import worker_pb2

_Key = tuple[str, int]


class OtherRouters:
    """One per router."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._running: dict[str, set[int]] = {}

    def greeted(self, worker: str, hello: worker_pb2.WorkerHello) -> None:
        """A stream to a worker begins."""
        self._traffic.met(worker, hello.recent_work_ms, up_ms=hello.up_ms)

    def heard(self, worker: str, jobs: Iterable[worker_pb2.OtherJob]) -> None:
        """The worker tells of jobs of others."""
        running = self._running.setdefault(worker, set())
        for job in jobs:
            key = (worker, job.number)
            if job.state == worker_pb2.OTHER_JOB_STATE_ENDED:
                running.discard(job.number)
                self._traffic.ended(key)
                continue
            if job.number not in running and not _is_update(job):
                running.add(job.number)
                self._sent(key, job)
            if job.state == worker_pb2.OTHER_JOB_STATE_DECODE:
                self._traffic.first_token(key)

    def missed(self, worker: str) -> None:
        """Messages of the worker were lost, maybe ends among them: it will tell again what runs."""
        for number in self._running.pop(worker, ()):
            self._traffic.ended((worker, number))

    def lost(self, worker: str) -> None:
        """Its stream is down."""
        self.missed(worker)
        self._traffic.forget(worker)

    def _sent(self, key: _Key, job: worker_pb2.OtherJob) -> None:
        hashes = short_hashes(job.block_hashes)
        self._traffic.sent(
            key,
            key[0],
            hashes,
            work_ms=job.work_ms,
            cached_blocks=job.cached_blocks,
            place=job.number,
            is_met=job.work_is_known,
        )


def _is_update(job: worker_pb2.OtherJob) -> bool:
    """Whether it speaks of a job that was told before, and so says nothing of its prompt."""
    return job.state == worker_pb2.OTHER_JOB_STATE_DECODE and not (job.block_hashes or job.work_ms)
