"""The router: admit -> tokenize -> hash -> choose -> submit -> stream -> account.

Covers: wiring the parts, and the walk of one request through them. Does not cover: any single step, each of which has
a module of its own, nor servers (`server`). Owned by one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import grpc

from router import features
from router.accounts import Accounts
from router.admission import Admission
from router.attempts import Attempts
from router.audit import audited
from router.beliefs import Beliefs
from router.board import Board, Recent
from router.cache_admin import CacheAdmin
from router.config import RouterConfig, named_tenants
from router.constraints import ConstraintChecks
from router.decide import Decider
from router.errors import InternalError, RouterError
from router.explain import explained
from router.fleet import Fleet, report_failure
from router.fleet_record import FleetRecord
from router.handshake import Expected
from router.index import PrefixIndex
from router.metrics import Metrics
from router.operators import Operators
from router.other_routers import OtherRouters
from router.policy import checked_weights, find_policy
from router.prefix_map import PrefixMap
from router.prepare import Preparer
from router.protocol import Caller, Discovery, Encoder, RequestContext
from router.readiness import Readiness, time_left
from router.record_file import keeper, restored
from router.record_writer import RecordWriter
from router.request import PreparedPrompt, Request, job_for
from router.samples import Samples
from router.self_audit import SelfAudit
from router.settling import Settle, settle_nothing
from router.shadow import Shadow
from router.shaping import check_adapter, samples_of
from router.state import State
from router.traffic import Traffic
from router.validation import check_cache, check_model, check_priority, filled_cache, filled_sampling
from router.waiting_room import WaitingRoom
from router.watching import Watchers
from router.worker_stream import LinkSettings
from warmkv import versions
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2, worker_pb2

_WAIT_FOR_WORKER_S = 3.0
_WORDS = 80  # of a prompt, as a label
_SAME_MOMENT_S = 0.05  # a caller's own clock ends at its deadline too, and its cancellation may be here first

log = logging.getLogger(__name__)


class Router:
    """Serves one model from one fleet. Satisfies `router.protocol.RouterApi`.

    Call `start` on the event loop before use, and `close` at the end.
    """

    def __init__(
        self,
        config: RouterConfig,
        encoder: Encoder,
        discovery: Discovery,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        trust_group_of: Callable[[str], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        wait_for_worker_s: float = _WAIT_FOR_WORKER_S,
        settle: Settle = settle_nothing,
    ) -> None:
        """Wire it; nothing runs yet.

        Args:
            credentials: of the channels to workers; None: plaintext. trust_group_of: the group of a tenant that
            an operator names; None: as last seen with that tenant, else its own. wait_for_worker_s: how long a request
            waits while no worker is ready. wall_clock: seconds since the epoch, for directives that name a time.
            settle: see `PrefixIndex`; a process of the router's own gives `settle_process`.

        Raises:
            InvalidRequest: the settings name an unknown policy or weight.
        """
        checked_weights(find_policy(config.policy), config.weights)
        self._config = config
        self._encoder = encoder
        self._clock, self._wall_clock = clock, wall_clock
        self._rng = rng or random.Random()
        self.metrics = Metrics(
            router=config.name,
            model=config.model_name,
            version=versions.VERSION,
            tenants=named_tenants(config.overload),
        )
        self._constraints = ConstraintChecks(
            lambda kind, verdict: self.metrics.constraints.labels(kind, verdict).inc(),
            max_bytes=config.max_constraint_bytes,
        )
        self._admission = Admission(config.max_in_flight, config.max_in_flight_per_tenant)
        self._index = PrefixIndex(clock, limit_bytes=config.index_bytes, settle=settle)
        self._beliefs = Beliefs(self._index, clock, ttl_s=config.belief_ttl_s)
        self._traffic = Traffic(clock)
        self._prefixes = PrefixMap()
        self._recent = Recent(clock)
        self._records: RecordWriter | None = None
        self.fleet = self._make_fleet(encoder, discovery, credentials)
        self._watchers = Watchers(
            clock, wall_clock, self._block_size, secret=config.fleet_secret, show_prompts=config.show_prompts
        )
        readiness = Readiness(self.fleet, clock, patience_s=wait_for_worker_s)
        self._decider = Decider(self.fleet, self._beliefs, self._traffic, clock)
        self._preparer = Preparer(config, encoder, self.fleet, readiness, self.metrics, trust_group_of=trust_group_of)
        shadow = Shadow(wall_clock, self.metrics)
        self._room = WaitingRoom(config.overload, self.fleet, self._decider, readiness, self.metrics, clock)
        self._attempts = Attempts(
            self.fleet,
            self._decider,
            self._traffic,
            self._index,
            readiness,
            self._room,
            self._recent,
            shadow,
            self.metrics,
            self._beliefs,
            hands_over=config.handover,
        )
        self._audit = SelfAudit(
            self.fleet, self._beliefs, self.metrics, self._rng, clock, every_s=config.audit_interval_s
        )
        self._accounts = Accounts(self.metrics, self._recent, self._room, self._watchers, encoder, clock)
        state = State(self.fleet, self._index, self._beliefs, self._audit, self._decider, self._admission, self._room)
        self._board = Board(self.fleet, self._index, self._prefixes, self._recent, state.trust)
        self.cache = CacheAdmin(self.fleet, self._index, self._preparer, self._decider, wall_clock=wall_clock)
        self._operators = Operators(config.name, self.fleet, self._board, self._preparer, shadow, wall_clock=wall_clock)
        self._auditing: asyncio.Task[None] | None = None
        self.metrics.export_gauges(state.gauges)

    async def start(self) -> None:
        """Begin to follow the fleet; requests wait until a worker is ready."""
        self.fleet.start()
        self._auditing = asyncio.create_task(self._audit.run(), name="self-audit")
        self._auditing.add_done_callback(report_failure)

    async def close(self) -> None:
        """Leave the fleet; requests that still run end with an error."""
        self.drain()
        self._attempts.close()
        self._constraints.close()
        if self._auditing is not None:
            self._auditing.cancel()
        await self.fleet.close()
        await self.policy_kept()

    def drain(self) -> None:
        """Admit nothing new, and send those that wait elsewhere; what runs goes on."""
        self._admission.drain()
        self._room.drain()

    # Requests

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, caller: Caller, context: RequestContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Run a request. Closing the iterator cancels it. Raises RouterError."""
        to = self._accounts
        work = Request(caller, context, self._clock(), self._clock, to.settle, to.first_token, to.gap, to.paused)
        code = grpc.StatusCode.CANCELLED
        samples: Samples | None = None
        try:
            with self._admission.admitted(caller.tenant):
                prepared = await self._prepared(request, work)
                self._watchers.arrived(work, request, prepared)
                job = self._job(request, work, prepared)
                self._prefixes.count(prepared.question.hashes, caller.tenant, self._label(request.input))
                if (count := samples_of(request)) > 1:
                    samples = Samples(work, job, count, self._attempts)
                    async with aclosing(samples.outputs(prepared)) as outputs:
                        async for sample, output in outputs:
                            yield samples.completed(sample, self._response(sample, prepared, output))
                last = samples is not None
                while not last:
                    output = await self._attempts.next_output(work, prepared, job)
                    last = bool(output.finish_reason)
                    yield self._response(work, prepared, output)
            code = grpc.StatusCode.OK
        except RouterError as error:
            code = error.code
            self._accounts.refuse(error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = _code_of_leaving(context)
            raise
        except Exception as error:
            code = grpc.StatusCode.INTERNAL
            log.exception("a request failed", extra={"request_id": context.request_id})
            raise InternalError(
                f"The router failed; report it with the id {context.request_id} and the router's log.",
                request_id=context.request_id,
            ) from error
        finally:
            if samples is None:
                work.finish(code)
                self._attempts.leave(work)
            else:
                samples.finish(code)

    async def explain(self, request: inference_pb2.ExplainRequest, *, caller: Caller) -> inference_pb2.ExplainResponse:
        """What `generate` would decide. Changes nothing. Raises RouterError."""
        check_model(request.model, self._config.model_name)
        check_cache(request.cache, wall=self._wall_clock())
        prepared = await self._preparer.prepare(request.input, caller, request.cache, deadline=None)
        choice = self._decider.decide(prepared.question)
        answers = await self._encoder.earlier_answers(request.input, prepared.prompt)
        return explained(
            prepared,
            choice,
            fleet=self.fleet,
            index=self._index,
            beliefs=self._beliefs,
            decider=self._decider,
            changed=self._accounts.answers.changed_turn(
                prepared.root, prepared.prompt, answers, prepared.question.hashes
            ),
            router_wait_ms=self._room.wait_ms(caller.tenant, 0),
        )

    async def tokenize(
        self, request: inference_pb2.TokenizeRequest, *, caller: Caller
    ) -> inference_pb2.TokenizeResponse:
        """The token ids that `generate` would use, and the names of their blocks. Raises RouterError."""
        check_model(request.model, self._config.model_name)
        prepared = await self._preparer.prepare(request.input, caller, common_pb2.CacheDirectives(), deadline=None)
        return inference_pb2.TokenizeResponse(
            token_ids=prepared.prompt.token_ids,
            rendered=prepared.prompt.rendered,
            block_hashes=prepared.question.hashes,
        )

    # Operators

    def list_workers(self) -> list[admin_pb2.WorkerInfo]:
        """Every worker known, sorted by name."""
        return self._board.workers()

    def drain_worker(self, worker: str, *, hand_over_after_s: float | None = None) -> int:
        """Send it nothing new, on all routers; requests that still run there. See `RouterApi`."""
        return self._operators.drain_worker(worker, hand_over_after_s=hand_over_after_s)

    def undrain_worker(self, worker: str) -> None:
        """Send to it again. Raises WorkerNotFound."""
        self._operators.undrain_worker(worker)

    async def scale_workers(self, workers: int) -> tuple[list[str], list[str]]:
        """Names started, names stopped. Raises NotSupported."""
        return await self._operators.scale_workers(workers)

    def get_policy(self) -> admin_pb2.GetPolicyResponse:
        """The policy in force and those available."""
        return self._operators.get_policy()

    async def policy_kept(self) -> None:
        """Returns when what is in force would outlive this process, if it is to."""
        if self._records is not None:
            await self._records.written()

    def set_policy(self, request: admin_pb2.SetPolicyRequest, *, caller: Caller) -> admin_pb2.SetPolicyResponse:
        """From the next request on, on all routers within a second. Raises InvalidRequest; then nothing changed."""
        return self._operators.set_policy(request, caller=caller)

    def rollback_policy(
        self, request: admin_pb2.RollbackPolicyRequest, *, caller: Caller
    ) -> admin_pb2.RollbackPolicyResponse:
        """Return to an earlier policy. Raises InvalidRequest; then nothing changed."""
        return self._operators.rollback_policy(request, caller=caller)

    def set_shadow_policy(
        self, request: admin_pb2.SetShadowPolicyRequest, *, caller: Caller
    ) -> admin_pb2.SetShadowPolicyResponse:
        """Let a policy score without acting, or end that. Raises InvalidRequest; then nothing changed."""
        return self._operators.set_shadow_policy(request, caller=caller)

    async def clear_cache(
        self, request: admin_pb2.ClearCacheRequest, *, caller: Caller
    ) -> admin_pb2.ClearCacheResponse:
        """Drop blocks; returns when every worker confirmed. Raises InvalidRequest, WorkerLost, NoWorkerAvailable."""
        return await self._operators.clear_cache(request, caller=caller)

    async def watch_requests(
        self, request: admin_pb2.WatchRequestsRequest, *, caller: Caller
    ) -> AsyncIterator[admin_pb2.WatchRequestsResponse]:
        """What became of each request, as it ends. Raises PermissionDenied, InvalidRequest, Overloaded."""
        with audited("watch requests", caller, with_text=request.with_text):
            async with aclosing(self._watchers.watch(request)) as messages:
                async for message in messages:
                    yield message

    def stats(self, *, show_prompts: bool) -> admin_pb2.WatchStatsResponse:
        """A snapshot of the numbers behind the dashboard. Words of prompts only where the settings allow it."""
        return self._board.stats(
            self._accounts.ledger.totals,
            in_flight=self._admission.in_flight,
            queued=(len(self._room), self._room.tokens),
            refused=self._accounts.refused,
            show_prompts=show_prompts and self._config.show_prompts,
        )

    def ready(self) -> bool:
        """Whether a request could be served now, by what all workers hold."""
        if self._admission.draining or self.fleet.catching_up:
            return False
        return any(self.fleet.takes_requests(link) for link in self.fleet.links())

    # The steps of a request

    async def _prepared(self, body: inference_pb2.GenerateRequest, work: Request) -> PreparedPrompt:
        check_model(body.model, self._config.model_name)
        check_adapter(body.adapter)
        samples_of(body)
        check_priority(body.priority)
        self._room.check_quota(work.caller.tenant)
        check_cache(body.cache, wall=self._wall_clock())
        await self._constraints.check(body.sampling)
        prepared = await self._preparer.prepare(body.input, work.caller, body.cache, deadline=work.context.deadline)
        work.prompt_tokens = prepared.question.prompt_tokens
        if protocol := features.protocol_of(body.sampling):
            prepared.question = replace(prepared.question, protocol=protocol)
        self._audit.seen.add(prepared.chain.joined)
        return prepared

    def _job(self, body: inference_pb2.GenerateRequest, work: Request, prepared: PreparedPrompt) -> worker_pb2.Job:
        sampling = filled_sampling(
            body.sampling,
            prompt_tokens=prepared.question.prompt_tokens,
            context_length=self.fleet.context_length(),
            vocab_size=self.fleet.vocab_size(),
            draw_seed=lambda: self._rng.getrandbits(63),
        )
        return job_for(work, prepared, body, sampling, filled_cache(body.cache, wall=self._wall_clock()))

    def _response(
        self, work: Request, prepared: PreparedPrompt, output: worker_pb2.SequenceOutput
    ) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse(
            text=output.text, token_ids=output.token_ids, logprobs=output.logprobs, finish_reason=output.finish_reason
        )
        if prepared.given.HasField("chat"):
            work.answer.append(output.text)
        if output.finish_reason:
            response.usage.CopyFrom(work.usage())
            response.route.CopyFrom(work.route(self._config.name))
            if work.answer:
                self._accounts.remember_answer(work, prepared)
        return response

    # Small things

    def _make_fleet(self, encoder: Encoder, discovery: Discovery, credentials: grpc.ChannelCredentials | None) -> Fleet:
        config = self._config
        record = FleetRecord(0, config.name, config.policy, dict(config.weights), frozenset(), config.shared_tier_reads)
        if config.record_file:
            file, configured = Path(config.record_file), record
            keep = keeper(file, configured.setting)
            self._records = RecordWriter(keep)
            record = restored(file, configured, time_ms=int(self._wall_clock() * 1000))
            if record is not configured:
                keep(record)  # so that an edit of the settings is noted once, and when it was
        return Fleet(
            discovery,
            self._index,
            self.metrics,
            LinkSettings(config.name, versions.VERSION, config.fleet_secret, credentials),
            Expected(config.model_name, encoder.tokenizer_sha256),
            record,
            clock=self._clock,
            jitter=self._rng.random,
            others=OtherRouters(self._traffic),
            on_worker_gone=lambda worker: self._room.forget(worker),
            beliefs=self._beliefs,
            catch_up_s=config.catch_up_s,
            on_load=lambda: self._room.look_again(),
            wall_clock=self._wall_clock,
            keep_record=self._records.write if self._records else _kept_nowhere,
        )

    def _block_size(self) -> int:
        return self.fleet.identity.scheme.block_size if self.fleet.identity else 0

    def _label(self, given: inference_pb2.Input) -> str:
        """The first words that a person wrote, kept only where the settings allow to show them."""
        if not self._config.show_prompts:
            return ""
        words = given.chat.messages[0].content if given.chat.messages else given.text
        return " ".join(words[: 4 * _WORDS].split())[:_WORDS]


def _code_of_leaving(context: RequestContext) -> grpc.StatusCode:
    """Why a call was ended from outside: its edge watches the same deadline."""
    if context.deadline is not None and time_left(context.deadline) <= _SAME_MOMENT_S:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _kept_nowhere(_record: FleetRecord) -> None:
    return
