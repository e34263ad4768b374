"""The own Ray as a session of processes: only they are ended. Ray itself is tested in test_up.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.cluster import ClusterProblem, end_own_ray, ray_environment, session_members, start_own_ray
from deploy.sections import RaySettings
from deploy.state import ClusterRecord, read_record, write_record

# A leader with a child in a process group of its own, as Ray's workers have; both ignore SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"], process_group=0)
time.sleep(600)
"""


@pytest.fixture
def family() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    for member in session_members(process.pid):
        member.kill()
    process.wait()
    process.stdout.close()


def _record(process: subprocess.Popen[str], temp_dir: Path) -> ClusterRecord:
    started = psutil.Process(process.pid).create_time()
    return ClusterRecord("127.0.0.2:1", process.pid, started, str(temp_dir), "token")


def test_ending_takes_the_whole_session_and_only_it(
    tmp_path: Path, family: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.cluster._END_GRACE_S", 0.5)
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    temp_dir = tmp_path / "ray"
    temp_dir.mkdir()
    write_record(tmp_path / "state", _record(family, temp_dir))
    assert len(session_members(family.pid)) == 2
    assert end_own_ray(tmp_path / "state")
    assert session_members(family.pid) == []
    assert not temp_dir.exists()
    assert read_record(tmp_path / "state") is None
    assert bystander.poll() is None
    bystander.communicate(b"\n")
    assert not end_own_ray(tmp_path / "state"), "there is nothing left to end"


def test_children_of_a_dead_leader_are_ended_too(tmp_path: Path, family: subprocess.Popen[str]) -> None:
    write_record(tmp_path, _record(family, tmp_path / "gone"))
    family.kill()
    family.wait()
    assert len(session_members(family.pid)) == 1
    end_own_ray(tmp_path)
    assert session_members(family.pid) == []


def test_a_number_that_another_process_bears_now_is_not_touched(tmp_path: Path, family: subprocess.Popen[str]) -> None:
    ours = _record(family, tmp_path / "gone")
    write_record(tmp_path, ClusterRecord(ours.address, ours.pid, ours.started_at - 999, ours.temp_dir, "t"))
    assert end_own_ray(tmp_path)
    assert len(session_members(family.pid)) == 2
    assert read_record(tmp_path) is None


def test_the_running_ray_is_found_and_not_started_again(tmp_path: Path, family: subprocess.Popen[str]) -> None:
    record = _record(family, tmp_path)
    write_record(tmp_path, record)
    assert start_own_ray(RaySettings(), tmp_path) == record


def test_a_ray_that_does_not_start_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir("/tmp"))
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ClusterProblem, match="warmkv doctor"):
        start_own_ray(RaySettings(start_timeout=5.0), tmp_path)
    assert read_record(tmp_path) is None
    assert [name for name in set(os.listdir("/tmp")) - before if name.startswith("warmkv-ray-")] == []


def test_the_token_goes_to_drivers_of_the_own_ray_only() -> None:
    record = ClusterRecord("127.0.0.2:1", 1, 1.0, "/tmp/x", "s3cret")
    theirs = {"PATH": "/bin", "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/theirs"}
    own = ray_environment(record, theirs)
    assert (own["RAY_AUTH_MODE"], own["RAY_AUTH_TOKEN"]) == ("token", "s3cret")
    assert "RAY_AUTH_TOKEN_PATH" not in own
    joined = ray_environment(None, theirs)
    assert {name: joined[name] for name in theirs} == theirs
    assert "RAY_AUTH_TOKEN" not in joined
