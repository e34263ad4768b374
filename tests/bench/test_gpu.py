"""`bench.gpu`: every line of it but the GPU's own, over a tiny model; what its floors are made of."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import BARS, main, measure
from bench.gpu_floors import Floors
from bench.gpu_rig import DRY

HAS = ("torch", "triton", "transformers")  # a machine for the benchmark, with whatever these require
# Hides every package that belongs to another distribution, as if it were not installed, then measures one part.
BARE = """
import argparse, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

allowed, todo = set(), {HAS}
while todo:
    name = canonicalize_name(todo.pop())
    if name not in allowed:
        allowed.add(name)
        try:
            needs = [Requirement(each) for each in requires(name) or ()]
        except PackageNotFoundError:
            continue
        todo += [each.name for each in needs if each.marker is None or each.marker.evaluate(dict(extra=""))]
hidden = {
    top for top, owners in packages_distributions().items()
    if allowed.isdisjoint(map(canonicalize_name, owners)) and top not in ("bench", "kvstore", "workers")
}
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.partition(".")[0] in hidden else find(name, path, target)
)
import bench.gpu
from bench.gpu_rig import DRY
options = argparse.Namespace(quick=True, json=True, dry=True, compile=False, eager=False, only=["copies"])
done = bench.gpu.measure(DRY, options, Path(sys.argv[1]))
done.report.print(as_json=True)
sys.exit("; ".join(done.failed) or hidden & set(sys.modules) and str(hidden & set(sys.modules)) or 0)
""".replace("{HAS}", repr(list(HAS)))


def test_a_dry_run_measures_every_row_that_has_a_bar(tmp_path: Path):
    options = argparse.Namespace(quick=True, json=True, dry=True, compile=False, eager=False, only=None)
    bench = measure(DRY, options, tmp_path)
    assert bench.failed == []
    rows = {row.name: row for row in bench.report.rows}
    assert set(BARS) | {"cold_8k_ms", "spill_beside_decode_gb_s"} <= set(rows)
    assert rows["warm_8k_host_cached_tokens"].value == DRY.prompt - DRY.tail
    assert all(row.value > 0 for name, row in rows.items() if "loss" not in name)
    assert all(row.n >= 2 for name, row in rows.items() if name in BARS)


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


def test_it_needs_no_more_than_a_gpu_machine_has(tmp_path: Path):
    """Torch, triton, transformers, what those require, and ours: all else is hidden while it measures."""
    done = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bench"] == "gpu"
