"""One line of a trace file as a request: our own format and Mooncake's public one, and what is wrong with a bad line.

Covers: fields, their types and ranges. Does not cover: files (`traces`), or whether ids are consistent over lines
(`traces.check_prefixes`).

Ours is described in `replay/data/README.md`. Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release/traces, which
other replayers read and write too) has `timestamp` in ms, `input_length`, `output_length` and `hash_ids`, one id for
every 512 tokens, the last block counted even when it is not full.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOONCAKE_BLOCK = 512
_FATES = ("computed", "device", "host", "disk", "redis", "peer")
_MOST = 1 << 40  # of any count; more is no token count but garbage
_MOST_MS = 1000 * 365.25 * 86400e3  # a thousand years; times since 1970 are less


@dataclass(frozen=True, slots=True)
class Happened:
    """What a live fleet made of a request, where the trace was recorded from one.

    Attributes:
        ttft_s: to the first token; None: there was none. cached, computed: prompt tokens. worker: that ran it.
        duration_s: to the end. code: "OK" or how it failed.
    """

    ttft_s: float | None
    cached: int
    computed: int
    worker: str
    duration_s: float | None = None
    code: str = "OK"


@dataclass(frozen=True, slots=True)
class Line:
    """The fields of a line, checked. `block_size` None: it knows no prefixes. The rest as in `traces.Request`."""

    time_s: float
    input_length: int
    output_length: int
    block_size: int | None
    runs: tuple[tuple[int, int], ...]
    session: str | None
    turn: int | None
    stop: str | None
    think_s: float | None
    tenant: int | None
    parent: str | None
    started_s: float | None
    happened: Happened | None
    priority: int = 0


def parse_line(text: str) -> Line:
    """A line of either format.

    Raises:
        ValueError: it is none; the message says what is wrong, and what was expected.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"it holds {type(fields).__name__}, not a JSON object with the fields of a request")
    if "timestamp_ms" in fields:
        line = _ours(fields)
    elif "timestamp" in fields:
        line = _mooncake(fields)
    else:
        raise ValueError("it has neither timestamp_ms (our format) nor timestamp (Mooncake's)")
    _check_blocks(line)
    return line


def runs_of(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ids as (first, count) of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for one in ids:
        if runs and runs[-1][0] + runs[-1][1] == one:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((one, 1))
    return tuple(runs)


def _ours(fields: Mapping[str, Any]) -> Line:
    size = fields.get("block_size")
    return Line(
        time_s=_number(fields, "timestamp_ms") / 1e3,
        input_length=_count(fields, "input_length", least=1),
        output_length=_count(fields, "output_length"),
        block_size=None if size is None else _count(fields, "block_size", least=1),
        runs=_runs(fields.get("hash_runs")),
        session=_text(fields, "session_id"),
        turn=None if fields.get("turn") is None else _count(fields, "turn"),
        stop=_text(fields, "stop"),
        think_s=None if fields.get("think_ms") is None else _number(fields, "think_ms") / 1e3,
        tenant=None if fields.get("tenant") is None else _count(fields, "tenant"),
        parent=_text(fields, "parent"),
        started_s=None if fields.get("started_unix_ms") is None else _number(fields, "started_unix_ms") / 1e3,
        happened=_happened(fields),
        priority=_priority(fields),
    )


def _mooncake(fields: Mapping[str, Any]) -> Line:
    ids = fields.get("hash_ids")
    if not isinstance(ids, list) or not all(_is_id(one) for one in ids):
        raise ValueError("hash_ids is no list of whole numbers from 0; a trace without prefixes cannot be replayed")
    return Line(
        time_s=_number(fields, "timestamp") / 1e3,
        input_length=_count(fields, "input_length", least=1),
        output_length=_count(fields, "output_length"),
        block_size=_count(fields, "block_size", least=1) if fields.get("block_size") is not None else MOONCAKE_BLOCK,
        runs=runs_of(ids),
        session=_text(fields, "session_id"),
        turn=None,
        stop=None,
        think_s=None,
        tenant=None,
        parent=None,
        started_s=None,
        happened=None,
    )


def _happened(fields: Mapping[str, Any]) -> Happened | None:
    fates = fields.get("fates")
    if fates is None and fields.get("ttft_ms") is None and fields.get("code") is None:
        return None
    if fates is None:
        fates = {}
    if not isinstance(fates, dict) or not set(fates) <= set(_FATES):
        raise ValueError(f"fates is no object with some of {', '.join(_FATES)}")
    tokens = {fate: _count(fates, fate) for fate in fates}
    return Happened(
        ttft_s=None if fields.get("ttft_ms") is None else _number(fields, "ttft_ms") / 1e3,
        cached=sum(count for fate, count in tokens.items() if fate != "computed"),
        computed=tokens.get("computed", 0),
        worker=_text(fields, "worker") or "",
        duration_s=None if fields.get("duration_ms") is None else _number(fields, "duration_ms") / 1e3,
        code=_text(fields, "code") or "OK",
    )


def _runs(given: object) -> tuple[tuple[int, int], ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise ValueError("hash_runs is no list of [first id, count] pairs")
    for run in given:
        if not (isinstance(run, list) and len(run) == 2 and all(_is_id(part) for part in run) and run[1]):
            raise ValueError(f"hash_runs has {run!r}, which is no [first id, count] with a count of at least 1")
    return tuple((first, count) for first, count in given)


def _check_blocks(line: Line) -> None:
    """A prompt has as many blocks as fit; one more is let pass, since some writers round up twice."""
    if line.block_size is None:
        if line.runs:
            raise ValueError("it has hash_runs and no block_size")
        return
    blocks = sum(count for _, count in line.runs)
    most = -(-line.input_length // line.block_size)
    if blocks > most + 1:
        raise ValueError(
            f"it has {blocks} blocks of {line.block_size} tokens, and {line.input_length} tokens have at most {most}"
        )


def _priority(fields: Mapping[str, Any]) -> int:
    value = fields.get("priority", 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"priority is {value!r}; it should be a whole number")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_MS:
        raise ValueError(
            f"{name} is {value!r}; it should be a number from 0, of milliseconds, for a thousand years at most"
        )
    return float(value)


def _count(fields: Mapping[str, Any], name: str, *, least: int = 0) -> int:
    value = fields.get(name)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= _MOST  # false for NaN as well
        or value != int(value)
    ):
        raise ValueError(f"{name} is {value!r}; it should be a whole number from {least}")
    return int(value)


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name} is {value!r}; it should be a text or null")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST
