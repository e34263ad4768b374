"""Do routers side by side choose as one router would that sees all traffic? Recorded traces, in the simulator.

Each request goes to a random router. At the same moment a further router, which is told of every placement at once, is
asked where it would send it, and does not act (`replay.agreement`). Eight workers as in `bench.policies`; what they say
of blocks and of one another's requests arrives 5 ms later.

Rows `agreement_<case>_n8`: share of equal choices, two routers, each knowing the workers' true load; `_reported`: the
load as workers report it, every 20 ms and 5 ms late; `_four`: four routers, true load; `_restarted`: one router and
true load, which restarts a quarter, a half and three quarters through the trace and is back a second later, its choices
from the first restart on beside those of a router that never restarts. Each with `_dearer_ms`: by how much the chosen
workers were dearer than those that the one router would have chosen, mean over all choices, in its own costs.

`--quick`: the cases with few requests, without `_reported` and `_four`. `--traces`, `--cases`: as in `bench.policies`.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.policies import BASE_WORKERS, CASES, chosen, prepared
from bench.report import Report
from replay.agreement import Agreement, compare
from replay.serial_engine import SerialProfile
from replay.simulated_router import RouterSettings
from replay.simulation import RouterRestart, Setup
from replay.traces import shipped

DELAY_S = 0.005
REPORT_S = 0.02
DEFAULT_CASES = ("conv_400k", "conv_3200k", "synth_3200k", "claude_half_400k", "rag_400k", "tau_400k")
QUICK_CASES = ("synth_3200k", "tau_400k")
BAR = ">= 0.97"
DOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class Kind:
    """What is compared.

    Attributes:
        reports_s: the workers' reports are so far apart, and as late as all else; zero: the load is known as it is.
        restarts: how many, spread over the trace; only what follows the first one is counted.
    """

    routers: int
    reports_s: float = 0.0
    restarts: int = 0


KINDS = {"": Kind(2), "_reported": Kind(2, REPORT_S), "_four": Kind(4), "_restarted": Kind(1, restarts=3)}
QUICK_KINDS = ("", "_restarted")


@dataclass(frozen=True, slots=True)
class Run:
    """One replay to make; `kind`: one of `KINDS`."""

    case: str
    path: Path
    kind: str


def replay(run: Run) -> Agreement:
    """Make it."""
    kind, work = KINDS[run.kind], prepared(run.case, run.path, BASE_WORKERS)
    whole_s = max(work.arrivals_s)
    times = [whole_s * (number + 1) / (kind.restarts + 1) for number in range(kind.restarts)]
    setup = Setup(
        BASE_WORKERS,
        RouterSettings("cache_aware", delay_s=DELAY_S, load_delay_s=DELAY_S if kind.reports_s else 0.0),
        SerialProfile(pool_tokens=CASES[run.case].pool_tokens, report_s=kind.reports_s),
        routers=kind.routers,
        restarts=[RouterRestart(0, at_s, DOWN_S) for at_s in times],
    )
    return compare(work, setup, since_s=times[0] if times else 0.0)


def add_rows(report: Report, run: Run, agreement: Agreement) -> None:
    """The rows of one replay."""
    name = f"agreement_{run.case}_n{BASE_WORKERS}{run.kind}"
    report.add(name, [agreement.share], "share", bar="" if run.kind == "_reported" else BAR)
    report.add(f"{name}_dearer_ms", [agreement.dearer_ms], "ms")


def runs(given: argparse.Namespace) -> list[Run]:
    """What the flags ask for."""
    folder = {} if given.traces is None else {p.name.partition(".")[0]: p for p in given.traces.glob("*.jsonl*")}
    paths = shipped() | folder
    usual = QUICK_CASES if given.quick else DEFAULT_CASES
    cases = chosen(given.cases, list(CASES), "case") if given.cases else usual
    left_out = [case for case in cases if CASES[case].trace not in paths]
    if left_out:
        print(f"{', '.join(left_out)} left out: no trace; give --traces FOLDER with it", file=sys.stderr)
    kinds = QUICK_KINDS if given.quick else tuple(KINDS)
    return [Run(case, paths[CASES[case].trace], kind) for case in cases if case not in left_out for kind in kinds]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(QUICK_CASES)}, less is compared")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="more traces, before the shipped ones")
    parser.add_argument("--cases", metavar="NAME,...", help=f"some of {', '.join(CASES)}")
    given, report = parser.parse_args(), Report("routers")
    todo = runs(given)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for run, agreement in zip(todo, pool.map(replay, todo), strict=True):
            add_rows(report, run, agreement)
    report.print(as_json=given.json)


if __name__ == "__main__":
    main()
