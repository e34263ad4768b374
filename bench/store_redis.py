"""The Redis tier beside a minimal RESP client, redis-py and memcpy: GB/s and client CPU seconds per GB.

Every size writes and reads one set of values through every client in turn, round by round, so that a noisy neighbour
hits all of them. A figure is the best of a batch of rounds; the rows' n counts batches. Values are random bytes, read
into slots that have been touched before; keys are dropped before each write, outside of its time. GB = 10^9 bytes.

`raw` is the ceiling: plain SET and GET of one string, four under way, no header, no checksum, no deadline, no TTL.
"""

from __future__ import annotations

import importlib.util
import random
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import redis
from redis._parsers import Encoder, _RESP2Parser
from redis.connection import PythonRespSerializer

from bench.report import Report
from deploy.redis_server import PrivateRedis
from kvstore.blocks import BlockHash, block_hashes
from kvstore.codec import BlockCodec
from kvstore.events import RemovalCause
from kvstore.layout import KVLayout
from kvstore.redis.resp import pack
from kvstore.redis.tier import RedisTier
from kvstore.tier import chain_metas

SIZES = {
    "64kib": 64 << 10,
    "256kib": 256 << 10,
    "1mib": 1 << 20,
    "2mib": 2 << 20,
    "4mib": 4 << 20,
    "8mib": 8 << 20,
    "32mib": 32 << 20,
}
MAIN_SIZE = "2mib"
LAYER_NBYTES = 64 << 10
ROUNDS_A_BATCH = 9
LOOK_UP_BLOCKS = 256
ROOT = BlockHash(b"b" * 32)
NAMESPACE = b"n" * 32
PATIENCE_S = 30.0
WINDOW = 4
BARS = {
    "redis_get_unix_2mib_gbps": ">= 3.5",
    "redis_get_tcp_2mib_gbps": ">= 3.0",
    "redis_set_unix_2mib_gbps": ">= 3.5",
    "redis_get_unix_2mib_cpu_s_per_gb": "<= 0.15",
}

Views = Sequence[memoryview]


class Client(Protocol):
    """One way to move values."""

    def drop(self) -> None:
        """Remove its keys."""
        ...

    def write(self, values: Views) -> None:
        """Store them all."""
        ...

    def read(self, slots: Views) -> None:
        """Fetch them all."""
        ...


class Raw:
    """The ceiling: blocking sockets, strings, a window of four."""

    def __init__(self, sock: socket.socket, names: Sequence[BlockHash]) -> None:
        self._sock = sock
        self._keys = [b"raw:" + name.hex().encode() for name in names]
        self._bytes = bytearray(64)
        self._buffer = memoryview(self._bytes)
        self._low = self._high = 0

    def drop(self) -> None:
        """Remove its keys."""
        for key in self._keys:
            self._sock.sendall(pack(b"UNLINK", key))
            self._line()

    def write(self, values: Views) -> None:
        """SET each."""
        for number, (key, value) in enumerate(zip(self._keys, values, strict=True)):
            front = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(value))
            rest = [memoryview(front), value, memoryview(b"\r\n")]
            while rest:
                sent = self._sock.sendmsg(rest)
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.pop(0))
                if sent:
                    rest[0] = rest[0][sent:]
            if number >= WINDOW:
                self._line()
        for _ in range(min(WINDOW, len(self._keys))):
            self._line()

    def read(self, slots: Views) -> None:
        """GET each into its slot."""
        commands = [pack(b"GET", key) for key in self._keys]
        self._sock.sendall(b"".join(commands[:WINDOW]))
        for number, slot in enumerate(slots):
            length = int(self._line()[1:])
            done = min(length, self._high - self._low)
            slot[:done] = self._buffer[self._low : self._low + done]
            self._low += done
            while done < length:
                done += self._sock.recv_into(slot[done:length])
            self._line()
            if number + WINDOW < len(commands):
                self._sock.sendall(commands[number + WINDOW])

    def _line(self) -> bytes:
        while (end := self._bytes.find(b"\r\n", self._low, self._high)) < 0:
            left = self._bytes[self._low : self._high]
            self._bytes[: len(left)] = left
            self._low, self._high = 0, len(left)
            self._high += self._sock.recv_into(self._buffer[self._high :])
        line = self._bytes[self._low : end]
        self._low = end + 2
        return bytes(line)


class RedisPy:
    """redis-py as its documentation shows it, one value at a time."""

    def __init__(self, client: redis.Redis, names: Sequence[BlockHash]) -> None:
        self._client = client
        self._keys = [b"py:" + name.hex().encode() for name in names]

    def drop(self) -> None:
        """Remove its keys."""
        for key in self._keys:
            self._client.unlink(key)

    def write(self, values: Views) -> None:
        """SET each."""
        for key, value in zip(self._keys, values, strict=True):
            self._client.set(key, value)

    def read(self, slots: Views) -> None:
        """GET each and copy it into its slot."""
        for key, slot in zip(self._keys, slots, strict=True):
            slot[:] = cast("bytes", self._client.get(key))


