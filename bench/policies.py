"""Routing policies on recorded traces, in the simulator: share of prompt tokens found, and time to the first token.

Rows `<case>_n<workers>_<policy>_hit`, `_ttft_s` (mean), `_p99_s` and `_busiest` (the busiest worker's prefill time by
the mean), median of the seeds; `_simulated_per_s`: requests simulated in a second of one core. A seed breaks ties, and
puts the rate that the router is told off by a fiftieth: rules that predict have no ties, and their rows should show
noise, too. Engine model: `replay.serial_engine`; the first tenth of each trace fills the caches and does not count.
With more or fewer workers than eight, open-loop chat arrives faster or slower, so that the load of a worker stays what
it is.

A policy may have weights: `--policies cache_aware,cache_aware:price_floor=2,tie_ms=5,sticky`; its rows tell. `sgl5`
and `mix25` are names for such (`VARIANTS`): rules of the literature that a policy with other weights expresses.

`--quick` runs the `cache_aware` rows of eight workers with one seed. Traces come from `replay/data`, or from the folder
that `--traces` names; cases whose trace is in neither are left out, and standard error says so.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bench.report import Report
from replay.outcome import Figures
from replay.serial_engine import SerialProfile
from replay.simulated_router import RouterSettings
from replay.simulation import Setup, simulate
from replay.traces import load, shipped
from replay.workload import Workload, part, workload
from router.errors import InvalidRequest
from router.policy import POLICIES, checked_weights, find_policy

BASE_WORKERS = 8
RATE_ERRORS = (1.0, 0.98, 1.02)  # by seed, in turn
TOLD_SESSIONS = frozenset({"sticky"})  # policies that are nothing without them


# Comparisons that are a policy with other weights: SGLang's rule with the threshold of its Rust router, and the sum
# of a quarter of the queue and the own prefill.
VARIANTS = {
    "sgl5": "sglang_cache_aware:cache_threshold=0.5",
    "mix25": "cache_aware:price_floor=4,price_cap=4,sharing=0,tie_ms=0",
}
_BETWEEN_SPECS = re.compile(r",(?![a-z_]+=)")  # a comma before `weight=` belongs to the policy before it


@dataclass(frozen=True, slots=True)
class Case:
    """A trace, what is taken of it, and the pool of one worker in tokens.

    Attributes:
        by_workers: its arrivals follow the number of workers. The rest as in `replay.workload`.
    """

    trace: str
    pool_tokens: int
    speed: float = 1.0
    by_workers: bool = False
    closed_loop: bool = False
    jitter_s: float = 0.0
    share: float = 1.0
    longest: int | None = None


_CONVERSATION, _SYNTHETIC, _CLAUDE = "mooncake_conversation", "mooncake_synthetic", "claude_code"
CASES = {
    "conv_400k": Case(_CONVERSATION, 400_000, by_workers=True, jitter_s=3.0),
    "conv_3200k": Case(_CONVERSATION, 3_200_000, by_workers=True, jitter_s=3.0),
    "conv_3200k_x1.75": Case(_CONVERSATION, 3_200_000, speed=1.75, by_workers=True, jitter_s=3.0),
    "conv_3200k_x2": Case(_CONVERSATION, 3_200_000, speed=2.0, by_workers=True, jitter_s=3.0),
    "synth_400k": Case(_SYNTHETIC, 400_000, by_workers=True),
    "synth_3200k": Case(_SYNTHETIC, 3_200_000, by_workers=True),
    "claude_half_400k": Case(_CLAUDE, 400_000, closed_loop=True, share=0.5, longest=131_072),
    "claude_3200k": Case(_CLAUDE, 3_200_000, closed_loop=True),
    "rag_400k": Case("ragpulse", 400_000, speed=600.0),
    "tau_400k": Case("tau_airline", 400_000, speed=20.0, closed_loop=True),
}
# What `cache_aware` should reach with eight workers: the best of simple rules on the same traces, or better.
BARS = {
    "conv_400k_ttft_s": "<= 1.46",
    "conv_3200k_ttft_s": "<= 1.12",
    "conv_3200k_hit": ">= 0.348",
    "conv_3200k_x1.75_ttft_s": "<= 1.50",
    "conv_3200k_x2_ttft_s": "<= 2.4",
    "synth_3200k_ttft_s": "<= 1.08",
    "claude_half_400k_ttft_s": "<= 0.60",
    "claude_3200k_ttft_s": "<= 0.92",
    "claude_3200k_p99_s": "<= 16",
    "rag_400k_ttft_s": "<= 0.28",
    "tau_400k_ttft_s": "<= 0.045",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One replay to make."""

    case: str
    path: Path
    workers: int
    policy: str
    seed: int

    @property
    def name(self) -> str:
        """Of its rows."""
        return f"{self.case}_n{self.workers}_{self.policy}"


@dataclass(frozen=True, slots=True)
class Replayed:
    """Figures, and requests simulated in a second of one core."""

    figures: Figures
    per_s: float


