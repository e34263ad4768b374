"""Whatever happens to streams, workers and caches: once it is quiet, each router believes what the workers hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from router.core import Router
from router.errors import RouterError
from router.link import WorkerLink
from tests.router.rig import ADMIN, ALICE, Rig, all_ready, eventually, generate, request, rig, tokens
from warmkv.v1 import admin_pb2, inference_pb2, kv_events_pb2

SMALL = {"device_blocks": 60, "host_blocks": 120}  # so that blocks are evicted from both tiers
WORKERS = ("w0", "w1", "w2")


async def ask(router: Router, rng: random.Random, seen: set[bytes]) -> None:
    ids = tokens(rng.randrange(12), 16 * rng.randrange(2, 12)) + [rng.randrange(1000)] * rng.randrange(40)
    body = request(ids, max_tokens=rng.randrange(1, 6))
    try:
        seen.update((await router.tokenize(inference_pb2.TokenizeRequest(input=body.input), caller=ALICE)).block_hashes)
        await generate(router, body)
    except RouterError:
        return  # it lost two workers


async def clear(router: Router) -> None:
    try:
        await router.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN)
    except RouterError:
        return  # a worker was away; it owes the clear


def lose_a_step(link: WorkerLink) -> None:
    """The events of the next step never come, and the message after it is numbered accordingly."""
    apply = link._feed.events

    def lost(events: Sequence[kv_events_pb2.KvEvent]) -> None:
        link._feed.events = apply  # type: ignore[method-assign]
        link._feed._seq -= 1

    link._feed.events = lost  # type: ignore[method-assign]


async def disturb(fleet: Rig, rng: random.Random) -> None:
    """Break a stream, lose a message of one, doubt a worker, clear the fleet, or kill a worker and start it again."""
    router, worker = rng.choice(fleet.routers), rng.choice(WORKERS)
    link = router.fleet.link(worker)
    match rng.randrange(5):
        case 0:
            link._break("the test says so")
        case 1:
            lose_a_step(link)
        case 2 if link.whole:
            link.resync()
        case 3:
            await clear(router)
        case 4:
            port = int(fleet.addresses[worker].rsplit(":", 1)[1])
            await fleet.kill_worker(worker)
            fleet.start_worker(worker, port=port, **SMALL)


def wrong(fleet: Rig, seen: set[bytes]) -> int:
    """Blocks of which a router believes another thing than is so, by worker and tier."""
    count = 0
    for name, server in fleet.workers.items():
        held = {(event.tier, bytes(each)) for event in server._engine.snapshot() for each in event.hashes}
        for router in fleet.routers:
            for block in seen:
                overlap = router._index.match([block])[name]
                on_device, in_host = ("device", block) in held, ("host", block) in held
                count += (overlap.device > 0, overlap.host > 0) != (on_device, on_device or in_host)
    return count


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", [1, 2])
async def test_after_turmoil_beliefs_are_right_and_nothing_is_left_over(seed: int) -> None:
    rng, seen = random.Random(seed), set[bytes]()
    async with rig(3, **SMALL) as fleet:
        for name in ("r0", "r1"):
            await all_ready(await fleet.start_router(name), 3)
        running: list[asyncio.Task[None]] = []
        for _ in range(12):
            for _ in range(12):
                running.append(asyncio.create_task(ask(rng.choice(fleet.routers), rng, seen)))
                await asyncio.sleep(0.01)
            await disturb(fleet, rng)
        await asyncio.gather(*running)
        for router in fleet.routers:
            await all_ready(router, 3)
        links = [link for router in fleet.routers for link in router.fleet.links()]
        await eventually(lambda: all(link.whole and not link.owes_clear for link in links))
        await eventually(lambda: wrong(fleet, seen) == 0, timeout_s=20.0)
        for router in fleet.routers:
            assert router._traffic.check()
            assert router._room.check()
            assert all(link.jobs == 0 for link in router.fleet.links())
            assert not router._beliefs.credits.below
            router._index.check()
