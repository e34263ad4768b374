"""`bench.gpu_attention` computes every kind of row, and checks each shape against SDPA before it times it."""

from __future__ import annotations

import torch

from bench.gpu_attention import plan, rows
from bench.report import Report


def test_a_dry_run_has_every_kind_of_row():
    report = Report("gpu_attention")
    with torch.inference_mode():
        rows(report, plan(quick=True, dry=True))
    found = {row.name: row.value for row in report.rows}
    shapes = ("decode_b2_ctx70", "decode_b2_ctx70_dim80", "decode_b2_ctx70_window20")
    assert {f"{shape}{of}" for shape in shapes for of in ("_us", "_floor_us", "_ratio")} <= set(found)
    assert {"prefill_20_ctx50_us", "prefill_20_ctx50_tflop_s", "attention_decode_bandwidth_ratio"} <= set(found)
    assert all(value > 0 for value in found.values())
