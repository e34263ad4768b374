"""Sets of block holders: who, at which tier, as interned bit masks. The index's inner structure.

Covers: the layout of masks, one object a set, taking an owner out of all sets at once. Does not cover: which block has
which holders (`index`). Pure.

A mask has bit 0 for the shared tier and three bits a worker slot (device, host, disk). `reach` is the same set seen by
`match`: four bits a slot, cumulative over tiers (device | +host | +disk | +shared), in which a shared block is within
everybody's reach. Sets are weakly held: one that no block points to any more is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from weakref import WeakSet, WeakValueDictionary

from kvstore.events import TierName

SHARED = 1
LEVELS = 4  # bits a slot in `reach`
_RAW_BITS = 3  # bits a slot in a mask
_TIER_BIT = {TierName.DEVICE: 0, TierName.HOST: 1, TierName.DISK: 2}
# What a slot's raw bits reach.
_OWN_REACH = {raw: (raw & 1) | bool(raw & 3) << 1 | 0b1100 for raw in range(1, 8)}


class Gone(StrEnum):
    """Why a block that was known is held by nobody."""

    EVICTED = "evicted"
    EXPIRED = "expired"
    CLEARED = "cleared"
    WORKER_LOST = "worker_lost"


class Holders:
    """One set. `blocks`: how many point here. `gone`: why it is empty, read only while `mask` is zero."""

    __slots__ = ("__weakref__", "blocks", "gone", "mask", "reach")

    def __init__(self, mask: int, reach: int) -> None:
        self.mask = mask
        self.reach = reach
        self.blocks = 0
        self.gone = Gone.EVICTED


class HolderSets:
    """All sets that some block has, for up to `slots` workers; `grow` makes room for more."""

    def __init__(self) -> None:
        self.slots = 8
        self._interned: WeakValueDictionary[int, Holders] = WeakValueDictionary()
        self._all: WeakSet[Holders] = WeakSet()
        self._everyone = _everyone(self.slots)

    def __iter__(self) -> Iterator[Holders]:
        return iter(self._all)

    def get(self, mask: int) -> Holders:
        """The set of that mask."""
        holders = self._interned.get(mask)
        if holders is None:
            holders = self._interned[mask] = Holders(mask, self.reach(mask))
            self._all.add(holders)
        return holders

    def take_out(self, bits: int, cause: Gone) -> bool:
        """Take bits from every set; whether any had them. O(different sets), however many blocks there are.

        Two sets may become equal: both stay, and only one is handed out again. Empty ones are not handed out, for each
        remembers its own cause.
        """
        touched = [holders for holders in self._all if holders.mask & bits]
        for holders in touched:
            holders.mask &= ~bits
            holders.reach = self.reach(holders.mask)
            if not holders.mask:
                holders.gone = cause
        if touched:
            self._interned = WeakValueDictionary({h.mask: h for h in self._all if h.mask})
        return bool(touched)

    def grow(self) -> None:
        """Twice as many slots."""
        self.slots *= 2
        self._everyone = _everyone(self.slots)
        for holders in self._all:
            holders.reach = self.reach(holders.mask)

    def reach(self, mask: int) -> int:
        """A mask as `match` sees it."""
        reach = self._everyone if mask & SHARED else 0
        rest, slot = mask >> 1, 0
        while rest:
            if own := rest & 0b111:
                reach |= _OWN_REACH[own] << (slot * LEVELS)
            rest >>= _RAW_BITS
            slot += 1
        return reach


def slot_mask(slot: int) -> int:
    """All tiers of a worker."""
    return 0b111 << (1 + slot * _RAW_BITS)


def tier_mask(slot: int, tier: TierName) -> int:
    """One tier of a worker; the shared tier's bit belongs to no worker."""
    return SHARED if tier is TierName.REDIS else 1 << (1 + slot * _RAW_BITS + _TIER_BIT[tier])


def _everyone(slots: int) -> int:
    return sum(0b1000 << (slot * LEVELS) for slot in range(slots))
