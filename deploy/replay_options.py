"""The options by which `replay`, `tune` and `capacity` are told a trace and a fleet, and what they mean.

Covers: names of shipped traces, numbers of tokens, failures, checks. Does not cover: what is done with them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from deploy.failures import USAGE, Failure

if TYPE_CHECKING:
    from replay.comparison import Fleet, Source
    from replay.policy_space import Configuration
    from replay.simulation import Failure as WorkerFailure
    from replay.traces import Trace

T = TypeVar("T")

DEFAULT_WORKERS = 8
DEFAULT_CAPACITY = "400k"
DEFAULT_SEEDS = 3
_TOKENS = re.compile(r"(\d+(?:\.\d+)?)([kMG]?)")
_SCALES = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
_MOST_TOKENS = 10**13
_FAILURE = re.compile(r"(\d+)@([^+]+)\+(.+)")

TraceNames = Annotated[
    list[str],
    typer.Argument(metavar="TRACE", help="A file, or the name of a shipped trace; see `warmkv replay --list`."),
]
Workers = Annotated[int, typer.Option("--workers", "-n", min=1, max=4096, help="How many workers.")]
Capacity = Annotated[
    str, typer.Option("--capacity", metavar="TOKENS", help="Tokens of K/V that one worker holds, as 400k or 3.2M.")
]
Engine = Annotated[str, typer.Option("--engine", metavar="PROFILE", help="Timing model of the workers.")]
Host = Annotated[
    str | None,
    typer.Option("--host", metavar="TOKENS", help="In a worker's host RAM; not `serial`.", show_default="none"),
]
Redis = Annotated[
    str | None,
    typer.Option("--redis", metavar="TOKENS", help="In the shared tier; not `serial`.", show_default="none"),
]
Roles = Annotated[
    str,
    typer.Option(
        "--roles",
        metavar="ROLE=N,...",
        help="Who prefills and who answers, as prefill=2,decode=6; not `serial`. With it, or with both=8, the times "
        "between tokens are shown.",
        show_default="all do both",
    ),
]
PrefillRate = Annotated[
    float | None,
    typer.Option(
        "--prefill-tokens-per-s",
        metavar="N",
        help="Of one worker: 1,000,000 / the `ms/1k prefill` that `warmkv status` shows.",
        show_default="the engine's",
    ),
]
Speed = Annotated[float, typer.Option("--speed", help="So many times faster than recorded.")]
ClosedLoop = Annotated[
    bool, typer.Option("--closed-loop", help="A turn waits for the answer before it, as far as think times are known.")
]
Longest = Annotated[
    int | None, typer.Option("--longest", min=1, metavar="TOKENS", help="Leave out longer prompts.", show_default="all")
]
First = Annotated[
    int | None, typer.Option("--first", min=10, metavar="N", help="Only the first requests.", show_default="all")
]
Affinity = Annotated[
    bool | None,
    typer.Option(
        "--affinity/--no-affinity",
        help="Requests carry their session as affinity key.",
        show_default="as recorded; on for sticky",
    ),
]
Routers = Annotated[int, typer.Option("--routers", min=1, max=64, help="How many; each request goes to a random one.")]
EventDelay = Annotated[
    str, typer.Option("--event-delay", metavar="DURATION", help="From a worker's word to the routers.")
]
Fail = Annotated[
    list[str] | None,
    typer.Option("--fail", metavar="WORKER@TIME+DOWN", help="A worker dies, as 0@10m+30s; repeatable."),
]
Processes = Annotated[
    int | None, typer.Option("--processes", min=1, max=1024, help="Replays at once.", show_default="one a core")
]


def source_of(
    names: Sequence[str], *, speed: float, closed_loop: bool, longest: int | None, first: int | None
) -> Source:
    """The requests to replay. Raises Failure."""
    from replay.comparison import Source

    if not 0 < speed < float("inf"):
        raise Failure(f"--speed {speed:g}: give a number above zero, 1 for the recorded times", USAGE)
    return Source(tuple(trace_path(name) for name in names), speed, closed_loop, longest, first)


def trace_path(name: str) -> Path:
    """The file of that name, or the shipped trace. Raises Failure."""
    from replay.traces import shipped

    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    raise Failure(f"{name} is no file, and no shipped trace either ({', '.join(known)}); name one of them", USAGE)


def read_trace(source: Source) -> Trace:
    """The trace, checked. Raises Failure."""
    from replay.comparison import prepared, read

    def both() -> Trace:
        prepared(source)
        return read(source)

    try:
        return checked(both)
    except OSError as error:
        raise Failure(f"the trace cannot be read ({error}); name another file", USAGE) from None


def fleet_of(
    trace: Trace,
    *,
    workers: int,
    capacity: str,
    engine: str,
    prefill_tokens_per_s: float | None = None,
    routers: int = 1,
    event_delay: str = "0s",
    fail: Sequence[str] = (),
    affinity: bool | None = None,
    host: str | None = None,
    redis: str | None = None,
    roles: str = "",
) -> Fleet:
    """What the trace is replayed on. Raises Failure."""
    from replay.comparison import Fleet
    from replay.engine_choice import profile, tiers

    tokens = token_count("--capacity", capacity)
    checked(lambda: profile(engine, tokens, prefill_tokens_per_s=prefill_tokens_per_s))
    if trace.block_size is None or tokens < trace.block_size:
        raise Failure(f"--capacity {capacity} is less than a block of {trace.block_size} tokens; give more", USAGE)
    failures = tuple(worker_failure(text, workers) for text in fail)
    told = trace.started_s is not None if affinity is None else affinity
    delay_s = duration("--event-delay", event_delay)
    host_tokens = None if host is None else token_count("--host", host)
    redis_tokens = None if redis is None else token_count("--redis", redis)
    checked(lambda: tiers(engine, host_tokens=host_tokens, redis_tokens=redis_tokens, roles=roles))
    return Fleet(
        workers,
        tokens,
        engine,
        prefill_tokens_per_s,
        routers,
        delay_s,
        told,
        failures,
        host_tokens,
        redis_tokens,
        roles,
    )


def configurations(texts: Sequence[str]) -> list[Configuration]:
    """Policies in their text form. Raises Failure."""
    from replay.policy_space import parse_configuration

    parsed = checked(lambda: [parse_configuration(text) for text in texts])
    return list({each.text: each for each in parsed}.values())


def token_count(option: str, text: str) -> int:
    """`400k`, `3.2M`, `400000`. Raises Failure."""
    found = _TOKENS.fullmatch(text.strip().replace("_", "").replace(",", ""))
    tokens = float(found[1]) * _SCALES[found[2]] if found else 0.0
    if not 1 <= tokens <= _MOST_TOKENS:
        raise Failure(f"{option} {text}: write a number of tokens, as 400k, 3.2M or 400000", USAGE)
    return round(tokens)


def duration(option: str, text: str) -> float:
    """Seconds. Raises Failure."""
    from deploy.quantities import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise Failure(f"{option}: {error}", USAGE) from None


def worker_failure(text: str, workers: int) -> WorkerFailure:
    """`0@10m+30s`: worker 0 dies after ten minutes and is back half a minute later. Raises Failure."""
    from replay.simulation import Failure as WorkerFailure

    found = _FAILURE.fullmatch(text.strip())
    if found is None:
        raise Failure(f"--fail {text}: write it as WORKER@TIME+DOWN, for example 0@10m+30s", USAGE)
    if int(found[1]) >= workers:
        raise Failure(f"--fail {text}: there are workers 0 to {workers - 1}; name one of them", USAGE)
    return WorkerFailure(int(found[1]), duration("--fail", found[2]), duration("--fail", found[3]))


def make_folder(out: Path | None) -> None:
    """Before a search and not behind it, so that nobody hears after ten minutes that it fails. Raises Failure."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"--out {out} cannot be made ({error.strerror}); name another folder", USAGE) from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise Failure(f"--out {out}: this user may not write there; name another folder", USAGE)


def checked(make: Callable[[], T]) -> T:
    """What it returns; a ValueError is wrong usage. Raises Failure."""
    try:
        return make()
    except ValueError as error:
        raise Failure(str(error), USAGE) from None
