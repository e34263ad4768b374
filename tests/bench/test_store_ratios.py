"""Which way round the comparisons of `bench.store` go: the parts run on a few blocks, with times that are made up."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import store_crypto, store_disk, store_host, store_peer, store_redis
from bench.report import Report
from bench.store_redis import Speeds
from kvstore.codec import BlockCodec


def made_up(*seconds: float) -> Callable[..., float]:
    """Runs what it is given and says that it took the next of these times."""
    times = cycle(seconds)

    def take(call: Callable[..., object], *arguments: object) -> float:
        call(*arguments)
        return next(times)

    return take


def values(report: Report) -> dict[str, float]:
    return {row.name: row.value for row in report.rows}


def test_host_ratios_are_memcpys_time_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_host, "seconds", made_up(1.0, 4.0, 8.0, 3.0))  # memcpy, put, get, memcpy
    report = Report("store")
    store_host.copies(report, blocks=2, rounds=3)
    found = values(report)
    assert (found["host_put_vs_memcpy_ratio"], found["host_get_vs_memcpy_ratio"]) == (0.5, 0.25)
    assert found["host_put_2mib_gbps"] == pytest.approx(2 * (2 << 20) / 4e9)
    assert report.rows[0].n == 3, "the first round warms up and does not count"


def test_handles_are_counted_by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_host, "seconds", made_up(10e-6, 20e-6, 30e-6, 90e-6))
    report = Report("store")
    store_host.handles(report, blocks=10, rounds=1)
    found = values(report)
    assert found["host_view_and_end_us"] == pytest.approx(9.0)
    assert found["host_handle_us"] == pytest.approx(3.0), "four names, of which one is two operations"


def test_keys_are_our_time_by_that_of_the_hash_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_host, "seconds", made_up(3.0, 2.0))
    report = Report("store")
    store_host.keys(report, rounds=2)
    found = values(report)
    assert found["key_vs_sha256_ratio"] == 1.5
    assert found["key_us_per_block"] == pytest.approx(3e6 / (store_host.KEY_TOKENS / 16))


def test_what_is_hashed_alone_are_as_many_bytes_a_block() -> None:
    pieces = list(store_host.plain_pieces(list(range(64))))
    assert [len(piece) for piece in pieces] == [32 + 64] * 4
    assert len(set(pieces)) == 4


def test_disk_ratios_are_the_raw_files_time_by_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store_disk, "BATCH", 2)
    monkeypatch.setattr(store_disk, "SLOTS", 4)
    seconds = made_up(9.0, *[9.0] * 3, *[4.0, 2.0, 8.0, 2.0] * 3)  # warming up; then write, raw, read, raw
    monkeypatch.setattr(store_disk, "timed", seconds)
    report = Report("store")
    store_disk.throughput(report, tmp_path, rounds=3)
    found = values(report)
    assert (found["disk_write_vs_raw_ratio"], found["disk_read_vs_raw_ratio"]) == (0.5, 0.25)
    assert found["disk_write_2mib_gbps"] == pytest.approx(2 * (2 << 20) / 4e9)
    assert found["disk_raw_write_2mib_gbps"] == pytest.approx(2 * (2 << 20) / 2e9)


def test_the_peers_ratio_is_the_sockets_time_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_peer, "RUN", 2)
    monkeypatch.setattr(store_peer, "LOOK_UP", 4)
    turns = made_up(*[1.0, 4.0, 5.0, 6.0] * 9, *[0.5e-3] * 90)  # socket, raw, authenticate, encrypt; look-ups
    monkeypatch.setattr(store_peer, "seconds", turns)
    report = Report("store")
    store_peer.rows(report, quick=True)
    found = values(report)
    assert found["peer_read_vs_socket_ratio"] == 0.25
    assert found["peer_read_raw_gbps"] == pytest.approx(2 * (2 << 20) / 4e9)
    assert found["peer_lookup_256_ms"] == pytest.approx(0.5)


def test_the_codecs_ratio_is_the_plain_checksums_time_by_verifying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_crypto, "RUN", 1)
    monkeypatch.setattr(store_crypto, "seconds_each", lambda call, blocks: next(times))
    times = cycle([1.0, 3.0, 2.0])  # checksum, writing, verifying
    report = Report("store")
    store_crypto.payload_rows(report, {"raw": BlockCodec(store_crypto.LAYOUT, b"n" * 32)}, rounds=2)
    found = values(report)
    assert found["codec_verify_vs_xxh3_ratio"] == 0.5
    assert found["codec_verify_raw_cpu_s_per_gb"] == pytest.approx(2e9 / (2 << 20))
    assert found["codec_write_raw_gbps"] == pytest.approx((2 << 20) / 3e9)


def test_a_round_is_counted_in_gigabytes_a_second_and_cpu_seconds_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, cpu = iter([10.0, 10.5]), iter([1.0, 1.2])
    clocks = SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(cpu))
    monkeypatch.setattr(store_redis, "time", clocks)
    found = Speeds([], [])
    store_redis._time(found, lambda: None, 2_000_000_000)
    assert (found.gbps, found.cpu) == ([4.0], [pytest.approx(0.1)])
