"""Which entry goes first: what every named eviction policy is, and the two structures that most are made of.

`eviction.Eviction` decides which entries may go; an `Order` only chooses among those that were offered to it. So no
policy knows pins, leases, times to live or chains, and none can break their rules.

`Ranking` is the queue behind them. Ranks that arrive in rising order, as those of uses do, stand in an ordered dict:
O(1). Others, of entries that were kept back and may go again at their old place, stand in a heap with lazy deletion:
O(log n), with at most twice as many items as live ones. The first entry is the smaller one of the two heads.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)
Rank = tuple[float, ...]

_SPARE_ITEMS = 64  # below this many, dead heap items are not worth a rebuild


@dataclass(frozen=True, slots=True)
class Hint:
    """What is known of an entry when it is added. Policies use what they need; nothing is required.

    Attributes:
        name: what other entries call it in their `parent`: a block's hash.
        parent: name of the entry that it continues; None: it starts a chain, or is no part of one. An entry is never
            evicted while a held entry continues it.
        root: whose it is, for quotas.
        priority: 0 to 100, higher ones stay longer (policy `priority`).
        position: how many blocks its chain has before the last one of this entry (policy `tail_optimized`); zero: not
        told, and an entry with its parent is one block.
        turn: which turn of its conversation this is, from 1 (policy `reuse`). None: not known.
        think_s: seconds since the turn before (policy `reuse`). None: this is the first, or not known.
        new_tokens: what this turn adds to its conversation: of a first turn, all of it (policy `reuse`).
        awaits_tool: whether the answer ended with a call of a tool, whose result follows soon (policy `reuse`).
    """

    name: Hashable | None = None
    parent: Hashable | None = None
    root: Hashable | None = None
    priority: int = 0
    position: int = 0
    turn: int | None = None
    think_s: float | None = None
    new_tokens: int | None = None
    awaits_tool: bool | None = None


NO_HINT = Hint()


class Order(Protocol[Key]):
    """Which of the entries that may go is evicted first.

    An entry is added once, and then offered (it may go from now on) and withdrawn (not now) in turns, until it is
    removed; `remove` also withdraws it. Uses are told whether it is offered or not.
    """

    def add(self, key: Key, hint: Hint) -> None:
        """A new entry is held; it is not offered yet."""
        ...

    def use(self, key: Key, *, again: bool) -> None:
        """It was used; not `again`: the use that brought it has only now ended."""
        ...

    def offer(self, key: Key) -> None:
        """It may go from now on."""
        ...

    def withdraw(self, key: Key) -> None:
        """It may not go for now."""
        ...

    def remove(self, key: Key, *, evicted: bool) -> None:
        """It is held no more: by eviction, or because it expired or was taken away."""
        ...

    def __contains__(self, key: Key) -> bool:
        """Whether it is offered."""
        ...

    def first(self, kept: Container[Key], root: Hashable | None) -> Key | None:
        """The offered entry to evict next, passing over `kept` ones, to make room for one of `root`; None: none."""
        ...


class Ranking(Generic[Key]):
    """Keys by rank, smallest first. Setting a rank above all others is O(1), any other one O(log n) amortised."""

    def __init__(self) -> None:
        self._rising: OrderedDict[Key, Rank] = OrderedDict()
        self._last: Rank = ()  # no less than any rank in it
        self._others: dict[Key, tuple[Rank, int]] = {}
        self._heap: list[tuple[Rank, int, Key]] = []
        self._serial = 0  # breaks ties: keys need not compare

    def __contains__(self, key: Key) -> bool:
        return key in self._rising or key in self._others

    def __len__(self) -> int:
        return len(self._rising) + len(self._others)

    def set(self, key: Key, rank: Rank) -> None:
        """Hold it at that rank."""
        if self._rising.pop(key, None) is None and self._others:
            self.discard(key)
        if not self._rising or rank >= self._last:
            self._rising[key] = self._last = rank
            return
        self._serial += 1
        self._others[key] = rank, self._serial
        heapq.heappush(self._heap, (rank, self._serial, key))

    def discard(self, key: Key) -> None:
        """Forget it, if it is held."""
        if self._rising.pop(key, None) is None and self._others.pop(key, None) is not None:
            if self._heap[0][2] == key:
                heapq.heappop(self._heap)  # evictions take the first: nothing dead stays behind
            self._drop_dead_items()

    def first(self, kept: Container[Key] = ()) -> Key | None:
        """The key of the smallest rank that is not among `kept`; None: there is none. Passing over one is O(log n)."""
        top = self._top() if self._heap else None
        head = next(iter(self._rising.items()), None)
        if top is not None and (head is None or top[0] < head[1]):
            found = top[2]
        elif head is not None:
            found = head[0]
        else:
            return None
        return self._first_but(kept) if found in kept else found

    def _first_but(self, kept: Container[Key]) -> Key | None:
        rising = next(((rank, key) for key, rank in self._rising.items() if key not in kept), None)
        passed: list[tuple[Rank, int, Key]] = []
        while (top := self._top()) is not None and top[2] in kept:
            passed.append(heapq.heappop(self._heap))
        for item in passed:
            heapq.heappush(self._heap, item)
        if top is None or (rising is not None and rising[0] <= top[0]):
            return None if rising is None else rising[1]
        return top[2]

    def keys(self) -> list[Key]:
        """A copy of all, those in rising order first. O(n)."""
        return [*self._rising, *self._others]

    def last(self) -> Key | None:
        """The key that came last in rising order; None: there is none. O(1)."""
        return next(reversed(self._rising), None)

    def __iter__(self) -> Iterator[Key]:
        """Smallest rank first, O(n log n)."""
        late = sorted((rank, serial, key) for key, (rank, serial) in self._others.items())
        both = heapq.merge(((rank, key) for rank, _, key in late), ((r, k) for k, r in self._rising.items()), key=_rank)
        return (key for _, key in both)

    def _top(self) -> tuple[Rank, int, Key] | None:
        while self._heap:
            rank, serial, key = self._heap[0]
            if self._others.get(key) == (rank, serial):
                return self._heap[0]
            heapq.heappop(self._heap)
        return None

    def _drop_dead_items(self) -> None:
        if len(self._heap) > 2 * len(self._others) + _SPARE_ITEMS:
            self._heap = [(rank, serial, key) for key, (rank, serial) in self._others.items()]
            heapq.heapify(self._heap)


def _rank(item: tuple[Rank, Hashable]) -> Rank:
    return item[0]


class Ranked(Generic[Key]):
    """The part of an order that is the same for all policies that give each entry one rank, smallest first.

    A policy derives from it and calls `_place` in `add` and `use`.
    """

    def __init__(self) -> None:
        self._ranks: dict[Key, Rank] = {}
        self._offered: Ranking[Key] = Ranking()
        self._time = 0  # counts adds and uses

    def __contains__(self, key: Key) -> bool:
        return key in self._offered

    def offer(self, key: Key) -> None:
        """As `Order.offer`."""
        self._offered.set(key, self._ranks[key])

    def withdraw(self, key: Key) -> None:
        """As `Order.withdraw`."""
        self._offered.discard(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """As `Order.remove`."""
        self._offered.discard(key)
        del self._ranks[key]

    def first(self, kept: Container[Key], root: Hashable | None) -> Key | None:
        """As `Order.first`."""
        return self._offered.first(kept)

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _place(self, key: Key, rank: Rank) -> None:
        self._ranks[key] = rank
        if key in self._offered:
            self._offered.set(key, rank)


class Ghosts:
    """Names of entries that are held no more, at most `limit` of them, the latest ones. O(1)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: Hashable) -> None:
        """Remember it as the latest one."""
        self._names[name] = None
        self._names.move_to_end(name)
        self.shrink(self._limit)

    def pop(self, name: Hashable) -> bool:
        """Forget it; whether it was remembered."""
        return self._names.pop(name, self) is None

    def shrink(self, limit: int) -> None:
        """Forget the oldest ones until at most so many are left."""
        while len(self._names) > max(0, limit):
            self._names.popitem(last=False)


def name_of(key: Hashable, hint: Hint) -> Hashable:
    """By what an entry is recognised when it comes back: keys may be numbers of slots."""
    return key if hint.name is None else hint.name
