"""Real Redis servers that work together on loopback: a primary with its replica and Sentinel, and a cluster."""

from __future__ import annotations

import itertools
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.redis_server import find_redis_server
from tests.router.certificates import Authority

GIVE_UP_S = 90.0
SLOTS = 16384


def until(condition: Callable[[], object], what: str = "") -> None:
    give_up = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < give_up, f"never came true: {what or condition}"
        time.sleep(0.005)


def system_redis() -> Path:
    found = find_redis_server()
    if found is None or found.origin != "system":
        pytest.skip("no redis-server on this system; install redis-server to run this")
    return found.path


@dataclass(frozen=True)
class Tls:
    """Certificates of one authority; servers speak nothing but TLS with them."""

    authority: Authority
    server: tuple[str, str]
    client: tuple[str, str]
    asks_clients: bool = True

    @classmethod
    def made_in(cls, folder: Path, *, asks_clients: bool = True) -> Tls:
        folder.mkdir()
        authority = Authority(folder)
        return cls(authority, authority.issue("server"), authority.issue("client"), asks_clients)

    def lines(self, port: int) -> list[str]:
        certificate, key = self.server
        return [
            *("port 0", f"tls-port {port}", f"tls-cert-file {certificate}", f"tls-key-file {key}"),
            *(f"tls-ca-cert-file {self.authority.path}", "tls-replication yes"),
            f"tls-auth-clients {'yes' if self.asks_clients else 'no'}",
        ]

    @property
    def options(self) -> str:
        """Of a URL."""
        certificate, key = self.client
        return f"?ssl_ca_certs={self.authority.path}&ssl_certfile={certificate}&ssl_keyfile={key}"

    def settings(self) -> dict[str, object]:
        """Of redis-py."""
        certificate, key = self.client
        return {"ssl": True, "ssl_ca_certs": self.authority.path, "ssl_certfile": certificate, "ssl_keyfile": key}


@dataclass
class Process:
    """One redis-server on a port of loopback, ended with its context."""

    binary: Path
    folder: Path
    port: int
    lines: list[str]
    arguments: tuple[str, ...] = ()
    tls: Tls | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "server.conf"
        if not config.exists():  # Sentinel and clusters write into theirs
            listens = [f"port {self.port}"] if self.tls is None else self.tls.lines(self.port)
            config.write_text("\n".join([*listens, "bind 127.0.0.1", f'dir "{self.folder}"', *self.lines]))
        log = (self.folder / "log").open("ab")
        with log:
            self.process = subprocess.Popen([self.binary, config, *self.arguments], stdout=log, stderr=log)
        until(self.answers, f"{self.folder.name} answers")

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def client(self, **settings: object) -> redis.Redis:
        secure = {} if self.tls is None else self.tls.settings()
        host = "127.0.0.1"  # a certificate is for this name
        return redis.Redis(host, self.port, socket_timeout=20, retry=Retry(NoBackoff(), 0), **secure, **settings)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running(processes: Sequence[Process]) -> Iterator[None]:
    with ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
            process.start()
        yield


def free_ports(count: int, *, also: int = 0) -> list[int]:
    """Ports that nobody listens on, and of which nobody listens `also` above either."""
    found: list[int] = []
    with ExitStack() as stack:
        for _ in itertools.count():
            if len(found) == count:
                return found
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port + also < 65536 and (not also or _is_free(port + also)):
                found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class Guarded:
    """A primary, its replica, and sentinels that watch them."""

    servers: list[Process]
    sentinels: list[Process]
    service: str = "blocks"

    @property
    def url(self) -> str:
        tls = self.sentinels[0].tls
        scheme, options = ("redis", "") if tls is None else ("rediss", tls.options)
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels)
        return f"{scheme}+sentinel://{hosts}/{self.service}{options}"

    def primary_port(self) -> int:
        with self.sentinels[-1].client() as client:
            return int(client.sentinel_get_master_addr_by_name(self.service)[1])

    def can_fail_over(self) -> bool:
        """Whether every sentinel knows the replica well enough to promote it, and the other sentinels."""
        for one in self.sentinels:
            with one.client() as client:
                state = client.sentinel_master(self.service)
                replicas = client.sentinel_slaves(self.service)
                if len(replicas) != 1 or replicas[0]["is_sdown"] or replicas[0]["master-link-status"] != "ok":
                    return False
                if int(state["num-other-sentinels"]) != len(self.sentinels) - 1:
                    return False
        return True

    def fail_over(self) -> None:
        """Make the replica the primary."""
        before = self.primary_port()

        def accepted() -> bool:
            try:
                with self.sentinels[-1].client() as client:
                    client.execute_command("SENTINEL", "FAILOVER", self.service)
            except redis.ResponseError:
                return self.primary_port() != before
            return True

        until(accepted, "a sentinel begins the failover")
        until(lambda: self.primary_port() != before, "the failover ends")


