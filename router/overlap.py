"""How many leading blocks of a prompt each worker could reuse: the answer, and making it of bits that end somewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from router.holders import LEVELS
from router.index_workers import IndexWorkers

_REMEMBERED_MASKS = 4096
_LANE = (1 << LEVELS) - 1
_Parts = tuple[list[str], list[tuple[int, int]]]


class Overlap(NamedTuple):
    """Leading blocks of a prompt that a worker could reuse, cumulative from the fastest tier to the slowest.

    `device` blocks lie in its paged pool; `host` in pool or host RAM; `disk` in those or on its disk; `shared` in any
    of those or in the shared tier. device <= host <= disk <= shared.
    """

    device: int
    host: int
    disk: int
    shared: int


NO_OVERLAP = Overlap(0, 0, 0, 0)
End = tuple[int, int]  # bits of reach (`holders`) that are lost, and after how many blocks


class Overlaps:
    """Makes overlaps of ends. Remembers whose bits the masks that it saw are, which mostly come again."""

    def __init__(self, workers: IndexWorkers) -> None:
        self._workers = workers
        self._counts = workers.counts
        self._parts: dict[int, _Parts] = {}  # by mask of reach, while the same workers count

    def of(self, ends: Iterable[End]) -> dict[str, Overlap]:
        """By worker, of all of them."""
        found = dict.fromkeys(self._workers, NO_OVERLAP)
        depths: dict[int, list[int]] = {}  # by level, of the slots whose tiers end at different depths
        if self._counts != self._workers.counts:
            self._counts = self._workers.counts
            self._parts.clear()
        for bits, depth in ends:
            if not depth:
                continue
            whole, levels = self._parts.get(bits) or self._parts_of(bits)
            if whole:
                overlap = Overlap(depth, depth, depth, depth)
                for worker in whole:
                    found[worker] = overlap
            for slot, level in levels:
                if slot not in depths:
                    depths[slot] = [0] * LEVELS
                depths[slot][level] = depth
        for slot, (device, host, disk, shared) in depths.items():
            found[self._workers.names[slot]] = Overlap(device, host, disk, max(disk, shared))
        return found

    def _parts_of(self, bits: int) -> _Parts:
        """Whose workers' counted bits these are to the last, and the other bits as slot and level; remembered."""
        if len(self._parts) >= _REMEMBERED_MASKS:
            self._parts.clear()
        whole, levels = [], []
        for slot, lane in _lanes(bits):
            if lane == self._workers.counted >> slot * LEVELS & _LANE:
                whole.append(self._workers.names[slot])
            else:
                levels += [(slot, level) for level in range(LEVELS) if lane >> level & 1]
        self._parts[bits] = (whole, levels)
        return self._parts[bits]


def slots_of(bits: int) -> set[int]:
    """The slots that any of these bits of reach belong to."""
    return {slot for slot, _ in _lanes(bits)}


def _lanes(bits: int) -> Iterator[tuple[int, int]]:
    """The slots with any bit, the lowest first, and what each has of them."""
    while bits:
        slot = ((bits & -bits).bit_length() - 1) // LEVELS
        lane = bits >> slot * LEVELS & _LANE
        yield slot, lane
        bits ^= lane << slot * LEVELS
