"""Getting an answer out of the fleet: choose, submit, listen, and once more where a worker was lost without a word.

Covers: the life of a request's jobs. Does not cover: preparing it, when it is sent (`waiting_room`), or what its caller
is sent (`core`).

A request whose worker is lost before it said anything is sent to another one, once: a request that has lost two workers
may be what kills them. A gap in the stream of a healthy worker is no such sign, nor is one that ended before the
job was sent: it is sent again, to another one where there is one. Once tokens were handed out, either is an error.
"""

from __future__ import annotations

import asyncio
import time
from itertools import count

from router import worker_errors
from router.beliefs import Beliefs
from router.board import Recent
from router.decide import Choice, Decider
from router.errors import InternalError, NoWorkerAvailable, PoisonRequest, RouterError, WorkerLost
from router.fleet import Fleet
from router.flight import FlightEnd, FlightGap, FlightLost
from router.guest import Guest
from router.index import PrefixIndex
from router.metrics import Metrics
from router.readiness import Readiness, time_left, too_late
from router.request import PreparedPrompt, Request
from router.shadow import Shadow
from router.traffic import Traffic
from router.waiting_room import WaitingRoom
from warmkv.v1 import common_pb2, worker_pb2

_MAX_LOST = 2


class Attempts:
    """Runs the jobs of requests."""

    def __init__(
        self,
        fleet: Fleet,
        decider: Decider,
        traffic: Traffic,
        index: PrefixIndex,
        readiness: Readiness,
        room: WaitingRoom,
        recent: Recent,
        shadow: Shadow,
        metrics: Metrics,
        beliefs: Beliefs,
    ) -> None:
        self._shadow = shadow
        self._fleet = fleet
        self._beliefs = beliefs
        self._room = room
        self._decider = decider
        self._traffic = traffic
        self._index = index
        self._readiness = readiness
        self._recent = recent
        self._metrics = metrics
        self._choose_seconds = metrics.route_seconds.labels("choose")
        self._keys = count(1)

    async def next_output(
        self, work: Request, prepared: PreparedPrompt, job: worker_pb2.Job
    ) -> worker_pb2.SequenceOutput:
        """What the worker says next; chooses one first, and another one if it was lost without a word.

        Raises:
            RouterError: the answer cannot be had, or ended in an error.
        """
        while True:
            if work.flight is None:
                await self._place(work, prepared, job)
            try:
                output = await self._heard(work)
            except FlightLost as loss:
                self._count_loss(work, str(loss))
                continue
            except FlightGap as gap:
                self._note_gap(work, str(gap))
                continue
            if output.finish_reason == common_pb2.FINISH_REASON_ERROR:
                self._judge(work, output.error)
                continue
            _check_end(work, output)
            return output

    def leave(self, work: Request) -> None:
        """The caller is gone: stop its worker if it is still at it; that worker's last word settles the bill."""
        if work.flight is not None and not work.flight.ended:
            self._fleet.link(work.flight.worker).cancel(work.flight)

    async def place(self, work: Request, prepared: PreparedPrompt, job: worker_pb2.Job) -> None:
        """Send it, and the samples beside it, to one worker; returns when they were sent. Raises as `next_output`."""
        await self._place(work, prepared, job)

    async def _place(self, work: Request, prepared: PreparedPrompt, job: worker_pb2.Job) -> None:
        """Send it to a worker. Only the first time it waits for its turn: what was let in once is not held up again."""
        choice = await self._choose(work, prepared)
        if work.guest is not None:
            self._submit(work, prepared, job, choice)
            return
        work.guest = Guest(
            tenant=work.caller.tenant,
            priority=job.priority,
            question=prepared.question,
            max_tokens=job.sampling.max_tokens,
            samples=1 + len(work.beside),
            deadline=work.context.deadline,
            send=lambda best: self._submit(work, prepared, job, best),
        )
        await self._room.enter(work.guest, choice)

    async def _choose(self, work: Request, prepared: PreparedPrompt) -> Choice:
        """Decide; while no worker can take it, wait for one, but not for long. A new router first hears them all."""
        await self._readiness.caught_up(work.context.deadline)
        until = self._readiness.until()
        while True:
            started = time.perf_counter()
            choice = self._decide(work, prepared)
            self._choose_seconds.observe(time.perf_counter() - started)
            if choice is not None:
                return choice
            await self._wait(work, until)

    def _decide(self, work: Request, prepared: PreparedPrompt) -> Choice | None:
        """Workers whose stream had a gap come last."""
        choice = self._decider.decide(prepared.question.avoiding(work.avoid | set(work.gaps)))
        if choice is None and work.gaps:
            return self._decider.decide(prepared.question.avoiding(work.avoid))
        return choice

    async def _wait(self, work: Request, until: float) -> None:
        try:
            await self._readiness.wait(until, work.context.deadline)
        except NoWorkerAvailable as error:
            raise _none_left(work, error) from error

    def _submit(self, work: Request, prepared: PreparedPrompt, job: worker_pb2.Job, choice: Choice) -> None:
        """Send the job, and with it those of the samples beside it, and remember that they were sent."""
        question = prepared.question
        work_ms = choice.price.load_ms + choice.price.compute_ms
        cached_blocks = min(choice.held, choice.price.cached_tokens // question.block_size)
        self._decider.taken()
        self._index.placed(question.hashes)
        self._note(work, choice, question.prompt_tokens)
        self._send(work, prepared, job, choice, work_ms, cached_blocks)
        if work.beside:
            self._submit_beside(work, prepared, choice, job.cache)

    def _submit_beside(
        self, first: Request, prepared: PreparedPrompt, choice: Choice, cache: common_pb2.CacheDirectives
    ) -> None:
        """Send the samples beside one that was just sent, to the same worker: no decisions of their own."""
        question = prepared.question
        work_ms, cached_blocks = choice.price.load_ms + choice.price.compute_ms, 0
        if not cache.no_store and not cache.no_read:  # else each computes the prompt for itself
            cached_blocks = (question.prompt_tokens - 1) // question.block_size
            tail = question.prompt_tokens - cached_blocks * question.block_size
            work_ms = choice.price.cold_ms * tail / question.prompt_tokens
        beside, first.beside = first.beside, []
        for other, job in beside:
            other.choice, other.sent_at, other.guest = choice, first.sent_at, first.guest
            self._send(other, prepared, job, choice, work_ms, cached_blocks)

    def _send(
        self,
        work: Request,
        prepared: PreparedPrompt,
        job: worker_pb2.Job,
        choice: Choice,
        work_ms: float,
        cached_blocks: int,
    ) -> None:
        key, question = next(self._keys), prepared.question
        self._traffic.sent(key, choice.worker, question.hashes, work_ms=work_ms, cached_blocks=cached_blocks)
        self._room.sent(key, choice)
        link = self._fleet.link(choice.worker)
        cache = job.cache
        placement = self._beliefs.placed(link, question.hashes, reads=not cache.no_read, stores=not cache.no_store)

        def on_tokens(tokens: int) -> None:
            self._traffic.first_token(key)
            if placement is not None:
                placement.computed()
            self._room.first_token(key, choice.worker)
            work.tokens_came(tokens)

        def on_end(end: FlightEnd) -> None:
            self._traffic.ended(key)
            self._room.ended(key, choice.worker)
            if not work.worker_done(end):
                self._metrics.fates_corrected.labels(choice.worker).inc()
            if placement is not None:
                placement.ended(work.fates, question.block_size)

        sent = _for_one_link(job, work.context.deadline)
        sent.work_ms, sent.cached_blocks = work_ms, cached_blocks
        sent.peers.extend(worker_pb2.PeerHint(address=peer.address, blocks=peer.blocks) for peer in choice.peers)
        work.flight = link.submit(sent, on_tokens, on_end)

    def _note(self, work: Request, choice: Choice, prompt_tokens: int) -> None:
        work.choice, work.sent_at = choice, work.clock()
        self._metrics.decisions.labels(choice.policy.name, choice.decision.reason).inc()
        self._shadow.scored(choice, work.context.request_id)
        work.record = self._recent.decided(
            choice,
            request_id=work.context.request_id,
            tenant=work.caller.tenant,
            prompt_tokens=prompt_tokens,
        )

    async def _heard(self, work: Request) -> worker_pb2.SequenceOutput:
        if work.flight is None:  # pragma: no cover - next_output has just made one
            raise FlightLost("the job was never sent")
        if work.context.deadline is None:
            return await work.flight.next()
        try:
            async with asyncio.timeout_at(work.context.deadline):
                return await work.flight.next()
        except TimeoutError as error:
            raise too_late() from error

    def _count_loss(self, work: Request, why: str) -> None:
        """Raises unless the request may be sent once more."""
        worker = work.flight.worker if work.flight else ""
        work.lost.append(worker)
        work.flight = None
        if work.generated:
            raise WorkerLost(
                f"Worker {worker} was lost in the middle of the answer ({why}); send the request again, its prompt is"
                " likely to be cached.",
                worker=worker,
            )
        if len(work.lost) >= _MAX_LOST:
            raise PoisonRequest(
                f"Workers {' and '.join(work.lost)} were lost while they ran this request, so it is not sent to a"
                f" third; look for the cause in their logs under the id {work.context.request_id}.",
                workers=",".join(work.lost),
            )
        self._metrics.retries.labels(worker).inc()

    def _note_gap(self, work: Request, why: str) -> None:
        """Raises where tokens were handed out, and at a second gap of the same worker, so that this ends."""
        worker = work.flight.worker if work.flight else ""
        work.flight = None
        if work.generated:
            raise WorkerLost(
                f"The stream of worker {worker} broke in the middle of the answer ({why}); send the request again, its"
                " prompt is likely to be cached.",
                worker=worker,
            )
        if worker in work.gaps:
            why = (
                f"The stream of worker {worker} broke twice and no other one is ready ({why}); send the request again."
            )
            raise _none_left(work, NoWorkerAvailable(why, retry_after_s=1.0))
        work.gaps.append(worker)
        self._metrics.retries.labels(worker).inc()

    def _judge(self, work: Request, error: worker_pb2.JobError) -> None:
        """A worker refused or failed the job. Raises unless it may go to another one."""
        worker = work.flight.worker if work.flight else ""
        if error.reason in worker_errors.ELSEWHERE and not work.generated:
            work.avoid.add(worker)
            work.flight = None
        elif error.reason in worker_errors.ENGINE_LOST:
            work.avoid.add(worker)
            self._count_loss(work, error.message)
        else:
            raise worker_errors.error_of(error, worker=worker, request_id=work.context.request_id)


def _none_left(work: Request, error: NoWorkerAvailable) -> RouterError:
    """For a request that has lost a worker another error, since a client that sends it again would take it to a third:
    here its losses would be counted from zero.
    """
    if not work.lost:
        return error
    return WorkerLost(
        f"Worker {work.lost[0]} was lost while it ran this request, and no other one is ready ({error.message}); look"
        " for the cause in its log before you send the request again.",
        lost_workers=",".join(work.lost),
    )


def _for_one_link(job: worker_pb2.Job, deadline: float | None) -> worker_pb2.Job:
    """The job itself for the first link, which gives it an id of its own; for those after it a copy.

    To copy a long prompt takes longer than to decide where it goes.
    """
    sent = job
    if job.job_id:
        sent = worker_pb2.Job()
        sent.CopyFrom(job)
        del sent.peers[:]
    if deadline is not None:
        sent.deadline_ms = max(0, round(time_left(deadline) * 1000))
    return sent


def _check_end(work: Request, output: worker_pb2.SequenceOutput) -> None:
    """Raises where the end of the answer is an error to its caller."""
    if output.finish_reason == common_pb2.FINISH_REASON_DEADLINE:
        raise too_late()
    if output.finish_reason == common_pb2.FINISH_REASON_CANCELLED:
        raise InternalError(
            f"The worker cancelled the request {work.context.request_id} unasked; send it again.",
            request_id=work.context.request_id,
        )
