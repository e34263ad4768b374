"""The command `warmkv capacity`: hit rate against size and time to live of caches, and what more would give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy import replay_options as options
from deploy.connection import Json
from deploy.failures import USAGE, Failure, reports_failures

if TYPE_CHECKING:
    from deploy.capacity_answers import Addition
    from replay.capacity import Tiers


def _tier_option(tier: str, whose: str) -> Any:
    return typer.Option(f"--{tier}", metavar="SIZE", help=f"Of the {tier} tier {whose}.", show_default="none")


def add_to(app: typer.Typer) -> None:
    """Put the command into the app."""
    app.command(
        epilog="Example: warmkv capacity monday.jsonl.gz --model ./Qwen3-0.6B -n 4 --host 32GiB --add host=64GiB"
    )(capacity)


@reports_failures
def capacity(
    traces: options.TraceNames,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", metavar="PATH", help="Model folder, or its config.json alone.")
    ] = None,
    kv_bytes_per_token: Annotated[
        str | None, typer.Option("--kv-bytes-per-token", metavar="SIZE", help="Instead of --model, as 128KiB.")
    ] = None,
    device: Annotated[str | None, _tier_option("device", "of one worker")] = None,
    host: Annotated[str | None, _tier_option("host", "of one worker")] = None,
    disk: Annotated[str | None, _tier_option("disk", "of one worker")] = None,
    redis: Annotated[str | None, _tier_option("redis", "of the fleet")] = None,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", metavar="TIER=SIZE", help="What would so much more give, as host=64GiB; repeatable."),
    ] = None,
    ttl: Annotated[
        list[str] | None,
        typer.Option(
            "--ttl", metavar="DURATION", help="After the last use, as 30m; repeatable.", show_default="5m, 1h, never"
        ),
    ] = None,
    workers: options.Workers = 1,
    policy: Annotated[str, typer.Option("--policy", "-p", help="Who routes, with several workers.")] = "cache_aware",
    engine: options.Engine = "serial",
    speed: options.Speed = 1.0,
    longest: options.Longest = None,
    first: options.First = None,
    affinity: options.Affinity = None,
    processes: options.Processes = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Write the curve there, as capacity.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what caches of other sizes would have had of a trace, and what more memory would give.

    The curve is exact for one LRU cache that all requests share. With --workers the same memory is also split over a
    fleet, which is replayed at each size. Sizes are tokens; with --model or --kv-bytes-per-token they may be bytes.
    Where a block lies does not matter to these, nor how long reading it takes. With an --engine that has tiers, as
    h100_8b, and --device, each answer is also replayed with its tiers, which tells times.
    """
    from deploy.capacity_answers import answer
    from deploy.capacity_page import write_page
    from deploy.render_capacity import capacity_json, capacity_text
    from replay.comparison import prepared, running

    options.make_folder(out)
    per_token = _bytes_per_token(model, kv_bytes_per_token)
    source = options.source_of(traces, speed=speed, closed_loop=False, longest=longest, first=first)
    trace = options.read_trace(source)
    tiers = _tiers({"device": device, "host": host, "disk": disk, "redis": redis}, per_token)
    additions = [_addition(text, per_token) for text in add or ()]
    fleet = options.fleet_of(trace, workers=workers, capacity=_MOST, engine=engine, affinity=affinity)
    (configuration,) = options.configurations([policy])
    with running(1 if workers == 1 else processes) as runner:
        answers = options.checked(
            lambda: answer(
                prepared(source),
                runner,
                source,
                fleet,
                configuration,
                tiers=tiers,
                additions=additions,
                ttls_s=_ttls(ttl),
                bytes_per_token=per_token,
            )
        )
    typer.echo(capacity_json(trace, answers) if as_json else capacity_text(trace, answers))
    if out is not None:
        typer.echo(f"written {write_page(out, trace, answers)}", err=as_json)


_MOST = "1G"  # stands for no size yet: each replay is given its own


def _bytes_per_token(model: Path | None, given: str | None) -> int | None:
    if model is not None and given is not None:
        raise Failure("give either --model or --kv-bytes-per-token, not both", USAGE)
    if given is not None:
        size = _size("--kv-bytes-per-token", given)
        if not size:
            raise Failure("--kv-bytes-per-token 0: give what a token takes, as 128KiB", USAGE)
        return size
    if model is None:
        return None
    from deploy.cli_size import layout_of_model

    return layout_of_model(model, "auto", None).token_nbytes


def _tiers(given: dict[str, str | None], per_token: int | None) -> Tiers:
    from replay.capacity import OWN_TIERS, Tiers

    sizes = {tier: _tokens(f"--{tier}", text, per_token) for tier, text in given.items() if text is not None}
    return Tiers({tier: sizes[tier] for tier in OWN_TIERS if tier in sizes}, sizes.get("redis", 0))


def _addition(text: str, per_token: int | None) -> Addition:
    from deploy.capacity_answers import Addition
    from replay.capacity import TIERS

    tier, _, size = text.partition("=")
    if tier not in TIERS:
        raise Failure(f"--add {text}: write it as TIER=SIZE, TIER one of {', '.join(TIERS)}", USAGE)
    return Addition(tier, _tokens(f"--add {tier}", size, per_token), size)


def _tokens(option: str, text: str, per_token: int | None) -> int:
    """Bytes where bytes a token are known, else tokens."""
    if per_token is None:
        try:
            return options.token_count(option, text)
        except Failure as error:
            raise Failure(f"{error}; for bytes give --model or --kv-bytes-per-token, too", USAGE) from None
    return _size(option, text) // per_token


def _size(option: str, text: str) -> int:
    from deploy.quantities import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise Failure(f"{option}: {error}", USAGE) from None


def _ttls(given: list[str] | None) -> list[float]:
    texts = ["5m", "1h", "never"] if given is None else [*given, "never"]
    return sorted({math.inf if text == "never" else options.duration("--ttl", text) for text in texts})
