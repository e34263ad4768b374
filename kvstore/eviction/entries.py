"""What may go: the entries of a tier with their pins, leases and times to live, over a policy.

Two questions are kept apart. *Which entries may go* is answered here, the same for all policies: none that is pinned
(in use), none that is leased (promised), and none that a held entry continues, so that a suffix always goes before its
prefix. *Which of them goes first* is the policy's (`order.Order`): it is offered an entry when that may go, and
the entry is withdrawn when it may not. So the victim is what the policy names, O(1) or O(log n), with nothing to skip.

Chains are known from the hints (`chain`). Entries without hints are no part of one: use a chain of those from its
last block to its first, so that under `lru` the last one is the oldest.

Ends of lifetimes and of leases stand in two `Deadlines`: uses are O(1), expiry is O(log n) an entry, amortised.

A fixed end is a time of the wall clock; all others are of the injected clock, which never jumps. It is converted at
each use anew: a wall clock that is set in between moves the end from the next use on, and drops nothing at once.
"""

from __future__ import annotations

import time
from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic

from kvstore.errors import InvariantError
from kvstore.eviction.chain import Candidates, Node
from kvstore.eviction.deadlines import Deadlines
from kvstore.eviction.order import NO_HINT, Hint, Key, Order
from kvstore.lifetime import Lifetime
from kvstore.tier import Clock

_FOR_EVER = float("inf")
EXPIRED_AT_ONCE = 256  # a tier drops so many under its lock, some milliseconds; others go on before the next ones


@dataclass(slots=True, eq=False)
class _Entry(Generic[Key]):
    """A held entry.

    Attributes:
        node: its place among the candidates. used: number of its last use. new: pinned by its first users only.
        deadline: when its lifetime ends; None: never, or not while it is pinned.
        leased_until: end of its lease, which may be infinite; None: it has none.
    """

    key: Key
    node: Node[Key]
    lifetime: Lifetime
    deadline: float | None = None
    leased_until: float | None = None
    pins: int = 0
    used: int = 0
    new: bool = False

    @property
    def dies(self) -> float | None:
        """When it expires; None: never, or not while it is pinned."""
        if self.deadline is None or self.leased_until is None:
            return self.deadline
        return max(self.deadline, self.leased_until)


