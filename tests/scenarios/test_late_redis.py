"""A shared tier whose server comes after the workers: real Redis, real engines, real gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deploy.redis_server import PrivateRedis
from router.core import Router
from tests.kvstore.redis.redis_for_tests import client_of
from tests.router.rig import ADMIN, ALICE, eventually, generate, request, tokens
from tests.scenarios.test_restarts import on_redis
from warmkv.v1 import admin_pb2, inference_pb2

OTHER = {"w0": "w1", "w1": "w0"}
CLEAR_ALL = admin_pb2.ClearCacheRequest(all=True)


def keys_of(server: PrivateRedis) -> int:
    with client_of(server) as client:
        return int(client.dbsize())


async def names_of(router: Router, ids: list[int]) -> list[bytes]:
    body = inference_pb2.TokenizeRequest(input=request(ids).input)
    return list((await router.tokenize(body, caller=ALICE)).block_hashes)


def shared_blocks(router: Router, names: list[bytes]) -> dict[str, int]:
    """What each worker could reuse of a prompt, whether that is worth its while or not."""
    return {worker: overlap.shared for worker, overlap in router._beliefs.match(names).items()}


@pytest.mark.asyncio
async def test_a_server_that_comes_later_counts_for_every_worker_and_is_cleared_with_them(tmp_path: Path) -> None:
    ids, socket = tokens(1, 330), tmp_path / "late.sock"
    async with on_redis(f"unix://{socket}", redis_recall_s=0.0) as router:
        await generate(router, request(tokens(2, 40)))
        with PrivateRedis(maxmemory_bytes=256 << 20) as server:
            socket.symlink_to(server.url.removeprefix("unix://"))
            for again in range(200):  # breakers look for the server now and then, when they are asked
                await asyncio.gather(*(generate(router, request(tokens(1000 + 4 * again + n, 40))) for n in range(4)))
                await asyncio.sleep(0.05)
                if all(worker.tiers[-1].healthy for worker in router.list_workers()):
                    break
            writer = (await generate(router, request(ids))).route.worker
            names = await names_of(router, ids)
            # A worker that finds the server empty only now says so; then what is there is told again, 5 s later.
            await eventually(lambda: shared_blocks(router, names)[OTHER[writer]] == 20, timeout_s=60.0)
            assert keys_of(server) >= 20
            await router.clear_cache(CLEAR_ALL, caller=ADMIN)
            assert keys_of(server) == 0
            assert shared_blocks(router, names) == {"w0": 0, "w1": 0}
