"""A worker's block pool, as a least recently used cache of segments that loses single blocks.

Covers: what is held, what a prompt brings in and drives out. Does not cover: time. Exact to the block: a prompt's last
blocks go before its first, as engines free them, so what is held of a chain is always a leading part of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple


class Partial(NamedTuple):
    """A segment of which a worker's pool holds only so many leading blocks."""

    segment: int
    blocks: int


class Change(NamedTuple):
    """What a prompt did to a pool: segments that became whole, and those that no longer are."""

    stored: list[int]
    removed: list[int]


class Pool:
    """A cache of `capacity` blocks. `lengths`: blocks of each segment of the trace."""

    def __init__(self, capacity: int, lengths: Sequence[int]) -> None:
        self._capacity = capacity
        self._lengths = lengths
        self._held: OrderedDict[int, int] = OrderedDict()  # blocks of each segment, the least recently used first
        self._used = 0

    @property
    def used(self) -> int:
        """Blocks held."""
        return self._used

    def leading(self, chain: Sequence[int]) -> int:
        """Blocks of a chain that are held from its start on."""
        blocks, held, lengths = 0, self._held, self._lengths
        for segment in chain:
            there = held.get(segment, 0)
            blocks += there
            if there < lengths[segment]:
                break
        return blocks

    def take(self, chain: Sequence[int]) -> Change:
        """All blocks of a chain were computed or used; what does not fit any more goes."""
        held, lengths, stored = self._held, self._lengths, []
        for segment in reversed(chain):
            there, length = held.get(segment, 0), lengths[segment]
            if there < length:
                self._used += length - there
                held[segment] = length
                stored.append(segment)
            held.move_to_end(segment)
        return Change(stored[::-1], self._shrink())

    def partial(self) -> Partial | None:
        """The segment of which a leading part is held: only the next to go can be one."""
        if not self._held:
            return None
        segment, blocks = next(iter(self._held.items()))
        return Partial(segment, blocks) if blocks < self._lengths[segment] else None

    def whole(self) -> list[int]:
        """The segments of which all blocks are held."""
        return [segment for segment, blocks in self._held.items() if blocks == self._lengths[segment]]

    def clear(self) -> None:
        """Hold nothing."""
        self._held.clear()
        self._used = 0

    def _shrink(self) -> list[int]:
        held, removed = self._held, []
        while self._used > self._capacity:
            segment, blocks = next(iter(held.items()))
            going = min(blocks, self._used - self._capacity)
            if blocks == self._lengths[segment]:
                removed.append(segment)
            self._used -= going
            if going == blocks:
                del held[segment]
            else:
                held[segment] = blocks - going
        return removed
