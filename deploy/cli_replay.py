"""The command `warmkv replay`: what policies would have made of a trace, on a simulated fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy import replay_options as options
from deploy.connection import Json
from deploy.failures import USAGE, Failure, reports_failures

DEFAULT_POLICIES = ("cache_aware", "lowest_ttft", "dynamo_cost", "sglang_cache_aware", "round_robin")


def add_to(app: typer.Typer) -> None:
    """Put the command into the app."""
    app.command(epilog="Example: warmkv replay monday.jsonl.gz -n 4 -p cache_aware -p cache_aware:price_floor=3")(
        replay
    )


@reports_failures
def replay(
    traces: Annotated[
        list[str] | None,
        typer.Argument(metavar="TRACE", help="A file or the name of a shipped trace; several are merged by time."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="NAME[:WEIGHT=N,...]",
            help="Repeatable; `all` for all.",
            show_default=", ".join(DEFAULT_POLICIES),
        ),
    ] = None,
    workers: options.Workers = options.DEFAULT_WORKERS,
    capacity: options.Capacity = options.DEFAULT_CAPACITY,
    engine: options.Engine = "serial",
    host: options.Host = None,
    redis: options.Redis = None,
    roles: options.Roles = "",
    prefill_tokens_per_s: options.PrefillRate = None,
    speed: options.Speed = 1.0,
    closed_loop: options.ClosedLoop = False,
    longest: options.Longest = None,
    first: options.First = None,
    affinity: options.Affinity = None,
    routers: options.Routers = 1,
    event_delay: options.EventDelay = "0s",
    fail: options.Fail = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Replays of each policy.")] = (
        options.DEFAULT_SEEDS
    ),
    processes: options.Processes = None,
    list_traces: Annotated[bool, typer.Option("--list", help="List the shipped traces and the engines.")] = False,
    as_json: Json = False,
) -> None:
    """Compare routing policies on a trace: hit rate, time to the first token, balance. Needs no fleet and no GPU.

    Runs the router's own decisions over simulated workers on a virtual clock. The first tenth of the requests fills the
    caches and does not count. Figures rank policies; a simulated second is none of your hardware's.
    """
    from deploy.render_replay import progress_to, replay_json, replay_text, shipped_json, shipped_text
    from replay.comparison import Run, running

    if list_traces:
        typer.echo(shipped_json() if as_json else shipped_text())
        return
    if not traces:
        raise Failure("no trace was named; give a file or a name, `warmkv replay --list` shows those shipped", USAGE)
    chosen = options.configurations(_policies(policy))
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
        roles=roles,
    )
    runs = [Run(source, fleet, each, seed) for each in chosen for seed in range(1, seeds + 1)]
    with running(1 if len(runs) == 1 else processes) as runner:
        results = options.checked(lambda: runner.results(runs, on_done=progress_to(len(runs))))
    typer.echo(replay_json(trace, results) if as_json else replay_text(trace, results))


def _policies(given: list[str] | None) -> list[str]:
    if given is None:
        return list(DEFAULT_POLICIES)
    if "all" in given:
        from router.policy import POLICIES

        return [*POLICIES, *(each for each in given if each != "all")]
    return given