@contextmanager
def guarded(folder: Path, *, sentinels: int = 1, password: str = "", tls: Tls | None = None) -> Iterator[Guarded]:
    binary = system_redis()
    ports = free_ports(2 + sentinels)
    login = [f"requirepass {password}", f"masterauth {password}"] if password else []
    common = ['save ""', "appendonly no", "maxmemory 64mb", "maxmemory-policy allkeys-lru", *login]
    common += ["repl-diskless-sync-delay 0"]
    primary = Process(binary, folder / "primary", ports[0], common, tls=tls)
    replica = Process(binary, folder / "replica", ports[1], [*common, f"replicaof 127.0.0.1 {ports[0]}"], tls=tls)
    watch = [f"sentinel monitor blocks 127.0.0.1 {ports[0]} {1 + sentinels // 2}"]
    watch += [f"sentinel auth-pass blocks {password}"] if password else []
    watch += ["sentinel down-after-milliseconds blocks 1000", "sentinel failover-timeout blocks 10000"]
    guards = [
        Process(binary, folder / f"sentinel{i}", ports[2 + i], watch, ("--sentinel",), tls) for i in range(sentinels)
    ]
    with ExitStack() as stack:
        for process in (primary, replica):
            if password:
                process.client = _with_password(process, password)  # type: ignore[method-assign]
        stack.enter_context(running([primary, replica, *guards]))
        made = Guarded([primary, replica], guards)
        until(made.can_fail_over, "sentinels know the replica")
        yield made


def _with_password(process: Process, password: str) -> Callable[..., redis.Redis]:
    return partial(Process.client, process, password=password)


@dataclass
class Cluster:
    """Three primaries with a third of the slots each."""

    nodes: list[Process]

    @property
    def url(self) -> str:
        tls = self.nodes[0].tls
        scheme, options = ("redis", "") if tls is None else ("rediss", tls.options)
        return f"{scheme}+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}{options}"

    def node_of(self, key: str) -> Process:
        """By the servers' own arithmetic."""
        with self.alive().client() as client:
            slot = client.execute_command("CLUSTER", "KEYSLOT", key)
            for first, last, (_, port, *_), *_ in client.execute_command("CLUSTER", "SLOTS", **RAW):
                if first <= slot <= last:
                    return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"nobody serves slot {slot}")

    def alive(self) -> Process:
        return next(node for node in self.nodes if node.process is not None)

    def ids(self) -> list[str]:
        names = []
        for node in self.nodes:
            with node.client() as client:
                names.append(client.execute_command("CLUSTER", "MYID", **RAW).decode())
        return names

    def is_whole(self) -> bool:
        for node in self.nodes:
            with node.client() as client:
                info = client.execute_command("CLUSTER", "INFO", **RAW).decode()
            if not all(line in info for line in ("cluster_state:ok", "cluster_slots_ok:16384", "cluster_size:3")):
                return False
        return True

    def begin_move(self, slot: int, source: Process, target: Process) -> None:
        """From now on absent keys of the slot are to be asked for at the target (ASK)."""
        ids = dict(zip((node.port for node in self.nodes), self.ids(), strict=True))
        with source.client() as old, target.client() as new:
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port])
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])

    def move_keys(self, slot: int, source: Process, target: Process) -> int:
        with source.client() as old:
            keys = old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10_000, **RAW)
            for key in keys:
                old.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 20_000)
        return len(keys)

    def end_move(self, slot: int, source: Process, target: Process) -> None:
        owner = dict(zip((node.port for node in self.nodes), self.ids(), strict=True))[target.port]
        for node in (target, source, *self.nodes):
            with node.client() as client:
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", owner)


RAW = {"NEVER_DECODE": True}


@contextmanager
def clustered(folder: Path, *lines: str, tls: Tls | None = None) -> Iterator[Cluster]:
    binary = system_redis()
    lines = lines if tls is None else (*lines, "tls-cluster yes")
    common = ["cluster-enabled yes", "cluster-node-timeout 2000", "cluster-require-full-coverage no"]
    common += ['save ""', "appendonly no", "maxmemory 64mb", "maxmemory-policy allkeys-lru", *lines]
    made = Cluster(
        [
            Process(binary, folder / f"node{i}", port, common, tls=tls)
            for i, port in enumerate(free_ports(3, also=10_000))
        ]
    )
    with running(made.nodes):
        for i, node in enumerate(made.nodes):
            with node.client() as client:
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                client.execute_command("CLUSTER", "ADDSLOTS", *range(i * SLOTS // 3, (i + 1) * SLOTS // 3))
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", made.nodes[0].port)
        until(made.is_whole, "the cluster is whole")
        yield made
