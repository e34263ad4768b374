"""The language of the benchmarks: what a row says, whether its bar is met, and the object for programs."""

from __future__ import annotations

import json
import sys

import pytest

from bench.report import Report, arguments, ratios, reaches


def test_a_row_is_the_median_with_the_extremes_and_the_number_of_samples() -> None:
    row = Report("x").add("name", [5.0, 1.0, 4.0, 2.0], "ms")
    assert (row.value, row.min, row.max, row.n) == (3.0, 1.0, 5.0, 4)
    assert (row.name, row.unit, row.bar, row.is_met) == ("name", "ms", "", None)


@pytest.mark.parametrize(
    ("bar", "met", "missed"),
    [
        (">= 3.5", (3.5, 3.6), (3.4999, -4.0)),
        ("<= 0.15", (0.15, 0.0), (0.1501, 1.0)),
        ("< 1 (8.0 GiB)", (0.99,), (1.0, 1.5)),
        ("> 1", (1.01,), (1.0, 0.5)),
        ("0.145 +- 0.005", (0.1401, 0.145, 0.1499), (0.1399, 0.1501)),
        ("0", (0.0,), (1.0, -1.0)),
        ("1", (1.0,), (0.0, 10.0)),
    ],
)
def test_a_bar_is_met_or_not(bar: str, met: tuple[float, ...], missed: tuple[float, ...]) -> None:
    assert [reaches(value, bar) for value in (*met, *missed)] == [True] * len(met) + [False] * len(missed)


@pytest.mark.parametrize("bar", ["fast", ">= many", "3.5x", "== 1", ">= 1.5GB"])
def test_what_is_no_bar_is_refused_when_the_row_is_added(bar: str) -> None:
    with pytest.raises(ValueError, match="is no bar; write it like"):
        Report("x").add("name", [1.0], "ms", bar=bar)


def test_the_bar_is_held_against_the_median() -> None:
    report = Report("x")
    assert report.add("a", [1.0, 4.0, 9.0], "GB/s", bar=">= 3.5").is_met is True
    assert report.add("b", [1.0, 3.0, 9.0], "GB/s", bar=">= 3.5").is_met is False


def test_ratios_are_pairwise() -> None:
    assert ratios([1.0, 6.0], [2.0, 3.0]) == [0.5, 2.0]
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])


def test_the_last_line_is_one_object_with_the_machine_the_command_and_the_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["store.py", "--quick", "--json"])
    report = Report("store")
    report.add("a_ratio", [2.0, 1.0, 4.0], "ratio", bar=">= 1")
    report.print(as_json=True)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["bench"], said["command"]) == ("store", "python -m bench.store --quick --json")
    assert said["rows"] == [{"name": "a_ratio", "value": 2.0, "unit": "ratio", "min": 1.0, "max": 4.0, "n": 3}]
    assert set(said["machine"]) >= {"cpu", "cores", "load", "python"}


def test_the_table_shows_bars_and_which_are_missed(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("store")
    report.add("good", [2.0], "ratio", bar=">= 1")
    report.add("poor", [0.5], "ratio", bar=">= 1")
    report.add("plain", [0.25], "ratio")
    report.print(as_json=False)
    out = capsys.readouterr().out
    lines = {name: next(line for line in out.splitlines() if f" {name} " in line) for name in ("good", "poor", "plain")}
    assert [("yes" in line, "NO" in line, ">= 1" in line) for line in lines.values()] == [
        (True, False, True),
        (False, True, True),
        (False, False, False),
    ]
    assert out.rstrip().endswith("bars missed: poor")


def test_every_benchmark_takes_the_same_two_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--quick"])
    assert vars(arguments("What it is.\nMore.")) == {"quick": True, "json": False}
