"""How many leading blocks of a prompt each worker could reuse: the answer, and making it of bits that end somewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from router.holders import LEVELS

_REMEMBERED_MASKS = 4096


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
    """Makes overlaps of ends. Remembers which bits the masks that it saw have, which mostly come again."""

    def __init__(self) -> None:
        self._levels: dict[int, tuple[int, ...]] = {}

    def of(self, ends: Iterable[End], workers: Iterable[str], names: Mapping[int, str]) -> dict[str, Overlap]:
        """By worker. `names`: of the workers, by slot."""
        depths: dict[int, list[int]] = {}  # of the slots that have any, by level
        for bits, depth in ends:
            if not depth:
                continue
            for level in self._levels.get(bits) or self._levels_of(bits):
                slot = level // LEVELS
                if slot not in depths:
                    depths[slot] = [0] * LEVELS
                depths[slot][level % LEVELS] = depth
        found = dict.fromkeys(workers, NO_OVERLAP)
        for slot, (device, host, disk, shared) in depths.items():
            found[names[slot]] = Overlap(device, host, disk, max(disk, shared))
        return found

    def slots(self, bits: int) -> set[int]:
        """The slots that any of these bits of reach belong to."""
        return {level // LEVELS for level in self._levels_of(bits)}

    def _levels_of(self, bits: int) -> tuple[int, ...]:
        """The numbers of the bits that are set, remembered."""
        if len(self._levels) >= _REMEMBERED_MASKS:
            self._levels.clear()
        levels, rest = [], bits
        while rest:
            lowest = rest & -rest
            levels.append(lowest.bit_length() - 1)
            rest ^= lowest
        self._levels[bits] = tuple(levels)
        return self._levels[bits]
