"""The one language of the benchmarks: a table for people, one JSON object for programs.

`python -m bench.NAME [--quick] [--json]`: with `--json` the last line of standard output is
`{"bench": ..., "command": ..., "machine": {...}, "rows": [{"name", "value", "unit", "min", "max", "n"}, ...]}`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: the median of `n` measurements, with the smallest and the largest."""

    name: str
    value: float
    unit: str
    min: float
    max: float
    n: int
    bar: str = ""


@dataclass(slots=True)
class Report:
    """The rows of one run."""

    bench: str
    rows: list[Row] = field(default_factory=list)

    def add(self, name: str, samples: Sequence[float], unit: str, *, bar: str = "") -> Row:
        """A row of the samples' median; `bar` is what the figure should reach, for people."""
        row = Row(name, statistics.median(samples), unit, min(samples), max(samples), len(samples), bar)
        self.rows.append(row)
        return row

    def print(self, *, as_json: bool) -> None:
        """The table, or with `as_json` one object as the last line."""
        machine = machine_facts()
        command = shlex.join(["python", "-m", f"bench.{self.bench}", *sys.argv[1:]])
        if as_json:
            rows = [{k: v for k, v in asdict(row).items() if k != "bar"} for row in self.rows]
            print(json.dumps({"bench": self.bench, "command": command, "machine": machine, "rows": rows}))
            return
        table = Table(title=command, caption=", ".join(f"{k} {v}" for k, v in machine.items()), caption_justify="left")
        for column in ("row", "median", "min", "max", "n", "unit", "bar"):
            table.add_column(column, justify="left" if column in ("row", "unit", "bar") else "right")
        for row in self.rows:
            figures = (f"{x:.4g}" for x in (row.value, row.min, row.max))
            table.add_row(row.name, *figures, str(row.n), row.unit, row.bar)
        Console(width=None if sys.stdout.isatty() else 120).print(table)


def machine_facts() -> dict[str, str | int]:
    """What a reader needs to judge the figures."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
    }


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
