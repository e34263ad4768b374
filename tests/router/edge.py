"""A small router of words, and a server around it: what the tests of the edge and of the client talk to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc

from router.auth import open_access
from router.config import RouterConfig
from router.errors import InvalidRequest, ModelNotFound, RouterError, WorkerNotFound
from router.protocol import Caller, RequestContext
from router.server import RouterServer
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2


class WordRouter:
    """Answers with the numbers 0, 1, ... as words; a RouterApi that remembers who asked and what was closed.

    Attributes:
        failures: raised by the next calls of `generate`, one each, before anything is sent.
        fail_after: raise this after so many pieces. delay_s: between pieces. gate: opened before the
            first one. pad: appended to every piece.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Caller, RequestContext]] = []
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.failures: list[Exception] = []
        self.fail_after: tuple[int, Exception] | None = None
        self.delay_s = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.pad = ""
        self.is_ready = True
        self.sent = 0
        self.started = asyncio.Event()
        self.closed = asyncio.Event()
        self.drained: set[str] = set()
        self.cache = WordCache()
        self.policy = admin_pb2.Policy(name="cache_aware", weights={"load": 1.0})

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, caller: Caller, context: RequestContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.calls.append((caller, context))
        self.requests.append(request)
        try:
            if self.failures:
                raise self.failures.pop(0)
            count = request.sampling.max_tokens or 3
            if not self.gate.is_set():
                self.started.set()
                await self.gate.wait()
            for i in range(count):
                if self.fail_after is not None and i == self.fail_after[0]:
                    raise self.fail_after[1]
                if self.delay_s:
                    self.started.set()
                    await asyncio.sleep(self.delay_s)
                self.sent += 1
                self.started.set()
                for index in range(max(1, request.n)):
                    piece = self._piece(i, count, context)
                    piece.index = index
                    if index < request.n - 1:
                        piece.ClearField("usage")
                        piece.ClearField("route")
                    elif piece.finish_reason:
                        piece.usage.completion_tokens *= max(1, request.n)
                    yield piece
        finally:
            self.closed.set()

    def _piece(self, i: int, count: int, context: RequestContext) -> inference_pb2.GenerateResponse:
        piece = inference_pb2.GenerateResponse(text=f"{i} {self.pad}", token_ids=[i])
        if i == count - 1:
            piece.finish_reason = common_pb2.FINISH_REASON_LENGTH
            piece.usage.CopyFrom(inference_pb2.Usage(prompt_tokens=7, completion_tokens=count))
            piece.usage.prompt_tokens_by_fate.CopyFrom(common_pb2.TokensByFate(computed=3, device=4))
            piece.route.CopyFrom(inference_pb2.Route(worker="w0", reason="prefix", request_id=context.request_id))
        return piece

    async def explain(self, request: inference_pb2.ExplainRequest, *, caller: Caller) -> inference_pb2.ExplainResponse:
        if request.model not in ("", "tiny"):
            raise ModelNotFound(f"no model {request.model!r} here. Leave model empty.", model=request.model)
        return inference_pb2.ExplainResponse(prompt_tokens=len(request.input.text), worker="w0", reason="prefix")

    async def tokenize(
        self, request: inference_pb2.TokenizeRequest, *, caller: Caller
    ) -> inference_pb2.TokenizeResponse:
        if self.failures:
            raise self.failures.pop(0)
        return inference_pb2.TokenizeResponse(token_ids=[ord(c) for c in request.input.text], rendered=caller.tenant)

    def list_workers(self) -> list[admin_pb2.WorkerInfo]:
        return [admin_pb2.WorkerInfo(name="w0"), admin_pb2.WorkerInfo(name="w1")]

    def drain_worker(self, worker: str, *, hand_over_after_s: float | None = None) -> int:
        if worker not in ("w0", "w1"):
            raise WorkerNotFound(f"no worker {worker!r}. List them by ListWorkers.", worker=worker)
        self.drained.add(worker)
        return 5

    def undrain_worker(self, worker: str) -> None:
        self.drained.discard(worker)

    async def scale_workers(self, workers: int) -> tuple[list[str], list[str]]:
        return [f"w{i}" for i in range(2, workers)], []

    def get_policy(self) -> admin_pb2.GetPolicyResponse:
        return admin_pb2.GetPolicyResponse(policy=self.policy, version=1)

    async def policy_kept(self) -> None:
        return None

    def set_policy(self, request: admin_pb2.SetPolicyRequest, *, caller: Caller) -> admin_pb2.SetPolicyResponse:
        self.policy.MergeFrom(request.policy)
        return admin_pb2.SetPolicyResponse(policy=self.policy, version=2)

    def rollback_policy(
        self, request: admin_pb2.RollbackPolicyRequest, *, caller: Caller
    ) -> admin_pb2.RollbackPolicyResponse:
        return admin_pb2.RollbackPolicyResponse(policy=self.policy, version=request.to_version)

    def set_shadow_policy(
        self, request: admin_pb2.SetShadowPolicyRequest, *, caller: Caller
    ) -> admin_pb2.SetShadowPolicyResponse:
        return admin_pb2.SetShadowPolicyResponse(version=3)

    async def clear_cache(
        self, request: admin_pb2.ClearCacheRequest, *, caller: Caller
    ) -> admin_pb2.ClearCacheResponse:
        if request.WhichOneof("scope") is None:
            raise InvalidRequest("the scope is not set. Set one of all, tenant and prefix.", field="scope")
        return admin_pb2.ClearCacheResponse(workers=[admin_pb2.ClearCacheResponse.Cleared(worker="w0")])

    async def watch_requests(
        self, request: admin_pb2.WatchRequestsRequest, *, caller: Caller
    ) -> AsyncIterator[admin_pb2.WatchRequestsResponse]:
        yield admin_pb2.WatchRequestsResponse(block_size=16)

    def stats(self, *, show_prompts: bool) -> admin_pb2.WatchStatsResponse:
        return admin_pb2.WatchStatsResponse(time_ms=1, generated_tokens=self.sent, in_flight=int(show_prompts))

    def ready(self) -> bool:
        return self.is_ready


