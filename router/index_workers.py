"""The workers as the index knows them: whose messages are heard, and whose bits count. Pure.

A worker has a slot, which is its place in the masks of `holders`, for as long as its stream lives. It is heard under
one incarnation, and its bits count between the end of a whole snapshot and the next gap, loss or restart.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvstore.events import TierName
from router.holders import LEVELS, SHARED, slot_mask

_OWN_LEVELS, _ALL_LEVELS = 0b0111, 0b1111


class IndexWorker:
    """What the index knows of a worker. `removed` and `cleared` collect removals while a snapshot is being read.

    Attributes:
        shares: it reads from the shared tier. counted: its bits count. deaf: so much was removed while its snapshot
            was read that it is not remembered, and the rest of the snapshot is not believed. cleared: tiers that were
            cleared meanwhile, of which the rest of the snapshot tells what they held before.
    """

    __slots__ = ("cleared", "counted", "deaf", "incarnation", "removed", "shares", "slot")

    def __init__(self, slot: int, incarnation: int, *, shares: bool) -> None:
        self.slot = slot
        self.incarnation = incarnation
        self.shares = shares
        self.counted = False
        self.deaf = False
        self.removed: set[tuple[TierName, bytes]] | None = None
        self.cleared: set[TierName] = set()


class IndexWorkers:
    """All of them.

    Attributes:
        names: by slot. counted: the bits of every holder set's reach that count. counts: how often that changed.
    """

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.counted = 0
        self.counts = 0
        self._known: dict[str, IndexWorker] = {}
        self._incarnations: dict[str, int] = {}
        self._free: list[int] = []

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._known)

    def get(self, worker: str) -> IndexWorker | None:
        """By name."""
        return self._known.get(worker)

    def fenced(self, worker: str, incarnation: int) -> IndexWorker | None:
        """By name, if this is the incarnation that is heard."""
        known = self._known.get(worker)
        return known if known is not None and known.incarnation == incarnation else None

    def is_past(self, worker: str, incarnation: int) -> bool:
        """Whether a later incarnation has been heard."""
        return incarnation < self._incarnations.get(worker, 0)

    def add(self, worker: str, incarnation: int, *, shares: bool) -> int:
        """One that is not known; its slot, which may be higher than any before."""
        slot = self._free.pop() if self._free else len(self._known)
        self._incarnations[worker] = incarnation
        self._known[worker] = IndexWorker(slot, incarnation, shares=shares)
        self.names[slot] = worker
        return slot

    def remove(self, worker: str) -> int | None:
        """It is lost; the slot that it had, which the next one may get."""
        known = self._known.pop(worker, None)
        if known is None:
            return None
        del self.names[known.slot]
        self._free.append(known.slot)
        self.count()
        return known.slot

    def unfence(self, worker: str) -> None:
        """Whichever incarnation joins next is heard."""
        self._incarnations.pop(worker, None)

    def count(self) -> None:
        """Some began or ceased to count."""
        self.counted = 0
        self.counts += 1
        for known in self._known.values():
            if known.counted:
                self.counted |= (_ALL_LEVELS if known.shares else _OWN_LEVELS) << known.slot * LEVELS

    def taken(self) -> int:
        """The bits of holder sets' masks that have an owner."""
        mask = SHARED
        for known in self._known.values():
            mask |= slot_mask(known.slot)
        return mask

    def is_sound(self) -> bool:
        """Whether every slot has one owner."""
        slots = [known.slot for known in self._known.values()] + self._free
        by_slot = {known.slot: name for name, known in self._known.items()}
        return len(slots) == len(set(slots)) and self.names == by_slot
