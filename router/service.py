"""The gRPC servicers: from the wire to `RouterApi` and back. Everything else about a call is `interceptors`' matter."""

# ruff: noqa: D102, N802 - the .proto files name and describe the methods

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import grpc

from router.errors import InvalidRequest, PermissionDenied
from router.interceptors import current_call
from router.protocol import Caller, Role, RouterApi
from warmkv.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

DEFAULT_PERIOD_MS = 1000
MIN_PERIOD_MS, MAX_PERIOD_MS = 100, 60_000
Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """What clients call."""

    def __init__(self, router: RouterApi) -> None:
        self._router = router

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        caller, about = current_call()
        async with aclosing(cast("Any", self._router.generate(request, caller=caller, context=about))) as responses:
            async for response in responses:
                yield response

    async def Explain(self, request: inference_pb2.ExplainRequest, context: Context) -> inference_pb2.ExplainResponse:
        caller, _ = current_call()
        return await self._router.explain(request, caller=caller)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        caller, _ = current_call()
        return await self._router.tokenize(request, caller=caller)


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """What operators call; every method needs the role admin."""

    def __init__(self, router: RouterApi) -> None:
        self._router = router

    async def ListWorkers(
        self, request: admin_pb2.ListWorkersRequest, context: Context
    ) -> admin_pb2.ListWorkersResponse:
        _admin()
        return admin_pb2.ListWorkersResponse(workers=self._router.list_workers())

    async def DrainWorker(
        self, request: admin_pb2.DrainWorkerRequest, context: Context
    ) -> admin_pb2.DrainWorkerResponse:
        _admin()
        after_s = request.hand_over_after_ms / 1000.0 if request.HasField("hand_over_after_ms") else None
        running = self._router.drain_worker(request.worker, hand_over_after_s=after_s)
        return admin_pb2.DrainWorkerResponse(running=running)

    async def UndrainWorker(
        self, request: admin_pb2.UndrainWorkerRequest, context: Context
    ) -> admin_pb2.UndrainWorkerResponse:
        _admin()
        self._router.undrain_worker(request.worker)
        return admin_pb2.UndrainWorkerResponse()

    async def ScaleWorkers(
        self, request: admin_pb2.ScaleWorkersRequest, context: Context
    ) -> admin_pb2.ScaleWorkersResponse:
        _admin()
        started, stopped = await self._router.scale_workers(request.workers)
        return admin_pb2.ScaleWorkersResponse(started=started, stopped=stopped)

    async def GetPolicy(self, request: admin_pb2.GetPolicyRequest, context: Context) -> admin_pb2.GetPolicyResponse:
        _admin()
        return self._router.get_policy()

    async def SetPolicy(self, request: admin_pb2.SetPolicyRequest, context: Context) -> admin_pb2.SetPolicyResponse:
        response = self._router.set_policy(request, caller=_admin())
        await self._router.policy_kept()
        return response

    async def SetShadowPolicy(
        self, request: admin_pb2.SetShadowPolicyRequest, context: Context
    ) -> admin_pb2.SetShadowPolicyResponse:
        response = self._router.set_shadow_policy(request, caller=_admin())
        await self._router.policy_kept()
        return response

    async def RollbackPolicy(
        self, request: admin_pb2.RollbackPolicyRequest, context: Context
    ) -> admin_pb2.RollbackPolicyResponse:
        response = self._router.rollback_policy(request, caller=_admin())
        await self._router.policy_kept()
        return response

    async def ClearCache(self, request: admin_pb2.ClearCacheRequest, context: Context) -> admin_pb2.ClearCacheResponse:
        return await self._router.clear_cache(request, caller=_admin())

    async def ListBlocks(self, request: admin_pb2.ListBlocksRequest, context: Context) -> admin_pb2.ListBlocksResponse:
        return await self._router.cache.list_blocks(request, caller=_admin())

    async def GetCacheStats(
        self, request: admin_pb2.GetCacheStatsRequest, context: Context
    ) -> admin_pb2.GetCacheStatsResponse:
        return self._router.cache.stats(request, caller=_admin())

    async def Warm(self, request: admin_pb2.WarmRequest, context: Context) -> admin_pb2.WarmResponse:
        return await self._router.cache.warm(request, caller=_admin())

    async def Pin(self, request: admin_pb2.PinRequest, context: Context) -> admin_pb2.PinResponse:
        return await self._router.cache.pin(request, caller=_admin())

    async def Unpin(self, request: admin_pb2.UnpinRequest, context: Context) -> admin_pb2.UnpinResponse:
        return await self._router.cache.unpin(request, caller=_admin())

    async def CheckStore(self, request: admin_pb2.CheckStoreRequest, context: Context) -> admin_pb2.CheckStoreResponse:
        return await self._router.cache.check(request, caller=_admin())

    async def WatchStats(
        self, request: admin_pb2.WatchStatsRequest, context: Context
    ) -> AsyncIterator[admin_pb2.WatchStatsResponse]:
        _admin()
        period_ms = request.period_ms if request.HasField("period_ms") else DEFAULT_PERIOD_MS
        if not MIN_PERIOD_MS <= period_ms <= MAX_PERIOD_MS:
            raise InvalidRequest(
                f"period_ms is {period_ms}. Send one from {MIN_PERIOD_MS} to {MAX_PERIOD_MS}, or none.",
                field="period_ms",
            )
        while True:
            yield self._router.stats(show_prompts=request.show_prompts)
            await asyncio.sleep(period_ms / 1000)

    async def WatchRequests(
        self, request: admin_pb2.WatchRequestsRequest, context: Context
    ) -> AsyncIterator[admin_pb2.WatchRequestsResponse]:
        caller = _admin()
        async with aclosing(cast("Any", self._router.watch_requests(request, caller=caller))) as messages:
            async for message in messages:
                yield message


def _admin() -> Caller:
    """The caller, when it may administer.

    Raises:
        PermissionDenied: it may not.
    """
    caller, _ = current_call()
    if caller.role is not Role.ADMIN:
        raise PermissionDenied('this call needs a key with role = "admin". Use such a key, or ask the operator.')
    return caller
