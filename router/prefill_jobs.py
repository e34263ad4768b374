"""The other half of a pair: a job that ends with its prompt, on the worker that prefills.

Covers: making it, sending it, its place in what is known to be on workers, ending it when nobody needs it any more.
Does not cover: choosing the pair (`pairing`), the answer (`attempts`). Its end is no answer and no entry in the ledger:
the worker that answers tells the fate of every token, and counts as computed what was computed for it. One that fails,
or dies with its worker, costs time: the answering worker is told so, and computes what is missing.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.blocks import SHORT_HASH_BYTES, BlockHash
from router import kv_wire, worker_errors
from router.beliefs import Beliefs
from router.board import Recent
from router.decide import Choice
from router.fleet import Fleet
from router.flight import Flight, FlightEnd
from router.metrics import Metrics
from router.pairing import Pair
from router.request import PreparedPrompt
from router.traffic import Traffic
from warmkv.v1 import common_pb2, worker_pb2

_TOKEN_NBYTES = 4


class PrefillJob:
    """One that was sent.

    Args:
        answering: the worker that it is for. ticket: the name of the last block that it makes.
    """

    def __init__(self, fleet: Fleet, pair: Pair, answering: str, ticket: BlockHash) -> None:
        self._fleet, self._worker, self._answering = fleet, pair.worker, answering
        self._broken = worker_pb2.PromiseBroken(address=pair.maker.address, ticket=ticket)
        self.flight: Flight | None = None

    def break_promise(self) -> None:
        """It has ended without its blocks: the answering worker shall wait for them no longer."""
        self._fleet.link(self._answering).break_promise(self._broken)

    def end(self) -> None:
        """Nobody needs it any more: stop it, if it is still at it."""
        if self.flight is not None and not self.flight.ended:
            self._fleet.link(self._worker).cancel(self.flight)


class PrefillJobs:
    """Sends them."""

    def __init__(self, fleet: Fleet, traffic: Traffic, beliefs: Beliefs, metrics: Metrics, recent: Recent) -> None:
        self._fleet, self._traffic, self._beliefs = fleet, traffic, beliefs
        self._metrics, self._recent = metrics, recent

    def send(
        self,
        job: worker_pb2.Job,
        prepared: PreparedPrompt,
        choice: Choice,
        *,
        on_lost: Callable[[str], None],
        on_failed: Callable[[PrefillJob], None],
    ) -> PrefillJob | None:
        """To the worker that the choice names; None: it names none. `job`: the answering worker's, with its deadline.

        `on_lost` is called with the worker's name where it is lost, or its engine fails, while it is at it; `on_failed`
        where the blocks do not come, for whatever reason.
        """
        pair = choice.pair
        if pair is None:
            return None
        link, hashes = self._fleet.link(pair.worker), prepared.question.hashes[: pair.blocks]
        sent = PrefillJob(self._fleet, pair, choice.worker, prepared.chain.at(pair.blocks - 1))
        held = pair.maker.candidate.price.cached_tokens // prepared.question.block_size
        self._traffic.sent(sent, pair.worker, hashes, work_ms=pair.work_ms, cached_blocks=min(held, pair.blocks))
        placement = self._beliefs.placed(link, hashes)

        def on_end(end: FlightEnd) -> None:
            self._traffic.ended(sent)
            outcome = _outcome(end)
            self._metrics.prefills.labels(pair.worker, outcome).inc()
            self._recent.prefill_jobs[outcome] += 1
            if placement is not None and outcome == "done":
                placement.computed()
            if placement is not None and end.last is not None:
                placement.ended(kv_wire.fates(end.last.fates), prepared.question.block_size)
            if (sent.flight is not None and sent.flight.is_lost) or _failed_engine(end):
                on_lost(pair.worker)
            if outcome != "done":
                on_failed(sent)

        sent.flight = link.submit(_job(job, pair, prepared.question.block_size), lambda _tokens: None, on_end)
        return sent


def promise(pair: Pair) -> worker_pb2.Promise:
    """What the answering worker is told."""
    return worker_pb2.Promise(
        address=pair.maker.address, blocks=pair.blocks, ready_ms=pair.ready_ms, margin_ms=pair.margin_ms
    )


def _job(job: worker_pb2.Job, pair: Pair, block_size: int) -> worker_pb2.Job:
    tokens = pair.blocks * block_size
    made = worker_pb2.Job(
        request_id=job.request_id,
        traceparent=job.traceparent,
        packed_token_ids=job.packed_token_ids[: tokens * _TOKEN_NBYTES],
        tenant_salt=job.tenant_salt,
        chain_root=job.chain_root,
        block_hashes=job.block_hashes[: pair.blocks * SHORT_HASH_BYTES],
        sampling=common_pb2.SamplingParams(max_tokens=1, temperature=0.0),
        priority=job.priority,
        cache=job.cache,
        prefill_only=True,
        work_ms=pair.work_ms,
        cached_blocks=min(pair.blocks, pair.maker.candidate.price.cached_tokens // block_size),
    )
    if job.HasField("deadline_ms"):
        made.deadline_ms = job.deadline_ms
    made.peers.extend(worker_pb2.PeerHint(address=peer.address, blocks=peer.blocks) for peer in pair.maker.peers)
    return made


def _failed_engine(end: FlightEnd) -> bool:
    """Whether the whole engine is gone, which counts as a lost worker here as it does where an answer is given."""
    return end.last is not None and end.last.error.reason in worker_errors.ENGINE_LOST


def _outcome(end: FlightEnd) -> str:
    if end.last is None:
        return "lost"
    if end.last.finish_reason in (common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP):
        return "done"
    return "failed" if end.last.finish_reason == common_pb2.FINISH_REASON_ERROR else "cancelled"
