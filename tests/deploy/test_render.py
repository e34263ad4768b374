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
