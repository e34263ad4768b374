"""A real worker with a real disk tier that is killed: what is cleared while it is down does not come back with it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from router.config import RouterConfig
from router.core import Router
from router.discovery import StaticDiscovery
from router.errors import NoWorkerAvailable
from router.protocol import WorkerAddress
from tests.router.rig import ADMIN, SECRET, CharEncoder, all_ready, eventually, generate, request, states, tokens
from tests.scenarios.test_peers import CONFIG, FULL, IDS
from warmkv.v1 import admin_pb2, common_pb2
from workers.config import WorkerConfig


def start(config: WorkerConfig) -> tuple[subprocess.Popen[str], str]:
    """A worker of its own process, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.main", "--config", json.dumps(asdict(config))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["address"]


def end(process: subprocess.Popen[str]) -> None:
    """`kill -9`."""
    process.kill()
    process.communicate()


async def on_disk(router: Router) -> int:
    """How many blocks the worker has there."""
    request = admin_pb2.ListBlocksRequest(tier=common_pb2.TIER_DISK, page_size=1000)
    return len((await router.cache.list_blocks(request, caller=ADMIN)).blocks)


async def reach(router: Router, blocks: int) -> None:
    async with asyncio.timeout(20):
        while await on_disk(router) < blocks:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.05)


@pytest.mark.asyncio
@pytest.mark.parametrize("cleared", [True, False])
async def test_a_killed_worker_brings_back_from_disk_only_what_was_not_cleared_meanwhile(
    tmp_path: Path, cleared: bool
) -> None:
    config = replace(CONFIG, disk_bytes=16 << 20, disk_dir=str(tmp_path), admission="always", peers=False)
    process, address = await asyncio.to_thread(start, config)
    discovery = StaticDiscovery([WorkerAddress("w0", address)])
    router = Router(
        RouterConfig(name="r0", model_dir="", model_name="tiny", fleet_secret=SECRET),
        CharEncoder(),
        discovery,
        wait_for_worker_s=5.0,
    )
    try:
        await router.start()
        await all_ready(router, 1)
        await generate(router, request(IDS, max_tokens=2))
        await reach(router, FULL // 16)
        await asyncio.to_thread(end, process)
        await eventually(lambda: states(router)["w0"] == "LOST")
        if cleared:
            with pytest.raises(NoWorkerAvailable, match="nothing was cleared yet"):
                await router.clear_cache(admin_pb2.ClearCacheRequest(all=True), caller=ADMIN)
        process, address = await asyncio.to_thread(start, config)
        discovery.set([WorkerAddress("w0", address)])
        await eventually(lambda: states(router)["w0"] == "READY", timeout_s=30)
        await generate(router, request(tokens(5, 20), max_tokens=2))  # whatever it is sent first, the clear came before
        left = await on_disk(router)
        assert (left >= FULL // 16) != cleared
        assert left <= 1 or not cleared
        assert all("w0" in clear.confirmed for clear in router.fleet.record.clears)
        assert len(router.fleet.record.clears) == int(cleared)
    finally:
        await router.close()
        await asyncio.to_thread(end, process)
