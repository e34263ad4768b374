"""The steps that were launched and not taken in yet: none, or one; two for a moment, while `launch` is under way.

    host    | schedule n+1, launch | wait n, take in | schedule n+2, launch | wait n+1, take in | ...
    device  |  ... step n ...             | step n+1 ...                           | step n+2 ...

The device computes step n+1 while the host takes in step n and schedules n+2.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from kvstore.store import TieredStore
from workers.scheduler import Chunk
from workers.sequence import Sequence
from workers.stepping.holds import Holds
from workers.stepping.launch import Flight, Launcher, must_wait
from workers.stepping.work import make_work


class Pipeline:
    """Launches steps, and keeps what they use until they have ended.

    Attributes:
        store: as the scheduler shall see it.
    """

    def __init__(
        self, launcher: Launcher, store: TieredStore, block_size: int, ends_with: Callable[[Sequence, int], bool]
    ) -> None:
        """`ends_with`: whether a sequence is sure to end when it has so many tokens."""
        self.store = Holds(store)
        self._launcher, self._block_size, self._ends_with = launcher, block_size, ends_with
        self._flight: Flight | None = None

    @property
    def is_flying(self) -> bool:
        """Whether a step is in flight."""
        return self._flight is not None

    @property
    def must_land(self) -> bool:
        """Whether the step in flight is to be taken in before anything is scheduled behind it."""
        return self._flight is not None and must_wait(self._flight.work.ready)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may stay in flight while the next one is scheduled."""
        return self._launcher.runs_ahead

    def lift(self) -> Flight | None:
        """The step in flight; from now on it is the caller's, who waits for it and then calls `end`."""
        flight, self._flight, self.store.given_back = self._flight, None, None
        return flight

    def launch(self, chunks: Items[Chunk], now: float, before: Flight | None) -> None:
        """Start a step behind `before`, which `lift` gave; its sequences are then as far as it brings them.

        Raises:
            RuntimeError: it failed at once, and the device has nothing to do any more.
        """
        work = make_work(chunks, self._block_size, () if before is None else before.work.ready)
        try:
            flight = self._launcher.launch(work)
        except RuntimeError:
            self._launcher.settle()
            raise
        flight.started = now
        self._flight, self.store.given_back = flight, flight.given_back
        for chunk, stop in zip(work.chunks, work.stops, strict=True):
            chunk.sequence.num_computed = stop
        if self._launcher.runs_ahead:
            for sequence in work.ready:
                if not self._ends_with(sequence, sequence.num_computed + 1):
                    sequence.ahead = sequence.num_computed + 1

    def undo(self, flight: Flight) -> None:
        """A step could not be computed: its sequences are as far as before it, and so are those of the step behind it,
        which is thrown away. What both have written to blocks is written again, and blocks that were taken over behind
        what is computed no more are given back."""
        later = self.lift()
        for each in (later, flight):
            if each is not None:
                _roll_back(each)
        if later is not None:
            self._launcher.settle()
            self.end(later)
        for chunk in flight.work.chunks:
            self.store.release(chunk.sequence.unjoin(self._block_size))

    def end(self, flight: Flight) -> None:
        """A step has been taken in: what was given back while it ran is free."""
        self.store.end(flight.given_back)

    def close(self) -> None:
        """Wait for the device, give everything back, and let go of the pool."""
        try:
            self._launcher.settle()
        finally:
            if (flight := self.lift()) is not None:
                self.end(flight)
            self._launcher.close()


def _roll_back(flight: Flight) -> None:
    for chunk, stop in zip(flight.work.chunks, flight.work.stops, strict=True):
        chunk.sequence.num_computed, chunk.sequence.ahead = stop - chunk.length, 0
