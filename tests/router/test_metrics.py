from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from prometheus_client import generate_latest

from router.ledger import Entry
from router.metrics import Metrics, RouterGauges, WorkerGauges
from warmkv.v1 import common_pb2, worker_pb2

TIER = worker_pb2.TierLoad(
    tier=common_pb2.TIER_HOST,
    used_bytes=5,
    capacity_bytes=10,
    blocks=2,
    healthy=True,
    hits=7,
    misses={"absent": 3},
    removals={"evicted": 4},
    store_failures={"queue_full": 1},
)
LOAD = worker_pb2.Load(
    running=1, waiting=2, decode_step_ms=8.0, tiers=[TIER], steps=9, prefill_share=0.4, prefill_error=0.05
)


def busy() -> Metrics:
    metrics = Metrics(router="r", model="m", version="1")
    metrics.export_gauges(lambda: RouterGauges(1, 2, 3, 0.5, [WorkerGauges("w", "ready", 1, LOAD)]))
    metrics.count(Entry("t", "w", "OK", 10, {"computed": 4, "device": 6}, 5, 8))
    metrics.observe_ttft(0.5)
    metrics.observe_ttft_error(0.5, 400.0, "w")
    metrics.observe_gap(0.1, 2)
    metrics.observe_request(1.0)
    metrics.decisions.labels("cache_aware", "prefix").inc()
    metrics.route_seconds.labels("hash").observe(0.001)
    metrics.retries.labels("w").inc()
    metrics.resyncs.labels("w").inc()
    metrics.losses.labels("w").inc()
    metrics.fates_corrected.labels("w").inc()
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_fates_are_exported_and_sum_to_the_prompt() -> None:
    metrics = busy()
    fates = {
        f: value(metrics, "warmkv_prompt_tokens_total", model="m", worker="w", fate=f) for f in ("computed", "device")
    }
    assert fates == {"computed": 4, "device": 6}
    assert value(metrics, "warmkv_route_overlap_tokens_total", worker="w", kind="predicted") == 8
    assert value(metrics, "warmkv_route_overlap_tokens_total", worker="w", kind="reused") == 6
    assert value(metrics, "warmkv_route_overlap_tokens_total", worker="w", kind="overrated") == 2
    assert value(metrics, "warmkv_requests_total", model="m", code="OK") == 1
    assert value(metrics, "warmkv_generation_tokens_total", model="m", worker="w") == 5


def test_the_index_shows_its_memory_and_what_it_forgot() -> None:
    metrics = Metrics(router="r", model="m", version="1")
    metrics.export_gauges(
        lambda: RouterGauges(
            0, 7, 3, 0.5, [], index_runs=2, index_bytes=900, index_limit_bytes=1000, index_evicted_blocks=5
        )
    )
    names = ("blocks", "runs", "bytes", "limit_bytes", "evicted_blocks_total")
    assert [value(metrics, f"warmkv_index_{name}") for name in names] == [7, 2, 900, 1000, 5]


def test_workers_reports_are_exported_while_there_is_a_worker() -> None:
    metrics = busy()
    assert value(metrics, "warmkv_kv_hits_total", worker="w", tier="host") == 7
    assert value(metrics, "warmkv_kv_misses_total", worker="w", tier="host", reason="absent") == 3
    assert value(metrics, "warmkv_kv_removals_total", worker="w", tier="host", cause="evicted") == 4
    assert value(metrics, "warmkv_requests_waiting", worker="w") == 2
    assert value(metrics, "warmkv_decode_step_seconds", worker="w") == pytest.approx(0.008)
    assert value(metrics, "warmkv_prefill_busy_ratio", worker="w") == pytest.approx(0.4)
    assert value(metrics, "warmkv_prefill_fit_error_ratio", worker="w") == pytest.approx(0.05)
    assert value(metrics, "warmkv_worker_state", worker="w", state="ready") == 1
    assert value(metrics, "warmkv_worker_state", worker="w", state="lost") == 0


def test_two_routers_of_one_process_share_no_metric() -> None:
    first, second = busy(), Metrics(router="s", model="m", version="1")
    assert value(first, "warmkv_requests_total", model="m", code="OK") == 1
    assert value(second, "warmkv_requests_total", model="m", code="OK") is None


def test_prediction_errors_keep_their_sign() -> None:
    metrics = busy()
    metrics.observe_ttft_error(0.1, 400.0, "w")
    metrics.observe_ttft_error(0.1, 0.0, "w")
    assert value(metrics, "warmkv_time_to_first_token_error_seconds_sum", worker="w", sign="late") == pytest.approx(0.1)
    assert value(metrics, "warmkv_time_to_first_token_error_seconds_sum", worker="w", sign="early") == pytest.approx(
        0.3
    )


def test_every_metric_has_the_prefix_and_a_help_that_is_a_sentence() -> None:
    text = generate_latest(busy().registry).decode()
    helps = re.findall(r"# HELP (\S+) (.*)", text)
    assert len(helps) > 30
    for name, words in helps:
        assert name.startswith("warmkv_")
        assert words.endswith(".")


def test_promtool_finds_nothing_to_complain_of() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=generate_latest(busy().registry),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
