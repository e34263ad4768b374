"""The command `warmkv record`: the live traffic of one or several routers as a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deploy.connection import Connection, Json, asks_router
from deploy.failures import FAILED, USAGE, Failure, reports_failures


def add_to(app: typer.Typer) -> None:
    """Put the command into the app."""
    app.command(epilog="Example: warmkv record monday.jsonl.gz --for 1h")(record)


@reports_failures
@asks_router
def record(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; compressed if its name ends in .gz.")],
    duration: Annotated[
        str | None, typer.Option("--for", metavar="DURATION", help="End after so long, for example 10m.")
    ] = None,
    requests: Annotated[int | None, typer.Option("--requests", min=1, help="End after so many.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="HOST:PORT", help="Another router of the fleet; repeatable."),
    ] = None,
    with_text: Annotated[
        bool, typer.Option("--with-text", help="Write prompts, too. Needs router.show_prompts on the router.")
    ] = False,
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Write the requests that arrive from now on as a trace, for `replay`, `tune` and `capacity`. Ctrl-C ends it.

    A line a request, written when it has ended: times, lengths, and which prompts begin alike. Blocks, tenants and
    sessions (affinity keys) are numbers of this file alone; no text, no hash and no name is in it. What the fleet made
    of each request is, so that a replay can be compared with it. Several routers of a fleet are recorded together by
    --also: prefixes that two files share are not known.
    """
    from deploy.recording import Wanted
    from deploy.recording import record as run
    from deploy.render_record import recorded_json, recorded_text

    if file.suffix != ".gz" and file.suffix != ".jsonl":
        raise Failure(f"{file}: name it .jsonl, or .jsonl.gz to have it compressed", USAGE)
    wanted = Wanted(file, None if duration is None else _seconds(duration), requests, with_text)
    routers = [connection, *(replace(connection, router=address) for address in also or ())]
    try:
        ended = run(wanted, routers, say=lambda text: typer.echo(text, err=True))
    except FileExistsError:
        raise Failure(f"{file} is there already, and is not overwritten; name another file", USAGE) from None
    except OSError as error:
        raise Failure(f"{file} cannot be written ({error.strerror}); name another file, or make room") from None
    typer.echo(recorded_json(file, ended) if as_json else recorded_text(file, ended))
    if ended.lost:
        raise typer.Exit(FAILED)


def _seconds(text: str) -> float:
    from deploy.quantities import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise Failure(f"--for: {error}", USAGE) from None
    if not seconds:
        raise Failure("--for 0s records nothing; give a time, for example 10m", USAGE)
    return seconds
