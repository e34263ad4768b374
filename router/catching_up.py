"""The first moments of a router: whose snapshots it still waits for before it decides.

Covers: which of the workers that it met first have yet to say what they hold, and for how long that is worth waiting
for. Does not cover: the waiting itself (`readiness`). A router that decided as soon as one worker is known would send
everything there, and whatever the others hold would be computed once more.

A worker is waited for until its snapshot is complete, it was refused, is no longer listed, or was not reached in so
many tries that it counts as dead: one try may fail for a moment. All of them until `patience_s` have passed since the
first list of workers came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from router.link import WorkerLink

_DEAD_AFTER = 4  # tries in a row: about a second and a half where nobody listens

log = logging.getLogger(__name__)


class CatchingUp:
    """See the module.

    Attributes:
        waiting: names of those that are waited for, sorted; empty before the first list and for ever after the end.
    """

    def __init__(self, clock: Callable[[], float], *, patience_s: float) -> None:
        self.waiting: tuple[str, ...] = ()
        self._clock, self._patience_s = clock, patience_s
        self._started: float | None = None
        self._ended = False

    def met(self, workers: Iterable[str]) -> None:
        """A list of workers came; the first one that names any begins the wait."""
        if self._started is None and (names := tuple(sorted(workers))):
            self._started, self.waiting = self._clock(), names

    def note(self, links: Sequence[WorkerLink]) -> None:
        """Look who of those listed is still missing; the wait ends with the last one, or with the patience."""
        if self._started is None or self._ended:
            return
        missing = {link.name for link in links if not (link.synced or link.refused or link.failures >= _DEAD_AFTER)}
        self.waiting = tuple(name for name in self.waiting if name in missing)
        waited_s = self._clock() - self._started
        if not self.waiting:
            self._end("the router knows what its workers hold", (), waited_s)
        elif waited_s >= self._patience_s:
            missed, self.waiting = self.waiting, ()
            self._end("the router decides without some workers, whose snapshots take too long", missed, waited_s)

    def _end(self, said: str, missed: Sequence[str], waited_s: float) -> None:
        self._ended = True
        level = logging.WARNING if missed else logging.INFO
        log.log(level, said, extra={"missed": ",".join(missed), "waited_s": round(waited_s, 3)})
