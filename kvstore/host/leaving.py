"""Blocks that eviction drops from host, kept until somebody takes them to a lower tier.

Covers: which are kept, and how many. Does not cover: copying their bytes (`tier`), where they go (`write_back`).
Whoever calls it holds the tier's lock, but for `is_full`. O(1) a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass

from kvstore.blocks import BlockHash
from kvstore.tier import BlockMeta


@dataclass(frozen=True, slots=True)
class Evicted:
    """A block that was evicted.

    Attributes:
        meta: with the time to live that was left. payload: a copy of its bytes.
    """

    meta: BlockMeta
    payload: bytes


class Leaving:
    """Evicted blocks by name, the one that left first first.

    Attributes:
        limit: how many are kept; zero: none, nobody takes them. lost: those that found no room.
    """

    def __init__(self) -> None:
        self.limit = 0
        self.lost = 0
        self._blocks: OrderedDict[BlockHash, Evicted] = OrderedDict()

    @property
    def is_full(self) -> bool:
        """Whether one more would be lost."""
        return len(self._blocks) >= self.limit

    def add(self, meta: BlockMeta, payload: bytes | None) -> None:
        """Keep it; without its bytes, or without room, it is lost."""
        if payload is None or (self.is_full and meta.hash not in self._blocks):
            self.lost += 1
        else:
            self._blocks[meta.hash] = Evicted(meta, payload)

    def take(self) -> list[Evicted]:
        """All of them; none is kept any more."""
        blocks, self._blocks = self._blocks, OrderedDict()
        return list(blocks.values())

    def drop(self, names: Container[BlockHash]) -> None:
        """Forget those."""
        for name in [name for name in self._blocks if name in names]:
            del self._blocks[name]

    def metas(self) -> list[BlockMeta]:
        """Of all of them."""
        return [evicted.meta for evicted in self._blocks.values()]
