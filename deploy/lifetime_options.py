"""The options that say how long a prompt's blocks are to live, as people write them."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.failures import USAGE, Failure

if TYPE_CHECKING:
    from warmkv.client import LifetimeOptions

LAST_EPOCH_S = 253_402_300_799  # the end of the year 9999

Ttl = Annotated[
    str | None,
    typer.Option("--ttl", metavar="DURATION", help="How long its blocks live after a use: 5m, 30m, 1h, 24h, ..."),
]
FixedTtl = Annotated[bool, typer.Option("--fixed-ttl", help="--ttl counts from now: later hits do not renew it.")]
ExpiresAt = Annotated[
    str | None,
    typer.Option(
        "--expires-at",
        metavar="TIME",
        help="Instead of --ttl: its blocks live until then, used or not: 2027-01-31T18:00Z, or seconds since 1970.",
    ),
]
KeepPriority = Annotated[
    int | None,
    typer.Option("--keep-priority", min=0, max=100, help="Worth of its blocks under the eviction policy `priority`."),
]


def lifetime_options(
    ttl: str | None, expires_at: str | None, keep_priority: int | None, *, fixed_ttl: bool
) -> LifetimeOptions:
    """What the client takes.

    Raises:
        Failure: a value cannot be read, or they contradict one another.
    """
    if ttl is not None and expires_at is not None:
        raise Failure("give --ttl or --expires-at, not both", USAGE)
    if fixed_ttl and ttl is None:
        raise Failure("--fixed-ttl says how --ttl counts; give --ttl as well", USAGE)
    options: LifetimeOptions = {}
    if ttl is not None:
        options["ttl"] = whole_seconds("--ttl", ttl)
    if fixed_ttl:
        options["fixed_ttl"] = True
    if expires_at is not None:
        options["expires_at"] = epoch_seconds("--expires-at", expires_at)
    if keep_priority is not None:
        options["keep_priority"] = keep_priority
    return options


def whole_seconds(option: str, duration: str) -> int:
    """A duration in seconds, rounded up.

    Raises:
        Failure: it is none, or zero.
    """
    from deploy.quantities import parse_duration

    try:
        seconds = parse_duration(duration)
    except ValueError as error:
        raise Failure(f"{option}: {error}", USAGE) from None
    if seconds <= 0:
        raise Failure(f"{option} {duration}: give more than nothing, for example 30m", USAGE)
    return math.ceil(seconds)


def epoch_seconds(option: str, time: str) -> int:
    """Seconds since the epoch of a time, rounded up; one without a time zone is this machine's.

    Raises:
        Failure: it is no time, or out of range.
    """
    try:
        seconds = int(time) if time.isascii() and time.isdigit() else datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):
        raise Failure(
            f"{option}: {time!r} is no time; write it like 2027-01-31T18:00Z, or in seconds since 1970", USAGE
        ) from None
    if not 0 <= seconds <= LAST_EPOCH_S:
        raise Failure(
            f"{option}: {time} is not between the years 1970 and 9999; write it like 2027-01-31T18:00Z, or in seconds "
            "since 1970",
            USAGE,
        )
    return math.ceil(seconds)
