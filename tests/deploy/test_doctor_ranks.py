"""What the doctor says of ranks: heads as a worker judges them, devices as Ray would hand them out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from deploy import doctor_ranks
from deploy.doctor_ranks import check_ranks
from deploy.finding import Finding
from deploy.layers import load_settings
from workers.tensor_parallel.shard import NotDivisible, check_heads
from workers.tiny import ModelShape, make_model_folder

TINY = ModelShape(layers=1, hidden=32, heads=4, kv_heads=2, vocab=512, context_length=256)


def _findings(**flags: object) -> list[Finding]:
    chosen = {name.replace("__", "."): value for name, value in flags.items()}
    return list(check_ranks(load_settings(environ={}, flags=chosen).settings, Path()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_heads_are_judged_as_a_worker_does(ranks: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ranks.os, "cpu_count", lambda: 64)
    try:
        check_heads(AutoConfig.from_pretrained(model), ranks)
        starts = True
    except NotDivisible:
        starts = False
    found = _findings(workers__tensor_parallel=ranks, workers__device="cpu", model__dir=str(model))
    assert [finding.level for finding in found] == ([] if ranks == 1 else ["ok"] if starts else ["fail"])


@pytest.mark.parametrize(
    ("flags", "levels", "remedy"),
    [
        ({"workers__count": 4}, [], ""),
        ({"workers__count": 5}, ["fail"], "workers.count to 4"),
        ({"workers__count": 2, "workers__tensor_parallel": 2}, ["ok"], ""),
        ({"workers__count": 3, "workers__tensor_parallel": 2}, ["fail"], "workers.count to 2"),
        ({"workers__count": 8, "workers__gpus": 0.5}, [], ""),
        ({"workers__count": 9, "workers__gpus": 0.5}, ["fail"], "workers.count to 8"),
        ({"workers__count": 2, "workers__tensor_parallel": 2, "workers__gpus": 1}, ["warn"], "workers.gpus to 2"),
        ({"workers__count": 9, "ray__address": "127.0.0.1:6379"}, [], ""),
        ({"workers__count": 9, "workers__device": "cpu"}, [], ""),
        ({"workers__count": 9, "workers__engine": "simulated"}, [], ""),
    ],
)
def test_gpus_that_are_too_few_are_told(
    flags: dict[str, object], levels: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_ranks, "_gpus", lambda: 4)
    found = _findings(**flags)
    assert [finding.level for finding in found] == levels
    assert remedy in "".join(finding.remedy for finding in found)


def test_more_ranks_than_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ranks, "os", SimpleNamespace(cpu_count=lambda: 4))
    assert [f.level for f in _findings(workers__count=2, workers__tensor_parallel=2, workers__device="cpu")] == ["ok"]
    found = _findings(workers__count=3, workers__tensor_parallel=2, workers__device="cpu")
    assert [finding.level for finding in found] == ["warn"]
    assert "4 core(s)" in found[0].found
