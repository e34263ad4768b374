"""What `warmkv status` says of tiers."""

from __future__ import annotations

from deploy.render import status_text
from warmkv.v1 import admin_pb2, common_pb2


def _stats(*tiers: admin_pb2.TierUsage, shared: admin_pb2.TierUsage | None = None) -> admin_pb2.WatchStatsResponse:
    worker = admin_pb2.WorkerInfo(name="w0", state=admin_pb2.WORKER_STATE_READY, tiers=tiers)
    return admin_pb2.WatchStatsResponse(workers=[worker], shared_tier=shared)


def test_a_tier_that_never_could_be_reached_is_cut_off_too() -> None:
    redis = admin_pb2.TierUsage(tier=common_pb2.TIER_REDIS, healthy=False)
    host = admin_pb2.TierUsage(tier=common_pb2.TIER_HOST, capacity_bytes=64 << 20, used_bytes=1 << 20, healthy=True)
    text = status_text(_stats(host, redis))
    assert "host 1/64 MiB  redis 0 blocks (cut off)" in text
    assert "host 1/64 MiB (cut off)" not in text


def test_a_fleet_without_a_shared_tier_has_none_that_is_cut_off() -> None:
    assert "shared     0 blocks; reads" in status_text(_stats())
    broken = admin_pb2.TierUsage(tier=common_pb2.TIER_REDIS, blocks=3, healthy=False)
    assert "shared     3 blocks (cut off); reads" in status_text(_stats(shared=broken))


def test_what_blocks_hold_is_told_once_for_workers_that_agree() -> None:
    workers = [admin_pb2.WorkerInfo(name=f"w{n}", layout=layout) for n, layout in enumerate(("A int8/row", "A", "A"))]
    assert "\nK/V        A; A int8/row\n" in status_text(admin_pb2.WatchStatsResponse(workers=workers))
    assert "K/V" not in status_text(_stats())


def test_status_tells_of_ranks_and_canonical_mode_where_there_are_any() -> None:
    plain = admin_pb2.WorkerInfo(name="w0", ranks=1)
    assert "ranks" not in status_text(admin_pb2.WatchStatsResponse(workers=[plain]))
    assert "mode" not in status_text(admin_pb2.WatchStatsResponse(workers=[plain]))
    two = admin_pb2.WorkerInfo(name="w1", ranks=2, deterministic=True)
    never_seen = admin_pb2.WorkerInfo(name="w2")
    header, *rows = status_text(admin_pb2.WatchStatsResponse(workers=[plain, two, never_seen])).splitlines()
    at = header.index("ranks")
    assert [row[at] for row in rows[:3]] == ["1", "2", "-"]
    assert "\nmode       deterministic on w1 only\n" in status_text(admin_pb2.WatchStatsResponse(workers=[plain, two]))
    assert "\nmode       deterministic\n" in status_text(admin_pb2.WatchStatsResponse(workers=[two, never_seen]))


def test_status_tells_of_pairs_and_handovers_once_there_are_any() -> None:
    assert not {"pairs", "handovers"} & {line.split()[0] for line in status_text(_stats()).splitlines() if line}
    stats = _stats()
    stats.prefill_jobs.update({"done": 11, "failed": 1, "lost": 2})
    stats.handovers.update({"lost": 2, "draining": 1})
    lines = status_text(stats).splitlines()
    assert "pairs      11 of 14 prompts prefilled for another worker (1 failed, 2 lost)" in lines
    assert "handovers  3 (1 draining, 2 lost)" in lines
    stats.handover_pause.CopyFrom(admin_pb2.Latency(count=3, p50_ms=181.4, p99_ms=412.6))
    assert "handovers  3 (1 draining, 2 lost); pause p50 181 ms, p99 413 ms" in status_text(stats).splitlines()
    del stats.prefill_jobs["failed"], stats.prefill_jobs["lost"]
    assert "pairs      11 of 11 prompts prefilled for another worker" in status_text(stats).splitlines()
