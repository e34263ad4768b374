"""The client for asyncio. Import it from `warmkv.client`, where it is described."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc

from warmkv.channel import Calls, ConnectOptions, channel_arguments
from warmkv.chat import Chat
from warmkv.errors import from_rpc_error
from warmkv.requests import (
    ExplainOptions,
    GenerateOptions,
    InputOptions,
    PromptOptions,
    WarmOptions,
    drain_request,
    explain_request,
    generate_request,
    list_blocks_request,
    pin_request,
    set_policy_request,
    set_shadow_policy_request,
    tokenize_request,
    unpin_request,
    warm_request,
)
from warmkv.stream import AsyncStream, Generation
from warmkv.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

Q = TypeVar("Q")
A = TypeVar("A")


class AsyncClient:
    """A connection to a router, for asyncio. Belongs to the event loop that runs when it is made."""

    def __init__(self, target: str = "127.0.0.1:50051", **options: Unpack[ConnectOptions]) -> None:
        """Connect, at the first call, to `target`: host:port, or another name that gRPC resolves."""
        credentials, arguments = channel_arguments(options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, arguments)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, arguments)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._calls = Calls.of(options)

    def generate(self, text: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Generate a continuation of a text, of `messages` or of `token_ids`.

        Raises:
            WarmkvError: while the stream is read.
        """
        return self._start(text, None, options)

    def chat(self, *, system: str | None = None, **options: Unpack[GenerateOptions]) -> Chat[AsyncStream]:
        """A conversation; the options hold for each of its turns."""
        return Chat(self._start, system, options)

    async def explain(
        self, text: str | None = None, **options: Unpack[ExplainOptions]
    ) -> inference_pb2.ExplainResponse:
        """What `generate` would decide now, and why."""
        return await self._ask(self._inference.Explain, explain_request(text, options))

    async def tokenize(
        self, text: str | None = None, **options: Unpack[InputOptions]
    ) -> inference_pb2.TokenizeResponse:
        """The token ids that `generate` would use."""
        return await self._ask(self._inference.Tokenize, tokenize_request(text, options))

    async def list_workers(self) -> list[admin_pb2.WorkerInfo]:
        """The workers, sorted by name."""
        return list((await self._ask(self._admin.ListWorkers, admin_pb2.ListWorkersRequest())).workers)

    async def drain(self, worker: str, *, hand_over_after_s: float | None = None) -> int:
        """Send a worker nothing new; the requests that still run there.

        `hand_over_after_s`: so long they may still take, then they go on at other workers; None: they finish there.
        """
        request = drain_request(worker, hand_over_after_s)
        return int((await self._ask(self._admin.DrainWorker, request)).running)

    async def undrain(self, worker: str) -> None:
        """Send to a worker again."""
        await self._ask(self._admin.UndrainWorker, admin_pb2.UndrainWorkerRequest(worker=worker))

    async def scale(self, workers: int) -> admin_pb2.ScaleWorkersResponse:
        """Start or end workers until there are so many."""
        return await self._ask(self._admin.ScaleWorkers, admin_pb2.ScaleWorkersRequest(workers=workers))

    async def get_policy(self) -> admin_pb2.GetPolicyResponse:
        """The policy in force, and those that can be set."""
        return await self._ask(self._admin.GetPolicy, admin_pb2.GetPolicyRequest())

    async def set_policy(
        self, name: str = "", weights: Mapping[str, float] | None = None, *, shared_tier_reads: bool | None = None
    ) -> admin_pb2.SetPolicyResponse:
        """Change the policy, from the next request on; what is left out stays as it is."""
        return await self._ask(self._admin.SetPolicy, set_policy_request(name, weights, shared_tier_reads))

    async def set_shadow_policy(
        self, name: str = "", weights: Mapping[str, float] | None = None
    ) -> admin_pb2.SetShadowPolicyResponse:
        """Let a policy score the live requests without acting; without a name: end that. See `get_policy().shadow`."""
        return await self._ask(self._admin.SetShadowPolicy, set_shadow_policy_request(name, weights))

    async def rollback_policy(self, to_version: int = 0) -> admin_pb2.RollbackPolicyResponse:
        """Return to the policy before the last change, or to the one that a version put in force."""
        return await self._ask(self._admin.RollbackPolicy, admin_pb2.RollbackPolicyRequest(to_version=to_version))

    async def clear_cache(self, scope: admin_pb2.ClearCacheRequest) -> admin_pb2.ClearCacheResponse:
        """Drop blocks; returns when every worker confirmed."""
        return await self._ask(self._admin.ClearCache, scope)

    async def list_blocks(
        self,
        *,
        worker: str = "",
        tier: str = "",
        page_size: int = 0,
        page_token: str = "",
        **prompt: Unpack[PromptOptions],
    ) -> admin_pb2.ListBlocksResponse:
        """A page of the blocks that workers hold: of a tenant, a prompt's, of a worker, in a tier, or all.

        `next_page_token` of the answer, with the rest of the question as it was, asks for the next one.
        """
        request = list_blocks_request(prompt, worker=worker, tier=tier, page_size=page_size, page_token=page_token)
        return await self._ask(self._admin.ListBlocks, request)

    async def cache_stats(self, worker: str = "") -> admin_pb2.GetCacheStatsResponse:
        """Fill, hits, misses and failures of every tier of every worker, or of one."""
        return await self._ask(self._admin.GetCacheStats, admin_pb2.GetCacheStatsRequest(worker=worker))

    async def warm(
        self,
        *,
        workers: Sequence[str] = (),
        compute: bool = False,
        **options: Unpack[WarmOptions],
    ) -> admin_pb2.WarmResponse:
        """Bring a prompt's blocks up from slow tiers, and with `compute` compute those that nobody holds.

        Without `workers`: on the one that the prompt would be sent to. How long they live: see `LifetimeOptions`.
        """
        return await self._ask(self._admin.Warm, warm_request(options, workers=workers, compute=compute))

    async def pin(
        self, *, seconds: int | None = None, workers: Sequence[str] = (), **prompt: Unpack[PromptOptions]
    ) -> admin_pb2.PinResponse:
        """Forbid to drop the blocks of a prompt, or of a tenant, that are held now; for so long, or until `unpin`."""
        return await self._ask(self._admin.Pin, pin_request(prompt, seconds=seconds, workers=workers))

    async def unpin(self, *, workers: Sequence[str] = (), **prompt: Unpack[PromptOptions]) -> admin_pb2.UnpinResponse:
        """Allow it again."""
        return await self._ask(self._admin.Unpin, unpin_request(prompt, workers=workers))

    async def check_store(self, workers: Sequence[str] = ()) -> admin_pb2.CheckStoreResponse:
        """Audit the stores of workers: index against blocks."""
        return await self._ask(self._admin.CheckStore, admin_pb2.CheckStoreRequest(workers=workers))

    async def watch_stats(
        self, *, period_ms: int | None = None, show_prompts: bool = False, timeout: float | None = None
    ) -> AsyncIterator[admin_pb2.WatchStatsResponse]:
        """The numbers behind the dashboard, one message a period, until the iterator is closed or `timeout` s over."""
        request = admin_pb2.WatchStatsRequest(period_ms=period_ms, show_prompts=show_prompts)
        async with aclosing(self._followed(self._admin.WatchStats, request, timeout)) as messages:
            async for stats in messages:
                yield stats

    async def watch_requests(
        self, *, salt: bytes = b"", with_text: bool = False, timeout: float | None = None
    ) -> AsyncIterator[admin_pb2.WatchRequestsResponse]:
        """What becomes of each request, as it ends, until the iterator is closed or `timeout` s over.

        The first message comes at once. `salt`, 8 to 64 bytes, makes references to tenants and sessions alike on
        all routers of a fleet. `with_text` needs the router's setting show_prompts.
        """
        request = admin_pb2.WatchRequestsRequest(salt=salt, with_text=with_text)
        async with aclosing(self._followed(self._admin.WatchRequests, request, timeout)) as messages:
            async for message in messages:
                yield message

    async def close(self) -> None:
        """Close the connection; running calls end."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def _start(
        self, text: str | None, on_complete: Callable[[Generation], None] | None, options: GenerateOptions
    ) -> AsyncStream:
        request = generate_request(text, options)
        metadata = self._calls.metadata(options.get("request_id"), options.get("traceparent"))
        waits = self._calls.retry.waits(options.get("timeout", self._calls.timeout))
        return AsyncStream(
            lambda left: self._inference.Generate(request, timeout=left, metadata=metadata),
            waits,
            on_complete,
            n=request.n,
        )

    async def _followed(
        self, method: grpc.aio.UnaryStreamMultiCallable[Q, A], request: Q, timeout: float | None
    ) -> AsyncGenerator[A, None]:
        """Messages until the iterator is closed; not asked again, for nobody could tell what was missed."""
        call = method(request, timeout=timeout, metadata=self._calls.metadata())
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    async def _ask(self, method: grpc.aio.UnaryUnaryMultiCallable[Q, A], request: Q) -> A:
        waits = self._calls.waits()
        while True:
            try:
                return await method(request, timeout=waits.time_left(), metadata=self._calls.metadata())
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
                wait = waits.before_retry(error)
                if wait is None:
                    raise error from None
                await asyncio.sleep(wait)
