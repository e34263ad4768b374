"""The servicers over a real server: each call reaches its method, roles are checked, statistics flow."""

import asyncio

import grpc
import pytest

from router.errors import PermissionDenied
from router.protocol import Caller, Role
from tests.router.edge import WordRouter, channel_to, serving
from warmkv.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

ADMIN_CALLS = {
    "ListWorkers": admin_pb2.ListWorkersRequest(),
    "DrainWorker": admin_pb2.DrainWorkerRequest(worker="w0"),
    "UndrainWorker": admin_pb2.UndrainWorkerRequest(worker="w0"),
    "ScaleWorkers": admin_pb2.ScaleWorkersRequest(workers=3),
    "GetPolicy": admin_pb2.GetPolicyRequest(),
    "SetPolicy": admin_pb2.SetPolicyRequest(policy=admin_pb2.Policy(name="round_robin")),
    "SetShadowPolicy": admin_pb2.SetShadowPolicyRequest(),
    "RollbackPolicy": admin_pb2.RollbackPolicyRequest(to_version=4),
    "ClearCache": admin_pb2.ClearCacheRequest(all=True),
    "ListBlocks": admin_pb2.ListBlocksRequest(),
    "GetCacheStats": admin_pb2.GetCacheStatsRequest(),
    "Warm": admin_pb2.WarmRequest(),
    "Pin": admin_pb2.PinRequest(tenant="acme"),
    "Unpin": admin_pb2.UnpinRequest(tenant="acme"),
    "CheckStore": admin_pb2.CheckStoreRequest(),
    "WatchStats": admin_pb2.WatchStatsRequest(period_ms=100),
    "WatchRequests": admin_pb2.WatchRequestsRequest(),
}


def a_user(_token: str | None) -> Caller:
    return Caller("alpha", Role.USER, "alpha")


def test_the_list_of_admin_calls_is_whole() -> None:
    assert set(ADMIN_CALLS) == set(admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods_by_name)


@pytest.mark.asyncio
@pytest.mark.parametrize("method", ADMIN_CALLS)
async def test_admin_calls_need_the_role_admin(method: str) -> None:
    router = WordRouter()
    async with serving(router, a_user) as server, channel_to(server) as channel:
        call = getattr(admin_pb2_grpc.AdminServiceStub(channel), method)(ADMIN_CALLS[method])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call.read() if method.startswith("Watch") else call)
    assert caught.value.code() is PermissionDenied.code
    assert "admin" in (caught.value.details() or "")
    assert (router.drained, router.policy.name, router.cache.requests) == (set(), "cache_aware", [])


@pytest.mark.asyncio
async def test_admin_calls_reach_the_router() -> None:
    router = WordRouter()
    async with serving(router) as server, channel_to(server) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        assert [w.name for w in (await stub.ListWorkers(ADMIN_CALLS["ListWorkers"])).workers] == ["w0", "w1"]
        assert (await stub.DrainWorker(ADMIN_CALLS["DrainWorker"])).running == 5
        assert router.drained == {"w0"}
        await stub.UndrainWorker(ADMIN_CALLS["UndrainWorker"])
        assert router.drained == set()
        assert list((await stub.ScaleWorkers(ADMIN_CALLS["ScaleWorkers"])).started) == ["w2"]
        await stub.SetPolicy(ADMIN_CALLS["SetPolicy"])
        assert (await stub.GetPolicy(ADMIN_CALLS["GetPolicy"])).policy.name == "round_robin"
        assert (await stub.RollbackPolicy(ADMIN_CALLS["RollbackPolicy"])).version == 4
        assert (await stub.SetShadowPolicy(ADMIN_CALLS["SetShadowPolicy"])).version == 3
        assert [w.worker for w in (await stub.ClearCache(ADMIN_CALLS["ClearCache"])).workers] == ["w0"]
        assert [b.worker for b in (await stub.ListBlocks(ADMIN_CALLS["ListBlocks"])).blocks] == ["w0"]
        assert (await stub.Warm(ADMIN_CALLS["Warm"])).blocks == 3
        for method in ("GetCacheStats", "Pin", "Unpin", "CheckStore"):
            answer = await getattr(stub, method)(ADMIN_CALLS[method])
            assert [w.worker for w in answer.workers] == ["w0"], method
        asked = ["ListBlocks", "Warm", "GetCacheStats", "Pin", "Unpin", "CheckStore"]
        assert router.cache.requests == [ADMIN_CALLS[method] for method in asked]


@pytest.mark.asyncio
async def test_an_unknown_worker_is_not_found() -> None:
    async with serving(WordRouter()) as server, channel_to(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin_pb2_grpc.AdminServiceStub(channel).DrainWorker(admin_pb2.DrainWorkerRequest(worker="w9"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.asyncio
async def test_statistics_come_every_period_and_pass_on_what_was_asked() -> None:
    async with serving(WordRouter()) as server, channel_to(server) as channel:
        call = admin_pb2_grpc.AdminServiceStub(channel).WatchStats(
            admin_pb2.WatchStatsRequest(period_ms=100, show_prompts=True)
        )
        seen = [await call.read() for _ in range(3)]
        call.cancel()
    assert [stats.in_flight for stats in seen] == [1, 1, 1]


@pytest.mark.asyncio
@pytest.mark.parametrize("period_ms", [0, 99, 60_001])
async def test_periods_outside_the_range_are_refused(period_ms: int) -> None:
    async with serving(WordRouter()) as server, channel_to(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (
                admin_pb2_grpc.AdminServiceStub(channel)
                .WatchStats(admin_pb2.WatchStatsRequest(period_ms=period_ms))
                .read()
            )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.asyncio
async def test_a_watcher_outlives_the_default_deadline_of_requests_and_does_not_delay_a_drain() -> None:
    async with serving(WordRouter(), default_deadline_s=0.15) as server, channel_to(server) as channel:
        call = admin_pb2_grpc.AdminServiceStub(channel).WatchStats(admin_pb2.WatchStatsRequest(period_ms=100))
        assert len([await call.read() for _ in range(4)]) == 4
        assert await asyncio.wait_for(server.drain(), 5) is True


@pytest.mark.asyncio
async def test_explain_and_tokenize_reach_the_router_as_the_keys_tenant() -> None:
    async with serving(WordRouter(), a_user) as server, channel_to(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        explained = await stub.Explain(inference_pb2.ExplainRequest(input=inference_pb2.Input(text="abc")))
        tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(input=inference_pb2.Input(text="abc")))
    assert (explained.prompt_tokens, explained.reason) == (3, "prefix")
    assert (list(tokens.token_ids), tokens.rendered) == ([97, 98, 99], "alpha")


@pytest.mark.asyncio
async def test_an_unknown_model_is_not_found() -> None:
    async with serving(WordRouter()) as server, channel_to(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceServiceStub(channel).Explain(inference_pb2.ExplainRequest(model="gpt-9"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
