"""`bench.gpu`: every line of it but the GPU's own, over a tiny model; what its floors are made of."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import BARS, main, measure
from bench.gpu_floors import Floors
from bench.gpu_rig import DRY

NOT_THERE = {"ray", "grpc", "redis", "msgpack", "xxhash", "cryptography", "pydantic", "aiohttp", "warmkv"}
NOT_THERE |= {"prometheus_client", "uvloop"}


def _options(**others: object) -> argparse.Namespace:
    options = {"quick": True, "json": True, "dry": True, "compile": False, "eager": False, "kv_dtype": "auto"}
    return argparse.Namespace(**(options | {"only": None} | others))


def test_a_dry_run_measures_every_row_that_has_a_bar(tmp_path: Path):
    bench = measure(DRY, _options(), tmp_path)
    assert bench.failed == []
    rows = {row.name: row for row in bench.report.rows}
    assert set(BARS) | {"cold_8k_ms", "spill_beside_decode_gb_s"} <= set(rows)
    assert rows["warm_8k_host_cached_tokens"].value == DRY.prompt - DRY.tail
    assert all(row.value > 0 for name, row in rows.items() if "loss" not in name)
    assert all(row.n >= 2 for name, row in rows.items() if name in BARS)


def test_rows_of_quantised_kv_have_its_name_and_no_bar(tmp_path: Path):
    parts = ["attention", "first_tokens", "copies"]
    bench = measure(DRY, _options(kv_dtype="int8", only=parts), tmp_path)
    assert bench.failed == []
    assert bench.rig.device.layout.quantised
    rows = {row.name: row for row in bench.report.rows}
    assert {"attention_decode_bandwidth_ratio_int8", "warm_8k_host_ms_int8", "spill_gb_s_int8"} <= set(rows)
    assert rows["warm_8k_host_cached_tokens_int8"].value == DRY.prompt - DRY.tail
    assert not set(BARS) & set(rows)


def test_without_a_gpu_it_says_how_to_run_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit):
        main()
    assert "--dry" in capsys.readouterr().err


def test_floors_of_an_8b_model_on_an_h100():
    """Against figures worked out by hand: 15 GB of weights at 3.35 TB/s, 14 GFLOP a token."""
    floors = Floors(
        3350.0, 989.0, 55.0, weights_nbytes=15_010_000_000, products=13.96e9, token_nbytes=131_072, attention=524_288
    )
    assert floors.decode_tok_s(1, 1024) == pytest.approx(221, rel=0.01)
    assert floors.decode_tok_s(128, 1024) == pytest.approx(13_300, rel=0.01)
    assert floors.prefill_tok_s(2048) == pytest.approx(54_500, rel=0.02)
    assert floors.weights_ms == pytest.approx(4.48, rel=0.01)


def test_it_needs_no_more_than_a_gpu_machine_has():
    """Torch, transformers and what those bring: everything else is kept from being imported."""
    code = (
        "import sys\n"
        f"missing = {sorted(NOT_THERE)}\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in missing: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import bench.gpu\n"
        "from bench.report import machine_facts\n"
        "print(machine_facts()['ray'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
