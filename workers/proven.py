"""Blocks over which this process has computed finite numbers: what is not to blame when logits go wrong."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvstore.blocks import BlockHash

MAX_BLOCKS = 1 << 16


class Proven:
    """Bounded: those shown longest ago are forgotten, which makes them doubtful again. O(1) a block."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        """Nothing is proven yet."""
        self._max_blocks = max_blocks
        self._names: OrderedDict[BlockHash, None] = OrderedDict()

    def add(self, names: Iterable[BlockHash]) -> None:
        """Finite logits came out of a prompt with these."""
        for name in names:
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._max_blocks:
            self._names.popitem(last=False)

    def discard(self, names: Iterable[BlockHash]) -> None:
        """Logits that are not finite did: one of these may have been replaced."""
        for name in names:
            self._names.pop(name, None)

    def leading(self, names: Sequence[BlockHash]) -> int:
        """How many leading ones are proven."""
        return next((i for i, name in enumerate(names) if name not in self._names), len(names))
