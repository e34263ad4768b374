"""The Redis tier beside a minimal RESP client, redis-py and memcpy: GB/s and client CPU seconds per GB.

Every size writes and reads one set of values through every client in turn, round by round, so that a noisy neighbour
hits all of them. A figure is the best of a batch of rounds; the rows' n counts batches. Values are random bytes, read
into slots that have been touched before; keys are dropped before each write, outside of its time. GB = 10^9 bytes.

The clients are those of `redis_clients`: `raw` is the ceiling, `raw_hset` the ceiling for values of our form. A ratio
is that of two clients' best rounds in one batch, the lower one of unix socket and TCP.
"""

from __future__ import annotations

import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import redis

from bench.redis_clients import ROOT, Ours, Views, absent, expect, open_clients, open_tier
from bench.report import Report, arguments, ratios
from deploy.redis_server import PrivateRedis
from kvstore.blocks import block_hashes
from kvstore.events import RemovalCause

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
ROUNDS_A_BATCH = 9
BATCHES = 3
QUICK_ROUNDS = 1  # of the sizes that no bar is about
LOOK_UP_BLOCKS = 256
TRANSPORTS = ("unix", "tcp")
BARS = {
    "redis_get_unix_2mib_gbps": ">= 3.5",
    "redis_get_tcp_2mib_gbps": ">= 3.0",
    "redis_set_unix_2mib_gbps": ">= 3.5",
    "redis_get_unix_2mib_cpu_s_per_gb": "<= 0.15",
}
# Of two clients at MAIN_SIZE, and the bar. What `raw_hset` loses against `raw` is the server's share.
RATIOS = {
    "vs_raw": ("ours", "raw", ">= 0.85"),
    "vs_raw_hset": ("ours", "raw_hset", ">= 0.85"),
    "raw_hset_vs_raw": ("raw_hset", "raw", ""),
}
NOT_PEERS = {"ours", "raw", "raw_hset"}

Key = tuple[str, str, str]  # verb, transport, client


@dataclass(slots=True)
class Speeds:
    """What the rounds of one client and verb gave: GB/s and CPU seconds per GB."""

    gbps: list[float]
    cpu: list[float]

    def best(self) -> list[float]:
        """The fastest round of each batch."""
        return [max(batch) for batch in batches(self.gbps)]

    def least_cpu(self) -> list[float]:
        """The cheapest round of each batch."""
        return [min(batch) for batch in batches(self.cpu)]


def rows(report: Report, quick: bool) -> None:
    """Add the rows of the Redis tier; about 25 s with `quick`, some minutes without."""
    for line in absent():
        print(line, file=sys.stderr)
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
    rounds = ROUNDS_A_BATCH * BATCHES if is_main or not quick else QUICK_ROUNDS
    values, slots = _random(count, nbytes), _random(count, nbytes)
    names = block_hashes(list(range(count)), ROOT, 1)
    speeds: dict[Key, Speeds] = defaultdict(lambda: Speeds([], []))
    with ExitStack() as stack:
        clients = {
            (transport, name): client
            for transport, server in servers.items()
            for name, client in open_clients(stack, server.url, names, nbytes).items()
        }
        for _ in range(rounds):
            for (transport, name), client in clients.items():
                client.drop()
                _time(speeds["set", transport, name], partial(client.write, values), count * nbytes)
                _time(speeds["get", transport, name], partial(client.read, slots), count * nbytes)
                _compare(values, slots)
        for client in clients.values():
            client.drop()
    add_rows(report, size, speeds)


def add_rows(report: Report, size: str, speeds: dict[Key, Speeds]) -> None:
    """What was measured at one size; at MAIN_SIZE also how the clients compare."""
    for (verb, transport, client), found in speeds.items():
        name = f"redis_{verb}_{transport}_{size}" + ("" if client == "ours" else f"_{client}")
        report.add(f"{name}_gbps", found.best(), "GB/s", bar=BARS.get(f"{name}_gbps", ""))
        report.add(f"{name}_cpu_s_per_gb", found.least_cpu(), "s/GB", bar=BARS.get(f"{name}_cpu_s_per_gb", ""))
    if size == MAIN_SIZE:
        for verb in ("get", "set"):
            for pair, (one, other, bar) in RATIOS.items():
                _add_ratio(
                    report, f"redis_{verb}_{pair}", bar, [_pair(speeds, verb, t, one, other) for t in TRANSPORTS]
                )
            by_transport = [_against_peers(speeds, verb, t) for t in TRANSPORTS]
            _add_ratio(report, f"redis_{verb}_vs_best_peer", "> 1", by_transport)
        report.add("redis_get_cpu_s_per_gb", speeds["get", "unix", "ours"].least_cpu(), "s/GB", bar="<= 0.15")


def _pair(speeds: dict[Key, Speeds], verb: str, transport: str, one: str, other: str) -> list[float]:
    return ratios(speeds[verb, transport, one].best(), speeds[verb, transport, other].best())


def _against_peers(speeds: dict[Key, Speeds], verb: str, transport: str) -> list[float]:
    """Ours by the fastest of those that others made, batch by batch."""
    peers = {client for what, where, client in speeds if (what, where) == (verb, transport)} - NOT_PEERS
    every = [_pair(speeds, verb, transport, "ours", peer) for peer in peers]
    return [min(batch) for batch in zip(*every, strict=True)]


def _add_ratio(report: Report, name: str, bar: str, by_transport: Sequence[Sequence[float]]) -> None:
    for transport, found in zip(TRANSPORTS, by_transport, strict=True):
        report.add(f"{name}_{transport}_ratio", found, "ratio", bar=bar)
    lower = [min(batch) for batch in zip(*by_transport, strict=True)]
    report.add(f"{name}_ratio", lower, "ratio", bar=bar)


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
        ours = Ours(open_tier(stack, server.url, nbytes), names)
        ours.write(values)
        client = stack.enter_context(redis.Redis.from_url(server.url))
        keys = list(client.scan_iter("warmkv:*"))
        charged = [client.memory_usage(key) / nbytes for key in keys]
        ours.drop()
    expect(len(charged), 4)
    report.add("redis_memory_overhead_ratio", charged, "ratio", bar="<= 1.02")


def _look_ups(report: Report, server: PrivateRedis, times: int) -> None:
    nbytes = SIZES["64kib"]
    names, values = block_hashes(list(range(LOOK_UP_BLOCKS)), ROOT, 1), _random(LOOK_UP_BLOCKS, nbytes)
    held = {"lookup_256_ms": LOOK_UP_BLOCKS, "lookup_256_with_100_held_ms": 100}
    with ExitStack() as stack:
        tier = open_tier(stack, server.url, nbytes)
        ours = Ours(tier, names)
        ours.write(values)
        for name, count in held.items():
            tier.remove(names[count:], RemovalCause.CLEARED)
            found = []
            for _ in range(times):
                started = time.perf_counter()
                expect(tier.match(names), count)
                found.append((time.perf_counter() - started) * 1e3)
            report.add(name, found, "ms", bar="<= 0.3")
        ours.drop()


def _time(found: Speeds, work: Callable[[], object], nbytes: int) -> None:
    cpu, started = time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    found.gbps.append(nbytes / seconds / 1e9)
    found.cpu.append((time.process_time() - cpu) / (nbytes / 1e9))


def batches(samples: Sequence[float]) -> list[Sequence[float]]:
    """The samples in runs of a batch's rounds; the last run may be shorter."""
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


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("store_redis")
    rows(report, options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
