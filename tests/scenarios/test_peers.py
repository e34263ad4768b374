"""Workers that read one another's blocks: a router over real gRPC, real engines, one small model, no shared tier."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from router.config import RouterConfig
from router.core import Router
from router.discovery import StaticDiscovery
from router.protocol import WorkerAddress
from tests.router.rig import ADMIN, ALICE, SECRET, CharEncoder, all_ready, eventually, generate, request, tokens
from tests.workers.engine_rig import model_folder
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2
from workers import peers
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.server import WorkerServer

CONFIG = WorkerConfig(
    name="w0",
    model_dir=str(model_folder()),
    model_name="tiny",
    device="cpu",
    device_bytes=8 << 20,
    host_bytes=16 << 20,
    block_size=16,
    fleet_secret=SECRET,
    peers=True,
)
IDS = tokens(1, 330)  # twenty full blocks
FULL = 320


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_S", 5.0)


@dataclass
class Fleet:
    router: Router
    servers: dict[str, WorkerServer]
    engines: dict[str, TorchEngine]

    async def ask(self, worker: str, ids: list[int] = IDS) -> tuple[list[int], dict[str, int]]:
        """Tokens and fates of a request that only this worker can take."""
        others = [each.name for each in self.router.list_workers() if each.name != worker]
        for each in others:
            self.router.drain_worker(each)
        answer = await generate(self.router, request(ids, max_tokens=6))
        for each in others:
            self.router.undrain_worker(each)
        assert answer.route.worker == worker
        return list(answer.token_ids), fates(answer.usage)

    async def knows(self, worker: str, blocks: int, ids: list[int] = IDS) -> None:
        """Until the router has heard that the worker holds so many blocks of the prompt in host RAM."""
        body = inference_pb2.TokenizeRequest(input=request(ids).input)
        hashes = (await self.router.tokenize(body, caller=ALICE)).block_hashes
        await eventually(lambda: self.router._index.match(hashes)[worker].host == blocks)


def fates(usage: inference_pb2.Usage) -> dict[str, int]:
    return {field.name: count for field, count in usage.prompt_tokens_by_fate.ListFields()}


@asynccontextmanager
async def fleet_of(*names: str, others: dict[str, str] | None = None) -> AsyncIterator[Fleet]:
    """Workers in this process, `others` by their address, and a router."""
    engines = {name: await asyncio.to_thread(build_engine, replace(CONFIG, name=name)) for name in names}
    for engine in engines.values():
        # So small a model computes faster than anybody reads; these tests are about what is read.
        engine._scheduler._compute_ms = lambda first, count: math.inf
    servers = {name: WorkerServer(replace(CONFIG, name=name), engine) for name, engine in engines.items()}
    addresses = (others or {}) | {name: server.start() for name, server in servers.items()}
    discovery = StaticDiscovery([WorkerAddress(name, address) for name, address in addresses.items()])
    config = RouterConfig(name="r0", model_dir="", model_name="tiny", fleet_secret=SECRET)
    router = Router(config, CharEncoder(), discovery, wait_for_worker_s=5.0)
    try:
        await router.start()
        await all_ready(router, len(addresses))
        yield Fleet(router, servers, engines)
    finally:
        await router.close()
        await asyncio.gather(*(asyncio.to_thread(server.close) for server in servers.values()))


@pytest.mark.asyncio
async def test_a_prefix_that_one_worker_computed_is_read_by_the_next_and_outlives_the_first() -> None:
    async with fleet_of("w0", "w1") as fleet:
        cold = await fleet.ask("w0")
        assert cold[1] == {"computed": 330}
        await fleet.knows("w0", FULL // 16)
        assert await fleet.ask("w1") == (cold[0], {"computed": 10, "peer": FULL})
        await fleet.knows("w1", FULL // 16)
        assert fleet.router.stats(show_prompts=False).prompt_tokens.peer == FULL

        def hits() -> int:
            cache = fleet.router.cache.stats(admin_pb2.GetCacheStatsRequest(worker="w1"), caller=ADMIN).workers[0]
            return sum(tier.hits for tier in cache.tiers if tier.tier == common_pb2.TIER_PEER)

        await eventually(lambda: hits() == FULL // 16)
        await asyncio.to_thread(fleet.servers["w0"].close)
        assert await fleet.ask("w1") == (cold[0], {"computed": 10, "device": FULL})
        assert (await fleet.ask("w1", tokens(2, 100)))[1] == {"computed": 100}


@pytest.mark.asyncio
async def test_requests_that_wait_find_what_a_peer_has_already_near() -> None:
    async with fleet_of("w0", "w1") as fleet:
        cold, longer = await fleet.ask("w0"), [*IDS, *tokens(7, 40)]
        await fleet.knows("w0", FULL // 16)
        fleet.router.drain_worker("w0")
        answers = await asyncio.gather(*(generate(fleet.router, request(ids, 6)) for ids in (IDS, longer, IDS, longer)))
        assert [list(answer.token_ids) for answer in answers[::2]] == [cold[0]] * 2
        for answer in answers:
            assert fates(answer.usage).get("computed", 0) < 60
        assert fleet.engines["w1"].load().tiers["peer"][0].hits == FULL // 16, "each block was read once"


@pytest.mark.asyncio
async def test_nothing_comes_back_from_a_worker_that_is_cleared_later() -> None:
    async with fleet_of("w0", "w1") as fleet:
        cold = await fleet.ask("w1")
        await fleet.knows("w1", FULL // 16)
        assert (await fleet.ask("w0"))[1] == {"computed": 10, "peer": FULL}
        await fleet.knows("w0", FULL // 16)
        go_on, stuck = threading.Event(), threading.Event()

        def hang(_engine: object) -> None:
            stuck.set()
            go_on.wait(30)

        fleet.servers["w1"]._engine_thread.post(hang)  # its clear has to wait; its blocks are served all the while
        await asyncio.to_thread(stuck.wait, 30)
        clear = admin_pb2.ClearCacheRequest(all=True)
        clearing = asyncio.ensure_future(fleet.router.clear_cache(clear, caller=ADMIN))
        await fleet.knows("w0", 0)
        assert not clearing.done()
        # The router knows that the other one has it, says so, and the worker does not take it.
        assert await fleet.ask("w0") == (cold[0], {"computed": 330})
        go_on.set()
        await clearing
        await fleet.knows("w1", 0)
        await fleet.knows("w0", FULL // 16)  # computed since
        assert await fleet.ask("w1") == (cold[0], {"computed": 10, "peer": FULL}), "afterwards peers are read again"


def _process() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "workers.main", "--config", json.dumps(asdict(CONFIG))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.asyncio
async def test_a_worker_that_is_stopped_in_its_tracks_costs_others_a_miss() -> None:
    process = await asyncio.to_thread(_process)
    try:
        assert process.stdout is not None
        address = json.loads(await asyncio.to_thread(process.stdout.readline))["address"]
        async with fleet_of("w1", others={"w0": address}) as fleet:
            cold = await fleet.ask("w0")
            await fleet.knows("w0", FULL // 16)
            peers_of_w1 = fleet.engines["w1"]._peers
            assert peers_of_w1 is not None
            peers_of_w1.tier._timeout_s = 0.1
            fleet.router.drain_worker("w0")
            process.send_signal(signal.SIGSTOP)
            answer = await generate(fleet.router, request(IDS, 6))
            assert (list(answer.token_ids), fates(answer.usage)) == (cold[0], {"computed": 330})
            assert fleet.engines["w1"].load().tiers["peer"][0].misses == {"deadline": 1}
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