class Ours:
    """The tier as the store uses it: header, checksum, TTL, deadline."""

    def __init__(self, tier: RedisTier, names: Sequence[BlockHash]) -> None:
        self._tier = tier
        self._names = names
        self._metas = chain_metas(names, before=ROOT, root=ROOT, ttl_s=86400.0)

    def drop(self) -> None:
        """Remove its keys."""
        self._tier.remove(self._names, RemovalCause.CLEARED)

    def write(self, values: Views) -> None:
        """Store each block."""
        _expect(self._tier.write(self._metas, values), len(values))

    def read(self, slots: Views) -> None:
        """Fetch and verify each block."""
        _expect(self._tier.read(self._names, slots).count, len(slots))


@dataclass(slots=True)
class Speeds:
    """What the rounds of one client and verb gave: GB/s and CPU seconds per GB."""

    gbps: list[float]
    cpu: list[float]

    def best(self) -> list[float]:
        """The fastest round of each batch."""
        return [max(batch) for batch in _batches(self.gbps)]

    def least_cpu(self) -> list[float]:
        """The cheapest round of each batch."""
        return [min(batch) for batch in _batches(self.cpu)]


def rows(report: Report, quick: bool) -> None:
    """Add the rows of the Redis tier; about 20 s with `quick`, some minutes without."""
    _memcpy(report, quick)
    with ExitStack() as stack:
        servers = {
            "unix": stack.enter_context(PrivateRedis(maxmemory_bytes=2 << 30)),
            "tcp": stack.enter_context(PrivateRedis(maxmemory_bytes=2 << 30, port=0)),
        }
        for size in SIZES:
            _one_size(report, servers, size, quick=quick)
        _memory(report, servers["unix"])
        _look_ups(report, servers["unix"], 60 if quick else 300)


