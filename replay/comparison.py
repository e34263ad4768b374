"""Several replays of one trace, over processes: who is replayed with which seed, and the figures with their spread.

Covers: preparing the workload once in every process, running, mean and spread. Does not cover: one replay
(`simulation`), choosing what to replay (`tuning`). Same arguments, same figures, however many processes there are.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from replay.engine_choice import DEFAULT_ENGINE, profile, tiers
from replay.merging import merge
from replay.outcome import Figures, Outcome
from replay.policy_space import Configuration
from replay.simulated_router import RouterSettings
from replay.simulation import Failure, Setup, simulate
from replay.traces import Trace, load
from replay.workload import Workload, part, workload

# It is nothing without sessions, so it is told them even where the others are not.
_NEEDS_SESSIONS = frozenset({"sticky"})
_COARSE_TICK_MS = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """Which requests are replayed.

    Attributes:
        paths: merged by time. longest: leave out longer prompts. first: only so many requests, from the start.
        jitter_s: the tick of the trace's clock; None: found out (`clock_tick_s`). The rest as in `replay.workload`.
    """

    paths: tuple[Path, ...]
    speed: float = 1.0
    closed_loop: bool = False
    longest: int | None = None
    first: int | None = None
    jitter_s: float | None = None


@dataclass(frozen=True, slots=True)
class Fleet:
    """What it is replayed on.

    Attributes:
        capacity_tokens: of one worker. engine: name of a timing model.
        prefill_tokens_per_s: of one worker; None: the engine's. delay_s: from a worker's word to the router.
        tells_sessions: requests carry their session as affinity key.
        host_tokens: capacity of one worker's host RAM. redis_tokens: of the shared tier. None: there is none.
        roles: who prefills for whom, see `workers.roles`; empty: nobody.
    """

    workers: int
    capacity_tokens: int
    engine: str = DEFAULT_ENGINE
    prefill_tokens_per_s: float | None = None
    routers: int = 1
    delay_s: float = 0.0
    tells_sessions: bool = False
    failures: tuple[Failure, ...] = ()
    host_tokens: int | None = None
    redis_tokens: int | None = None
    roles: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One replay to make.

    Attributes:
        requests: only so many from the start; None: all. warm_up: share of those that do not count.
        keep_requests: return what became of every request, for comparing two runs request by request.
    """

    source: Source
    fleet: Fleet
    configuration: Configuration
    seed: int = 1
    requests: int | None = None
    warm_up: float = 0.1
    keep_requests: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What one came to.

    Attributes:
        requests: simulated ones. cpu_s: that it took. times, cached: of each request, warm-up included, if they were
        kept: seconds to the first token (nan: no token), and prompt tokens that were cached.
    """

    run: Run
    figures: Figures
    requests: int
    cpu_s: float
    times: tuple[float, ...] = ()
    cached: tuple[int, ...] = ()


class Spread(NamedTuple):
    """One figure over seeds: its mean, and half of the difference between the largest and the smallest."""

    mean: float
    half: float


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample; those that are nan are left out."""
    real = [sample for sample in samples if not math.isnan(sample)]
    if not real:
        return Spread(float("nan"), 0.0)
    return Spread(statistics.fmean(real), (max(real) - min(real)) / 2)


@lru_cache(maxsize=2)
def read(source: Source) -> Trace:
    """The trace that it names, with times as fine as they were.

    Raises:
        ValueError: a file is no trace, or traces do not go together, or nothing is left. OSError: it cannot be read.
    """
    whole = merge([load(path) for path in source.paths])
    tick_s = clock_tick_s(whole) if source.jitter_s is None else source.jitter_s
    trace = part(whole, longest=source.longest, jitter_s=tick_s)
    if not trace.requests:
        raise ValueError(f"{trace.name} has no prompt of at most {source.longest} tokens; allow longer ones")
    return trace if source.first is None else replace(trace, requests=trace.requests[: source.first])


