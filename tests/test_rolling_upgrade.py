"""Routers and workers that are one minor version apart work together: real ones, over a wire of the last release."""

from __future__ import annotations

import asyncio

import pytest

from router.core import Router
from tests.released_contract import PROTOCOL_VERSION, OldWire, released
from tests.router.rig import ALICE, Rig, all_ready, context, eventually, generate, request, rig, tokens, worker_server
from tests.router.test_core import warmed
from warmkv import versions
from warmkv.v1 import worker_pb2


async def upgraded_around(fleet: Rig, name: str) -> OldWire:
    """Start a worker that is of the last release for whoever connects."""
    server = worker_server(name)
    fleet.workers[name] = server
    wire = OldWire(server.start())
    fleet.addresses[name] = await wire.start()
    fleet.announce()
    return wire


def protocols(router: Router) -> dict[str, int]:
    return {worker.name: worker.protocol_version for worker in router.list_workers()}


def test_the_last_release_is_one_version_back() -> None:
    assert versions.OLDEST == PROTOCOL_VERSION == versions.NEWEST - 1
    hello = worker_pb2.RouterHello(protocol_version=versions.OLDEST, newest_protocol_version=versions.NEWEST)
    old = released("RouterHello").FromString(hello.SerializeToString())
    assert old.protocol_version == PROTOCOL_VERSION  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_a_router_and_a_worker_of_neighbouring_versions_serve_with_their_cache() -> None:
    async with rig(0) as fleet:
        wire = await upgraded_around(fleet, "w0")
        router = await fleet.start_router()
        await all_ready(router, 1)
        assert protocols(router) == {"w0": PROTOCOL_VERSION}
        ids = tokens(1, 160)
        await warmed(router, ids)
        again = await generate(router, request([*ids, *tokens(2, 30)], 5))
        assert again.usage.prompt_tokens_by_fate.device == again.route.predicted_cached_tokens == 160
        assert again.usage.completion_tokens == 5
        assert not wire.refused
        await router.close()
        await wire.stop()


@pytest.mark.asyncio
async def test_a_fleet_in_the_middle_of_its_upgrade_serves_from_both_sides() -> None:
    async with rig(1) as fleet:
        wire = await upgraded_around(fleet, "w1")
        router = await fleet.start_router()
        await all_ready(router, 2)
        assert protocols(router) == {"w0": versions.NEWEST, "w1": PROTOCOL_VERSION}
        router_two = await fleet.start_router("r1")
        await all_ready(router_two, 2)
        answers = await asyncio.gather(
            *(generate(each, request(tokens(seed, 100), 3)) for seed in range(8) for each in (router, router_two))
        )
        assert {answer.route.worker for answer in answers} == {"w0", "w1"}
        assert all(answer.usage.completion_tokens == 3 for answer in answers)
        router.drain_worker("w1")
        await eventually(lambda: "w1" in router_two.fleet.record.drained)
        assert (await generate(router_two, request(tokens(50, 100), 3))).route.worker == "w0"
        for each in (router, router_two):
            await each.close()
        await wire.stop()


@pytest.mark.asyncio
async def test_closing_a_request_reaches_a_worker_of_the_last_release() -> None:
    async with rig(0) as fleet:
        wire = await upgraded_around(fleet, "w0")
        router = await fleet.start_router()
        await all_ready(router, 1)
        answer = router.generate(request(tokens(1, 40), 4000), caller=ALICE, context=context("id-1"))
        async for _ in answer:
            break
        await answer.aclose()
        await eventually(lambda: not any(worker.running or worker.waiting for worker in router.list_workers()))
        await router.close()
        await wire.stop()