def _one_size(report: Report, servers: dict[str, PrivateRedis], size: str, *, quick: bool) -> None:
    is_main, nbytes = size == MAIN_SIZE, SIZES[size]
    in_all = 64 << 20 if not quick else 16 << 20 if is_main else 8 << 20
    count = max(1 if quick else 2, in_all // nbytes)
    rounds = ROUNDS_A_BATCH * (1 if quick else 3) if is_main or not quick else 1
    values, slots = _random(count, nbytes), _random(count, nbytes)
    names = block_hashes(list(range(count)), ROOT, 1)
    speeds: dict[tuple[str, str, str], Speeds] = defaultdict(lambda: Speeds([], []))
    with ExitStack() as stack:
        clients = {
            (transport, name): client
            for transport, server in servers.items()
            for name, client in _clients(stack, server, names, nbytes).items()
        }
        for _ in range(rounds):
            for (transport, name), client in clients.items():
                client.drop()
                _time(speeds["set", transport, name], partial(client.write, values), count * nbytes)
                _time(speeds["get", transport, name], partial(client.read, slots), count * nbytes)
                _compare(values, slots)
        for client in clients.values():
            client.drop()
    _add(report, size, speeds)


def _add(report: Report, size: str, speeds: dict[tuple[str, str, str], Speeds]) -> None:
    for (verb, transport, client), found in speeds.items():
        name = f"redis_{verb}_{transport}_{size}" + ("" if client == "ours" else f"_{client}")
        report.add(f"{name}_gbps", found.best(), "GB/s", bar=BARS.get(f"{name}_gbps", ""))
        report.add(f"{name}_cpu_s_per_gb", found.least_cpu(), "s/GB", bar=BARS.get(f"{name}_cpu_s_per_gb", ""))
    if size != MAIN_SIZE:
        return
    for verb in ("get", "set"):
        ratios = {t: _ratio(speeds[verb, t, "ours"], speeds[verb, t, "raw"]) for t in ("unix", "tcp")}
        for transport, ratio in ratios.items():
            report.add(f"redis_{verb}_vs_raw_{transport}_ratio", ratio, "ratio", bar=">= 0.85")
        lower = [min(pair) for pair in zip(*ratios.values(), strict=True)]
        report.add(f"redis_{verb}_vs_raw_ratio", lower, "ratio", bar=">= 0.85")
    report.add("redis_get_cpu_s_per_gb", speeds["get", "unix", "ours"].least_cpu(), "s/GB", bar="<= 0.15")


def _ratio(ours: Speeds, raw: Speeds) -> list[float]:
    return [a / b for a, b in zip(ours.best(), raw.best(), strict=True)]


def _clients(stack: ExitStack, server: PrivateRedis, names: Sequence[BlockHash], nbytes: int) -> dict[str, Client]:
    codec = BlockCodec(KVLayout(nbytes // LAYER_NBYTES, 8, 128, 128, "bfloat16"), NAMESPACE)
    tier = RedisTier(server.url, codec=codec, timeout_s=PATIENCE_S, write_timeout_s=PATIENCE_S)
    stack.callback(tier.close)
    clients: dict[str, Client] = {
        "raw": Raw(stack.enter_context(_socket(server.url)), names),
        "ours": Ours(tier, names),
    }
    encode = Encoder("utf-8", "strict", decode_responses=False).encode  # type: ignore[no-untyped-call]
    plain: dict[str, Any] = {"parser_class": _RESP2Parser, "command_packer": PythonRespSerializer(6000, encode)}
    kinds: dict[str, dict[str, Any]] = {"redis_py": plain}
    if importlib.util.find_spec("hiredis") is not None:
        kinds["hiredis"] = {}
    for name, options in kinds.items():
        client = redis.Redis.from_url(server.url, protocol=2, **options)
        stack.callback(client.close)
        clients[name] = RedisPy(client, names)
    return clients


def _socket(url: str) -> socket.socket:
    settings = redis.connection.parse_url(url)  # type: ignore[no-untyped-call]
    if "path" in settings:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(settings["path"])
    else:
        sock = socket.create_connection((settings["host"], settings["port"]))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _memcpy(report: Report, quick: bool) -> None:
    nbytes = SIZES[MAIN_SIZE]
    (source,), targets = _random(1, nbytes), _random(128, nbytes)
    found = Speeds([], [])

    def copy() -> None:
        for target in targets:
            np.copyto(np.asarray(target), np.asarray(source))

    for _ in range(ROUNDS_A_BATCH * (1 if quick else 3)):
        _time(found, copy, len(targets) * nbytes)
    report.add("memcpy_2mib_gbps", found.best(), "GB/s")
    report.add("memcpy_2mib_cpu_s_per_gb", found.least_cpu(), "s/GB")


def _memory(report: Report, server: PrivateRedis) -> None:
    nbytes = SIZES[MAIN_SIZE]
    names, values = block_hashes(list(range(4)), ROOT, 1), _random(4, nbytes)
    with ExitStack() as stack:
        ours = _clients(stack, server, names, nbytes)["ours"]
        ours.write(values)
        client = stack.enter_context(redis.Redis.from_url(server.url))
        keys = list(client.scan_iter("warmkv:*"))
        charged = [client.memory_usage(key) / nbytes for key in keys]
        ours.drop()
    _expect(len(charged), 4)
    report.add("redis_memory_overhead_ratio", charged, "ratio", bar="<= 1.02")


def _look_ups(report: Report, server: PrivateRedis, times: int) -> None:
    nbytes = SIZES["64kib"]
    names, values = block_hashes(list(range(LOOK_UP_BLOCKS)), ROOT, 1), _random(LOOK_UP_BLOCKS, nbytes)
    codec = BlockCodec(KVLayout(nbytes // LAYER_NBYTES, 8, 128, 128, "bfloat16"), NAMESPACE)
    tier = RedisTier(server.url, codec=codec, timeout_s=PATIENCE_S, write_timeout_s=PATIENCE_S)
    ours = Ours(tier, names)
    ours.write(values)
    held = {"lookup_256_ms": LOOK_UP_BLOCKS, "lookup_256_with_100_held_ms": 100}
    for name, count in held.items():
        tier.remove(names[count:], RemovalCause.CLEARED)
        found = []
        for _ in range(times):
            started = time.perf_counter()
            _expect(tier.match(names), count)
            found.append((time.perf_counter() - started) * 1e3)
        report.add(name, found, "ms", bar="<= 0.3")
    ours.drop()
    tier.close()


def _time(found: Speeds, work: Callable[[], object], nbytes: int) -> None:
    cpu, started = time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    found.gbps.append(nbytes / seconds / 1e9)
    found.cpu.append((time.process_time() - cpu) / (nbytes / 1e9))


def _batches(samples: Sequence[float]) -> list[Sequence[float]]:
    return [samples[start : start + ROUNDS_A_BATCH] for start in range(0, len(samples), ROUNDS_A_BATCH)]


def _random(count: int, nbytes: int) -> list[memoryview]:
    """Buffers that have been written to, so that no page is touched for the first time while time is taken."""
    generator = np.random.default_rng(random.randrange(1 << 32))
    return [memoryview(bytearray(generator.bytes(nbytes))) for _ in range(count)]


def _compare(values: Views, slots: Views) -> None:
    for value, slot in zip(values, slots, strict=True):
        if not np.array_equal(np.asarray(value), np.asarray(slot)):
            raise RuntimeError("a client delivered wrong bytes; run the tests")
        slot[:64] = bytes(64)


def _expect(count: int, wanted: int) -> None:
    if count != wanted:
        raise RuntimeError(f"{count} of {wanted} blocks; is another program using the memory of this machine?")
