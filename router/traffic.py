"""What was sent to workers lately, and what follows from it before any worker reports it.

Covers: work given to each worker with a decaying memory, the fleet's utilisation, prompts on their way (their blocks
will be there), how many requests in flight share a block, and how many blocks they use. Does not cover: prices (`cost`)
or weights (`policy`). What other routers sent counts as what this one did: workers tell of it (`other_routers`).
Pure and synchronous, on an injected clock. Every question leaves the state as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.fading_sum import WORK_MEMORY_S, FadingSum
from router.chain_tree import ChainTree, Runs

# How long placements and utilisation are remembered, in seconds.
MEMORY_S = WORK_MEMORY_S
# A worker counts as having been there for so long at least, in seconds: what it was given in less says little.
LEAST_THERE_S = 1.0
# The same of this router and the fleet's utilisation. In a moment's burst of long prompts, all counted when they are
# sent, it is called busier than it is; where nothing is cached yet that changes no choice.
_LEAST_SEEN_S = 2.0
# Who has been there for so long would have no more work in its memory had it been there for ever: 1 - exp(-40) is 1.0.
_SETTLED_S = 40.0 * MEMORY_S
_NEGLIGIBLE_MS = 1.0
_FLEET = ""  # the owner of what is counted for all workers together


@dataclass(slots=True)
class Sent:
    """A request on a worker. `shared` leading names of its chain are counted as being shared by requests in flight.

    `place`: as in `Known`; None: this router sent it itself.
    """

    worker: str
    hashes: Sequence[bytes]
    names: Sequence[bytes]
    work_ms: float
    at: float
    shared: int
    place: float | None = None
    prefilling: bool = True


class Known(NamedTuple):
    """Which requests a worker's report knows of.

    Attributes:
        until: of this router's, those that were sent until then, on the clock. place: of other routers', those up to
            this place in the order in which the worker took them in.
    """

    until: float
    place: float


NOTHING_KNOWN = Known(-math.inf, -math.inf)


class Unreported(NamedTuple):
    """Requests before their first token that a worker's report does not know of.

    A worker works while nobody looks: what was sent to an idle one 30 ms ago and takes 5 ms is done, whether or not it
    has said so. So work is followed as by a clerk at a counter (Lindley's recursion), not summed.

    Attributes:
        ms: their work. ends_at: when it is done if each began as soon as it was sent and those before it were done; on
            the clock, in seconds.
    """

    ms: float = 0.0
    requests: int = 0
    ends_at: float = -math.inf


NOTHING_UNREPORTED = Unreported()


class Traffic:
    """The memory of what was sent. One per router.

    Every sum and count is kept up to date when something is sent or ends, so that a question costs what has changed
    since the last reports and the nodes on a chain's path, however much is in flight.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._work: dict[str, FadingSum] = {}
        self._lost_work: dict[str, FadingSum] = {}  # of workers that may come back; the fleet's sum has it
        self._fleet = FadingSum()
        self._arriving = ChainTree()
        self._sharing = ChainTree()
        self._active = ChainTree()
        self._active_blocks: dict[str, int] = {}
        self._flights: dict[Hashable, Sent] = {}
        self._in_flight: Counter[str] = Counter()
        self._prefilling: dict[str, dict[Hashable, Sent]] = {}  # by worker, in the order of sending
        # The last answer of each worker, with what the report knew that it was given for. Between two decisions one
        # or two workers of a fleet say or are sent something: for the others it still holds.
        self._unreported: dict[str, tuple[Known, Unreported]] = {}
        self._first_at: float | None = None

    def met(self, worker: str, recent_work_ms: float, *, up_ms: float = 0.0) -> None:
        """A stream to a worker begins, which tells the work that all routers have given it lately, and its age.

        What a new life of the worker no longer knows was given to the fleet all the same.
        """
        now = self._clock()
        if recent_work_ms:
            self._seen_since(now - up_ms / 1000.0)
        known = self._work.get(worker) or self._lost_work.pop(worker, None) or FadingSum()
        news_ms = recent_work_ms - known.value(now)
        known.add(news_ms, now)
        self._fleet.add(max(0.0, news_ms), now)
        self._work[worker] = known

    def sent(
        self,
        key: Hashable,
        worker: str,
        hashes: Sequence[bytes],
        *,
        work_ms: float,
        cached_blocks: int,
        place: float | None = None,
        is_met: bool = False,
    ) -> None:
        """A request went to a worker, predicted to be `work_ms` of load and compute, its first blocks cached there.

        `place`: of one that another router sent, as in `Known`. `is_met`: what `met` was told contains its work. The
        hashes must not change until it has ended.
        """
        now, names = self._clock(), self._names(hashes)
        self._seen_since(now)
        given_ms = 0.0 if is_met else work_ms
        self._work.setdefault(worker, FadingSum()).add(given_ms, now)
        self._fleet.add(given_ms, now)
        flight = self._flights[key] = Sent(
            worker, hashes, names, work_ms, now, self._depth(hashes, cached_blocks), place
        )
        self._in_flight[worker] += 1
        self._prefilling.setdefault(worker, {})[key] = flight
        self._unreported.pop(worker, None)
        before = self._active.add(worker, names, len(names))
        self._active_blocks[worker] = self._active_blocks.get(worker, 0) + self._rest(hashes, before)
        self._arriving.add(worker, names, len(names))
        self._sharing.add(_FLEET, names, flight.shared)

    def first_token(self, key: Hashable) -> None:
        """Its prefill is done: all its blocks are cached now, and others may share them."""
        flight = self._flights.get(key)
        if flight is None or not flight.prefilling:
            return
        self._arrived(key, flight)
        self._sharing.remove(_FLEET, flight.names, flight.shared)
        flight.shared = len(flight.names)
        self._sharing.add(_FLEET, flight.names, flight.shared)

    def ended(self, key: Hashable) -> None:
        """It finished, failed, was cancelled or lost its worker."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        self._in_flight[flight.worker] -= 1
        self._arrived(key, flight)
        self._sharing.remove(_FLEET, flight.names, flight.shared)
        after = self._active.remove(flight.worker, flight.names, len(flight.names))
        self._active_blocks[flight.worker] -= self._rest(flight.hashes, after)
        if flight.worker not in self._work:  # it is gone, and this was one of its last
            self.forget(flight.worker)

    def recent_work_ms(self, worker: str, *, joined_at: float = -math.inf) -> float:
        """Work given to the worker, with the memory of `MEMORY_S`.

        For one that joined since, what it would be had it always been given as much: a worker that is new is not a
        quiet one, and every tie would go to it until it has caught up with the memory of the others.
        """
        return self.recent_works_ms([(worker, joined_at)])[0]

    def recent_works_ms(self, joined: Iterable[tuple[str, float]]) -> list[float]:
        """The same of many: of (worker, when it joined) each."""
        now, works = self._clock(), []
        settled = now - _SETTLED_S
        for worker, joined_at in joined:
            work = self._work.get(worker)
            if work is None:
                works.append(0.0)
            elif joined_at < settled:
                works.append(work.value(now))
            else:
                there_s = max(now - joined_at, LEAST_THERE_S)
                works.append(work.value(now) / (1.0 - math.exp(-there_s / MEMORY_S)))
        return works

    def utilisation(self, workers: int) -> float:
        """Share of the fleet's time that the work sent there takes; may exceed 1.

        Of the time since the first request, while that is shorter than the memory: a router that has just been started
        before a busy fleet would call it idle, and give up hits for a moment's queue.
        """
        if not workers or self._first_at is None:
            return 0.0
        now = self._clock()
        seen_s = max(MEMORY_S * (1.0 - math.exp((self._first_at - now) / MEMORY_S)), _LEAST_SEEN_S)
        return self._fleet.value(now) / (seen_s * 1000.0 * workers)

    def unreported(self, worker: str, known: Known) -> Unreported:
        """What was sent to a worker and its report does not know of."""
        if not self._prefilling.get(worker):
            return NOTHING_UNREPORTED
        answered = self._unreported.get(worker)
        if answered is None or answered[0] != known:
            answered = self._unreported[worker] = (known, _summed(self._late(worker, known)))
        return answered[1]

    def unreported_blocks(self, worker: str, known: Known) -> int:
        """Blocks to compute of what was sent to a worker and its report does not know of."""
        return sum(self._rest(f.hashes, f.shared) for f in self._late(worker, known))

    def prompt_blocks(self, workers: Sequence[str]) -> list[int]:
        """By worker the different blocks of the prompts in flight there."""
        return [self._active_blocks.get(worker, 0) for worker in workers]

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
        """The worker is gone, maybe for good."""
        now = self._clock()
        self._lost_work = {name: work for name, work in self._lost_work.items() if work.value(now) >= _NEGLIGIBLE_MS}
        if (work := self._work.pop(worker, None)) is not None:
            self._lost_work[worker] = work
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

    def _late(self, worker: str, known: Known) -> list[Sent]:
        late, own, told = [], True, True  # whether any that were sent before may be unknown
        for flight in reversed(self._prefilling.get(worker, {}).values()):
            if flight.place is None:
                own = is_late = own and flight.at > known.until
            else:
                told = is_late = told and flight.place > known.place
            if is_late:
                late.append(flight)
            elif not (own or told):
                break
        late.reverse()  # sums are made in the order of sending, whatever was reported between
        return late

    def _seen_since(self, at: float) -> None:
        self._first_at = at if self._first_at is None else min(self._first_at, at)

    def _arrived(self, key: Hashable, flight: Sent) -> None:
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
