"""Slots of the disk tier as its books know them: what one holds, and which are free. No bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.errors import InvariantError
from kvstore.tier import BlockMeta


@dataclass(slots=True, eq=False)
class Entry:
    """A slot that holds a block, or is about to.

    Attributes:
        index: of the slot. sequence: number of its write.
        used: time of the last use, on the tier's clock. order: number of the last use.
        lease: when it was promised, and for how many seconds (None: until it is ended). None: no lease.
        pins: readers, writers and auditors. views: of them, the auditors, which are no use.
        announced: the log knows it. removed: its block is gone; the last pin gives the slot back.
    """

    index: int
    meta: BlockMeta
    sequence: int
    used: float
    order: int = 0
    lease: tuple[float, float | None] | None = None
    pins: int = 0
    views: int = 0
    announced: bool = False
    removed: bool = False


def by_use(entry: Entry) -> int:
    """For sorting: least recently used first."""
    return entry.order


def end_of(start: float, for_s: float | None) -> float:
    """When a time ends; None: it does not."""
    return float("inf") if for_s is None else start + for_s


class FreeSlots:
    """Numbers of free slots, the one that was freed last first. O(1). Slots that were never used are not listed."""

    def __init__(self, num_slots: int) -> None:
        """All of `num_slots` are free."""
        self._num_slots = num_slots
        self._freed: list[int] = []
        self._fresh = 0  # slots from here on were never used

    def __len__(self) -> int:
        return self._num_slots - self._fresh + len(self._freed)

    def take(self) -> int | None:
        """A free slot; None: there is none."""
        if self._freed:
            return self._freed.pop()
        if self._fresh == self._num_slots:
            return None
        self._fresh += 1
        return self._fresh - 1

    def give(self, index: int) -> None:
        """That one is free again."""
        self._freed.append(index)

    def take_all(self, used: set[int]) -> None:
        """Those are not free. Only once, before any other call."""
        self._fresh = max(used, default=-1) + 1
        self._freed = sorted(set(range(self._fresh)) - used, reverse=True)

    def check(self, used: Iterable[int]) -> None:
        """Audit against the slots that are in use. O(slots).

        Raises:
            InvariantError: a slot is used twice, or lost.
        """
        if sorted([*used, *self._freed]) != list(range(self._fresh)) or self._fresh > self._num_slots:
            raise InvariantError("a slot is used twice, or lost")
