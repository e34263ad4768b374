"""Blocks that a disk tier found when it was opened, until eviction has been told of them.

Covers: answering for them by what the log says, and time that passed while nobody was there. Does not cover: finding
them (`recovery`), telling eviction (`books`).

To tell eviction of a block costs some 20 us, to read about it in the log 3: so 100,000 blocks can be found after a
third of a second, and eviction is told of each when it is used or when there is time.

Times go by the wall clock across restarts: what passed while the process was down counts. A wall clock that was set
back makes a block's age zero, not negative: it then lives one more time to live at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter

from kvstore.blocks import BlockHash
from kvstore.disk.entries import Entry, end_of
from kvstore.disk.log import (
    FOR_S,
    HASH,
    INDEX,
    PARENT,
    PRIORITY,
    PROMISED,
    ROOT,
    SEQUENCE,
    TTL_S,
    TURN,
    UNTIL,
    USED,
    Found,
)
from kvstore.tier import BlockMeta


class Restored:
    """Blocks by name, least recently used first; times are told on the tier's clock."""

    def __init__(self, found: Sequence[Found], *, clock: float, wall: float) -> None:
        """Blocks in order of use, and what the tier's clock and the wall clock say now."""
        self._clock = clock
        self._wall = wall
        for order, one in enumerate(found, 1):
            one[0] = order
        self._found: dict[BlockHash, Found] = dict(zip(map(itemgetter(HASH), found), found, strict=True))

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._found

    def live(self, name: BlockHash, now: float) -> bool:
        """Whether it is one of them that has not expired."""
        one = self._found.get(name)
        if one is None:
            return False
        return max(end_of(self._on_clock(one[USED]), one[TTL_S]), self._fixed_end(one), self._lease_end(one)) > now

    def leased(self, now: float) -> int:
        """Blocks under a lease. O(blocks)."""
        return sum(self._lease_end(one) > now for one in self._found.values())

    def lease_ends(self) -> dict[BlockHash, float]:
        """When the leases end of those that have one. O(blocks)."""
        return {name: self._lease_end(one) for name, one in self._found.items() if len(one) > FOR_S}

    def metas(self) -> list[BlockMeta]:
        """Their metadata."""
        return [_meta(one) for one in self._found.values()]

    def slots(self) -> list[int]:
        """The slots that hold them."""
        return [one[INDEX] for one in self._found.values()]

    def first(self, count: int) -> list[BlockHash]:
        """The names of the least recently used ones."""
        return list(islice(self._found, count))

    def take(self, name: BlockHash) -> Entry | None:
        """The block as the books know it, which is none of these any more; None: it was none of them."""
        one = self._found.pop(name, None)
        if one is None:
            return None
        entry = Entry(one[INDEX], _meta(one), one[SEQUENCE], self._on_clock(one[USED]), order=one[0], announced=True)
        if len(one) > FOR_S:
            entry.lease = self._on_clock(one[PROMISED]), one[FOR_S]
        return entry

    def _on_clock(self, wall: float) -> float:
        return self._clock - max(0.0, self._wall - wall)

    def _fixed_end(self, one: Found) -> float:
        until: float | None = one[UNTIL]
        return float("-inf") if until is None else self._clock + (until - self._wall)

    def ttl_left_s(self, name: BlockHash, now: float) -> float | None:
        """As `LocalTier.ttl_left_s`, of one of them."""
        one = self._found[name]
        ends = max(end_of(self._on_clock(one[USED]), one[TTL_S]), self._fixed_end(one), self._lease_end(one))
        return None if math.isinf(ends) else ends - now

    def _lease_end(self, one: Found) -> float:
        if len(one) <= FOR_S:
            return float("-inf")
        return end_of(self._on_clock(one[PROMISED]), one[FOR_S])


def _meta(one: Found) -> BlockMeta:
    return BlockMeta(one[HASH], one[PARENT], one[ROOT], one[TTL_S], one[PRIORITY], one[UNTIL], one[TURN])
