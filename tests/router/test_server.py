"""What listens: health that follows the router, reflection, sizes, and ports that are taken."""

import asyncio
import socket

import grpc
import pytest
from aiohttp import ClientSession, web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from router.auth import open_access
from router.errors import Unauthenticated
from router.listen import ListenError, host_port
from router.protocol import Caller
from router.server import ADMIN, INFERENCE, RouterServer
from tests.router.edge import WordRouter, channel_to, config, serving
from warmkv.v1 import inference_pb2, inference_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def nobody(_token: str | None) -> Caller:
    raise Unauthenticated("no. Send a key.")


async def status_of(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


async def until(channel: grpc.aio.Channel, status: int) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""), timeout=5)
    async for update in watch:
        if update.status == status:
            break
    watch.cancel()


@pytest.mark.asyncio
async def test_health_follows_the_router_without_a_key() -> None:
    router = WordRouter()
    router.is_ready = False
    async with serving(router, nobody) as server, channel_to(server) as channel:
        for service in ("", "warmkv.v1.InferenceService", "warmkv.v1.AdminService"):
            assert await status_of(channel, service) == NOT_SERVING
        router.is_ready = True
        await until(channel, SERVING)
        assert await status_of(channel, INFERENCE) == SERVING
        router.is_ready = False
        await until(channel, NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await status_of(channel, "no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.asyncio
async def test_watchers_of_health_hear_of_the_drain_and_do_not_hold_it_up() -> None:
    async with serving(WordRouter()) as server, channel_to(server) as channel:
        await until(channel, SERVING)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == SERVING
        assert await asyncio.wait_for(server.drain(), 5) is True
        assert (await asyncio.wait_for(watch.read(), 5)).status == NOT_SERVING
        await asyncio.sleep(0.3)  # the router still says that it is ready
        assert await status_of(channel, "") == NOT_SERVING
        watch.cancel()


@pytest.mark.asyncio
async def test_the_drain_tells_the_router() -> None:
    told: list[bool] = []
    server = RouterServer(
        WordRouter(), config(), authenticate=open_access("a"), on_drain=lambda: told.append(server._in_flight.draining)
    )
    await server.start()
    await server.drain()
    await server.stop()
    assert told == [True]


@pytest.mark.asyncio
async def test_a_second_signal_cuts_the_drain_short() -> None:
    router, hurry = WordRouter(), asyncio.Event()
    router.delay_s = 60
    async with serving(router) as server, channel_to(server) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest())
        await router.started.wait()
        draining = asyncio.create_task(server.drain(hurry))
        await asyncio.sleep(0.05)
        assert not draining.done()
        hurry.set()
        assert await asyncio.wait_for(draining, 5) is False
        call.cancel()


async def services(channel: grpc.aio.Channel) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    return {service.name for service in (await call.read()).list_services_response.service}


@pytest.mark.asyncio
async def test_reflection_lists_the_services_and_describes_them() -> None:
    async with serving(WordRouter(), nobody) as server:
        async with channel_to(server) as channel:
            assert {INFERENCE, ADMIN, "grpc.health.v1.Health"} <= await services(channel)

        def describe() -> list[str]:
            with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as plain:
                file = ProtoReflectionDescriptorDatabase(plain).FindFileContainingSymbol(INFERENCE)
                return [method.name for method in file.service[0].method]

        assert await asyncio.to_thread(describe) == ["Generate", "Explain", "Tokenize"]


@pytest.mark.asyncio
async def test_reflection_can_be_left_out() -> None:
    async with serving(WordRouter(), reflection=False) as server, channel_to(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services(channel)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_prompts_over_our_limit_reach_us_and_only_absurd_ones_meet_the_transports() -> None:
    router = WordRouter()
    async with serving(router, max_prompt_bytes=1000) as server, channel_to(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(input=inference_pb2.Input(text="x" * 3900))
        assert [piece async for piece in stub.Generate(request)]
        request.input.text = "x" * 4100
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(router.requests) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(("setting", "flag"), [("grpc_port", "--grpc-port"), ("http_port", "--http-port")])
async def test_a_port_in_use_is_named_with_the_flag_that_changes_it(setting: str, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = RouterServer(
            WordRouter(), config(**{setting: port}), authenticate=open_access("a"), http_app=web.Application()
        )
        with pytest.raises(ListenError, match=f"127.0.0.1:{port}: another process .* {flag}"):
            await server.start()
        await server.stop()


@pytest.mark.asyncio
async def test_two_routers_never_share_a_port() -> None:
    async with serving(WordRouter()) as first:
        second = RouterServer(WordRouter(), config(grpc_port=first.grpc_port), authenticate=open_access("a"))
        with pytest.raises(ListenError):
            await second.start()
        await second.stop()


@pytest.mark.asyncio
async def test_a_foreign_address_is_named() -> None:
    server = RouterServer(WordRouter(), config(grpc_host="203.0.113.7"), authenticate=open_access("a"))
    with pytest.raises(ListenError, match="does not have that address"):
        await server.start()
    await server.stop()


@pytest.mark.asyncio
async def test_http_is_served_beside_grpc_where_the_settings_name_a_port() -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.add_routes([web.get("/", hello)])
    server = RouterServer(WordRouter(), config(http_port=0), authenticate=open_access("a"), http_app=app)
    await server.start()
    try:
        async with ClientSession() as session, session.get(f"http://127.0.0.1:{server.http_port}/") as answer:
            assert await answer.text() == "hello"
    finally:
        await server.stop()


def test_ipv6_addresses_get_their_brackets() -> None:
    assert (host_port("::1", 5), host_port("[::1]", 5), host_port("a.b", 5)) == ("[::1]:5", "[::1]:5", "a.b:5")
