"""Are events worth it? One trace, the same workers, routers that are told of blocks and routers that only remember.

Eight workers with LRU pools and one prefill at a time, on a virtual clock, block by block; the router is the real index
with the real books of workers without events, and a plain rule over them (least queue plus prefill of what is not
believed there, ties by worker). Every router knows every queue; what differs is what it believes that the pools hold.

Rows `<case>_<mode>_hit` (share of prompt tokens reused), `_ttft_s` (mean, queue and prefill) and `_phantom` (share of
the believed blocks that were not there when the request came); `<case>_exact_gain` is the hit rate of exact less that
of approximate. Cases: `roomy` (nothing is evicted), `pressed` and `tight` (pools of 800k and 400k tokens), and these
with `_two` (each request comes to one of two routers by chance). Modes: `exact` (events, 20 ms late), `approximate`
(own decisions, corrected by answers), `never_corrected` (the same, without learning from answers).
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from bench.report import Report, arguments
from kvstore.events import BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from replay.traces import Trace, load, shipped
from router.approximate import Approximate, Placement, Room
from router.index import PrefixIndex

WORKERS = 8
TOKENS_PER_S = 8000.0
REQUEST_S = 0.01
EVENT_DELAY_S = 0.02
CASES = {
    "roomy": (16_000_000, 1),
    "pressed": (800_000, 1),
    "tight": (400_000, 1),
    "roomy_two": (16_000_000, 2),
    "pressed_two": (800_000, 2),
    "tight_two": (400_000, 2),
}
MODES = ("exact", "approximate", "never_corrected")
BARS = {"roomy_exact_gain": "<= 0.01", "pressed_exact_gain": "<= 0.01", "pressed_two_exact_gain": ">= 0.03"}
_NAMES = [f"w{n}" for n in range(WORKERS)]


@dataclass(slots=True)
class Figures:
    """What became of the requests."""

    prompt: int = 0
    reused: int = 0
    waited_s: float = 0.0
    requests: int = 0
    believed: int = 0
    phantom: int = 0


@dataclass(slots=True)
class Pool:
    """A worker's blocks: the last of a chain is the first to go."""

    room: int
    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    free_at: float = 0.0
    removed: int = 0

    def run(self, chain: Sequence[bytes]) -> int:
        """Leading blocks that are held."""
        return next((at for at, block in enumerate(chain) if block not in self.blocks), len(chain))

    def take(self, chain: Sequence[bytes]) -> list[KvEvent]:
        """All of a chain was computed or used; the events that tell it."""
        chain = chain[: self.room]
        new = [block for block in chain if block not in self.blocks]
        for block in reversed(chain):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        gone = [self.blocks.popitem(last=False)[0] for _ in range(len(self.blocks) - self.room)]
        self.removed += len(gone)
        events: list[KvEvent] = [BlockStored(TierName.DEVICE, tuple(new))] if new else []
        return [*events, BlockRemoved(TierName.DEVICE, tuple(gone), RemovalCause.EVICTED)] if gone else events


