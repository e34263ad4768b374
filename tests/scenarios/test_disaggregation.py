"""Prefill here, answer there: a router over real gRPC, real engines, one small model, no shared tier."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from router import pairing
from router.config import RouterConfig
from router.core import Router
from router.discovery import StaticDiscovery
from router.protocol import WorkerAddress
from tests.router.rig import ADMIN, ALICE, SECRET, CharEncoder, all_ready, eventually, generate, request, tokens
from tests.scenarios.test_peers import CONFIG, fates
from tests.workers.engine_rig import oracle
from warmkv.v1 import admin_pb2, inference_pb2
from workers import peers
from workers.build import build_engine
from workers.engine import TorchEngine
from workers.server import WorkerServer

IDS = tokens(1, 330)  # twenty full blocks
ROLES = "prefill=1,decode=1"
SLOW = replace(CONFIG, roles=ROLES, max_batch_tokens=32)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_S", 5.0)


@dataclass
class Fleet:
    router: Router
    servers: dict[str, WorkerServer]
    engines: dict[str, TorchEngine]

    async def explain(self, ids: list[int]) -> inference_pb2.ExplainResponse:
        body = inference_pb2.ExplainRequest(input=request(ids).input)
        return await self.router.explain(body, caller=ALICE)

    def quiet(self) -> bool:
        """Nothing is left of any request, here and on the workers."""
        is_idle = not any(engine.has_work() for engine in self.engines.values())
        return is_idle and self.router._traffic.check() and not self.router.fleet.links()[0]._flights


@asynccontextmanager
async def fleet_of(*names: str, roles: str = ROLES, others: dict[str, str] | None = None) -> AsyncIterator[Fleet]:
    configs = {name: replace(SLOW, name=name, roles=roles) for name in names}
    engines = {name: await asyncio.to_thread(build_engine, config) for name, config in configs.items()}
    for engine in engines.values():
        # So small a model computes faster than anybody reads; these tests are about what is read.
        engine._scheduler._compute_ms = lambda first, count: 30_000.0
    servers = {name: WorkerServer(configs[name], engine) for name, engine in engines.items()}
    addresses = (others or {}) | {name: server.start() for name, server in servers.items()}
    discovery = StaticDiscovery([WorkerAddress(name, address) for name, address in addresses.items()])
    config = RouterConfig(name="r0", model_dir="", model_name="tiny", fleet_secret=SECRET)
    router = Router(config, encoder=CharEncoder(), discovery=discovery)
    await router.start()
    try:
        await all_ready(router, len(addresses))
        yield Fleet(router, servers, engines)
    finally:
        await router.close()
        for server in servers.values():
            await asyncio.to_thread(server.close)
        for engine in engines.values():
            engine.store.check()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair costs nothing, so that the mechanism is tested and not the price."""
    free = pairing.best_pair

    def cheap(answering, makers, **told):  # type: ignore[no-untyped-def]
        crowd = answering._replace(decoding=10_000, price=answering.price._replace(compute_ms=1e6))
        return free(crowd, makers, **told | {"interference": 1.0})

    monkeypatch.setattr("router.decide.best_pair", cheap)


def wanted(ids: list[int], max_tokens: int) -> list[int]:
    """What the model says when nobody splits the work: by another implementation."""
    (expected,) = oracle().generate([ids], max_tokens)
    assert len(expected.token_ids) == max_tokens
    return expected.token_ids


def test_one_prefills_and_the_other_one_answers_with_the_same_tokens(always: None) -> None:
    async def story() -> None:
        async with fleet_of("w0", "w1") as fleet:
            answer = await generate(fleet.router, request(IDS, max_tokens=6))
            assert (answer.route.worker, answer.route.prefill_worker) == ("w1", "w0")
            assert list(answer.token_ids) == wanted(IDS, 6)
            assert fates(answer.usage) == {"computed": 330}, "computed for this request, by two workers"
            await eventually(fleet.quiet)
            stats = fleet.engines["w1"].store.stats()
            assert stats[next(tier for tier in stats if tier.value == "peer")].hits == 20
            again = await generate(fleet.router, request(IDS, max_tokens=6))
            assert list(again.token_ids) == list(answer.token_ids)
            assert fates(again.usage) == {"computed": 10, "device": 320}
            assert again.route.prefill_worker == ""
            totals = fleet.router._accounts.ledger.totals
            assert sum(totals.fates.values()) == totals.prompt_tokens == 660, "each token was counted once"

    asyncio.run(story())


