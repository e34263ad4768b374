"""The joints of the router: who calls it, how it hears of workers, and what servicers and the HTTP app may ask."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from warmkv.v1 import admin_pb2, inference_pb2


class Role(StrEnum):
    """What a caller may do: users generate and explain, admins also administer."""

    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, by its credentials.

    Attributes:
        tenant: whose quota and statistics. trust_group: whose cached blocks; tenants of one group share them.
    """

    tenant: str
    role: Role
    trust_group: str


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What belongs to a request besides its body.

    Attributes:
        request_id, traceparent: taken from the caller or made.
        deadline: on the event loop's clock; None: none.
    """

    request_id: str
    traceparent: str
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker listens (`host:port`)."""

    name: str
    address: str


class Discovery(Protocol):
    """Finds workers and changes how many there are. In production a child process that speaks with Ray."""

    def watch(self) -> AsyncIterator[list[WorkerAddress]]:
        """The full list now, and again whenever it changes. A worker that is missing from a list may still live."""
        ...

    async def scale(self, workers: int) -> tuple[list[str], list[str]]:
        """Start or end workers until there are that many; names started, names stopped.

        Raises:
            NotSupported: this deployment cannot scale.
        """
        ...

    async def close(self) -> None:
        """Stop watching."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded input.

    Attributes:
        token_ids: the prompt; an `array` of `kvstore.token_ids.u32` is read much faster than a list.
        rendered: the text that was encoded (after the chat template); empty for ready ids.
        largest_id: of token_ids; None: not looked for.
    """

    token_ids: Sequence[int]
    rendered: str = ""
    largest_id: int | None = None


@dataclass(frozen=True, slots=True)
class EarlierAnswer:
    """An assistant message of a chat. From these the router tells why blocks of earlier turns are not found.

    Attributes:
        said: digest of the conversation up to it (`router.misses.said_digests`).
        end: position in the rendered text just behind its content; None: it did not come out whole.
        spliced: it came with its token ids, which stand in the prompt as they are.
    """

    said: bytes
    end: int | None
    spliced: bool = False


class Encoder(Protocol):
    """Turns inputs into token ids, once per request. `router.tokenizer.PromptEncoder` is the real one.

    Attributes:
        tokenizer_sha256: of tokenizer.json, 32 bytes; a worker that has another one is refused. Empty: not compared.
        vocab_size: ids are below it; None: what the workers say counts alone.
    """

    @property
    def tokenizer_sha256(self) -> bytes:
        """See the class."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """See the class."""
        ...

    async def earlier_answers(self, input: inference_pb2.Input, prompt: Prompt) -> tuple[EarlierAnswer, ...]:
        """The assistant messages of a chat, in order. `prompt`: what `encode` made of the input."""
        ...

    def said(self, input: inference_pb2.Input, answer: str) -> bytes:
        """Digest of a chat and its answer; equal to that of an `EarlierAnswer` of the next turn."""
        ...

    async def encode(self, input: inference_pb2.Input, *, group: str = "") -> Prompt:
        """The prompt's ids. Long prompts are encoded in a thread. `group`: the trust group that may share memories.

        Ready ids come back as they are; the router checks their range and count. An input without text or messages is
        refused here, one that encodes to no token by the router.

        Raises:
            InvalidRequest: no kind is set, the template refuses the conversation, ...; names the remedy.
        """
        ...


class CacheApi(Protocol):
    """What operators ask of the cache. All raise `router.errors.RouterError`, and all but `tiers` are logged."""

    def tiers(self) -> admin_pb2.GetCacheStatsResponse:
        """The numbers of every tier of every worker, for a page that asks every other second."""
        ...

    async def list_blocks(
        self, request: admin_pb2.ListBlocksRequest, *, caller: Caller
    ) -> admin_pb2.ListBlocksResponse:
        """A page of blocks."""
        ...

    def stats(self, request: admin_pb2.GetCacheStatsRequest, *, caller: Caller) -> admin_pb2.GetCacheStatsResponse:
        """The numbers of every tier of every worker."""
        ...

    async def warm(self, request: admin_pb2.WarmRequest, *, caller: Caller) -> admin_pb2.WarmResponse:
        """Bring a prompt's blocks up, or compute them."""
        ...

    async def pin(self, request: admin_pb2.PinRequest, *, caller: Caller) -> admin_pb2.PinResponse:
        """Forbid to drop blocks."""
        ...

    async def unpin(self, request: admin_pb2.UnpinRequest, *, caller: Caller) -> admin_pb2.UnpinResponse:
        """Allow it again."""
        ...

    async def check(self, request: admin_pb2.CheckStoreRequest, *, caller: Caller) -> admin_pb2.CheckStoreResponse:
        """Audit the stores of workers."""
        ...