class Simulated:
    """One replay."""

    def __init__(self, trace: Trace, *, pool_tokens: int, routers: int, mode: str, seed: int) -> None:
        self._trace, self._mode = trace, mode
        self._size = trace.block_size or 1
        self._rng = random.Random(seed)
        self._now = 0.0
        self._order = count()
        self._todo: list[tuple[float, int, Callable[[], None]]] = []
        self._pools = {name: Pool(pool_tokens // self._size) for name in _NAMES}
        self._indexes = [PrefixIndex(lambda: self._now) for _ in range(routers)]
        self._books = [Approximate(index, lambda: self._now) for index in self._indexes]
        for index, books in zip(self._indexes, self._books, strict=True):
            for name, pool in self._pools.items():
                index.join(name, 1)
                index.end_snapshot(name, 1)
                books.joined(name, 1)
                books.reported(name, Room(pool.room), Room(0))
        self.figures = Figures()

    def run(self) -> Figures:
        """All of the trace."""
        for request in self._trace.requests:
            ids = (first + at for first, count in request.runs for at in range(count))
            chain = [block.to_bytes(16, "little") for block in ids]
            self._until(request.time_s)
            self._arrive(chain, request.input_length)
        self._until(float("inf"))
        return self.figures

    def _until(self, time_s: float) -> None:
        while self._todo and self._todo[0][0] <= time_s:
            self._now, _, action = heapq.heappop(self._todo)
            action()
        self._now = time_s

    def _at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._todo, (time_s, next(self._order), action))

    def _arrive(self, chain: list[bytes], tokens: int) -> None:
        router = self._rng.randrange(len(self._indexes))
        index, books = self._indexes[router], self._books[router]
        for name, pool in self._pools.items():
            books.reported(name, Room(pool.room, pool.removed), Room(0))
        books.expire()
        overlaps = index.match(chain)

        def seconds(name: str) -> float:
            cached = min(overlaps[name].device * self._size, tokens - 1)
            return max(0.0, self._pools[name].free_at - self._now) + (tokens - cached) / TOKENS_PER_S

        name = min(_NAMES, key=lambda each: (seconds(each), each))
        pool = self._pools[name]
        found = pool.run(chain)
        reused = min(found * self._size, tokens - 1)
        start = max(self._now, pool.free_at)
        pool.free_at = start + REQUEST_S + (tokens - reused) / TOKENS_PER_S
        self._count(tokens, reused, pool.free_at - self._now, overlaps[name].device, found)
        events = pool.take(chain)
        if self._mode == "exact":
            self._at(pool.free_at + EVENT_DELAY_S, lambda: self._tell(name, events))
            return
        placement = Placement(books, name, chain, reads=True, stores=True)
        fates = {"device": reused, "computed": tokens - reused} if self._mode == "approximate" else {}
        self._at(pool.free_at, lambda: self._answer(placement, fates))

    def _tell(self, name: str, events: list[KvEvent]) -> None:
        for index in self._indexes:
            index.apply(name, 1, events)

    def _answer(self, placement: Placement, fates: dict[str, int]) -> None:
        placement.computed()
        placement.ended(fates, self._size)

    def _count(self, tokens: int, reused: int, waited_s: float, believed: int, found: int) -> None:
        figures = self.figures
        figures.requests += 1
        figures.prompt += tokens
        figures.reused += reused
        figures.waited_s += waited_s
        figures.believed += believed
        figures.phantom += max(0, believed - found)


def replay(case: str, mode: str, trace: Trace, seed: int) -> Figures:
    """One case in one mode."""
    pool_tokens, routers = CASES[case]
    return Simulated(trace, pool_tokens=pool_tokens, routers=routers, mode=mode, seed=seed).run()


def shortened(requests: int) -> Trace:
    """The beginning of the shipped conversation trace."""
    trace = load(shipped()["mooncake_conversation"])
    return Trace(trace.name, trace.block_size, trace.requests[:requests])


def add_rows(report: Report, case: str, figures: dict[str, list[Figures]]) -> None:
    """The rows of one case."""
    hits = {mode: [f.reused / f.prompt for f in each] for mode, each in figures.items()}
    for mode, each in figures.items():
        report.add(f"{case}_{mode}_hit", hits[mode], "share")
        report.add(f"{case}_{mode}_ttft_s", [f.waited_s / f.requests for f in each], "s")
        report.add(f"{case}_{mode}_phantom", [f.phantom / max(1, f.believed) for f in each], "share")
    gains = [a - b for a, b in zip(hits["exact"], hits["approximate"], strict=True)]
    report.add(f"{case}_exact_gain", gains, "share", bar=BARS.get(f"{case}_exact_gain", ""))


def main() -> None:
    """Print the table."""
    given, report = arguments(__doc__), Report("beliefs")
    trace = shortened(1_500 if given.quick else 4_000)
    seeds = range(1, 2 if given.quick else 4)
    for case in CASES:
        add_rows(report, case, {mode: [replay(case, mode, trace, seed) for seed in seeds] for mode in MODES})
    report.print(as_json=given.json)


if __name__ == "__main__":
    main()
