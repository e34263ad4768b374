"""Small traces for tests: prompts as lists of block contents, numbered as the files do."""

from __future__ import annotations

from collections.abc import Sequence

from replay.traces import Request, Trace
from replay.workload import Workload, workload

BLOCK = 10


def made(
    prompts: Sequence[tuple[float, Sequence[int]]], *, output: int = 5, extra: int = 0, session: str | None = None
) -> Trace:
    """Prompts of (arrival in seconds, contents of the blocks); `extra` tokens stand behind the last full block."""
    numbers: dict[tuple[int, ...], int] = {}
    requests = []
    for turn, (at, blocks) in enumerate(prompts, 1):
        ids = [numbers.setdefault(tuple(blocks[: end + 1]), len(numbers)) for end in range(len(blocks))]
        runs = tuple(_runs(ids))
        think_s = 1.0 if session and turn > 1 else None
        requests.append(Request(at, len(blocks) * BLOCK + extra, output, runs, session, turn, None, think_s, None))
    return Trace("made", BLOCK, tuple(requests))


def made_work(prompts: Sequence[tuple[float, Sequence[int]]], *, output: int = 5, extra: int = 0) -> Workload:
    """The same, ready."""
    return workload(made(prompts, output=output, extra=extra))


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in ids:
        if runs and sum(runs[-1]) == block:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((block, 1))
    return runs
