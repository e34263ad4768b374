"""Routers and workers that are one minor version apart work together: real ones, over a wire of the last release."""

from __future__ import annotations

import asyncio

import pytest

from router.core import Router
from router.errors import NoWorkerAvailable
from tests.released_contract import PROTOCOL_VERSION, RELEASED, OldWire, released
from tests.router.rig import (
    ALICE,
    Rig,
    all_ready,
    context,
    eventually,
    generate,
    request,
    rig,
    states,
    tokens,
    worker_server,
)
from tests.router.test_core import SLOW, warmed
from warmkv import versions
from warmkv.v1 import worker_pb2

LOST = "LOST"


async def upgraded_around(fleet: Rig, name: str, **options: object) -> OldWire:
    """Start a worker that is of the last release for whoever connects."""
    server = worker_server(name, **options)  # type: ignore[arg-type]
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


def test_the_package_is_one_minor_version_ahead_of_the_last_release() -> None:
    """So that what ends say of themselves tells them apart."""
    (last,) = RELEASED.parent.glob("*.binpb")
    major, minor = (int(part) for part in last.stem.split("."))
    assert versions.VERSION.startswith(f"{major}.{minor + 1}.")


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
        assert all(answer.usage.completion_tokens == 3 for answer in answers)
        router.drain_worker("w1")
        await eventually(lambda: "w1" in router_two.fleet.record.drained)
        assert (await generate(router_two, request(tokens(50, 100), 3))).route.worker == "w0"
        router.undrain_worker("w1")
        router.drain_worker("w0")
        await eventually(lambda: router_two.fleet.record.drained == {"w0"})
        assert (await generate(router_two, request(tokens(51, 100), 3))).route.worker == "w1"
        for each in (router, router_two):
            await each.close()
        await wire.stop()


@pytest.mark.asyncio
async def test_closing_a_request_reaches_a_worker_of_the_last_release() -> None:
    async with rig(0) as fleet:
        wire = await upgraded_around(fleet, "w0", timing=SLOW)
        router = await fleet.start_router()
        await all_ready(router, 1)
        answer = router.generate(request(tokens(1, 40), 4000), caller=ALICE, context=context("id-1"))
        async for _ in answer:
            break
        await eventually(lambda: [worker.running for worker in router.list_workers()] == [1])
        await answer.aclose()
        # To its end the answer would take 80 s.
        await eventually(lambda: not any(worker.running or worker.waiting for worker in router.list_workers()))
        await router.close()
        await wire.stop()


@pytest.mark.asyncio
async def test_what_only_new_workers_understand_goes_to_them_alone() -> None:
    async with rig(1) as fleet:
        wire = await upgraded_around(fleet, "w1")
        router = await fleet.start_router()
        await all_ready(router, 2)
        for seed in range(6):
            body = request(tokens(seed, 60), 3)
            body.sampling.frequency_penalty = 0.5
            assert (await generate(router, body)).route.worker == "w0"
        await fleet.kill_worker("w0")
        await eventually(lambda: protocols(router).keys() == {"w1"} or states(router)["w0"] == LOST)
        with pytest.raises(NoWorkerAvailable, match="w1 run an older warmkv that knows no penalties"):
            await generate(router, body)
        body.sampling.frequency_penalty = 0.0  # says nothing, so everybody understands it
        assert (await generate(router, body)).route.worker == "w1"
        await router.close()
        await wire.stop()


@pytest.mark.asyncio
async def test_an_answer_is_not_handed_over_to_a_worker_that_cannot_go_on_with_it() -> None:
    async with rig(1, timing=SLOW) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        answer = router.generate(request(tokens(1, 40), 400), caller=ALICE, context=context("id-1"))
        await anext(answer)
        wire = await upgraded_around(fleet, "w1")
        await all_ready(router, 2)
        await fleet.kill_worker("w0")
        fleet.start_worker("w2")
        last = [part async for part in answer][-1]
        assert last.usage.completion_tokens == 400
        assert (last.route.worker, last.route.handovers) == ("w2", 1)
        await router.close()
        await wire.stop()
