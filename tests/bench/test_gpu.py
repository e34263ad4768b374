"""`bench.gpu`: every line of it but the GPU's own, over a tiny model; what its floors are made of."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu import BARS, Bench, _decode_rates, main, measure
from bench.gpu_chips import chip_of
from bench.gpu_copies import Watched
from bench.gpu_floors import Floors
from bench.gpu_rig import DRY, GpuRig, make_rig
from bench.report import Report
from kvstore.host.tier import HostTier
from workers.protocol import Output
from workers.stepping.make import StepOptions

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
told = dict(quick=True, json=True, dry=True, compile=False, eager=False, kv_dtype="auto", only=["copies"])
options = argparse.Namespace(**told)
done = bench.gpu.measure(DRY, options, Path(sys.argv[1]))
done.report.print(as_json=True)
sys.exit("; ".join(done.failed) or hidden & set(sys.modules) and str(hidden & set(sys.modules)) or 0)
""".replace("{HAS}", repr(list(HAS)))


def _options(**others: object) -> argparse.Namespace:
    options = {"quick": True, "json": True, "dry": True, "compile": False, "eager": False, "kv_dtype": "auto"}
    return argparse.Namespace(**(options | {"only": None} | others))


def test_a_dry_run_measures_every_row_that_has_a_bar(tmp_path: Path):
    bench = measure(DRY, _options(), tmp_path)
    assert bench.failed == []
    rows = {row.name: row for row in bench.report.rows}
    with_kernels = {"attention_decode_bandwidth_ratio"}
    assert set(BARS) - with_kernels | {"cold_8k_ms", "spill_bus_gb_s", "promote_bus_gb_s"} <= set(rows)
    assert {"canonical_prefill_2k_ratio", "canonical_decode_b32_ratio"} <= set(rows)
    assert "warm_8k_host_ms_floor" in rows
    assert rows["warm_8k_host_cached_tokens"].value == DRY.prompt - DRY.tail
    assert all(row.value > 0 for name, row in rows.items() if "loss" not in name)
    assert all(row.n >= 2 for name, row in rows.items() if name in BARS)


def test_rows_of_quantised_kv_have_its_name_and_no_bar(tmp_path: Path):
    parts = ["first_tokens", "copies"]
    bench = measure(DRY, _options(kv_dtype="int8", only=parts), tmp_path)
    assert bench.failed == []
    assert bench.rig.device.layout.quantised
    rows = {row.name: row for row in bench.report.rows}
    assert {"warm_8k_host_ms_int8", "spill_gb_s_int8"} <= set(rows)
    assert rows["warm_8k_host_cached_tokens_int8"].value == DRY.prompt - DRY.tail
    assert not set(BARS) & set(rows)


def test_a_rate_is_of_all_sequences_though_the_first_decode_while_the_last_are_prefilled(tmp_path: Path):
    """Few prompts fit a step, as with 128 sequences of 1024 tokens and steps of 2048."""
    scale = replace(DRY, max_running=16, max_batch_tokens=DRY.context + 16, pool_blocks=400)
    rig = make_rig(scale, tmp_path, StepOptions(), captures=False)
    bench = Bench(rig, Report("gpu"), Floors.of(rig), 3, dry=True)
    assert len(_decode_rates(bench, 16, 3)) == 3
    rig.close()


def test_a_rate_of_fewer_sequences_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rig = make_rig(DRY, tmp_path, StepOptions(), captures=False)
    bench = Bench(rig, Report("gpu"), Floors.of(rig), 3, dry=True)
    decoding = rig.decoding
    monkeypatch.setattr(GpuRig, "decoding", lambda self, sequences, output: decoding(sequences, 4))
    with pytest.raises(RuntimeError, match="tokens in 4 steps of 4 sequences"):
        _decode_rates(bench, 4, 3)
    rig.abandon()
    assert not rig.engine.has_work()
    rig.close()


def test_a_part_that_fails_leaves_the_engine_to_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step, steps, waiting = GpuRig.step, iter(range(10_000)), []

    def fails_once(self: GpuRig) -> list[Output]:
        if next(steps) == 20:
            raise RuntimeError("staged")
        return step(self)

    first_token_ms = GpuRig.first_token_ms

    def noted(self: GpuRig, prompt: list[int]) -> tuple[float, dict[str, int]]:
        waiting.append(self.engine.has_work())
        return first_token_ms(self, prompt)

    monkeypatch.setattr(GpuRig, "step", fails_once)
    monkeypatch.setattr(GpuRig, "first_token_ms", noted)
    bench = measure(DRY, _options(only=["decode", "first_tokens"]), tmp_path)
    assert bench.failed == ["decode"]
    assert waiting
    assert not any(waiting)


def test_a_second_engine_that_cannot_be_made_costs_no_other_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = iter([make_rig])

    def once(*arguments: object, **options: object) -> GpuRig:
        try:
            return next(made)(*arguments, **options)
        except StopIteration:
            raise RuntimeError("CUDA out of memory") from None

    monkeypatch.setattr("bench.gpu.make_rig", once)
    bench = measure(DRY, _options(only=["copies", "canonical"]), tmp_path)
    assert bench.failed == ["canonical"]
    assert "spill_gb_s" in {row.name for row in bench.report.rows}


def test_host_memory_that_is_not_page_locked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stats = HostTier.stats
    monkeypatch.setattr(HostTier, "stats", lambda self: replace(stats(self), problem="not page-locked"))
    make_rig(DRY, tmp_path, StepOptions(), captures=False).close()
    assert "not page-locked" in capsys.readouterr().err


class _Copied:
    def __init__(self, took_ms: float | None) -> None:
        self._took_ms = took_ms

    def is_done(self) -> bool:
        return self._took_ms is not None

    def took_ms(self) -> float | None:
        return self._took_ms


def test_the_bus_is_told_apart_by_what_the_copies_themselves_took():
    seen = Watched([(100, _Copied(2.0)), (100, _Copied(3.0))], block_nbytes=1_000_000)
    assert seen.bus_gb_s() == pytest.approx(40.0)
    assert Watched([(100, _Copied(2.0)), (1, _Copied(None))], block_nbytes=1).bus_gb_s() is None


def test_bytes_count_when_they_have_arrived(monkeypatch: pytest.MonkeyPatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr("bench.gpu_copies.time.perf_counter", lambda: next(times))
    seen = Watched([(7, _Copied(1.0))], block_nbytes=1_000_000_000)  # before
    seen.mark()
    seen.copies += [(4, _Copied(1.0)), (5, _Copied(None))]
    seen.mark()
    assert seen.gb_s() == 2.0


def test_the_longest_name_of_a_chip_counts():
    assert chip_of("NVIDIA H100 PCIe").bandwidth == 2.0e12
    assert chip_of("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert chip_of("unheard of") == chip_of("NVIDIA H100")


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
    assert floors.loaded_ms(8128) == pytest.approx(19.37 + 4.48, rel=0.01)


def test_it_needs_no_more_than_a_gpu_machine_has(tmp_path: Path):
    """Torch, triton, transformers, what those require, and ours: all else is hidden while it measures."""
    done = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bench"] == "gpu"
