"""What this router has sent lately, and what follows from it before any worker reports it.

Covers: work given to each worker with a decaying memory, the fleet's utilisation, prompts on their way (their blocks
will be there), how many requests in flight share a block, and how many blocks they use. Does not cover: prices (`cost`)
or weights (`policy`).
Pure and synchronous, on an injected clock. Every question leaves the state as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.active_blocks import ActiveBlocks

# How long placements and utilisation are remembered, in seconds: longer than a prefill, shorter than swings of load.
MEMORY_S = 30.0
# A worker counts as having been there for so long at least, in seconds: what it was given in less says little.
_LEAST_THERE_S = 1.0
# A load report that came this long after a job was sent contains it: workers report at most every 20 ms.
_REFLECTED_AFTER_S = 0.04


class Decayed:
    """A sum that forgets exponentially: after `memory_s` seconds a contribution counts 1/e."""

    __slots__ = ("_at", "_memory_s", "_sum")

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._sum = 0.0
        self._at = 0.0

    def add(self, amount: float, now: float) -> None:
        """Count an amount."""
        self._sum = self.value(now) + amount
        self._at = now

    def value(self, now: float) -> float:
        """The sum now."""
        return self._sum * math.exp(-max(0.0, now - self._at) / self._memory_s)


@dataclass(slots=True)
class Sent:
    """A request on a worker. `shared` leading blocks of its chain are counted as being shared by requests in flight."""

    worker: str
    hashes: Sequence[bytes]
    work_ms: float
    at: float
    shared: int
    prefilling: bool = True


class Traffic:
    """The memory of what was sent. One per router."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work: dict[str, Decayed] = {}
        self._fleet = Decayed()
        self._arriving: dict[str, Counter[bytes]] = {}
        self._sharing: Counter[bytes] = Counter()
        self._sent: dict[str, set[int]] = {}
        self._active: dict[str, ActiveBlocks] = {}
        self._flights: dict[int, Sent] = {}

    def sent(self, key: int, worker: str, hashes: Sequence[bytes], *, work_ms: float, cached_blocks: int) -> None:
        """A request went to a worker, predicted to be `work_ms` of load and compute, its first blocks cached there."""
        now = self._clock()
        self._work.setdefault(worker, Decayed()).add(work_ms, now)
        self._fleet.add(work_ms, now)
        self._flights[key] = Sent(worker, hashes, work_ms, now, cached_blocks)
        self._sent.setdefault(worker, set()).add(key)
        self._active.setdefault(worker, ActiveBlocks()).add(hashes)
        self._arriving.setdefault(worker, Counter()).update(hashes)
        self._sharing.update(hashes[:cached_blocks])

    def first_token(self, key: int) -> None:
        """Its prefill is done: all its blocks are cached now, and others may share them."""
        flight = self._flights.get(key)
        if flight is None or not flight.prefilling:
            return
        self._arrived(flight)
        self._sharing.update(flight.hashes[flight.shared :])
        flight.shared = len(flight.hashes)

    def ended(self, key: int) -> None:
        """It finished, failed, was cancelled or lost its worker."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        self._sent[flight.worker].discard(key)
        self._active[flight.worker].remove(flight.hashes)
        self._arrived(flight)
        _take(self._sharing, flight.hashes[: flight.shared])

    def recent_work_ms(self, worker: str, *, joined_at: float = -math.inf) -> float:
        """Work given to the worker, with the memory of `MEMORY_S`.

        For one that joined since, what it would be had it always been given as much: a worker that is new is not a
        quiet one, and every tie would go to it until it has caught up with the memory of the others.
        """
        work, now = self._work.get(worker), self._clock()
        there_s = max(now - joined_at, _LEAST_THERE_S)
        return work.value(now) / (1.0 - math.exp(-there_s / MEMORY_S)) if work else 0.0

    def utilisation(self, workers: int) -> float:
        """Share of the fleet's time that the work of this router takes; may exceed 1."""
        return self._fleet.value(self._clock()) / (MEMORY_S * 1000.0 * workers) if workers else 0.0

    def unreported(self, worker: str, reported_at: float) -> tuple[float, int]:
        """(milliseconds of work, requests) sent to a worker that its report of that time cannot contain yet."""
        late = self._late(worker, reported_at)
        return sum(f.work_ms for f in late), len(late)

    def doubtful_ms(self, worker: str, reported_at: float) -> float:
        """The part of the unreported work that was sent before the report came, and may be in it after all."""
        return sum(f.work_ms for f in self._late(worker, reported_at) if f.at <= reported_at)

    def unreported_blocks(self, worker: str, reported_at: float) -> int:
        """Blocks to compute that were sent to a worker and that its report of that time cannot contain yet."""
        return sum(len(f.hashes) - f.shared for f in self._late(worker, reported_at))

    def active_blocks(self, worker: str, hashes: Sequence[bytes]) -> int:
        """Different blocks that requests in flight on the worker use, if one with this chain were among them."""
        active = self._active.get(worker)
        return active.distinct + active.new(hashes) if active else len(hashes)

    def arriving_run(self, worker: str, hashes: Sequence[bytes]) -> int:
        """Leading blocks of a chain that prompts now in prefill on the worker will leave there. O(log blocks).

        Whole chains are registered, so what a worker expects of any chain is a leading part of it: bisect.
        """
        expected = self._arriving.get(worker)
        if not expected or not hashes or hashes[0] not in expected:
            return 0
        low, high = 1, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if hashes[middle - 1] in expected else (low, middle - 1)
        return low

    def sharers(self, hashes: Sequence[bytes]) -> list[int]:
        """For each leading block of a chain how many requests in flight use it where it is cached; ends at the first 0.

        Only leading runs are registered, so behind a zero there are only zeros.
        """
        counts = []
        for block in hashes:
            sharing = self._sharing.get(block, 0)
            if not sharing:
                break
            counts.append(sharing)
        return counts

    def forget(self, worker: str) -> None:
        """The worker is gone for good."""
        self._work.pop(worker, None)
        if not self._sent.get(worker):
            self._sent.pop(worker, None)
            self._active.pop(worker, None)

    def check(self) -> bool:
        """Whether nothing is left over when nothing is in flight."""
        idle = not self._flights
        left = self._sharing or any(self._arriving.values()) or any(a.distinct for a in self._active.values())
        return not idle or not left

    def _late(self, worker: str, reported_at: float) -> list[Sent]:
        flights = (self._flights[key] for key in self._sent.get(worker, ()))
        return [f for f in flights if f.prefilling and f.at + _REFLECTED_AFTER_S > reported_at]

    def _arrived(self, flight: Sent) -> None:
        if flight.prefilling:
            flight.prefilling = False
            _take(self._arriving[flight.worker], flight.hashes)


def _take(counts: Counter[bytes], hashes: Sequence[bytes]) -> None:
    for block in hashes:
        left = counts[block] - 1
        if left:
            counts[block] = left
        else:
            del counts[block]
