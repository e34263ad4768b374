"""Requests whose prompt one simulated worker prefills for another one: from the decision to their arrival there.

Covers: the prefill job, the way of its blocks, what becomes of a request when either worker dies. Does not cover: the
decision (`router.pairing`), the engines. Two simplifications: the answering worker's pool holds nothing of a prompt
before all of it has come, and a maker computes the tail that fills no block as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from replay.batched_engine import BatchedEngine, Delivered
from replay.engine import Engine
from replay.tiers import Line, TierProfile
from replay.timeline import Timeline
from replay.workload import Workload
from router.pairing import PIECE_TOKENS, Pair


@dataclass(slots=True, eq=False)
class _Flight:
    """A prompt on its way. `is_made`: the maker is done, and its last blocks travel."""

    maker: str
    answering: str
    blocks: int
    is_made: bool = False


class Pairs:
    """Of one replay."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        work: Workload,
        timeline: Timeline,
        way: TierProfile,
        *,
        arrived: Callable[[int, str, Delivered | None], None],
        left: Callable[[int], None],
    ) -> None:
        """Nothing is on its way.

        Args:
            way: between any two workers.
            arrived: hears of a request whose answering worker may begin, with what was made for it; None: nothing.
            left: hears of a request that its maker works at no more.
        """
        self._engines = {name: engine for name, engine in engines.items() if isinstance(engine, BatchedEngine)}
        self._work, self._timeline, self._way = work, timeline, way
        self._arrived, self._left = arrived, left
        self._flights: dict[int, _Flight] = {}
        self._lines = {name: Line() for name in engines}  # into each worker

    def begin(self, number: int, pair: Pair, answering: str) -> None:
        """A decision was taken."""
        self._flights[number] = _Flight(pair.worker, answering, pair.blocks)
        if not self._engines[pair.worker].prefill(number):
            self._alone(number)

    def made(self, number: int, found_blocks: int, started: float) -> None:
        """The maker is done; the blocks that it has computed since `started` travelled meanwhile, but for the last."""
        flight = self._flights[number]
        flight.is_made = True
        self._left(number)
        now, size = self._timeline.now, self._work.block_size
        tokens = flight.blocks * size
        last_ms = self._way.latency_ms + min(tokens, PIECE_TOKENS) * self._way.token_ms
        all_ms = self._way.latency_ms + tokens * self._way.token_ms
        wait_ms = self._lines[flight.answering].take(now, max(last_ms, all_ms - (now - started) * 1e3))
        self._timeline.after(wait_ms / 1e3, lambda: self._deliver(number, flight, found_blocks))

    def cancel(self, number: int) -> None:
        """Nobody wants it any more; one that is not on its way: nothing happens."""
        flight = self._flights.pop(number, None)
        if flight is not None and not flight.is_made:
            self._engines[flight.maker].cancel(number)
            self._left(number)

    def lost(self, worker: str) -> list[int]:
        """A worker died: those that it made are computed where they are answered; those that it was to answer."""
        for number in [n for n, flight in self._flights.items() if flight.maker == worker and not flight.is_made]:
            self._alone(number)
        orphans = [n for n, flight in self._flights.items() if flight.answering == worker]
        for number in orphans:
            self.cancel(number)
        return orphans

    def _alone(self, number: int) -> None:
        flight = self._flights.pop(number)
        self._left(number)
        self._arrived(number, flight.answering, None)

    def _deliver(self, number: int, flight: _Flight, found_blocks: int) -> None:
        if self._flights.get(number) is not flight:
            return  # it was called off, or lost, on its way
        del self._flights[number]
        self._arrived(number, flight.answering, Delivered(flight.blocks, min(found_blocks, flight.blocks)))
