"""Policy `reuse`: what is least likely to be asked for again soon, learnt from what was. Ours.

LRU takes every entry for equal. Here entries fall into classes by what is known of their conversation: whether it is at
its first turn (a chat that has gone on goes on), how long its user thought (who answers soon does so again), how much
the turn added (a pasted document is often asked about once), whether its answer asked for a tool (then it goes on
within seconds) or for a human, and whether several chains continue the entry (a shared prefix) or one (a private tail).
For each class the policy counts after how long entries are used again, those included that were evicted meanwhile,
whose names it remembers. From that comes the worth of a class at an age: the best ratio, over all times that one could
go on waiting, of uses to expect to room taken up. The entry of least worth goes first.

Of a class with few counts more is believed of what holds for a coarser one: the same turn, tool and sharing; of that,
of what holds for all that are shared or for all that are not; and of those, that a third come back at any age.

Worth rises with age, while nobody can have read the answer yet, and then falls. So the least in a class is at one end
of it, and the victim is the least worthy of each class's least and most recently used entry: O(classes), a few dozen.

Sources: the index is J. Gittins's (1979) for jobs that may be given up, with reuse in place of completion; classes with
learnt ages are those of N. Beckmann et al., "LHD: Improving cache hit rate by maximizing hit density", NSDI 2018.
The edges of the classes were chosen on the chat traces and the sample of coding agents; the two other traces of
`bench.eviction` had no part in the choice.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import OrderedDict, defaultdict
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, NamedTuple

from kvstore.eviction.order import Hint, Key, Ranking, name_of
from kvstore.tier import Clock

_EDGES = (0.0, *(2.0 ** (step / 1.2) - 1 for step in range(1, 14)), 6500.0)  # seconds between age buckets
_WIDTHS = tuple(end - start for start, end in pairwise(_EDGES))
_MOST_TURNS = 2  # later turns count as this one
_THINK_S = (30.0, 120.0)
_NEW_TOKENS = (2048, 8192, 32768)
_PRIOR = 100.0  # entries' worth of believing what holds for a coarser class
_PRIOR_REUSED = 0.3
_LEARN_EVERY = 500  # uses
_GHOSTS = 2  # names of evicted entries, as a multiple of the capacity
_MEMORY = 16.0  # uses, as a multiple of the capacity, after which counts are halved

_AT_ANY_AGE = (_PRIOR * _PRIOR_REUSED / len(_WIDTHS),) * len(_WIDTHS)


def age_bucket(age_s: float) -> int:
    """The number of the bucket of an age in seconds."""
    return min(len(_WIDTHS) - 1, int(1.2 * math.log2(max(0.0, age_s) + 1)))


class Kind(NamedTuple):
    """What makes a class: places among the edges above, zero where nothing is known."""

    turn: int
    think: int
    new: int
    awaits_tool: bool | None
    is_shared: bool

    @property
    def coarser(self) -> tuple[int, bool | None, bool]:
        """What most depends on."""
        return self.turn, self.awaits_tool, self.is_shared


def kind_of(hint: Hint) -> Kind:
    """The class of a new entry."""
    return Kind(
        turn=min(hint.turn or 0, _MOST_TURNS),
        think=0 if hint.think_s is None else 1 + bisect(_THINK_S, hint.think_s),
        new=0 if hint.new_tokens is None else 1 + bisect(_NEW_TOKENS, hint.new_tokens),
        awaits_tool=hint.awaits_tool,
        is_shared=False,
    )


def worth(starts: float, reused: Sequence[float], believed: Sequence[float] = _AT_ANY_AGE) -> list[float]:
    """The worth of a class at each age: reuses to expect for each second of room, waiting as long as is best.

    Args:
        starts: ages begun. reused: of them, how many ended in a reuse, by bucket.
        believed: how many of _PRIOR more did.
    """
    hits = [count + more for count, more in zip(reused, believed, strict=True)]
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

    def gather(self, other: _Class[Key]) -> None:
        """Count what another class has counted, too."""
        self.starts += other.starts
        self.reused = [a + b for a, b in zip(self.reused, other.reused, strict=True)]

    def believed(self, coarser: Sequence[float]) -> list[float]:
        """Of _PRIOR entries of a class within this one, how many are used again, by bucket."""
        share = _PRIOR / (self.starts + _PRIOR)
        return [(count + more) * share for count, more in zip(self.reused, coarser, strict=True)]

    def halve(self) -> None:
        """Forget half of it."""
        self.starts /= 2
        self.reused = [count / 2 for count in self.reused]


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
        self._known[key] = _Known(name, hint.parent, kind_of(hint))
        self._children[name] = 0
        before = self._gone.pop(name, None)
        if before is not None:
            self._reused(before)
            self._children[name] = 2 if before.kind.is_shared else 0
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
        said = self._passed_on.pop(known.name, known.kind)
        known.kind = said._replace(is_shared=self._children[known.name] > 1)
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
        coarse: defaultdict[tuple[int, bool | None, bool], _Class[Key]] = defaultdict(_Class)
        coarsest: defaultdict[bool, _Class[Key]] = defaultdict(_Class)
        for kind, counts in self._classes.items():
            coarse[kind.coarser].gather(counts)
            coarsest[kind.is_shared].gather(counts)
        for kind, counts in self._classes.items():
            of_all = coarsest[kind.is_shared].believed(_AT_ANY_AGE)
            counts.worth = worth(counts.starts, counts.reused, coarse[kind.coarser].believed(of_all))
            if counts.starts > _MEMORY * self._capacity:
                counts.halve()
