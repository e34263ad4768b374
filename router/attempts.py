"""Getting an answer out of the fleet: choose, submit, listen, and go on elsewhere where a worker leaves the answer.

Covers: the life of a request's jobs. Does not cover: preparing it, when it is sent (`waiting_room`), or what its caller
is sent (`core`), or told when it goes on nowhere (`endings`).

A request whose worker is lost goes to another one, once: a request that has lost two workers may be what kills them. A
gap in the stream of a healthy worker is no such sign, nor is one that ended before the job was sent, nor a worker that
ends in good order and hands its jobs back: it is sent again, to another one where there is one. Tokens that were handed
out go with it (`handover`), and its caller sees a pause.
"""

from __future__ import annotations

import asyncio
import logging
import time
from itertools import count

from router import endings, features, handover, kv_wire, worker_errors
from router.beliefs import Beliefs
from router.board import Recent
from router.decide import Choice, Decider
from router.errors import NoWorkerAvailable
from router.fleet import Fleet
from router.flight import FlightEnd, FlightGap, FlightLost
from router.guest import Guest
from router.index import PrefixIndex
from router.metrics import Metrics
from router.prefill_jobs import PrefillJobs, promise
from router.readiness import Readiness, time_left, too_late
from router.request import PreparedPrompt, Request
from router.shadow import Shadow
from router.traffic import Traffic
from router.waiting_room import WaitingRoom
from warmkv.v1 import common_pb2, worker_pb2

_MAX_LOST = 2
# What kills workers does so as they begin with it: one that made so many tokens clears it of the losses before. What
# nevertheless goes on losing workers ends too.
_CLEARED_AFTER = 64
_MAX_LOST_IN_ALL = 6

