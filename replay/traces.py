"""Recorded request traces: reading them, and which of their blocks go together.

Covers: the file format (`replay/data/README.md`), the shipped files, and a trace as a tree of segments. Does not cover:
time (a replay's clock is its own) or text (the traces have none).

A block's id stands for the block and the whole prefix before it, so equal ids mean equal prefixes, and what a cache
holds of a prompt is counted by ids. Blocks that are always requested together form one segment: a replay that touches
segments instead of blocks gives the same result in a tenth of the time or less.
"""

from __future__ import annotations

import gzip
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from replay.trace_lines import Happened, Line, parse_line

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Request:
    """One recorded request.

    Attributes:
        time_s: arrival, from the start of the trace.
        input_length, output_length: tokens.
        runs: ids of the prompt's blocks, as (first, count) of consecutive ids; empty where they are not known.
        session, turn: whose it is and which turn of it, from 1; None: not known.
        stop: why the answer ended: tool_use, end_turn, or not known.
        think_s: the client's time between the last answer and this request, for closed-loop replays.
        tenant: number of the client, where there are several.
        parent: the session that started this one, a sub-agent's.
        priority: greater goes first in an engine that knows priorities.
        happened: what a live fleet made of it; None: not known.
    """

    time_s: float
    input_length: int
    output_length: int
    runs: tuple[tuple[int, int], ...]
    session: str | None
    turn: int | None
    stop: str | None
    think_s: float | None
    tenant: int | None
    parent: str | None = None
    priority: int = 0
    happened: Happened | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """A file's requests, by time.

    Attributes:
        block_size: tokens a block; None: the trace knows no prefixes.
        started_s: when it was recorded, in seconds since the epoch; None: it was not recorded by `warmkv record`.
        cut_off: the file ends in the middle of a line, as one does whose writer was killed; that line is left out.
    """

    name: str
    block_size: int | None
    requests: tuple[Request, ...]
    started_s: float | None = None
    cut_off: bool = False


@dataclass(frozen=True, slots=True)
class Segments:
    """A trace's blocks in runs that are always requested together, numbered from 0.

    Attributes:
        lengths: blocks of each. parents: the segment before each; None: it starts a prompt.
        ends: blocks from the start of the prompt to the end of each.
        chains: each request's segments, first block first.
    """

    lengths: list[int]
    parents: list[int | None]
    ends: list[int]
    chains: list[list[int]]


def shipped() -> dict[str, Path]:
    """The traces that come with the project, by name."""
    return {path.name.removesuffix(".jsonl.gz"): path for path in sorted(DATA.glob("*.jsonl.gz"))}


def load(path: Path) -> Trace:
    """Read a file of one JSON object a line, compressed or not, in our format or Mooncake's.

    Raises:
        ValueError: a line is no request, the requests have different block sizes, or ids contradict one another.
        OSError: the file cannot be read.
    """
    lines, whole = _lines(path)
    requests, sizes, started = [], set(), None
    for number, text in enumerate(lines, 1):
        try:
            line = parse_line(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no request of a trace: {error}; mend or remove it") from None
        requests.append(_request(line))
        sizes.add(line.block_size)
        started = line.started_s if started is None else started
    if not requests:
        raise ValueError(f"{path} holds no request; a trace has one JSON object a line, `warmkv record` writes one")
    if len(sizes) != 1:
        raise ValueError(f"{path}: requests with block sizes {sorted(map(str, sizes))}; a trace has exactly one")
    check_prefixes(path, requests)
    requests.sort(key=lambda request: request.time_s)
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Trace(name, sizes.pop(), tuple(requests), started, cut_off=not whole)


def check_prefixes(path: Path, requests: Sequence[Request]) -> None:
    """An id stands for its block and all that is before it, so it stands always behind the same one. O(runs).

    Raises:
        ValueError: some id stands behind two different ones; the message names line and id.
    """
    before: dict[int, int | None] = {}  # first block of a run, and the block before it
    inside: list[tuple[int, int]] = []
    for number, request in enumerate(requests, 1):
        last: int | None = None
        for first, count in request.runs:
            if before.setdefault(first, last) != last:
                raise _contradiction(path, number, first, before[first], last)
            inside.append((first, first + count))
            last = first + count - 1
    _check_inside(path, before, inside)


def _check_inside(path: Path, before: dict[int, int | None], inside: list[tuple[int, int]]) -> None:
    """A run that begins within another one begins behind the same block as there."""
    runs = sorted(set(inside))
    at, reach = 0, -1  # how far the runs reach that begin before a start
    for start in sorted(before):
        while at < len(runs) and runs[at][0] < start:
            reach = max(reach, runs[at][1])
            at += 1
        if start < reach and before[start] != start - 1:
            raise _contradiction(path, None, start, start - 1, before[start])


def _contradiction(path: Path, line: int | None, block: int, one: int | None, other: int | None) -> ValueError:
    where = f"{path}, line {line}" if line else f"{path}"
    places = " and ".join("at the start" if each is None else f"behind {each}" for each in (one, other))
    return ValueError(
        f"{where}: block id {block} stands {places}; an id must stand for its block and all before it, so number "
        "each distinct prefix anew"
    )


def segments(requests: Sequence[Request], *, longest: int | None = None) -> Segments:
    """Cut the ids wherever some request's run begins or ends. O(n log n) in runs and segments.

    Args:
        requests: of one trace.
        longest: cut longer segments into pieces of so many blocks.
    """
    edges: set[int] = set()
    for request in requests:
        for first, count in request.runs:
            edges.update((first, first + count))
            if longest is not None:
                edges.update(range(first - first % longest + longest, first + count, longest))
    cuts = sorted(edges)
    numbers: dict[int, int] = {}  # by first block
    found = Segments([], [], [], [])
    for request in requests:
        chain: list[int] = []
        for first, count in request.runs:
            for at in range(bisect_left(cuts, first), bisect_left(cuts, first + count)):
                chain.append(_number(found, numbers, chain, cuts[at], cuts[at + 1] - cuts[at]))
        found.chains.append(chain)
    return found


def _lines(path: Path) -> tuple[list[str], bool]:
    """(lines that are not empty, whether the file ends where a line does)."""
    lines: list[bytes] = []
    whole = True
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as opened:
            lines.extend(opened)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if not lines:
            raise ValueError(f"{path} is no gzip file ({error}); name it .jsonl if it is not compressed") from None
        whole = False  # its writer was killed
    if lines and not lines[-1].endswith(b"\n"):
        whole = whole and _is_whole(lines[-1])
        if not whole:
            lines.pop()
    try:
        return [text for line in lines if (text := line.decode().strip())], whole
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text ({error}); a compressed trace must be named .gz") from None


def _is_whole(line: bytes) -> bool:
    return line.rstrip().endswith(b"}")


def _number(found: Segments, numbers: dict[int, int], chain: list[int], first: int, length: int) -> int:
    number = numbers.setdefault(first, len(numbers))
    if number == len(found.lengths):
        found.lengths.append(length)
        found.parents.append(chain[-1] if chain else None)
        found.ends.append(length + (found.ends[chain[-1]] if chain else 0))
    return number


def _request(line: Line) -> Request:
    return Request(
        time_s=line.time_s,
        input_length=line.input_length,
        output_length=line.output_length,
        runs=line.runs,
        session=line.session,
        turn=line.turn,
        stop=line.stop,
        think_s=line.think_s,
        tenant=line.tenant,
        parent=line.parent,
        priority=line.priority,
        happened=line.happened,
    )