class WordCache:
    """A CacheApi whose answers are short."""

    def __init__(self) -> None:
        self.requests: list[object] = []

    def _take(self, request: object, caller: Caller) -> None:
        self.requests.append(request)

    async def list_blocks(
        self, request: admin_pb2.ListBlocksRequest, *, caller: Caller
    ) -> admin_pb2.ListBlocksResponse:
        self._take(request, caller)
        return admin_pb2.ListBlocksResponse(blocks=[admin_pb2.CachedBlock(worker="w0")])

    def stats(self, request: admin_pb2.GetCacheStatsRequest, *, caller: Caller) -> admin_pb2.GetCacheStatsResponse:
        self._take(request, caller)
        return admin_pb2.GetCacheStatsResponse(workers=[admin_pb2.WorkerCache(worker="w0")])

    async def warm(self, request: admin_pb2.WarmRequest, *, caller: Caller) -> admin_pb2.WarmResponse:
        self._take(request, caller)
        return admin_pb2.WarmResponse(blocks=3)

    async def pin(self, request: admin_pb2.PinRequest, *, caller: Caller) -> admin_pb2.PinResponse:
        self._take(request, caller)
        return admin_pb2.PinResponse(workers=[admin_pb2.PinResponse.Pinned(worker="w0")])

    async def unpin(self, request: admin_pb2.UnpinRequest, *, caller: Caller) -> admin_pb2.UnpinResponse:
        self._take(request, caller)
        return admin_pb2.UnpinResponse(workers=[admin_pb2.UnpinResponse.Unpinned(worker="w0")])

    async def check(self, request: admin_pb2.CheckStoreRequest, *, caller: Caller) -> admin_pb2.CheckStoreResponse:
        self._take(request, caller)
        return admin_pb2.CheckStoreResponse(workers=[admin_pb2.CheckStoreResponse.Checked(worker="w0")])


def config(**changes: object) -> RouterConfig:
    settings = {"name": "r0", "model_dir": "unused", "model_name": "tiny", "grpc_port": 0, "http_port": None}
    return RouterConfig(**{**settings, **changes})  # type: ignore[arg-type]


@asynccontextmanager
async def serving(
    router: WordRouter, authenticate: Callable[[str | None], Caller] | None = None, **changes: object
) -> AsyncIterator[RouterServer]:
    server = RouterServer(router, config(**changes), authenticate=authenticate or open_access("default"))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def channel_to(server: RouterServer, *options: tuple[str, int]) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", list(options)) as channel:
        yield channel


def raised_by(error: RouterError) -> str:
    """For test ids."""
    return type(error).__name__
