"""The order in which runs were placed, and a sweep through it that survives every change. Pure.

A linked list through the runs themselves: a run is placed, put beside another or taken out in constant time, and
nothing is searched or rewritten in bulk.
"""

from __future__ import annotations

from collections.abc import Iterator

from router.run import Run


class PlacementOrder:
    """The order. `cursor`: the run at which the sweep goes on; None: it is through."""

    def __init__(self) -> None:
        self._end = _sentinel()
        self.cursor: Run | None = None

    def __iter__(self) -> Iterator[Run]:
        """The runs, those placed longest ago first. Nothing may change meanwhile."""
        run = self._end.newer
        while run is not self._end:
            yield run
            run = run.newer

    @property
    def oldest(self) -> Run | None:
        """The run placed longest ago."""
        run = self._end.newer
        return None if run is self._end else run

    def append(self, run: Run) -> None:
        """A new run, placed last."""
        _link(run, self._end)

    def insert(self, run: Run, *, before: Run) -> None:
        """A new run, placed just before another; a sweep that stands at that one looks at this one, too."""
        _link(run, before)
        if before is self.cursor:
            self.cursor = run

    def insert_after(self, run: Run, other: Run) -> None:
        """A new run, placed just after another."""
        _link(run, other.newer)

    def remove(self, run: Run) -> None:
        """The run is gone."""
        if run is self.cursor:
            self.cursor = run.newer
        run.older.newer, run.newer.older = run.newer, run.older

    def touch(self, run: Run) -> None:
        """The run is the one placed last."""
        if run.newer is not self._end:
            self.remove(run)
            _link(run, self._end)

    def rewind(self) -> None:
        """The sweep begins anew."""
        self.cursor = self._end.newer

    def advance(self) -> Run | None:
        """The run at the cursor, which goes on to the next one; None: the sweep is through."""
        run = self.cursor
        if run is None or run is self._end:
            self.cursor = None
            return None
        self.cursor = run.newer
        return run


def _sentinel() -> Run:
    """After the newest, before the oldest."""
    end = Run()
    end.older = end.newer = end
    end.length, end.number = 0, -1
    return end


def _link(run: Run, newer: Run) -> None:
    run.older, run.newer = newer.older, newer
    newer.older.newer = run
    newer.older = run
