"""One request on its way through the router: what it is, what became of it, settled once.

Covers: the facts that admission, decision, job and bill share, the times of its tokens, and the one entry in the
ledger. Does not cover: the order of the steps (`core`).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING

import grpc

from kvstore.blocks import BlockHash
from kvstore.token_ids import packed, u32
from router import kv_wire
from router.decide import Choice, Question
from router.flight import Flight, FlightEnd
from router.guest import Guest
from router.hash_memo import Names
from router.ledger import Entry, settled_fates
from router.protocol import Caller, Prompt, RequestContext
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2, worker_pb2

if TYPE_CHECKING:
    from router.prefill_jobs import PrefillJob
    from router.watching import Arrival


@dataclass(slots=True)
class PreparedPrompt:
    """A prompt with its names.

    Attributes:
        given: what was encoded. salt, root: of the caller's trust group. chain: of its full blocks.
        question: for the decider.
    """

    given: inference_pb2.Input
    prompt: Prompt
    salt: bytes
    root: BlockHash
    chain: Names
    question: Question

    @property
    def names(self) -> list[BlockHash]:
        """Of its full blocks, 32 bytes each; made anew at each call."""
        return self.chain.full


@dataclass(slots=True)
class Request:
    """One request. Times are seconds on the router's clock.

    `settle` is given the ledger's entry exactly once: when the worker had its last word, or when no worker will.
    """

    caller: Caller
    context: RequestContext
    started: float
    clock: Callable[[], float]
    settle: Callable[[Request, Entry], None]
    on_first: Callable[[Request, float], None]
    on_gap: Callable[[float, int], None]
    on_pause: Callable[[float, int], None]  # instead, where the answer has just come to another worker
    prompt_tokens: int = 0  # zero before it was encoded
    choice: Choice | None = None
    first_choice: Choice | None = None  # the one under which the first token came
    sent_at: float = 0.0  # when it went to the chosen worker; a request that lost one is sent again
    guest: Guest | None = None  # set when it first came to the door
    record: admin_pb2.DecisionRecord | None = None
    arrival: Arrival | None = None  # set while somebody watches
    flight: Flight | None = None
    beside: list[tuple[Request, worker_pb2.Job]] = field(default_factory=list)  # samples that go where it goes
    prefill: PrefillJob | None = None  # another worker's part of it
    lost: list[str] = field(default_factory=list)
    excused: int = 0  # of the lost ones, that it is no longer suspected for
    gaps: list[str] = field(default_factory=list)  # workers whose stream lost something of it
    avoid: dict[str, int] = field(default_factory=dict)  # workers that have refused it, and their incarnation
    incarnation: int = 0  # of the worker that it was sent to last
    retries: int = 0
    handovers: int = 0
    begun: bool = False  # some worker may have worked at it
    answer_ids: array[int] = field(default_factory=partial(u32, ()))  # those that were handed out
    answer: list[str] = field(default_factory=list)
    ttft_ms: float = 0.0
    code: str = ""
    fates: dict[str, int] = field(default_factory=dict)
    generated: int = 0
    generated_before: int = 0  # at the worker that it was sent to last: by those before it
    generated_by: Counter[str] = field(default_factory=Counter)  # worker
    finish_reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED
    _last_token_at: float = 0.0
    _is_paused: bool = False

    def sample(
        self, *, settle: Callable[[Request, Entry], None], on_first: Callable[[Request, float], None]
    ) -> Request:
        """One of several answers to the prompt of a request that was not sent yet: with a job and life of its own."""
        given = [each.name for each in fields(self) if each.default is each.default_factory is MISSING]
        same = {name: getattr(self, name) for name in given}
        return Request(**{**same, "settle": settle, "on_first": on_first}, prompt_tokens=self.prompt_tokens)

    @property
    def waited_ms(self) -> float:
        """How long it waited in this router for its turn."""
        return self.guest.waited_ms if self.guest else 0.0

    def tokens_came(self, tokens: int) -> None:
        """Some tokens of the answer arrived at the router."""
        now = self.clock()
        if not self._last_token_at:
            self.ttft_ms, self.first_choice = (now - self.started) * 1000.0, self.choice
            self.on_first(self, now)
        elif self._is_paused:
            self.on_pause(now - self._last_token_at, tokens)
        else:
            self.on_gap(now - self._last_token_at, tokens)
        self._last_token_at, self._is_paused = now, False
        self.generated += tokens
        self.generated_by[self.choice.worker if self.choice else ""] += tokens

    def outlived(self, tokens: int) -> bool:
        """Whether the worker that it was sent to last made so many tokens of it."""
        return self.generated - self.generated_before >= tokens

    def leaves_worker(self) -> bool:
        """Its worker does not go on with it, and it is to be sent to another one; whether that begins a handover.

        It does where tokens came and the answer was not on its way to another one already.
        """
        begins = bool(self.generated) and not self._is_paused
        self.flight = None
        self._is_paused = bool(self.generated)
        self.handovers += begins
        self.retries += not self.generated
        return begins

    def worker_done(self, end: FlightEnd) -> bool:
        """Its worker had its last word, or none; returns whether the reported fates were right.

        Settles it unless it may still be tried elsewhere or `finish` is to say how it ended.
        """
        right = True
        self.begun = self.begun or not _ended_in_the_queue(end)
        if end.last is not None:
            self.finish_reason = end.last.finish_reason
        if end.fates is not None and not self.fates:  # those of the first admission stay
            reported = kv_wire.fates(end.fates)
            if sum(reported.values()):
                self.fates, right = settled_fates(reported, self.prompt_tokens)
        if self.code:
            self._settle()
        return right

    def end_prefill(self) -> None:
        """The worker that answers needs no more blocks of the one that prefilled for it."""
        if (prefill := self.prefill) is not None:
            self.prefill = None
            prefill.end()

    def finish(self, code: grpc.StatusCode) -> None:
        """The caller got its answer or error. The bill waits for a worker that is still at it."""
        self.code = code.name
        if self.flight is None or self.flight.ended:
            self._settle()

    def usage(self) -> inference_pb2.Usage:
        """For the last message."""
        return inference_pb2.Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated,
            prompt_tokens_by_fate=common_pb2.TokensByFate(**self.fates),
        )

    def route(self, router: str) -> inference_pb2.Route:
        """For the last message."""
        route = inference_pb2.Route(
            ttft_ms=self.ttft_ms,
            retries=self.retries,
            handovers=self.handovers,
            router=router,
            request_id=self.context.request_id,
            router_wait_ms=self.waited_ms,
        )
        if self.choice is not None:
            first = self.first_choice or self.choice
            route.worker = self.choice.worker
            route.policy = first.policy.name
            route.reason = first.decision.reason
            route.predicted_ttft_ms = first.predicted_ttft_ms
            route.predicted_cached_tokens = first.price.cached_tokens
            if first.pair is not None:
                route.prefill_worker = first.pair.worker
        return route

    def _settle(self) -> None:
        first = self.first_choice or self.choice
        entry = Entry(
            tenant=self.caller.tenant,
            worker=self.choice.worker if self.choice else "",
            code=self.code,
            prompt_tokens=self.prompt_tokens,
            fates=self.fates,
            generated_tokens=self.generated,
            predicted_cached=first.price.cached_tokens if first else 0,
            begun=self.begun,
            admitted_by=first.worker if first else "",
            generated_by=self.generated_by,
        )
        self.settle(self, entry)


def _ended_in_the_queue(end: FlightEnd) -> bool:
    """Whether its worker says that it was given up before it was begun."""
    if end.last is None or end.last.HasField("fates"):
        return False
    return end.last.finish_reason in (common_pb2.FINISH_REASON_CANCELLED, common_pb2.FINISH_REASON_DEADLINE)


def job_for(
    request: Request,
    prepared: PreparedPrompt,
    body: inference_pb2.GenerateRequest,
    sampling: common_pb2.SamplingParams,
    cache: common_pb2.CacheDirectives,
) -> worker_pb2.Job:
    """The message to the worker, but for its deadline and the id that the link gives it."""
    return worker_pb2.Job(
        request_id=request.context.request_id,
        traceparent=request.context.traceparent,
        packed_token_ids=packed(prepared.prompt.token_ids),
        tenant_salt=prepared.salt,
        chain_root=prepared.root,
        block_hashes=b"".join(prepared.question.hashes),
        sampling=sampling,
        priority=body.priority,
        cache=cache,
        turn=turn_of(body.input),
    )


def turn_of(prompt: inference_pb2.Input) -> int:
    """Which turn of its conversation this is, from 1; zero: it is no conversation."""
    return sum(message.role == "user" for message in prompt.chat.messages)