def replay(run: Run) -> Replayed:
    """Make it."""
    work = prepared(run.case, run.path, run.workers)
    policy, weights = parsed(run.policy)
    setup = Setup(
        run.workers,
        RouterSettings(policy, weights, tells_sessions=policy in TOLD_SESSIONS),
        SerialProfile(
            pool_tokens=CASES[run.case].pool_tokens, fit_error=RATE_ERRORS[(run.seed - 1) % len(RATE_ERRORS)]
        ),
        seed=run.seed,
    )
    start = time.process_time()
    outcome = simulate(work, setup)
    return Replayed(outcome.figures(), len(work.requests) / (time.process_time() - start))


@lru_cache(maxsize=1)
def prepared(name: str, path: Path, workers: int) -> Workload:
    """The case's workload for so many workers."""
    case = CASES[name]
    trace = part(load(path), longest=case.longest, share=case.share, jitter_s=case.jitter_s)
    speed = case.speed * (workers / BASE_WORKERS if case.by_workers else 1.0)
    return workload(trace, speed=speed, closed_loop=case.closed_loop)


def runs(given: argparse.Namespace) -> Iterator[Run]:
    """What the flags ask for; tells of cases without a trace."""
    folder = {} if given.traces is None else {p.name.partition(".")[0]: p for p in given.traces.glob("*.jsonl*")}
    paths = shipped() | folder
    for name in chosen(given.cases, list(CASES), "case"):
        path = paths.get(CASES[name].trace)
        if path is None:
            print(f"{name} left out: no trace {CASES[name].trace}; give --traces FOLDER with it", file=sys.stderr)
            continue
        for workers in [BASE_WORKERS] if given.quick else map(int, given.workers.split(",")):
            for policy in ["cache_aware"] if given.quick else chosen_policies(given.policies):
                for seed in range(1, (1 if given.quick else given.seeds) + 1):
                    yield Run(name, path, workers, policy, seed)


def chosen(text: str | None, known: list[str], kind: str) -> list[str]:
    """The names in a comma-separated list, or all."""
    names = known if text is None else text.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"there is no {kind} {', '.join(unknown)}; choose some of {', '.join(known)}")
    return names


def chosen_policies(text: str | None) -> list[str]:
    """The policies in a comma-separated list, each with weights or without, or all without."""
    specs = sorted(POLICIES) if text is None else _BETWEEN_SPECS.split(text)
    for spec in specs:
        try:
            parsed(spec)
        except (InvalidRequest, ValueError) as error:
            raise SystemExit(f"{spec}: {error}; also known: {', '.join(VARIANTS)}") from error
    return specs


def parsed(spec: str) -> tuple[str, dict[str, float]]:
    """(policy, weights) of `name`, `name:weight=value,...` or a variant's name.

    Raises InvalidRequest when the policy or a weight is unknown, ValueError when a value is no number.
    """
    name, _, pairs = VARIANTS.get(spec, spec).partition(":")
    weights = {key: float(value) for key, _, value in (pair.partition("=") for pair in pairs.split(",") if pair)}
    checked_weights(find_policy(name), weights)
    return name, weights


def add_rows(report: Report, run: Run, replayed: list[Replayed]) -> None:
    """The rows of one case, number of workers and policy."""
    figures = [each.figures for each in replayed]
    columns: dict[str, tuple[list[float], str]] = {
        "hit": ([f.hit for f in figures], "share"),
        "ttft_s": ([f.ttft_mean_s for f in figures], "s"),
        "p99_s": ([f.ttft_p99_s for f in figures], "s"),
        "busiest": ([f.busiest for f in figures], "ratio"),
        "simulated_per_s": ([each.per_s for each in replayed], "1/s"),
    }
    for column, (samples, unit) in columns.items():
        has_bar = run.policy == "cache_aware" and run.workers == BASE_WORKERS
        bar = BARS.get(f"{run.case}_{column}", "") if has_bar else ""
        report.add(f"{run.name}_{column}", samples, unit, bar=bar)


def options() -> argparse.Namespace:
    """The flags that every benchmark has, and those that choose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="eight workers, cache_aware, one seed")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="more traces, before the shipped ones")
    parser.add_argument("--cases", metavar="NAME,...", help=f"some of {', '.join(CASES)}")
    parser.add_argument(
        "--policies", metavar="NAME,...", help=f"default: all; NAME:WEIGHT=VALUE,..., {', '.join(VARIANTS)}"
    )
    parser.add_argument("--workers", metavar="N,...", default="4,8,16", help="default: 4,8,16")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    given, report = options(), Report("policies")
    todo = list(runs(given))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done: dict[str, list[Replayed]] = {}
        for run, replayed in zip(todo, pool.map(replay, todo), strict=True):
            done.setdefault(run.name, []).append(replayed)
    for run in {run.name: run for run in todo}.values():
        add_rows(report, run, done[run.name])
    report.print(as_json=given.json)


if __name__ == "__main__":
    main()
