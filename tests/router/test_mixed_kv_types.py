"""A fleet in which one worker stores K/V as another type than the others: over real gRPC, with real worker servers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.core import Router
from tests.router import rig as rigs
from tests.router.rig import LAYOUT, Rig, all_ready, context, eventually, generate, request, rig, states, tokens

QUANTISED = replace(LAYOUT, kv_dtype="int8")


def _start(fleet: Rig, monkeypatch: pytest.MonkeyPatch, name: str, kv_dtype: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rigs, "LAYOUT", replace(LAYOUT, kv_dtype=kv_dtype))
        fleet.start_worker(name)


def _layouts(router: Router) -> dict[str, str]:
    return {worker.name: worker.layout for worker in router.list_workers()}


@pytest.mark.asyncio
async def test_a_worker_of_another_kv_type_gets_no_request_and_is_told_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        _start(fleet, monkeypatch, "other", "int8")
        await eventually(lambda: states(router).get("other") == "REFUSED")
        (problem,) = (worker.problem for worker in router.list_workers() if worker.name == "other")
        assert f"layout='{QUANTISED.describe()}', and the fleet has layout='{LAYOUT.describe()}'" in problem
        assert "engine.kv_dtype" in problem
        assert _layouts(router) == {"w0": LAYOUT.describe(), "other": ""}
        for seed in range(4):
            answer = await generate(router, request(tokens(seed, 40)), about=context(f"request {seed}"))
            assert answer.route.worker == "w0"


@pytest.mark.asyncio
async def test_a_whole_fleet_of_quantised_workers_is_a_fleet_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(0) as fleet:
        for name in ("a", "b"):
            _start(fleet, monkeypatch, name, "fp8_e4m3")
        router = await fleet.start_router()
        await all_ready(router, 2)
        assert set(_layouts(router).values()) == {replace(LAYOUT, kv_dtype="fp8_e4m3").describe()}
