"""Warming a prompt: its blocks are brought up, or computed, before anybody asks for them.

Covers: choosing workers, and both ways. Does not cover: the other orders of operators (`cache_admin`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from kvstore.token_ids import packed
from router import cache_orders
from router.decide import Decider
from router.errors import InvalidRequest, NoWorkerAvailable
from router.fleet import Fleet
from router.flight import FlightGap, FlightLost
from router.link import WorkerLink
from router.prepare import Preparer
from router.protocol import Caller
from router.request import PreparedPrompt, turn_of
from router.validation import check_cache, filled_cache, filled_sampling
from warmkv.v1 import admin_pb2, common_pb2, worker_pb2

COMPUTE_TIMEOUT_S = 300.0
MAX_CHAIN = 16_384  # blocks of a prompt that a worker takes in one order
_LOWEST_PRIORITY = -100

log = logging.getLogger(__name__)


class Warming:
    """Warms prompts on one fleet."""

    def __init__(
        self, fleet: Fleet, preparer: Preparer, decider: Decider, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._wall_clock = wall_clock
        self._fleet = fleet
        self._preparer = preparer
        self._decider = decider

    async def warm(self, request: admin_pb2.WarmRequest, *, caller: Caller) -> admin_pb2.WarmResponse:
        """Warm a prompt on some workers.

        Raises:
            InvalidRequest: the prompt is none, or too short. WorkerNotFound: there is none of such a name.
            NoWorkerAvailable: none is ready. WorkerLost: none did it; says why.
        """
        wall = self._wall_clock()
        check_cache(directives := _directives(request), wall=wall)
        directives = filled_cache(directives, wall=wall)
        whose = self._preparer.caller_for(request.tenant, caller)
        prepared = await self._preparer.prepare(request.prompt, whose, directives, deadline=None)
        size = prepared.question.block_size
        if not prepared.names:
            raise InvalidRequest(f"The prompt is shorter than a block; send at least {size} tokens.", field="prompt")
        if len(prepared.names) > MAX_CHAIN:
            raise InvalidRequest(f"The prompt has {len(prepared.names):,} blocks; warm at most {MAX_CHAIN:,} at once.")

        async def one(link: WorkerLink) -> admin_pb2.WarmResponse.Warmed:
            if request.compute:
                return await self._compute(link, prepared, directives, turn_of(request.prompt))
            return await _bring_up(link, prepared, directives)

        links = self._links(request, prepared)
        return admin_pb2.WarmResponse(
            prompt_tokens=len(prepared.prompt.token_ids),
            blocks=len(prepared.names),
            workers=await cache_orders.each(self._fleet, links, one, _nothing),
        )

    def _links(self, request: admin_pb2.WarmRequest, prepared: PreparedPrompt) -> list[WorkerLink]:
        if request.workers:
            return cache_orders.named(self._fleet, request.workers)
        choice = self._decider.decide(prepared.question)
        if choice is None:
            raise NoWorkerAvailable("No worker takes requests; wait for one, or name the workers.", retry_after_s=1.0)
        return [self._fleet.link(choice.worker)]

    async def _compute(
        self, link: WorkerLink, prepared: PreparedPrompt, directives: common_pb2.CacheDirectives, turn: int
    ) -> admin_pb2.WarmResponse.Warmed:
        """An ordinary prefill of one token: whatever the worker does to cache a request's blocks, it does here."""
        flight = link.submit(self._job(prepared, directives, turn), lambda _tokens: None, lambda _end: None)
        try:
            async with asyncio.timeout(COMPUTE_TIMEOUT_S):
                while not (output := await flight.next()).finish_reason:
                    continue
        except (FlightLost, FlightGap) as loss:
            return _nothing(link.name, f"{loss}; warm it again when it is back")
        except TimeoutError:
            return _nothing(link.name, f"not computed within {COMPUTE_TIMEOUT_S:g} s; try again when it is less busy")
        finally:
            if not flight.ended:
                link.cancel(flight)
        if output.finish_reason in (common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP):
            return admin_pb2.WarmResponse.Warmed(worker=link.name, fates=output.fates)
        return _nothing(link.name, output.error.message or "it ended the prefill early; try again")

    def _job(self, prepared: PreparedPrompt, directives: common_pb2.CacheDirectives, turn: int) -> worker_pb2.Job:
        sampling = filled_sampling(
            common_pb2.SamplingParams(max_tokens=1, temperature=0.0, seed=0, ignore_eos=True),
            prompt_tokens=prepared.question.prompt_tokens,
            context_length=self._fleet.context_length(),
            vocab_size=self._fleet.vocab_size(),
            draw_seed=int,
        )
        return worker_pb2.Job(
            request_id="warm",
            packed_token_ids=packed(prepared.prompt.token_ids),
            tenant_salt=prepared.salt,
            chain_root=prepared.root,
            block_hashes=b"".join(prepared.question.hashes),
            sampling=sampling,
            priority=_LOWEST_PRIORITY,
            cache=directives,
            turn=turn,
            deadline_ms=round(COMPUTE_TIMEOUT_S * 1000),
        )


async def _bring_up(
    link: WorkerLink, prepared: PreparedPrompt, directives: common_pb2.CacheDirectives
) -> admin_pb2.WarmResponse.Warmed:
    warm = worker_pb2.CacheCommand.Warm(chain_root=prepared.root, hashes=b"".join(prepared.names))
    if directives.HasField("ttl_seconds"):
        warm.ttl_ms = directives.ttl_seconds * 1000
    if directives.HasField("expires_at"):
        warm.expires_at = directives.expires_at
    done = await cache_orders.ask(link, worker_pb2.CacheCommand(warm=warm))
    return admin_pb2.WarmResponse.Warmed(worker=link.name, started=done.started, problem=done.error)


def _directives(request: admin_pb2.WarmRequest) -> common_pb2.CacheDirectives:
    return common_pb2.CacheDirectives(
        ttl_seconds=request.ttl_seconds if request.HasField("ttl_seconds") else None,
        expires_at=request.expires_at if request.HasField("expires_at") else None,
        fixed_ttl=request.fixed_ttl,
        keep_priority=request.keep_priority if request.HasField("keep_priority") else None,
    )


def _nothing(worker: str, problem: str) -> admin_pb2.WarmResponse.Warmed:
    return admin_pb2.WarmResponse.Warmed(worker=worker, problem=problem)
