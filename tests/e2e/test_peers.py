"""A fleet as a user runs it, without Redis and without disk: what one worker computed the other one reads from it."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil

from deploy.local_fleet import FleetShape, LocalFleet
from tests.e2e.test_fleet import MODEL, ask, fates, until
from warmkv.client import AsyncClient

PROMPTS = [f"Number {number}. " + "A name is bound by its first assignment. " * 40 for number in range(4)]


async def only(client: AsyncClient, worker: str, other: str) -> None:
    """Requests go to `worker` from now on."""
    await client.undrain(worker)
    await client.drain(other)


def pid_of(address: str) -> int:
    """Of the process of this user that listens there."""
    port = int(address.rpartition(":")[2])
    for process in psutil.process_iter():
        try:
            sockets = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets):
            return process.pid
    raise AssertionError(f"nobody listens at {address}")


def test_without_redis_a_prefix_is_read_from_the_worker_that_holds_it_and_its_end_fails_no_request() -> None:
    fleet = LocalFleet(FleetShape(MODEL, workers=2, redis_bytes=0, peers=True))

    async def story() -> None:
        await fleet.start()
        await fleet.wait_ready()
        first, second = await fleet.workers()
        async with fleet.client() as client:
            await only(client, first.name, second.name)
            cold = [await ask(client, prompt) for prompt in PROMPTS]
            block_size = (await client.explain("x")).block_size

            async def held() -> bool:
                blocks = (await client.list_blocks(worker=first.name, tier="host")).blocks
                return len(blocks) >= sum(usage.prompt_tokens // block_size for _, usage, _ in cold)

            await until(held)
            await only(client, second.name, first.name)
            read = [await ask(client, prompt) for prompt in PROMPTS[:3]]
            assert {worker for _, _, worker in read} == {second.name}
            assert [tokens for tokens, _, _ in read] == [tokens for tokens, _, _ in cold[:3]]
            # On a busy machine one of them may be too late, and is computed.
            assert max(fates(usage).get("peer", 0) / usage.prompt_tokens for _, usage, _ in read) > 0.8
            os.kill(pid_of(first.address), signal.SIGKILL)
            tokens, usage, _ = await ask(client, PROMPTS[3])
            assert (tokens, fates(usage)) == (cold[3][0], {"computed": usage.prompt_tokens})

    try:
        asyncio.run(story())
    finally:
        asyncio.run(fleet.stop())
