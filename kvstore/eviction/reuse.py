"""Policy `reuse`: what is least likely to be asked for again soon, learnt from what was. Ours.

LRU takes every entry for equal. Here entries fall into classes by what is known of their conversation: its turn (a chat
that has gone on goes on), whether its answer asked for a tool (then it goes on within seconds) or for a human, and
whether several chains continue the entry (a shared prefix) or one (a private tail). For each class the policy counts
after how long entries are used again, those included that were evicted meanwhile, whose names it remembers. From that
comes the worth of a class at an age: the best ratio, over all times that one could go on waiting, of uses to expect to
room taken up. The entry of least worth goes first.

Worth rises with age, while nobody can have read the answer yet, and then falls. So the least in a class is at one end
of it, and the victim is the least worthy of each class's least and most recently used entry: O(classes), at most 30.

Sources: the index is J. Gittins's (1979) for jobs that may be given up, with reuse in place of completion; classes with
learnt ages are those of N. Beckmann et al., "LHD: Improving cache hit rate by maximizing hit density", NSDI 2018.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic

from kvstore.eviction.order import Hint, Key, Ranking, name_of
from kvstore.tier import Clock

_EDGES = (0.0, *(2.0 ** (step / 1.2) - 1 for step in range(1, 14)), 6500.0)  # seconds between age buckets
_WIDTHS = tuple(end - start for start, end in pairwise(_EDGES))
_MOST_TURNS = 4  # later turns count as this one
_PRIOR = 50.0  # entries' worth of believing that _PRIOR_REUSED of them come back, at any age
_PRIOR_REUSED = 0.3
_LEARN_EVERY = 500  # uses
_GHOSTS = 2  # names of evicted entries, as a multiple of the capacity
_MEMORY = 16.0  # uses, as a multiple of the capacity, after which counts are halved

Kind = tuple[int, bool | None, bool]  # turn, awaits a tool, shared


def age_bucket(age_s: float) -> int:
    """The number of the bucket of an age in seconds."""
    return min(len(_WIDTHS) - 1, int(1.2 * math.log2(max(0.0, age_s) + 1)))


def worth(starts: float, reused: list[float]) -> list[float]:
    """The worth of a class at each age: reuses to expect for each second of room, waiting as long as is best.

    Args:
        starts: ages begun. reused: of them, how many ended in a reuse, by bucket.
    """
    prior = _PRIOR * _PRIOR_REUSED / len(_WIDTHS)
    hits = [count + prior for count in reused]
    waiting, left = [], starts + _PRIOR
    for count in hits:
        waiting.append(max(left, 0.5))
        left -= count
    best = []
    for bucket in range(len(_WIDTHS)):
        gain = cost = most = 0.0
        for later in range(bucket, len(_WIDTHS)):
            gain += hits[later]
            cost += _WIDTHS[later] * waiting[later]
            most = max(most, gain / cost)
        best.append(most)
    return best


@dataclass(slots=True)
class _Class(Generic[Key]):
    """A class's counts, and its entries that are offered, least recently used first.

    Attributes:
        starts: uses, each of which starts an age. reused: of them, those that ended in another use, by age bucket.
        worth: by age bucket.
    """

    starts: float = 0.0
    reused: list[float] = field(default_factory=lambda: [0.0] * len(_WIDTHS))
    worth: list[float] = field(default_factory=lambda: worth(0.0, [0.0] * len(_WIDTHS)))
    offered: Ranking[Key] = field(default_factory=Ranking)


@dataclass(slots=True)
class _Known:
    """An entry, or one that was evicted."""

    name: Hashable
    parent: Hashable | None
    kind: Kind
    used: float = 0.0  # time of its last use
    rank: int = 0  # number of its last use


class ReuseOrder(Generic[Key]):
    """Classes of entries, and how soon each is used again."""

    def __init__(self, clock: Clock, capacity: int) -> None:
        self._clock = clock
        self._capacity = capacity
        self._classes: dict[Kind, _Class[Key]] = {}
        self._known: dict[Key, _Known] = {}
        self._gone: OrderedDict[Hashable, _Known] = OrderedDict()  # evicted ones, the latest last
        self._children: dict[Hashable, int] = {}  # by name of a held entry: how many entries have continued it
        self._passed_on: dict[Hashable, Kind] = {}  # to the entry before: what a use of one says of the whole chain
        self._time = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._class(self._known[key].kind).offered

    def add(self, key: Key, hint: Hint) -> None:
        """As `Order.add`."""
        name = name_of(key, hint)
        kind = (min(hint.turn or 0, _MOST_TURNS), hint.awaits_tool, False)
        self._known[key] = _Known(name, hint.parent, kind)
        self._children[name] = 0
        before = self._gone.pop(name, None)
        if before is not None:
            self._reused(before)
            self._children[name] = 2 if before.kind[2] else 0
        elif hint.parent in self._children:
            self._children[hint.parent] += 1
        self._start(key)

    def use(self, key: Key, *, again: bool) -> None:
        """As `Order.use`."""
        offered = key in self
        self.withdraw(key)
        if again:
            self._reused(self._known[key])
        self._start(key)
        if offered:
            self.offer(key)

    def offer(self, key: Key) -> None:
        """As `Order.offer`: at the place of its last use."""
        known = self._known[key]
        self._class(known.kind).offered.set(key, (known.rank,))

    def withdraw(self, key: Key) -> None:
        """As `Order.withdraw`."""
        self._class(self._known[key].kind).offered.discard(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """As `Order.remove`."""
        self.withdraw(key)
        known = self._known.pop(key)
        self._children.pop(known.name, None)
        self._passed_on.pop(known.name, None)
        if evicted:
            self._gone[known.name] = known
            if len(self._gone) > _GHOSTS * self._capacity:
                self._gone.popitem(last=False)

    def first(self, kept: Container[Key], root: Hashable | None) -> Key | None:
        """As `Order.first`."""
        now = self._clock()
        least: tuple[float, int] | None = None
        found = None
        for kind in self._classes.values():
            if not kind.offered:
                continue
            for key in (kind.offered.first(kept), kind.offered.last()):
                if key is None or key in kept:
                    continue
                known = self._known[key]
                value = kind.worth[age_bucket(now - known.used)], known.rank
                if least is None or value < least:
                    least, found = value, key
        return found

    def _class(self, kind: Kind) -> _Class[Key]:
        known = self._classes.get(kind)
        if known is None:
            known = self._classes[kind] = _Class()
        return known

    def _start(self, key: Key) -> None:
        """An age begins. What was said of the entry behind it, which is used before it, holds for it as well."""
        known = self._known[key]
        turn, tool, _ = self._passed_on.pop(known.name, known.kind)
        known.kind = (turn, tool, self._children[known.name] > 1)
        known.used, known.rank = self._clock(), self._time
        if known.parent in self._children:
            self._passed_on[known.parent] = known.kind
        self._class(known.kind).starts += 1
        self._time += 1
        if self._time % _LEARN_EVERY == 0:
            self._learn()

    def _reused(self, known: _Known) -> None:
        self._class(known.kind).reused[age_bucket(self._clock() - known.used)] += 1

    def _learn(self) -> None:
        for kind in self._classes.values():
            kind.worth = worth(kind.starts, kind.reused)
            if kind.starts > _MEMORY * self._capacity:
                kind.starts /= 2
                kind.reused = [count / 2 for count in kind.reused]