class RouterApi(Protocol):
    """What servicers and the HTTP app ask of a router. All raise `router.errors.RouterError`."""

    @property
    def cache(self) -> CacheApi:
        """What operators ask of the cache, but for `clear_cache`."""
        ...

    def generate(
        self, request: inference_pb2.GenerateRequest, *, caller: Caller, context: RequestContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Run a request. Closing the iterator cancels it and frees its blocks within one engine step."""
        ...

    async def explain(self, request: inference_pb2.ExplainRequest, *, caller: Caller) -> inference_pb2.ExplainResponse:
        """What `generate` would decide. Changes nothing."""
        ...

    async def tokenize(
        self, request: inference_pb2.TokenizeRequest, *, caller: Caller
    ) -> inference_pb2.TokenizeResponse:
        """The token ids that `generate` would use."""
        ...

    def list_workers(self) -> list[admin_pb2.WorkerInfo]:
        """Every worker known, sorted by name."""
        ...

    def drain_worker(self, worker: str, *, hand_over_after_s: float | None = None) -> int:
        """Send it nothing new, on all routers; requests that still run there.

        Those go on elsewhere after `hand_over_after_s`; None: they finish there.

        Raises:
            WorkerNotFound: there is none of that name. NoWorkerAvailable: no other one can go on with them.
            NotSupported: it runs a warmkv that hands nothing over.
        """
        ...

    def undrain_worker(self, worker: str) -> None:
        """Send to it again. Raises WorkerNotFound."""
        ...

    async def scale_workers(self, workers: int) -> tuple[list[str], list[str]]:
        """Names started, names stopped."""
        ...

    def get_policy(self) -> admin_pb2.GetPolicyResponse:
        """The policy in force and those available."""
        ...

    async def policy_kept(self) -> None:
        """Returns when what is in force would outlive this process, if it is to."""
        ...

    def set_policy(self, request: admin_pb2.SetPolicyRequest, *, caller: Caller) -> admin_pb2.SetPolicyResponse:
        """From the next request on, on all routers within a second. Raises InvalidRequest."""
        ...

    def rollback_policy(
        self, request: admin_pb2.RollbackPolicyRequest, *, caller: Caller
    ) -> admin_pb2.RollbackPolicyResponse:
        """Return to an earlier policy. Raises InvalidRequest."""
        ...

    def set_shadow_policy(
        self, request: admin_pb2.SetShadowPolicyRequest, *, caller: Caller
    ) -> admin_pb2.SetShadowPolicyResponse:
        """Let a policy score without acting, or end that. Raises InvalidRequest."""
        ...

    async def clear_cache(
        self, request: admin_pb2.ClearCacheRequest, *, caller: Caller
    ) -> admin_pb2.ClearCacheResponse:
        """Drop blocks; returns when every worker confirmed."""
        ...

    def watch_requests(
        self, request: admin_pb2.WatchRequestsRequest, *, caller: Caller
    ) -> AsyncIterator[admin_pb2.WatchRequestsResponse]:
        """What became of each request, as it ends, until the iterator is closed."""
        ...

    def stats(self, *, show_prompts: bool) -> admin_pb2.WatchStatsResponse:
        """A snapshot of the numbers behind the dashboard."""
        ...

    def ready(self) -> bool:
        """Whether a request could be served now: at least one worker takes requests and the router does not drain."""
        ...