def test_a_prefill_worker_is_chosen_by_nobody_and_explain_says_why(always: None) -> None:
    async def story() -> None:
        async with fleet_of("w0", "w1") as fleet:
            told = await fleet.explain(IDS)
            assert (told.worker, told.prefill_worker) == ("w1", "w0")
            (left_out,) = [each for each in told.candidates if not each.eligible]
            assert (left_out.worker, left_out.excluded_because) == ("w0", "its role is prefill: other workers answer")
            assert [worker.role for worker in fleet.router.list_workers()] == ["prefill", "decode"]

    asyncio.run(story())


@pytest.mark.parametrize("drained", ["w0", "w1"])
def test_who_is_left_does_everything(always: None, drained: str) -> None:
    async def story() -> None:
        async with fleet_of("w0", "w1") as fleet:
            fleet.router.drain_worker(drained)
            answer = await generate(fleet.router, request(IDS, max_tokens=3))
            left = "w1" if drained == "w0" else "w0"
            assert (answer.route.worker, answer.route.prefill_worker) == (left, "")
            assert len(answer.token_ids) == 3

    asyncio.run(story())


def test_a_request_that_its_caller_leaves_ends_on_both(always: None) -> None:
    async def story() -> None:
        async with fleet_of("w0", "w1") as fleet:
            asked = asyncio.create_task(generate(fleet.router, request(tokens(2, 900), max_tokens=6)))
            await eventually(lambda: fleet.engines["w0"].has_work() and fleet.engines["w1"].has_work())
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            await eventually(fleet.quiet)

    asyncio.run(story())


def test_a_prefill_worker_that_is_killed_costs_no_request(always: None, tmp_path: Path) -> None:
    """A process of its own, ended by SIGKILL while it prefills."""

    async def story() -> None:
        config = replace(SLOW, name="w0", max_batch_tokens=16)
        command = [sys.executable, "-m", "workers.main", "--config", json.dumps(asdict(config))]
        process = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            ready = json.loads(await asyncio.to_thread(process.stdout.readline))
            async with fleet_of("w1", others={"w0": ready["address"]}) as fleet:
                before = await generate(fleet.router, request(IDS, max_tokens=6))
                assert before.route.prefill_worker == "w0"
                assert list(before.token_ids) == wanted(IDS, 6)
                ids = tokens(3, 1000)
                asked = asyncio.create_task(generate(fleet.router, request(ids, max_tokens=6)))
                await eventually(lambda: len(fleet.engines["w1"].store._promoter._promised) > 0)
                process.send_signal(signal.SIGKILL)
                answer = await asked
                assert (answer.route.worker, list(answer.token_ids)) == ("w1", wanted(ids, 6))
                assert fates(answer.usage) == {"computed": 1000}
                alone = await generate(fleet.router, request(ids, max_tokens=6))
                assert list(alone.token_ids) == list(answer.token_ids)
                assert alone.route.prefill_worker == ""
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    asyncio.run(story())


def test_a_policy_that_predicts_nothing_pairs_by_the_same_price(always: None) -> None:
    async def story() -> None:
        async with fleet_of("w0", "w1") as fleet:
            policy = admin_pb2.Policy(name="round_robin")
            fleet.router.set_policy(admin_pb2.SetPolicyRequest(policy=policy), caller=ADMIN)
            answer = await generate(fleet.router, request(IDS, max_tokens=3))
            assert (answer.route.worker, answer.route.prefill_worker) == ("w1", "w0")

    asyncio.run(story())


def test_without_roles_nobody_is_paired(always: None) -> None:
    async def story() -> None:
        async with fleet_of("w0", "w1", roles="") as fleet:
            answer = await generate(fleet.router, request(IDS, max_tokens=3))
            assert answer.route.prefill_worker == ""
            assert (await fleet.explain(tokens(5, 300))).prefill_worker == ""

    asyncio.run(story())
