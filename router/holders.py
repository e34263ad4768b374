"""Sets of block holders: who, at which tier, until when, as interned bit masks. The index's inner structure.

Covers: the layout of masks, one object a set, taking an owner out of all sets at once, the end of a shared life. Does
not cover: which block has which holders (`runs`). Pure.

A mask is made of lanes of four bits. Lane 0 has the shared tier's bit; lane n + 1 has slot n's device, host and disk.
`reach` is the same set as `match` asks for it: lane n for slot n, cumulative over tiers (device | +host | +disk |
+shared), in which a shared block is within everybody's reach.

How long a shared block lives is part of its set (`until`), so the end of a life edits a few sets, as the loss of a
worker does, and costs no memory a block. Ends are rounded down to a grid of 1/64 to 1/128 of the life, a power of two
of seconds, so that neighbours written within moments share a set: a block may be given up that much too early, never
too late. Sets are weakly held: one that no run points to any more is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from heapq import heappop, heappush
from math import floor, frexp, inf, ldexp
from weakref import WeakSet, ref

from kvstore.events import TierName

SHARED = 1
LEVELS = 4  # bits a lane
NEVER = inf
_OWN_BITS = 0b111
_GRID_BITS = 6  # a life is told in 64 to 128 steps
_TIER_BIT = {TierName.HOST: 1, TierName.DISK: 2}
_FIRST_SLOTS = 8
_RECOUNT_AT = 64


class Gone(StrEnum):
    """Why a block that was known is held by nobody."""

    EVICTED = "evicted"
    EXPIRED = "expired"
    CLEARED = "cleared"
    WORKER_LOST = "worker_lost"


class Holders:
    """One set. `blocks`: how many have it. `until`: when the shared tier's bit ends, in the clock's seconds.

    `gone`: why the set is empty, read only while `mask` is zero.
    """

    __slots__ = ("__weakref__", "blocks", "gone", "mask", "reach", "until")

    def __init__(self, mask: int, until: float, reach: int) -> None:
        self.mask = mask
        self.until = until
        self.reach = reach
        self.blocks = 0
        self.gone = Gone.EVICTED


NOBODY = Holders(0, NEVER, 0)  # of what is no run any more


class HolderSets:
    """All sets that some run has, for up to `slots` workers; `grow` makes room for more."""

    def __init__(self) -> None:
        self.slots = _FIRST_SLOTS
        self.count = 0  # sets, those included that vanished since `recount`; at most twice those that there are
        self._recount_at = _RECOUNT_AT
        self._lanes = _lanes(self.slots)
        self._interned: dict[tuple[int, float], ref[Holders]] = {}  # those that vanished included, until `recount`
        self._all: WeakSet[Holders] = WeakSet()
        self._ends: list[float] = []  # a heap of the keys of `_ending`
        self._ending: dict[float, list[ref[Holders]]] = {}  # by `until` when they were made

    def __iter__(self) -> Iterator[Holders]:
        return iter(self._all)

    def recount(self) -> None:
        """Count the sets that are left."""
        self.count = len(self._all)
        self._recount_at = max(_RECOUNT_AT, 2 * self.count)
        if len(self._interned) > self._recount_at:
            self._interned = {key: held for key, held in self._interned.items() if held() is not None}
            for end, ending in self._ending.items():
                self._ending[end] = [held for held in ending if held() is not None]

    def get(self, mask: int, until: float = NEVER) -> Holders:
        """The set of that mask; `until` matters where the mask has the shared tier."""
        key = (mask, until)
        held = self._interned.get(key)
        holders = held() if held is not None else None
        if holders is None:
            holders = Holders(mask, until, self.reach(mask))
            self._interned[key] = held = ref(holders)
            self._all.add(holders)
            self.count += 1
            if until < NEVER:
                self._note_end(until, held)
            if self.count >= self._recount_at:
                self.recount()
        return holders

    def take_out(self, bits: int, cause: Gone) -> bool:
        """Take bits from every set; whether any had them. O(different sets), however many blocks there are.

        Two sets may become equal: both stay, and only one is handed out again. Empty ones are not handed out, for each
        remembers its own cause.
        """
        return self._edit([holders for holders in self._all if holders.mask & bits], bits, cause)

    def expire(self, now: float) -> bool:
        """End the shared lives whose time has come; whether any did. O(sets that end)."""
        ended = []
        while self._ends and self._ends[0] <= now:
            held = [each() for each in self._ending.pop(heappop(self._ends))]
            ended += [holders for holders in held if holders is not None and holders.until <= now]
        return self._edit(ended, SHARED, Gone.EXPIRED) if ended else False

    def grow(self) -> None:
        """Twice as many slots."""
        self.slots *= 2
        self._lanes = _lanes(self.slots)
        for holders in self._all:
            holders.reach = self.reach(holders.mask)

    def reach(self, mask: int) -> int:
        """A mask as `match` sees it: all slots at once, lane by lane."""
        own, lanes = mask >> LEVELS, self._lanes
        device = own & lanes
        host = device | own >> 1 & lanes
        disk = host | own >> 2 & lanes
        return device | host << 1 | disk << 2 | (lanes if mask & SHARED else disk) << 3

    def _note_end(self, until: float, held: ref[Holders]) -> None:
        if until not in self._ending:
            self._ending[until] = []
            heappush(self._ends, until)
        self._ending[until].append(held)

    def _edit(self, touched: list[Holders], bits: int, cause: Gone) -> bool:
        for holders in touched:
            held = self._interned.get((holders.mask, holders.until))
            if held is not None and held() is holders:
                del self._interned[holders.mask, holders.until]
        for holders in touched:
            holders.mask &= ~bits
            holders.reach = self.reach(holders.mask)
            if not holders.mask & SHARED:
                holders.until = NEVER
            if holders.mask:
                self._hand_out(holders)
            else:
                holders.gone = cause
        return bool(touched)

    def _hand_out(self, holders: Holders) -> None:
        """Of sets that have become equal, the first one."""
        key = (holders.mask, holders.until)
        held = self._interned.get(key)
        if held is None or held() is None:
            self._interned[key] = ref(holders)


def slot_mask(slot: int) -> int:
    """All tiers of a worker."""
    return _OWN_BITS << LEVELS * (slot + 1)


def tier_mask(slot: int, tier: TierName) -> int:
    """One tier of a worker; the shared tier's bit belongs to no worker."""
    device = 1 << LEVELS * (slot + 1)
    if tier is TierName.DEVICE:  # most are
        return device
    return SHARED if tier is TierName.REDIS else device << _TIER_BIT[tier]


def end_of_life(now: float, ttl_s: float | None) -> float:
    """When a shared block that lives `ttl_s` from now on is given up, on the grid. `NEVER` for None."""
    if ttl_s is None:
        return NEVER
    if ttl_s <= 0:
        return now
    grid = ldexp(1.0, frexp(ttl_s)[1] - 1 - _GRID_BITS)
    return floor((now + ttl_s) / grid) * grid


def _lanes(slots: int) -> int:
    """The lowest bit of every lane."""
    return sum(1 << LEVELS * slot for slot in range(slots))
