"""What each fault of a tier costs a request: bytes that are wrong, requests that fail, milliseconds that are added.

`python -m bench.faults [--quick] [--json]`. For each tier and fault, requests ask for prefixes that the tier holds
while it is broken. Added is what a request waits for the store before it computes; the caller predicts 25 ms a block,
and the tier has been read before, so that a load may be late by `store.load_slack`, 50 ms.
Where it is known how many blocks of a prefix must come in spite of it, requests that got others are counted as well.
Rows: `<tier>_<fault>_wrong_bytes`, `_failed_requests`, `_unexpected_prefixes`, `_worst_added_ms`, `_p50_added_ms`,
`_recovered`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from bench import fault_disk, fault_peer, fault_redis
from bench.fault_blocks import FULL, SMALL, Shape
from bench.fault_rig import Outcome
from bench.report import Report, arguments, machine_facts

TIERS: dict[str, tuple[Sequence[str], Callable[[str, Shape], Outcome]]] = {
    "disk": (fault_disk.NAMES, fault_disk.fault),
    "redis": (fault_redis.NAMES, fault_redis.fault),
    "peer": (fault_peer.NAMES, fault_peer.fault),
}


def main() -> None:
    """Run every fault once and print the table."""
    options = arguments(__doc__)
    report = Report("faults")
    shape = SMALL if options.quick else FULL
    for tier, (names, fault) in TIERS.items():
        for name in names:
            add(report, f"{tier}_{name}", fault(name, shape), shape)
    if options.json:
        report.print(as_json=True)
    else:
        show(report)


def show(report: Report) -> None:
    """The matrix for people: a line for each case."""
    value = {row.name: row.value for row in report.rows}
    table = Table(title="faults", caption=", ".join(f"{k} {v}" for k, v in machine_facts().items()))
    for column in ("case", "wrong bytes", "failed", "unexpected", "worst added ms", "p50 added ms", "recovered"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for case in [name.removesuffix("_wrong_bytes") for name in value if name.endswith("_wrong_bytes")]:
        wrong, failed = value[f"{case}_wrong_bytes"], value[f"{case}_failed_requests"]
        unexpected = value[f"{case}_unexpected_prefixes"]
        worst, half = value[f"{case}_worst_added_ms"], value[f"{case}_p50_added_ms"]
        recovered = "yes" if value[f"{case}_recovered"] else "NO"
        table.add_row(
            case, f"{wrong:.0f}", f"{failed:.0f}", f"{unexpected:.0f}", f"{worst:.1f}", f"{half:.1f}", recovered
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def add(report: Report, case: str, outcome: Outcome, shape: Shape) -> None:
    """The rows of one case."""
    tally = outcome.tally
    report.add(f"{case}_wrong_bytes", [tally.wrong_blocks * shape.layout.block_nbytes], "bytes", bar="0")
    report.add(f"{case}_failed_requests", [tally.failed], "requests", bar="0")
    report.add(f"{case}_unexpected_prefixes", [tally.unexpected], "requests", bar="0")
    report.add(f"{case}_worst_added_ms", [outcome.worst_added_ms], "ms")
    report.add(f"{case}_p50_added_ms", tally.added_ms or [0.0], "ms")
    report.add(f"{case}_recovered", [float(outcome.recovered)], "bool", bar="1")


if __name__ == "__main__":
    main()
