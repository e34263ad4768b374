"""A local fleet ends with its owner, however the owner dies."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from deploy.cluster import end_own_ray, session_members
from deploy.fleet_guard import dismiss_guard, start_guard, sweep

if TYPE_CHECKING:
    from conftest import Warmkv

OWNER = """
import asyncio, json, sys
from pathlib import Path
from deploy.local_fleet import FleetShape, LocalFleet
from deploy.state import read_record

async def main():
    async with LocalFleet(FleetShape(Path(sys.argv[1]), workers=1, redis_bytes=1 << 20)) as fleet:
        await fleet.wait_ready()
        ray = read_record(fleet.state_dir)
        redis = fleet.redis.pid if fleet.redis else ray.pid
        facts = {"folder": str(fleet.folder), "ray": ray.pid, "router": fleet._router.pid, "redis": redis}
        print(json.dumps(facts), flush=True)
        await asyncio.sleep(300)

asyncio.run(main())
"""
SLEEPER = "import time; print('on', flush=True); time.sleep(300)"

pytestmark = pytest.mark.timeout(300)


def _until(true: Callable[[], object], timeout: float = 90.0) -> None:
    give_up = time.monotonic() + timeout
    while not true():
        if time.monotonic() > give_up:
            raise AssertionError("it did not come to pass")
        time.sleep(0.1)


def test_every_process_and_file_of_a_fleet_goes_when_its_owner_is_killed(warmkv: Warmkv, model_dir: Path) -> None:
    warmkv.environment["WARMKV_WORKERS__ENGINE"] = "simulated"
    owner = warmkv.spawn([sys.executable, "-c", OWNER, str(model_dir)])
    facts = json.loads(owner.read_until("\n"))
    folder = Path(facts["folder"])
    try:
        assert len(session_members(facts["ray"])) > 2
        owner.process.kill()
        owner.process.wait()
        _until(lambda: not psutil.pid_exists(facts["router"]))
        _until(lambda: not session_members(facts["ray"]))
        _until(lambda: not psutil.pid_exists(facts["redis"]))
        _until(lambda: not folder.exists())
    finally:
        end_own_ray(folder / "state")


def test_a_sweep_ends_what_runs_out_of_the_folder_and_nothing_beside_it(warmkv: Warmkv, tmp_path: Path) -> None:
    folder, beside = tmp_path / "fleet", tmp_path / "fleet-beside"
    folder.mkdir()
    inside = warmkv.spawn([sys.executable, "-c", SLEEPER, str(folder / "warmkv.toml")])
    outside = warmkv.spawn([sys.executable, "-c", SLEEPER, str(beside / "warmkv.toml")])
    inside.read_until("on")
    outside.read_until("on")
    sweep(folder)
    assert not psutil.pid_exists(inside.process.pid)
    assert outside.process.poll() is None
    assert not folder.exists()


def test_a_dismissed_guard_leaves_the_folder_alone(tmp_path: Path) -> None:
    guard = start_guard(tmp_path)
    os.kill(guard.pid, 0)
    dismiss_guard(guard)
    assert guard.returncode is not None
    assert tmp_path.exists()
