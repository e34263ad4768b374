"""What the page gets for numbers."""

from __future__ import annotations

import json

from router.stats_json import POINT_FIELDS, history_point, stats_to_plain, to_plain
from warmkv.v1 import admin_pb2, common_pb2


def test_64_bit_integers_stay_numbers_wherever_they_are() -> None:
    stats = admin_pb2.WatchStatsResponse(time_ms=1_800_000_000_000, generated_tokens=7)
    stats.prompt_tokens.redis = 1 << 40
    stats.requests["OK"] = 3
    stats.prefixes.add(label="a", requests=9)
    stats.workers.add(name="w0").tiers.add(tier=common_pb2.TIER_HOST, used_bytes=5)
    plain = json.loads(json.dumps(to_plain(stats)))
    assert plain["time_ms"] == 1_800_000_000_000
    assert plain["prompt_tokens"]["redis"] == 1 << 40
    assert plain["requests"] == {"OK": 3}
    assert plain["prefixes"][0]["requests"] == 9
    assert plain["workers"][0]["tiers"][0] == {
        "tier": "TIER_HOST", "used_bytes": 5, "capacity_bytes": 0, "blocks": 0, "healthy": False,
    }  # fmt: skip


def test_a_number_that_is_not_set_is_left_out_and_zero_is_not() -> None:
    stats = admin_pb2.WatchStatsResponse()
    stats.recent.add(request_id="a")
    stats.recent.add(request_id="b", reused_tokens=0, ttft_ms=0)
    running, done = to_plain(stats)["recent"]
    assert "reused_tokens" not in running
    assert "ttft_ms" not in running
    assert (done["reused_tokens"], done["ttft_ms"]) == (0, 0)


def test_an_empty_frame_has_every_part_but_the_shared_tier() -> None:
    stats = admin_pb2.WatchStatsResponse()
    plain = stats_to_plain(stats)
    assert plain["prompt_tokens"]["computed"] == 0
    assert plain["ttft"]["count"] == 0
    assert plain["policy"] == {"name": "", "weights": {}}
    assert "shared_tier" not in plain
    assert not stats.HasField("ttft"), "the caller's message must stay as it was"


def test_a_point_has_one_value_a_field_and_counts_failures_but_not_clients_that_left() -> None:
    stats = admin_pb2.WatchStatsResponse(time_ms=5, generated_tokens=2, in_flight=4)
    stats.prompt_tokens.computed = 60
    stats.prompt_tokens.disk = 40
    stats.requests.update({"OK": 10, "CANCELLED": 2, "UNAVAILABLE": 1, "INTERNAL": 1})
    stats.policy.name = "cache_aware"
    point = dict(zip(POINT_FIELDS, history_point(stats), strict=True))
    assert point == {
        "time_ms": 5, "computed": 60, "device": 0, "host": 0, "disk": 40, "redis": 0, "peer": 0, "generated": 2,
        "requests": 14, "failed": 2, "in_flight": 4, "ttft_p50_ms": None, "ttft_p95_ms": None, "policy": "cache_aware",
    }  # fmt: skip


def test_a_point_has_percentiles_once_something_was_measured() -> None:
    stats = admin_pb2.WatchStatsResponse(ttft=admin_pb2.Latency(count=1, p50_ms=1.23456, p95_ms=2))
    point = dict(zip(POINT_FIELDS, history_point(stats), strict=True))
    assert (point["ttft_p50_ms"], point["ttft_p95_ms"]) == (1.235, 2)
