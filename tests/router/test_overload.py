"""Overload over real gRPC: what a client is told, two routers, and nothing left of those who leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import ClientSession

from router.config import OverloadConfig, RouterConfig
from router.core import Router
from router.errors import QuotaExceeded
from router.http import create_app
from router.protocol import Caller, Role
from router.server import RouterServer
from tests.router.rig import ADMIN, Rig, all_ready, eventually, generate, request, rig, tokens
from warmkv import errors
from warmkv.client import AsyncClient
from workers.simulated_sequence import Timing

SLOW = Timing(prefill_fixed_ms=1.0, prefill_token_ms=1.0, prefill_pair_ms=0.0, decode_step_ms=1.0)
SHORT = OverloadConfig(max_worker_queue_s=0.3)


@asynccontextmanager
async def served(fleet: Rig, router: Router) -> AsyncIterator[tuple[RouterServer, AsyncClient]]:
    """The router behind its real server, and a client of it."""
    config = replace(RouterConfig("r0", "", "sim"), grpc_port=0, http_port=0)
    callers = lambda token: Caller(token or "anonymous", Role.ADMIN, "group")  # noqa: E731
    app = create_app(router, config, registry=router.metrics.registry, authenticate=callers)
    server = RouterServer(router, config, authenticate=callers, http_app=app, on_drain=router.drain)
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.grpc_port}", api_key="a") as client:
            yield server, client
    finally:
        await server.stop()


async def ask(client: AsyncClient, seed: int, size: int = 100, **options: object) -> float:
    """Milliseconds to its first token."""
    stream = client.generate(token_ids=tokens(seed, size), max_tokens=1, ignore_eos=True, **options)  # type: ignore[arg-type]
    return (await stream.result()).route.ttft_ms


@pytest.mark.asyncio
async def test_a_client_is_refused_at_once_with_the_time_to_come_back_and_does_not_try_again_by_itself() -> None:
    async with rig(1, timing=SLOW) as fleet, AsyncExitStack() as stack:
        router = await fleet.start_router(overload=SHORT)
        await all_ready(router, 1)
        server, client = await stack.enter_async_context(served(fleet, router))
        for n in range(9):
            await ask(client, n)
        flood = [asyncio.ensure_future(ask(client, 100 + n, 200)) for n in range(20)]
        await eventually(lambda: router._room._forecast.rate.per_second())
        with pytest.raises(errors.Overloaded) as refused:
            await ask(client, 50, timeout=1.0)
        error = refused.value
        assert error.reason == "DEADLINE_UNREACHABLE"
        assert error.retry_after is not None
        assert 0.1 <= error.retry_after <= 60
        assert error.metadata["limit"] == "deadline"
        assert float(error.metadata["predicted_ms"]) > float(error.metadata["deadline_ms"])
        stats = router.stats(show_prompts=False)
        assert stats.refused["deadline"] == 1  # once: the client did not ask again
        assert stats.queued > 0
        async with ClientSession() as http:
            page = await (await http.get(f"http://127.0.0.1:{server.http_port}/metrics")).text()
        assert 'warmkv_requests_refused_total{limit="deadline"} 1.0' in page
        assert "warmkv_requests_queued " in page
        await asyncio.gather(*flood)
        assert router._room.check()
        assert len(router._room) == 0


@pytest.mark.asyncio
async def test_a_caller_that_hangs_up_while_it_waits_leaves_nothing() -> None:
    async with rig(1, timing=SLOW) as fleet, AsyncExitStack() as stack:
        router = await fleet.start_router(overload=SHORT)
        await all_ready(router, 1)
        _, client = await stack.enter_async_context(served(fleet, router))
        streams = [client.generate(token_ids=tokens(n, 400), max_tokens=1) for n in range(8)]
        tasks = [asyncio.ensure_future(stream.result()) for stream in streams]
        await eventually(lambda: len(router._room) >= 5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await eventually(lambda: router.stats(show_prompts=False).in_flight == 0)
        assert (len(router._room), router._room.tokens) == (0, 0)
        await eventually(lambda: not router._room._lateness.silent())
        assert await ask(client, 99) > 0


@pytest.mark.asyncio
async def test_one_tenants_flood_leaves_the_others_first_token_bounded() -> None:
    async with rig(1, timing=SLOW) as fleet, AsyncExitStack() as stack:
        router = await fleet.start_router(overload=SHORT)
        await all_ready(router, 1)
        server, client = await stack.enter_async_context(served(fleet, router))
        other = await stack.enter_async_context(AsyncClient(f"127.0.0.1:{server.grpc_port}", api_key="b"))
        await asyncio.gather(ask(client, 1), ask(other, 2))  # both are connected
        flood = [asyncio.ensure_future(ask(client, 100 + n, 200)) for n in range(40)]
        await eventually(lambda: len(router._room) > 20)
        before = sum(task.done() for task in flood)
        await ask(other, 3)
        # More than 20 were before it; how few it waits for is measured on a virtual clock, not on a busy machine.
        assert sum(task.done() for task in flood) - before <= 20
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)


@pytest.mark.asyncio
async def test_routers_give_out_their_part_of_a_quota_as_they_come_and_go() -> None:
    quota = OverloadConfig(tokens_per_minute={"ops": 1000})
    async with rig(1) as fleet:
        first = await fleet.start_router("r0", overload=quota)
        await all_ready(first, 1)
        await eventually(lambda: first._room._quotas.limit("ops") == 1000)
        second = await fleet.start_router("r1", overload=quota)
        await all_ready(second, 1)
        await eventually(lambda: first._room._quotas.limit("ops") == second._room._quotas.limit("ops") == 500)
        await generate(second, request(tokens(1, 490), 1), caller=ADMIN)
        with pytest.raises(QuotaExceeded, match="500 tokens a minute on this router"):
            await generate(second, request(tokens(2, 490), 1), caller=ADMIN)
        await generate(first, request(tokens(3, 490), 1), caller=ADMIN)
        await second.close()
        await eventually(lambda: first._room._quotas.limit("ops") == 1000)


@pytest.mark.asyncio
async def test_several_routers_do_not_fill_a_workers_queue_together() -> None:
    async with rig(1, timing=SLOW) as fleet:
        routers = [await fleet.start_router(f"r{n}", overload=SHORT) for n in range(3)]
        for router in routers:
            await all_ready(router, 1)
        tasks = [
            asyncio.ensure_future(generate(routers[n % 3], request(tokens(n, 100), 1), caller=ADMIN)) for n in range(30)
        ]
        most = 0
        while not all(task.done() for task in tasks):
            report = routers[0].fleet.links()[0].report
            most = max(most, report.message.pending_prefill_tokens if report else 0)
            await asyncio.sleep(0.02)
        assert all(task.result().finish_reason for task in tasks)
        # 300 ms of queue and what each of the three sends before it hears of the others.
        assert most <= 2000
        assert sum(task.result().route.router_wait_ms > 0 for task in tasks) >= 5
