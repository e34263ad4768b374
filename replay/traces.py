"""Recorded request traces: reading them, and which of their blocks go together.

Covers: the file format (`replay/data/README.md`), the shipped files, and a trace as a tree of segments. Does not cover:
time (a replay's clock is its own) or text (the traces have none).

A block's id stands for the block and the whole prefix before it, so equal ids mean equal prefixes, and what a cache
holds of a prompt is counted by ids. Blocks that are always requested together form one segment: a replay that touches
segments instead of blocks gives the same result in a tenth of the time or less.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Trace:
    """A file's requests, by time.

    Attributes:
        block_size: tokens a block; None: the trace knows no prefixes.
    """

    name: str
    block_size: int | None
    requests: tuple[Request, ...]


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
    """Read a file of one JSON object a line, compressed or not.

    Raises:
        ValueError: a line is no request, or the requests have different block sizes.
    """
    requests, sizes = [], set()
    for number, line in enumerate(_lines(path), 1):
        try:
            fields = json.loads(line)
            requests.append(_request(fields))
            sizes.add(fields["block_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no request of a trace ({error!r})") from error
    if len(sizes) != 1:
        raise ValueError(f"{path}: requests with block sizes {sorted(map(str, sizes))}; a trace has exactly one")
    requests.sort(key=lambda request: request.time_s)
    return Trace(path.name.removesuffix(".gz").removesuffix(".jsonl"), sizes.pop(), tuple(requests))


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


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as lines:
        for line in lines:
            yield line.decode()


def _number(found: Segments, numbers: dict[int, int], chain: list[int], first: int, length: int) -> int:
    number = numbers.setdefault(first, len(numbers))
    if number == len(found.lengths):
        found.lengths.append(length)
        found.parents.append(chain[-1] if chain else None)
        found.ends.append(length + (found.ends[chain[-1]] if chain else 0))
    return number


def _request(fields: dict[str, Any]) -> Request:
    think_ms, turn, tenant = fields.get("think_ms"), fields.get("turn"), fields.get("tenant")
    return Request(
        time_s=fields["timestamp_ms"] / 1e3,
        input_length=int(fields["input_length"]),
        output_length=int(fields["output_length"]),
        runs=tuple((int(first), int(count)) for first, count in fields.get("hash_runs") or ()),
        session=fields.get("session_id"),
        turn=None if turn is None else int(turn),
        stop=fields.get("stop"),
        think_s=None if think_ms is None else think_ms / 1e3,
        tenant=None if tenant is None else int(tenant),
        parent=fields.get("parent"),
        priority=int(fields.get("priority") or 0),
    )
