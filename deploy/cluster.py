"""Starts and ends a Ray of our own on this machine.

Covers: `deploy.raynode` as a session of its own, its authentication, its end. Does not cover: what runs on it
(`deploy.placement`), a Ray that others run, which is only joined.

Every process of an own Ray, its workers included, belongs to the session that its first process leads, and a session
keeps its number as long as one process of it lives. So ending that session ends all of this Ray and nothing else;
`ray stop` would end every Ray of this machine.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from deploy.sections import RaySettings
from deploy.state import ClusterRecord, lives, locked, may_lead, read_record, remove_record, write_record

log = logging.getLogger(__name__)

NAMESPACE = "warmkv"
# Ray counts CPUs, it does not bind them; on one machine the operator decides how many workers it bears.
_LEAST_CPUS = 64
_END_GRACE_S = 10.0
_TEMP_PREFIX, _SHORT_PATH = "warmkv-ray-", "/tmp"  # Ray makes unix sockets in it, whose paths may have 107 bytes


class ClusterProblem(Exception):
    """Ray cannot be started, joined or ended. The message ends with what to do."""


def start_own_ray(settings: RaySettings, state_dir: Path, *, least_cpus: int = 1) -> ClusterRecord:
    """Start Ray, or find the one that runs, and record it.

    Args:
        least_cpus: how many CPUs the workers reserve together.

    Raises:
        ClusterProblem: it does not start. StateProblem: it cannot be recorded.
    """
    with locked(state_dir):
        record = read_record(state_dir)
        if record is not None and lives(record):
            return record
        if record is not None:
            log.warning("the recorded Ray has died; its remains were removed", extra={"pid": record.pid})
            end_own_ray(state_dir)
        return _start(settings, state_dir, least_cpus)


def end_own_ray(state_dir: Path) -> bool:
    """End what is recorded, its workers included; whether there was anything. Others' Ray is never touched."""
    record = read_record(state_dir)
    if record is None:
        return False
    if may_lead(record):
        _end_session(record.pid)
    shutil.rmtree(record.temp_dir, ignore_errors=True)
    remove_record(state_dir)
    return True


def ray_environment(record: ClusterRecord | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a Ray driver: for an own Ray its token, for another whatever the user has set."""
    own = {**environ, "RAY_USAGE_STATS_ENABLED": "0"}
    if record is None:
        return own
    own.pop("RAY_AUTH_TOKEN_PATH", None)
    return {**own, **_authentication(record.token)}


def session_members(leader: int) -> list[psutil.Process]:
    """Living processes of the session that `leader` leads or led."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return members


def _authentication(token: str) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _start(settings: RaySettings, state_dir: Path, least_cpus: int) -> ClusterRecord:
    token, temp_dir = secrets.token_hex(32), tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=_SHORT_PATH)
    cpus = settings.num_cpus or max(_LEAST_CPUS, least_cpus)
    process = _spawn(settings, cpus, token, temp_dir)
    try:
        address = _await_address(process, temp_dir, settings.start_timeout)
        record = ClusterRecord(address, process.pid, psutil.Process(process.pid).create_time(), temp_dir, token)
        write_record(state_dir, record)
    except BaseException:
        _end_session(process.pid)
        process.wait()
        shutil.rmtree(temp_dir, ignore_errors=True)
        raise
    log.info("own Ray started", extra={"address": address, "pid": process.pid})
    process.returncode = 0  # it outlives us: without this Popen would complain that nobody waited for it
    return record


def _spawn(settings: RaySettings, cpus: int, token: str, temp_dir: str) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "deploy.raynode", f"--num-cpus={cpus}", f"--temp-dir={temp_dir}"]
    with (Path(temp_dir) / "raynode.log").open("wb") as output:
        return subprocess.Popen(
            [*command, f"--object-store-memory={settings.object_store_memory}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**environment, "RAY_USAGE_STATS_ENABLED": "0", **_authentication(token)},
            cwd="/",
            start_new_session=True,
        )


def _await_address(process: subprocess.Popen[bytes], temp_dir: str, timeout_s: float) -> str:
    line = b""
    if process.stdout is not None:
        with process.stdout as pipe:
            readable, _, _ = select.select([pipe], [], [], timeout_s)
            line = pipe.readline() if readable else b""
    if not line:
        said = (Path(temp_dir) / "raynode.log").read_text(errors="replace").strip().splitlines()
        raise ClusterProblem(
            f"Ray did not start within {timeout_s:g} s; its last words: {said[-1] if said else 'none'}; "
            "run `warmkv doctor`, or give ray.start_timeout more"
        )
    return str(json.loads(line)["address"])


def _end_session(leader: int) -> None:
    """SIGTERM to the leader, which ends Ray in order; SIGKILL to what is left of the session."""
    members = session_members(leader)
    for process in members:
        if process.pid == leader:
            process.send_signal(signal.SIGTERM)
    _wait_until_gone(leader, _END_GRACE_S if any(p.pid == leader for p in members) else 0.0)
    for process in session_members(leader):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _wait_until_gone(leader, _END_GRACE_S)
    with suppress(ChildProcessError):  # only where we have started it ourselves
        os.waitpid(leader, os.WNOHANG)
    if left := session_members(leader):
        raise ClusterProblem(f"processes {[p.pid for p in left]} of the own Ray cannot be ended; end them by hand")


def _wait_until_gone(leader: int, timeout_s: float) -> None:
    give_up = time.monotonic() + timeout_s
    while session_members(leader) and time.monotonic() < give_up:
        time.sleep(0.05)
