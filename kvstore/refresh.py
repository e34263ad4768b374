"""When to refresh a block in a slow tier: it must not die there while it is used in a fast one.

A name is due at most once per quarter of its TTL, or in five minutes, unless it is to live longer by a quarter; `spill`
then touches what the tier holds and reports what it lost. Pure, on injected clocks.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from kvstore.blocks import BlockHash
from kvstore.eviction.deadlines import Deadlines
from kvstore.lifetime import FOR_EVER, Lifetime
from kvstore.tier import Clock

RETRY_S = 5.0  # after a refresh that got no answer; sooner where the TTL is short
REFRESH_WITHOUT_TTL_S = 300.0  # of what does not slide: keeps recency in a server that evicts by it


@dataclass(slots=True)
class _Use:
    renewed: float | None  # when the lower tier last heard of it; None: not that we know
    lifetime: Lifetime = FOR_EVER  # that it then heard of
    wanted: Lifetime = FOR_EVER  # that it hears of the next time


class RefreshSchedule:
    """When to refresh a name in the lower tier: a quarter of its TTL after the last refresh, if it was used since.

    A use that comes too early is not forgotten: it is due when the quarter is over, so that the lower tier's TTL ends
    at the earliest three quarters of a TTL after the last use. A lifetime that grows is told at once if the block is to
    live longer by a quarter of what it then has left, and with the next refresh if by less: a fixed end that each
    request puts a little later costs no more than one that stays. Pure, on injected clocks; O(log n) once per refresh,
    O(1) for uses in between. Bounded: names not used for longest are forgotten, which costs one early refresh.
    """

    def __init__(self, capacity: int, *, clock: Clock, wall_clock: Clock = time.time) -> None:
        """Remember at most `capacity` names; `wall_clock` is what fixed ends go by."""
        self._capacity = capacity
        self._clock = clock
        self._wall_clock = wall_clock
        self._uses: OrderedDict[BlockHash, _Use] = OrderedDict()
        self._due: Deadlines[BlockHash] = Deadlines()

    def used(self, name: BlockHash, lifetime: Lifetime) -> None:
        """It was hit in a faster tier."""
        use, now = self._entry(name), self._clock()
        if use.renewed is None:
            use.wanted = lifetime
            self._bring_forward(name, now)
        elif lifetime.outlives(use.lifetime):
            use.wanted = use.lifetime.joined(lifetime)
            self._bring_forward(name, max(now, self._grown_due(use, use.renewed, now)))
        elif self._due.get(name) is None:
            self._set_due(name, max(now, use.renewed + _interval_s(lifetime)))

    def doubted(self, name: BlockHash, lifetime: Lifetime) -> None:
        """It had to be computed though the lower tier should hold it: ask there at once whether it does."""
        use = self._entry(name)
        use.wanted = lifetime
        self._set_due(name, self._clock())

    def renewed(self, name: BlockHash, lifetime: Lifetime) -> None:
        """The lower tier has just been written or read: this lifetime has begun again there."""
        use = self._entry(name)
        use.renewed, use.lifetime, use.wanted = self._clock(), lifetime, lifetime
        self._due.discard(name)

    def unanswered(self, name: BlockHash, lifetime: Lifetime) -> None:
        """A refresh got no answer: try again soon."""
        self._entry(name)
        self._set_due(name, self._clock() + min(RETRY_S, _interval_s(lifetime) / 4))

    def lost(self, name: BlockHash) -> None:
        """The lower tier does not hold it."""
        self._uses.pop(name, None)
        self._due.discard(name)

    def retain(self, names: set[BlockHash]) -> None:
        """Of all others it is not known any more whether the lower tier holds them."""
        for name in [name for name in self._uses if name not in names]:
            self.lost(name)

    def pop_due(self) -> list[BlockHash]:
        """Names to refresh now, in the order of their uses. They count as renewed."""
        now = self._clock()
        due = list(self._due.pop_due(now))
        for name in due:
            use = self._uses[name]
            use.lifetime = use.wanted if use.renewed is None else use.lifetime.joined(use.wanted)
            use.renewed = now
        return due

    def _grown_due(self, use: _Use, renewed: float, now: float) -> float:
        """When to tell the lower tier that it is to live longer than was said at `renewed`."""
        wall = self._wall_clock()
        left_s, told = use.wanted.left_s(wall), use.lifetime
        if left_s is None or told.ttl_s is None:
            return now
        there_s = renewed + told.ttl_s - now
        if told.until is not None:
            there_s = max(there_s, told.until - wall)
        return now if left_s - there_s >= left_s / 4 else renewed + min(left_s / 4, _interval_s(use.wanted))

    def _bring_forward(self, name: BlockHash, at: float) -> None:
        due = self._due.get(name)
        if due is None or at < due:
            self._set_due(name, at)

    def _set_due(self, name: BlockHash, at: float) -> None:
        self._due.discard(name)  # moving one to an earlier time leaves a heap item behind: only this counts those
        self._due.set(name, at)

    def _entry(self, name: BlockHash) -> _Use:
        use = self._uses.get(name)
        if use is None:
            use = self._uses[name] = _Use(renewed=None)
            if len(self._uses) > self._capacity:
                self.lost(next(iter(self._uses)))
        else:
            self._uses.move_to_end(name)
        return use


def _interval_s(lifetime: Lifetime) -> float:
    """What no use renews is refreshed all the same, as a use in the eyes of a server that evicts by it."""
    return lifetime.ttl_s / 4 if lifetime.ttl_s else REFRESH_WITHOUT_TTL_S