@lru_cache(maxsize=4)
def prepared(source: Source, requests: int | None = None) -> Workload:
    """The workload, or its first requests. Raises as `read`, and ValueError when the trace knows no prefixes."""
    trace = read(source)
    if requests is not None:
        trace = replace(trace, requests=trace.requests[:requests])
    return workload(trace, speed=source.speed, closed_loop=source.closed_loop)


def clock_tick_s(trace: Trace) -> float:
    """Seconds between the ticks of a trace's clock, if it is a coarse one; else 0.

    A coarse clock: several requests at most of its ticks, and its usual step is a second or more. Requests of one tick
    would all arrive at the same instant, which they did not.
    """
    ticks = sorted({round(request.time_s * 1e3) for request in trace.requests})
    steps = Counter(later - earlier for earlier, later in pairwise(ticks))
    if not steps or len(ticks) > len(trace.requests) / 2:
        return 0.0
    (usual_ms, times), *_ = steps.most_common(1)
    return usual_ms / 1e3 if usual_ms >= _COARSE_TICK_MS and times > len(ticks) / 2 else 0.0


def run_once(run: Run) -> Result:
    """Make it. Raises ValueError when the arguments make no sense."""
    work, fleet, chosen = prepared(run.source, run.requests), run.fleet, run.configuration
    settings = RouterSettings(
        chosen.policy,
        dict(chosen.weights),
        delay_s=fleet.delay_s,
        tells_sessions=fleet.tells_sessions or chosen.policy in _NEEDS_SESSIONS,
    )
    setup = Setup(
        fleet.workers,
        settings,
        profile(fleet.engine, fleet.capacity_tokens, seed=run.seed, prefill_tokens_per_s=fleet.prefill_tokens_per_s),
        tiers=tiers(fleet.engine, host_tokens=fleet.host_tokens, redis_tokens=fleet.redis_tokens, roles=fleet.roles),
        routers=fleet.routers,
        failures=fleet.failures,
        seed=run.seed,
        roles=fleet.roles,
    )
    started = time.process_time()
    outcome = simulate(work, setup)
    seconds = time.process_time() - started
    result = Result(run, outcome.figures(warm_up=run.warm_up), len(work.requests), seconds)
    if not run.keep_requests:
        return result
    return replace(result, times=_times(outcome), cached=tuple(fate.cached for fate in outcome.fates))


class Runner:
    """Makes runs, several at once. Made by `running`.

    Attributes:
        processes: how many at once.
    """

    def __init__(self, pool: ProcessPoolExecutor | None, processes: int) -> None:
        self._pool = pool
        self.processes = processes

    def results(self, runs: Iterable[Run], *, on_done: Callable[[Result], None] = lambda _: None) -> list[Result]:
        """In the order of the runs; `on_done` is called as they end. Raises what a run raises."""
        todo = list(runs)
        if self._pool is None:
            return [_told(run_once(run), on_done) for run in todo]
        futures = [self._pool.submit(run_once, run) for run in todo]
        for future in _as_they_end(futures):
            on_done(future.result())
        return [future.result() for future in futures]


@contextmanager
def running(processes: int | None = None) -> Iterator[Runner]:
    """A runner with so many processes; None: one for each core that may be used; 1: this one.

    Processes are spawned, not forked: threads of gRPC do not outlive a fork.
    """
    count = len(os.sched_getaffinity(0)) if processes is None else processes
    if count <= 1:
        yield Runner(None, 1)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_leave_signals_to_parent)
    try:
        yield Runner(pool, count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_they_end(futures: Sequence[Future[Result]]) -> Iterator[Future[Result]]:
    left = set(futures)
    while left:
        ended, left = wait(left, return_when=FIRST_COMPLETED)
        yield from ended


def _told(result: Result, on_done: Callable[[Result], None]) -> Result:
    on_done(result)
    return result


def _times(outcome: Outcome) -> tuple[float, ...]:
    return tuple(fate.ttft_s if fate.first_token_s is not None else float("nan") for fate in outcome.fates)


def _leave_signals_to_parent() -> None:
    """Ctrl-C reaches the whole group of processes; the parent says what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
