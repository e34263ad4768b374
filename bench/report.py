"""The one language of the benchmarks: a table for people, one JSON object for programs.

`python -m bench.NAME [--quick] [--json]`: with `--json` the last line of standard output is
`{"bench": ..., "command": ..., "machine": {...}, "rows": [{"name", "value", "unit", "min", "max", "n"}, ...]}`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_MET = {True: "yes", False: "NO", None: ""}
_BAR = re.compile(r"(<=|>=|<|>|)\s*([\d.]+)(?:\s*\+-\s*([\d.]+))?(?:\s|$)")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: the median of `n` measurements, with the smallest and the largest.

    Attributes:
        bar: what `value` should reach: `>= 3.5`, `< 1`, `0.145 +- 0.005` or `0`, and then any words; empty: nothing.
        is_met: whether it does; None: there is no bar.
    """

    name: str
    value: float
    unit: str
    min: float
    max: float
    n: int
    bar: str = ""
    is_met: bool | None = None


@dataclass(slots=True)
class Report:
    """The rows of one run."""

    bench: str
    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, samples: Sequence[float], unit: str, *, bar: str = "") -> Row:
        """A row of the samples' median; `bar` is what the figure should reach, for people.

        Raises:
            ValueError: the bar is none, or there are no samples.
        """
        value = statistics.median(samples)
        row = Row(name, value, unit, min(samples), max(samples), len(samples), bar, reaches(value, bar))
        self.rows.append(row)
        return row

    def print(self, *, as_json: bool) -> None:
        """The table, or with `as_json` one object as the last line."""
        machine = machine_facts()
        command = shlex.join(["python", "-m", f"bench.{self.bench}", *sys.argv[1:]])
        if as_json:
            rows = [{k: v for k, v in asdict(row).items() if k not in ("bar", "is_met")} for row in self.rows]
            print(json.dumps({"bench": self.bench, "command": command, "machine": machine, "rows": rows}))
            return
        from rich.console import Console  # here: who asks for JSON needs no package but torch's own
        from rich.table import Table

        table = Table(title=command, caption=", ".join(f"{k} {v}" for k, v in machine.items()), caption_justify="left")
        for column in ("row", "median", "min", "max", "n", "unit", "bar", "met"):
            table.add_column(column, justify="left" if column in ("row", "unit", "bar", "met") else "right")
        for row in self.rows:
            figures = (f"{x:.4g}" for x in (row.value, row.min, row.max))
            table.add_row(row.name, *figures, str(row.n), row.unit, row.bar, _MET[row.is_met])
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        missed = [row.name for row in self.rows if row.is_met is False]
        print(f"bars missed: {', '.join(missed) or 'none'}")


def reaches(value: float, bar: str) -> bool | None:
    """Whether a value reaches its bar; None: there is none.

    Raises:
        ValueError: the bar is none.
    """
    if not bar:
        return None
    parts = _BAR.match(bar)
    if parts is None:
        raise ValueError(f"{bar!r} is no bar; write it like '>= 3.5' or '0.145 +- 0.005'")
    relation, limit, tolerance = parts[1], float(parts[2]), float(parts[3] or 0.0)
    met = {"<=": value <= limit, ">=": value >= limit, "<": value < limit, ">": value > limit}
    return met.get(relation, abs(value - limit) <= tolerance)


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Pairwise: each value by the other one that was measured beside it."""
    return [value / other for value, other in zip(values, others, strict=True)]


def machine_facts() -> dict[str, str | int]:
    """What a reader needs to judge the figures."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "ray": _version("ray"),
        **({"gpu": gpu} if (gpu := _gpu_name()) else {}),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a GPU machine may have no more than the engine needs
        return "none"


def _gpu_name() -> str:
    """Only where the benchmark has loaded torch."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return str(cuda.get_device_name()) if cuda is not None and cuda.is_available() else ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def arguments(description: str | None) -> argparse.Namespace:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="end within 50 s; coarser figures")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    return parser.parse_args()