log = logging.getLogger(__name__)


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
        *,
        hands_over: bool = True,
    ) -> None:
        """`hands_over`: whether an answer goes on after tokens of it were handed out."""
        self._hands_over = hands_over
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
        self._prefills = PrefillJobs(fleet, traffic, beliefs, metrics, recent)

    async def next_output(
        self, work: Request, prepared: PreparedPrompt, job: worker_pb2.Job
    ) -> worker_pb2.SequenceOutput:
        """What the worker says next; chooses one first, and another one if that one left the answer.

        Raises:
            RouterError: the answer cannot be had, or ended in an error.
        """
        while True:
            if work.flight is None:
                await self._place(work, *self._as_it_stands(work, prepared, job))
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
            endings.check_end(work, output)
            work.answer_ids.extend(output.token_ids)
            return output

    def close(self) -> None:
        """This router ends: workers that are lost from now on were left by it."""
        self._hands_over = False

    def _as_it_stands(
        self, work: Request, prepared: PreparedPrompt, job: worker_pb2.Job
    ) -> tuple[PreparedPrompt, worker_pb2.Job]:
        """What the next worker is given: the job, or what is left of it."""
        return handover.resumed(prepared, job, work.answer_ids) if work.answer_ids else (prepared, job)

    def leave(self, work: Request) -> None:
        """The caller is gone: stop its worker if it is still at it; that worker's last word settles the bill."""
        if work.flight is not None and not work.flight.ended:
            self._fleet.link(work.flight.worker).cancel(work.flight)
        work.end_prefill()

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
        until = self._readiness.until(handover.PATIENCE if work.generated else 1.0)
        while True:
            started = time.perf_counter()
            choice = self._decide(work, prepared)
            self._choose_seconds.observe(time.perf_counter() - started)
            if choice is not None:
                return choice
            await self._wait(work, prepared, until)

    def _decide(self, work: Request, prepared: PreparedPrompt) -> Choice | None:
        """Workers whose stream had a gap come last, and those that are stuck (the first time the room sees to it)."""
        avoid, last = self._unfit(work), set(work.gaps)
        if work.guest is not None:
            last |= self._room.stuck()
        choice = self._decider.decide(prepared.question.avoiding(avoid | last))
        if choice is None and last:
            return self._decider.decide(prepared.question.avoiding(avoid))
        return choice

    def _unfit(self, work: Request) -> set[str]:
        """Workers that have refused it, unless they were started anew since, and those that cannot go on with it."""
        if not (work.avoid or work.generated):
            return set()
        links = self._fleet.links()
        refused = {link.name for link in links if work.avoid.get(link.name) == link.incarnation}
        return refused | handover.unable(links) if work.generated else refused

    async def _wait(self, work: Request, prepared: PreparedPrompt, until: float) -> None:
        try:
            await self._readiness.wait(until, work.context.deadline)
        except NoWorkerAvailable as error:
            told = features.none_left(error, self._fleet.links(), prepared.question.protocol)
            raise endings.none_left(work, told) from error

    def _submit(self, work: Request, prepared: PreparedPrompt, job: worker_pb2.Job, choice: Choice) -> None:
        """Send the job, and with it those of the samples beside it, and remember that they were sent."""
        question = prepared.question
        work_ms, cached_blocks = choice.own_work_ms, choice.own_cached_blocks(question.block_size)
        self._decider.taken()
        self._index.placed(question.hashes)
        self._note(work, choice, question.prompt_tokens)
        first = _for_one_link(job, work.context.deadline)
        work.prefill = self._prefills.send(
            first,
            prepared,
            choice,
            on_lost=work.lost.append,
            on_failed=lambda prefill: prefill.break_promise() if work.prefill is prefill else None,
        )
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
            other.record = first.record
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
            work.end_prefill()
            if placement is not None:
                placement.computed()
            self._room.first_token(key, choice.worker)
            work.tokens_came(tokens)

        def on_end(end: FlightEnd) -> None:
            self._traffic.ended(key)
            work.end_prefill()
            self._room.ended(key, choice.worker)
            if not work.worker_done(end):
                self._metrics.fates_corrected.labels(choice.worker).inc()
            if placement is not None:
                placement.ended(_found(end), question.block_size)
            if end.resumed_fates is not None:
                self._metrics.count_resumed(kv_wire.fates(end.resumed_fates))

        sent = _for_one_link(job, work.context.deadline)
        sent.work_ms, sent.cached_blocks = work_ms, cached_blocks
        sent.peers.extend(worker_pb2.PeerHint(address=peer.address, blocks=peer.blocks) for peer in choice.peers)
        if choice.pair is not None:
            sent.promise.CopyFrom(promise(choice.pair))
        work.incarnation, work.generated_before = link.incarnation, work.generated
        work.flight = link.submit(sent, on_tokens, on_end)

    def _note(self, work: Request, choice: Choice, prompt_tokens: int) -> None:
        left = work.choice.worker if work.choice else ""
        work.choice, work.sent_at = choice, work.clock()
        self._metrics.decisions.labels(choice.policy.name, choice.decision.reason).inc()
        self._shadow.scored(choice, work.context.request_id)
        if work.record is None:
            request_id, tenant = work.context.request_id, work.caller.tenant
            work.record = self._recent.decided(
                choice, request_id=request_id, tenant=tenant, prompt_tokens=prompt_tokens
            )
        elif work.generated:
            self._recent.went_on(work.record, choice)
        else:
            self._recent.tried_again(work.record, left, choice)

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

    def _count_loss(self, work: Request, why: str, reason: str = "lost") -> None:
        """Raises unless the request may be sent once more."""
        if work.outlived(_CLEARED_AFTER):
            work.excused = len(work.lost)
        work.lost.append(work.flight.worker if work.flight else "")
        self._check_handover(work, why)
        if len(work.lost) - work.excused >= _MAX_LOST or len(work.lost) >= _MAX_LOST_IN_ALL:
            raise endings.poisonous(work)
        self._leave_worker(work, why, reason)

    def _check_handover(self, work: Request, why: str) -> None:
        """Raises where tokens were handed out and nobody is to go on behind them."""
        if work.generated and not self._hands_over:
            worker = work.flight.worker if work.flight else ""
            work.flight = None
            raise handover.stopped([worker], why, tokens=work.generated)

    def _leave_worker(self, work: Request, why: str, reason: str) -> None:
        """It goes on elsewhere. `reason`: a word for the metric; `why`: for people."""
        worker = work.flight.worker if work.flight else ""
        is_handover = work.leaves_worker()
        if not work.generated:
            self._metrics.retries.labels(worker).inc()
        if not is_handover:
            return
        self._metrics.handovers.labels(worker, reason).inc()
        self._recent.handovers[reason] += 1
        told = {"request_id": work.context.request_id, "worker": worker, "tokens": work.generated, "why": why}
        log.info("an answer goes on at another worker", extra=told)

    def _note_gap(self, work: Request, why: str) -> None:
        """Raises at a second gap of the same worker, so that this ends."""
        worker = work.flight.worker if work.flight else ""
        self._check_handover(work, why)
        if worker in work.gaps:
            work.flight = None
            raise endings.broken_twice(work, worker, why)
        work.gaps.append(worker)
        self._leave_worker(work, why, "gap")

    def _judge(self, work: Request, error: worker_pb2.JobError) -> None:
        """A worker refused or failed the job. Raises unless it may go to another one."""
        worker = work.flight.worker if work.flight else ""
        if error.reason in worker_errors.ELSEWHERE:
            self._check_handover(work, error.message)
            work.avoid[worker] = work.incarnation
            if work.generated:
                self._leave_worker(work, error.message, "draining")
            else:
                work.flight = None
        elif error.reason in worker_errors.ENGINE_LOST:
            work.avoid[worker] = work.incarnation
            self._count_loss(work, error.message, "failed")
        elif error.reason in worker_errors.TOO_SMALL and work.generated:
            work.avoid[worker], work.flight = work.incarnation, None
        else:
            raise worker_errors.error_of(error, worker=worker, request_id=work.context.request_id)


def _found(end: FlightEnd) -> dict[str, int]:
    """Where this worker found what it was sent, in tokens; empty: it did not say."""
    told = end.resumed_fates or end.fates
    return {} if told is None else kv_wire.fates(told)


def _for_one_link(job: worker_pb2.Job, deadline: float | None) -> worker_pb2.Job:
    """The job itself for the first link, which gives it an id of its own; for those after it a copy.

    To copy a long prompt takes longer than to decide where it goes.
    """
    sent = job
    if job.job_id:
        sent = worker_pb2.Job()
        sent.CopyFrom(job)
        del sent.peers[:]
        sent.ClearField("promise")
    if deadline is not None:
        sent.deadline_ms = max(0, round(time_left(deadline) * 1000))
    return sent