class Eviction(Generic[Key]):
    """Entries of a tier: pins, leases, lifetimes and chains, over a policy that says which goes first.

    A pinned entry is in use: it is neither evicted nor expired, and its TTL starts again when the last pin goes; then a
    fixed end that has passed meanwhile counts. A leased one is neither evicted nor expired before its lease ends; its
    end is no use.
    """

    def __init__(self, clock: Clock, order: Order[Key], *, wall_clock: Clock = time.time) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._order = order
        self._candidates = Candidates(order)
        self._entries: dict[Key, _Entry[Key]] = {}
        self._deaths: Deadlines[Key] = Deadlines()
        self._leases: Deadlines[Key] = Deadlines()  # those that end by themselves
        self._leased = 0
        self._uses = 0
        self._victim: Key | None = None

    def __contains__(self, key: Key) -> bool:
        """Whether it is held, expired or not."""
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    @property
    def evictable(self) -> int:
        """Entries that can all be evicted: neither they nor what continues them is pinned or leased."""
        self._end_due_leases()
        return self._candidates.free

    @property
    def leased(self) -> int:
        """Entries under a lease."""
        self._end_due_leases()
        return self._leased

    def add(
        self, key: Key, ttl_s: float | None, *, until: float | None = None, hint: Hint = NO_HINT, pins: int = 0
    ) -> None:
        """Hold a new entry, just used; pinned so often by those who use it now, whose last `unpin` ends this use.

        `ttl_s`, `until`: as in `Lifetime`.

        Raises:
            InvariantError: it is already held.
        """
        if key in self._entries:
            raise InvariantError(f"{key!r} is already held")
        self._order.add(key, hint)
        node = self._candidates.add(key, hint.name, hint.parent)
        entry = self._entries[key] = _Entry(key, node, Lifetime(ttl_s, until))
        self._renew(entry)
        for _ in range(pins):
            self.pin(key)
        entry.new = pins > 0

    def use(self, key: Key) -> None:
        """Tell the policy that it was used, and start its TTL again."""
        entry = self._entries[key]
        if entry.pins == 0:
            self._order.use(key, again=True)
            self._renew(entry)

    def prolong(self, key: Key, lifetime: Lifetime) -> None:
        """Use it, and from now on it lives as long as the longer one of its own lifetime and this one says."""
        entry = self._entries[key]
        entry.lifetime = entry.lifetime.joined(lifetime)
        self.use(key)

    def lifetime(self, key: Key) -> Lifetime:
        """How long it lives."""
        return self._entries[key].lifetime

    def remaining_s(self, key: Key) -> float | None:
        """Seconds until it expires, negative when it is overdue; None: never, or it is pinned."""
        self._end_due_leases()
        dies = self._entries[key].dies
        return None if dies is None or dies == _FOR_EVER else dies - self._clock()

    def expired(self, key: Key) -> bool:
        """Whether its lifetime has ended, and its lease as well."""
        dies = self._entries[key].dies
        return dies is not None and dies <= self._clock()

    def pin(self, key: Key) -> None:
        """Keep it until as many `unpin`."""
        entry = self._entries[key]
        entry.pins += 1
        entry.new = False
        if entry.pins == 1:
            entry.deadline = None
            self._deaths.discard(key)
            self._candidates.hold(entry.node)

    def unpin(self, key: Key) -> None:
        """Undo one `pin`; the last one is a use.

        Raises:
            InvariantError: it was not pinned.
        """
        entry = self._entries[key]
        if entry.pins == 0:
            raise InvariantError(f"{key!r} is not pinned")
        entry.pins -= 1
        if entry.pins == 0:
            self._order.use(key, again=not entry.new)
            entry.new = False
            self._renew(entry)
            self._candidates.let_go(entry.node)

    def pins(self, key: Key) -> int:
        """How often it is pinned."""
        return self._entries[key].pins

    def lease(self, key: Key, until: float | None) -> bool:
        """Promise not to drop it before this time of the clock (None: before `end_lease`); of several leases the
        longest holds. Whether it has a lease now: not when the time has passed already.
        """
        entry = self._entries[key]
        self._end_due_leases()
        before, end = entry.leased_until, _FOR_EVER if until is None else until
        if end <= (self._clock() if before is None else before):
            return before is not None
        if before is None:
            self._leased += 1
            self._candidates.hold(entry.node)
        entry.leased_until = end
        self._follow(entry)
        if end < _FOR_EVER:
            self._leases.set(key, end)
        else:
            self._leases.discard(key)
        return True

    def end_lease(self, key: Key) -> bool:
        """End its lease now; whether it had one."""
        self._end_due_leases()
        entry = self._entries[key]
        if entry.leased_until is None:
            return False
        self._leases.discard(key)
        self._end_lease(entry)
        return True

    def is_leased(self, key: Key) -> bool:
        """Whether it is under a lease."""
        until = self._entries[key].leased_until
        return until is not None and until > self._clock()

    def remove(self, key: Key) -> None:
        """Forget it, pinned and leased or not. If `victim` has just named it, the policy takes it for evicted."""
        entry = self._entries.pop(key)
        if entry.pins:
            self._candidates.let_go(entry.node)
        if entry.leased_until is not None:
            self._leases.discard(key)
            self._end_lease(entry)
        if entry.deadline is not None:
            self._deaths.discard(key)
        self._order.remove(key, evicted=key == self._victim)
        self._victim = None
        self._candidates.remove(entry.node)

    def victim(self, kept: Container[Key] = (), *, root: Hashable | None = None) -> Key | None:
        """The entry to evict next, passing over the `kept` ones; None: there is none. Not removed.

        Args:
            kept: entries that must stay this time.
            root: for whom room is made, where the roots have quotas.
        """
        self._end_due_leases()
        self._victim = self._order.first(kept, root)
        return self._victim

    def oldest_first(self) -> Iterator[Key]:
        """The entries that can be evicted, least recently used first, whatever the policy. O(n log n)."""
        free = (entry for entry in self._entries.values() if entry.node.holds == 0)
        return (entry.key for entry in sorted(free, key=lambda entry: entry.used))

    def latest_first(self) -> list[Key]:
        """All entries, most recently used first, whatever the policy. O(n log n)."""
        entries = sorted(self._entries.values(), key=lambda entry: entry.used, reverse=True)
        return [entry.key for entry in entries]

    def pop_expired(self, limit: int | None = None) -> list[Key]:
        """Forget what has expired, at most `limit` entries (None: all), and return it, soonest first.

        While some are left, `next_expiry_s` is zero.
        """
        gone = []
        for key in islice(self._deaths.pop_due(self._clock()), limit):
            self.remove(key)
            gone.append(key)
        return gone

    def next_expiry_s(self) -> float | None:
        """Seconds until the next entry expires, not negative; None when none will."""
        first = self._deaths.first()
        return None if first is None else max(0.0, first - self._clock())

    def check(self) -> None:
        """Audit the structure. O(n).

        Raises:
            InvariantError: its parts disagree.
        """
        self._end_due_leases()
        self._candidates.check((entry.node, _holds(entry)) for entry in self._entries.values())
        for key, entry in self._entries.items():
            dies = None if entry.dies == _FOR_EVER else entry.dies
            if entry.key != key or entry.node.key != key or self._deaths.get(key) != dies:
                raise InvariantError(f"{key!r} is known under another key, or nothing will expire it in time")
            ends = None if entry.leased_until == _FOR_EVER else entry.leased_until
            if self._leases.get(key) != ends:
                raise InvariantError(f"nothing will end the lease of {key!r} in time")
        if self._leased != sum(entry.leased_until is not None for entry in self._entries.values()):
            raise InvariantError("leases are miscounted")
        self._deaths.check()
        self._leases.check()

    def _renew(self, entry: _Entry[Key]) -> None:
        """It was used just now."""
        self._uses += 1
        entry.used = self._uses
        left_s = entry.lifetime.ttl_s
        if entry.lifetime.until is not None:
            left_s = entry.lifetime.left_s(self._wall_clock())
        if left_s is None and entry.deadline is None:
            return
        if left_s is None or entry.leased_until is not None:
            entry.deadline = None if left_s is None else self._clock() + left_s
            self._follow(entry)
            return
        entry.deadline = self._clock() + left_s
        self._deaths.set(entry.key, entry.deadline)

    def _follow(self, entry: _Entry[Key]) -> None:
        """Let the heap know when it expires now."""
        dies = entry.dies
        if dies is None or dies == _FOR_EVER:
            self._deaths.discard(entry.key)
        else:
            self._deaths.set(entry.key, dies)

    def _end_due_leases(self) -> None:
        if self._leased:
            for key in self._leases.pop_due(self._clock()):
                self._end_lease(self._entries[key])

    def _end_lease(self, entry: _Entry[Key]) -> None:
        entry.leased_until = None
        self._leased -= 1
        self._candidates.let_go(entry.node)
        self._follow(entry)


def _holds(entry: _Entry[Key]) -> int:
    """Reasons of its own for which it may not go."""
    return (entry.pins > 0) + (entry.leased_until is not None)
