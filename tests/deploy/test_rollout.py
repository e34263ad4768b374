"""Bringing a fleet to its number: what is there already, failures. Against a scripted discovery."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from deploy.cluster import ClusterProblem
from deploy.discovery import KnownWorker, RayDiscovery
from deploy.kept_secret import kept_secret
from deploy.layers import load_settings
from deploy.rollout import Rollout
from workers.config import WorkerConfig

KEPT = "ab" * 32


class FakeDiscovery:
    """A Ray on which workers are ready, or failed, as soon as they are placed."""

    def __init__(
        self, present: list[str], state: Callable[[str], str], *, fleet: Mapping[str, Any] | None = None
    ) -> None:
        self.names = list(present)
        self.state = state
        self.scaled: list[int] = []
        self.gpus = 0.0
        self.template: WorkerConfig | None = None
        self.bundle: Mapping[str, float] = {}
        self._fleet = fleet

    @property
    def workers(self) -> list[KnownWorker]:
        return [KnownWorker(n, self.state(n), "a:1", 1, 1, "n", "it broke") for n in self.names if self.state(n)]

    async def call(self, method: str) -> Any:
        blueprint = {"config": self._fleet}
        return {"names": self.names, "blueprint": blueprint, "gpus": self.gpus, "missing_room": "no"}[method]

    async def configure(self, config: WorkerConfig, bundle: Mapping[str, float]) -> None:
        self.template, self.bundle = config, bundle

    async def scale(self, count: int) -> tuple[list[str], list[str]]:
        self.scaled.append(count)
        self.names = [f"w{number}" for number in range(count)]
        return [], []

    async def changed(self) -> None:
        await asyncio.sleep(0.01)


def _rollout(
    discovery: FakeDiscovery, said: list[str], *, state_dir: Path = Path("/dev/null/none"), **flags: object
) -> Rollout:
    chosen = {"model.dir": "/m", **{name.replace("__", "."): value for name, value in flags.items()}}
    loaded = load_settings(environ={}, flags=chosen)
    return Rollout(loaded, cast("RayDiscovery", discovery), said.append, time.monotonic(), state_dir=state_dir)


@pytest.mark.asyncio
async def test_all_workers_are_placed_at_once_and_the_last_one_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "fleet-secret").write_text(KEPT)
    discovery, said = FakeDiscovery([], lambda _name: "ready"), list[str]()
    rollout = _rollout(discovery, said, workers__count=5, state_dir=tmp_path)
    assert await rollout.begin() == KEPT
    await rollout.finish()
    assert discovery.scaled == [5]
    assert any("5 of 5 ready" in line for line in said)
    assert discovery.template is not None
    assert discovery.template.fleet_secret == KEPT


@pytest.mark.asyncio
async def test_a_secret_that_was_set_is_used_and_not_kept(tmp_path: Path) -> None:
    discovery = FakeDiscovery([], lambda _name: "ready")
    assert await _rollout(discovery, [], state_dir=tmp_path, auth__fleet_secret="mine").begin() == "mine"
    assert kept_secret(tmp_path) is None


@pytest.mark.asyncio
async def test_two_fleets_of_one_state_folder_one_after_the_other_have_one_secret(tmp_path: Path) -> None:
    discoveries = [FakeDiscovery([], lambda _name: "ready") for _ in range(2)]
    first, second = [await _rollout(each, [], state_dir=tmp_path / "new").begin() for each in discoveries]
    assert first == second


@pytest.mark.asyncio
async def test_a_worker_that_is_there_is_never_ended_on_the_way_up() -> None:
    discovery = FakeDiscovery(["w3"], lambda _name: "ready", fleet=_fleet())
    rollout = _rollout(discovery, [], workers__count=6)
    assert await rollout.begin() == "theirs", "the fleet that runs keeps its secret"
    await rollout.finish()
    assert min(discovery.scaled) >= 4
    assert discovery.scaled[-1] == 6


@pytest.mark.asyncio
async def test_without_a_number_a_fleet_that_runs_is_left_as_it_is() -> None:
    discovery = FakeDiscovery(["w0", "w1", "w2"], lambda _name: "ready", fleet=_fleet())
    rollout = _rollout(discovery, [])
    await rollout.begin()
    await rollout.finish()
    assert discovery.scaled == []


@pytest.mark.asyncio
@pytest.mark.parametrize("different", [{"model_dir": "/other"}, {"engine": "simulated"}, {"model_name": "x"}], ids=str)
async def test_a_fleet_of_something_else_is_not_joined(different: dict[str, object]) -> None:
    discovery = FakeDiscovery(["w0"], lambda _name: "ready", fleet={**_fleet(), **different})
    with pytest.raises(ClusterProblem, match="warmkv down"):
        await _rollout(discovery, []).begin()
    assert discovery.scaled == []


@pytest.mark.asyncio
async def test_when_no_worker_can_start_the_reason_is_the_error(tmp_path: Path) -> None:
    discovery, said = FakeDiscovery([], lambda _name: "failed"), list[str]()
    rollout = _rollout(discovery, said, workers__count=2, state_dir=tmp_path)
    await rollout.begin()
    with pytest.raises(ClusterProblem, match="it broke"):
        await rollout.finish()


@pytest.mark.asyncio
@pytest.mark.parametrize(("one_is", "raises"), [("ready", False), ("starting", True)])
async def test_a_late_worker_is_an_error_only_where_none_is_ready(one_is: str, raises: bool, tmp_path: Path) -> None:
    discovery, said = FakeDiscovery([], lambda name: one_is if name == "w0" else "starting"), list[str]()
    rollout = _rollout(discovery, said, workers__count=2, workers__start_timeout="100ms", state_dir=tmp_path)
    await rollout.begin()
    if raises:
        with pytest.raises(ClusterProblem, match="w1 starting"):
            await rollout.finish()
    else:
        await rollout.finish()
        assert any("w1 starting" in line for line in said)


@pytest.mark.asyncio
async def test_cuda_without_a_gpu_is_refused_before_anything_is_placed(tmp_path: Path) -> None:
    discovery = FakeDiscovery([], lambda _name: "ready")
    with pytest.raises(ClusterProblem, match="no GPU"):
        await _rollout(discovery, [], workers__device="cuda", state_dir=tmp_path).begin()
    assert discovery.scaled == []


@pytest.mark.asyncio
async def test_a_worker_of_several_ranks_reserves_a_gpu_for_each(tmp_path: Path) -> None:
    discovery = FakeDiscovery([], lambda _name: "ready")
    discovery.gpus = 8.0
    await _rollout(discovery, [], workers__tensor_parallel=4, state_dir=tmp_path).begin()
    assert discovery.bundle["GPU"] == 4.0
    assert discovery.template is not None
    assert discovery.template.tensor_parallel == 4
    assert discovery.template.threads == max(1, (os.cpu_count() or 1) // 4)


@pytest.mark.asyncio
@pytest.mark.parametrize(("deterministic", "threads"), [("false", 16), ("true", 2)])
async def test_threads_that_nobody_set_are_no_more_than_the_mode_can_use(
    deterministic: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    discovery = FakeDiscovery([], lambda _name: "ready")
    flags = {"engine__deterministic": deterministic, "workers__count": 1}
    await _rollout(discovery, [], state_dir=tmp_path, **flags).begin()
    assert discovery.template is not None
    assert discovery.template.threads == threads


def _fleet() -> dict[str, Any]:
    return {"model_dir": "/m", "model_name": "m", "engine": "torch", "fleet_secret": "theirs"}
