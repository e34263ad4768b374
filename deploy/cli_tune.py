"""The command `warmkv tune`: which policy and which weights would have served a trace best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy import replay_options as options
from deploy.connection import Json
from deploy.failures import USAGE, Failure, reports_failures

if TYPE_CHECKING:
    from replay.comparison import Runner
    from replay.tuning import Search

_LARGEST_BUDGET_S = 86400.0


def add_to(app: typer.Typer) -> None:
    """Put the command into the app."""
    app.command(epilog="Example: warmkv tune monday.jsonl.gz -n 4 --capacity 400k --budget 5m --out tuning")(tune)


@reports_failures
def tune(
    traces: options.TraceNames,
    present: Annotated[
        str, typer.Option("--present", metavar="NAME[:WEIGHT=N,...]", help="What is in force.")
    ] = "cache_aware",
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", metavar="NAME", help="Search only these.", show_default="all")
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help="ttft_mean, ttft_p99, hit or busiest: what is to be better.")
    ] = "ttft_mean",
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=2, max=10_000, help="Configurations to begin with.", show_default="27"),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="DURATION", help="Instead of --trials: about so long, as 2m.")
    ] = None,
    workers: options.Workers = options.DEFAULT_WORKERS,
    capacity: options.Capacity = options.DEFAULT_CAPACITY,
    engine: options.Engine = "serial",
    host: options.Host = None,
    redis: options.Redis = None,
    prefill_tokens_per_s: options.PrefillRate = None,
    speed: options.Speed = 1.0,
    closed_loop: options.ClosedLoop = False,
    longest: options.Longest = None,
    first: options.First = None,
    affinity: options.Affinity = None,
    routers: options.Routers = 1,
    event_delay: options.EventDelay = "0s",
    fail: options.Fail = None,
    seeds: Annotated[int, typer.Option("--seeds", min=2, max=100, help="Replays of each finalist.")] = (
        options.DEFAULT_SEEDS
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the search; the same one finds the same.")] = 1,
    processes: options.Processes = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Write a picture there, as tune.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search policy and weights on a trace, and say whether anything beats what is in force.

    Many configurations are replayed on a short part of the trace, the better ones on longer parts. The last three
    tenths are held out: nothing is chosen by them, and the table is of them alone. Ends with the command that sets what
    was found. Changes nothing.
    """
    from deploy.render_replay import progress_to
    from deploy.render_tune import tune_json, tune_text
    from deploy.tune_page import write_page
    from replay.comparison import prepared, running
    from replay.front import OBJECTIVES
    from replay.tuning import Search
    from replay.tuning import tune as search_for
    from router.policy import POLICIES

    if objective not in OBJECTIVES:
        raise Failure(f"--objective {objective}: choose one of {', '.join(OBJECTIVES)}", USAGE)
    if trials is not None and budget is not None:
        raise Failure("give either --trials or --budget, not both", USAGE)
    (now,) = options.configurations([present])
    names = options.configurations(policy or list(POLICIES))
    if weighted := [each.text for each in names if each.weights]:
        raise Failure(f"--policy {weighted[0]}: give the name alone; tune looks for the weights", USAGE)
    options.make_folder(out)
    source = options.source_of(traces, speed=speed, closed_loop=closed_loop, longest=longest, first=first)
    trace = options.read_trace(source)
    fleet = options.fleet_of(
        trace,
        workers=workers,
        capacity=capacity,
        engine=engine,
        prefill_tokens_per_s=prefill_tokens_per_s,
        routers=routers,
        event_delay=event_delay,
        fail=fail or (),
        affinity=affinity,
        host=host,
        redis=redis,
    )
    search = Search(
        source,
        fleet,
        len(prepared(source).requests),
        now,
        tuple(dict.fromkeys(each.policy for each in names)),
        trials or 27,
        seeds,
        seed,
        objective,
    )
    with running(processes) as runner:
        if budget is not None:
            search = _within(search, runner, options.duration("--budget", budget))
        tuned = options.checked(lambda: search_for(search, runner, on_done=progress_to(None)))
    typer.echo(tune_json(trace, tuned) if as_json else tune_text(trace, tuned))
    if out is not None:
        typer.echo(f"written {write_page(out, trace, tuned)}", err=as_json)


def _within(search: Search, runner: Runner, budget_s: float) -> Search:
    """As many trials as fit, by the time that what is in force takes here; it says how many, to repeat the search."""
    from dataclasses import replace
    from time import perf_counter

    from replay.comparison import Run
    from replay.tuning import trials_within

    if not 1 <= budget_s <= _LARGEST_BUDGET_S:
        raise Failure("--budget: give from 1s to 24h", USAGE)
    began = perf_counter()
    many = [Run(search.source, search.fleet, search.present, seed) for seed in range(1, runner.processes + 1)]
    runner.results(many)
    each_s = (perf_counter() - began) / runner.processes
    trials = trials_within(search, budget_s / each_s - 1)
    typer.echo(f"a replay takes {each_s:.1f} s, so --trials {trials}", err=True)
    return replace(search, trials=trials)
