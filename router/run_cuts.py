"""Cutting runs and moving blocks between neighbours, so that runs are as long as their holders allow.

Every function leaves each known block in exactly one run, and rewrites at most the blocks that change their run. What
a run's `proved` says of its own leading blocks stays true of those that it keeps.
"""

from __future__ import annotations

from router.run import Run
from router.run_table import RunTable


def cut(table: RunTable, run: Run, at: int) -> tuple[Run, Run]:
    """Two runs of one, after `at` blocks. The longer part stays the object that it was."""
    width, names = table.width, run.names
    first, last = bytes(names[at * width : (at + 1) * width]), bytes(names[(at - 1) * width : at * width])
    if 2 * at >= run.length:
        piece = table.new(names[at * width :], run.holders, last)
        piece.after, piece.proved = run.after, max(1, run.proved - at)
        table.order.insert(piece, before=run)
        shorten(table, run, at, first)
        table.point(piece, piece.names)
        return run, piece
    piece = table.new(names[: at * width], run.holders, run.before)
    piece.after, piece.proved = first, min(run.proved, at)
    table.order.insert_after(piece, run)
    behead(table, run, at)
    table.point(piece, piece.names)
    return piece, run


def move_down(table: RunTable, run: Run, count: int, before: Run) -> None:
    """The run's first blocks become the last of the run before it, which has the holders that they are to have."""
    width = table.width
    part = run.names[: count * width]
    table.point(before, part)
    before.names += part
    before.length += count
    before.last = bytes(part[-width:])
    before.holders.blocks += count
    run.holders.blocks -= count
    if count == run.length:
        before.after = run.after
        table.discard(run)
    else:
        behead(table, run, count)
        before.after = bytes(run.names[:width])


def move_up(table: RunTable, run: Run, at: int, following: Run) -> None:
    """The run's blocks from `at` on become the first of the run after it, as `move_down` does."""
    width = table.width
    part = run.names[at * width :]
    count = run.length - at
    table.point(following, part)
    following.names[:0] = part
    following.length += count
    following.proved = min(count, max(1, run.proved - at))
    following.holders.blocks += count
    run.holders.blocks -= count
    if at:
        shorten(table, run, at, bytes(part[:width]))
        following.before = run.last
    else:
        following.before = run.before
        table.discard(run)


def shorten(table: RunTable, run: Run, length: int, after: bytes | None) -> None:
    """Only its first blocks stay in a run."""
    del run.names[length * table.width :]
    run.length, run.last, run.after = length, bytes(run.names[-table.width :]), after
    run.proved = min(run.proved, length)


def behead(table: RunTable, run: Run, count: int) -> None:
    """A run's first blocks leave it; they stay those before it."""
    width = table.width
    run.before = bytes(run.names[(count - 1) * width : count * width])
    del run.names[: count * width]
    run.length -= count
    run.proved = max(1, run.proved - count)


def following(table: RunTable, run: Run) -> Run | None:
    """The run that begins with the block after this one."""
    found = None if run.after is None else table.find(run.after)
    return found if found is not None and found is not run and found.names.startswith(run.after or b"") else None


def previous(table: RunTable, run: Run) -> Run | None:
    """The run that ends with the block before this one."""
    found = None if run.before is None else table.find(run.before)
    return found if found is not None and found is not run and found.last == run.before else None
