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
from typing import NamedTuple

from router.chain_tree import ChainTree, Runs

# How long placements and utilisation are remembered, in seconds: longer than a prefill, shorter than swings of load.
MEMORY_S = 30.0
# A worker counts as having been there for so long at least, in seconds: what it was given in less says little.
_LEAST_THERE_S = 1.0
_FLEET = ""  # the owner of what is counted for all workers together


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
        return self._sum * math.exp((self._at - now) / self._memory_s) if now > self._at else self._sum


class Unreported(NamedTuple):
    """Requests before their first token that a worker's report does not know of.

    Attributes:
        ms: their work. ends_at: when it is done if each began as soon as it was sent and those before it were done.
    """

    ms: float
    requests: int
    ends_at: float


NOTHING_UNREPORTED = Unreported(0.0, 0, -math.inf)


@dataclass(slots=True)
class Sent:
    """A request on a worker. `shared` leading names of its chain are counted as being shared by requests in flight."""

    worker: str
    hashes: Sequence[bytes]
    names: Sequence[bytes]
    work_ms: float
    at: float
    shared: int
    prefilling: bool = True


class Traffic:
    """The memory of what was sent. One per router.

    Every sum and count is kept up to date when something is sent or ends, so that a question costs what has changed
    since the last reports and the nodes on a chain's path, however much is in flight.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work: dict[str, Decayed] = {}
        self._fleet = Decayed()
        self._arriving = ChainTree()
        self._sharing = ChainTree()
        self._active = ChainTree()
        self._active_blocks: dict[str, int] = {}
        self._flights: dict[int, Sent] = {}
        self._in_flight: Counter[str] = Counter()
        self._prefilling: dict[str, dict[int, Sent]] = {}  # by worker, in the order of sending
        # The last answer of each worker, with the moment that it was given for. Between two decisions one
        # or two workers of a fleet say or are sent something: for the others it still holds.
        self._unreported: dict[str, tuple[float, Unreported]] = {}

    def sent(self, key: int, worker: str, hashes: Sequence[bytes], *, work_ms: float, cached_blocks: int) -> None:
        """A request went to a worker, predicted to be `work_ms` of load and compute, its first blocks cached there.

        The hashes must not change until it has ended.
        """
        now, names = self._clock(), self._names(hashes)
        self._work.setdefault(worker, Decayed()).add(work_ms, now)
        self._fleet.add(work_ms, now)
        flight = self._flights[key] = Sent(worker, hashes, names, work_ms, now, self._depth(hashes, cached_blocks))
        self._in_flight[worker] += 1
        self._prefilling.setdefault(worker, {})[key] = flight
        self._unreported.pop(worker, None)
        before = self._active.add(worker, names, len(names))
        self._active_blocks[worker] = self._active_blocks.get(worker, 0) + self._rest(hashes, before)
        self._arriving.add(worker, names, len(names))
        self._sharing.add(_FLEET, names, flight.shared)

    def first_token(self, key: int) -> None:
        """Its prefill is done: all its blocks are cached now, and others may share them."""
        flight = self._flights.get(key)
        if flight is None or not flight.prefilling:
            return
        self._arrived(key, flight)
        self._sharing.remove(_FLEET, flight.names, flight.shared)
        flight.shared = len(flight.names)
        self._sharing.add(_FLEET, flight.names, flight.shared)

    def ended(self, key: int) -> None:
        """It finished, failed, was cancelled or lost its worker."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        self._in_flight[flight.worker] -= 1
        self._arrived(key, flight)
        self._sharing.remove(_FLEET, flight.names, flight.shared)
        after = self._active.remove(flight.worker, flight.names, len(flight.names))
        self._active_blocks[flight.worker] -= self._rest(flight.hashes, after)

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

    def unreported(self, worker: str, known_until: float) -> Unreported:
        """What was sent to a worker since the moment up to which its report knows of requests."""
        if not self._prefilling.get(worker):
            return NOTHING_UNREPORTED
        known = self._unreported.get(worker)
        if known is None or known[0] != known_until:
            known = self._unreported[worker] = (known_until, _summed(self._late(worker, known_until)))
        return known[1]

    def unreported_blocks(self, worker: str, known_until: float) -> int:
        """Blocks to compute that were sent to a worker since then."""
        return sum(self._rest(f.hashes, f.shared) for f in self._late(worker, known_until))

    def active_blocks(self, hashes: Sequence[bytes], workers: Sequence[str]) -> list[int]:
        """By worker the different blocks that requests in flight there use, if one with this chain were among them."""
        known = self._active.depths(self._names(hashes))
        return [self._active_blocks.get(w, 0) + self._rest(hashes, known.get(w, 0)) for w in workers]

    def arriving(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks of a chain that prompts now in prefill will leave on each worker; those with none left out."""
        return self._arriving.depths(self._names(hashes))

    def arriving_run(self, worker: str, hashes: Sequence[bytes]) -> int:
        """The same of one worker."""
        return self.arriving(hashes).get(worker, 0)

    def sharers(self, hashes: Sequence[bytes]) -> Runs:
        """How many requests in flight use the leading blocks of a chain where they are cached, as runs of equal number:
        (requests, end of the run in blocks), until nobody does.
        """
        return self._sharing.runs(self._names(hashes))

    def forget(self, worker: str) -> None:
        """The worker is gone for good."""
        self._work.pop(worker, None)
        self._unreported.pop(worker, None)
        if not self._in_flight[worker]:  # else what is left ends one by one
            del self._in_flight[worker]
            self._active_blocks.pop(worker, None)
            self._prefilling.pop(worker, None)

    def check(self) -> bool:
        """Whether nothing is left over when nothing is in flight."""
        idle = not self._flights
        left = self._sharing or self._arriving or self._active or any(self._active_blocks.values())
        return not idle or not left

    # A chain by the names of its parts; here each block has one.

    def _names(self, hashes: Sequence[bytes]) -> Sequence[bytes]:
        return hashes

    def _depth(self, hashes: Sequence[bytes], blocks: int) -> int:
        """Leading parts that lie within so many leading blocks."""
        return min(blocks, len(hashes))

    def _rest(self, hashes: Sequence[bytes], depth: int) -> int:
        """Blocks behind so many leading parts."""
        return len(hashes) - depth

    def _late(self, worker: str, known_until: float) -> list[Sent]:
        late = []
        for flight in reversed(self._prefilling.get(worker, {}).values()):
            if flight.at <= known_until:
                break  # and so are all that were sent before it
            late.append(flight)
        late.reverse()  # sums are made in the order of sending, whatever was reported between
        return late

    def _arrived(self, key: int, flight: Sent) -> None:
        if flight.prefilling:
            flight.prefilling = False
            del self._prefilling[flight.worker][key]
            self._unreported.pop(flight.worker, None)
            self._arriving.remove(flight.worker, flight.names, len(flight.names))


def _summed(late: Sequence[Sent]) -> Unreported:
    ms, ends_at = 0.0, -math.inf
    for flight in late:
        ms += flight.work_ms
        ends_at = max(ends_at, flight.at) + flight.work_ms / 1000.0
    return Unreported(ms, len(late), ends_at)
