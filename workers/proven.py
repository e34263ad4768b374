"""Blocks over which this process has computed finite numbers: what is not to blame when logits go wrong."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items

from kvstore.blocks import BlockHash
from workers.sequence import Sequence

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

    def leading(self, names: Items[BlockHash]) -> int:
        """How many leading ones are proven."""
        return next((i for i, name in enumerate(names) if name not in self._names), len(names))

    def doubt(self, sequence: Sequence, block_size: int) -> list[BlockHash]:
        """A sequence's numbers went wrong: those of its committed blocks that may be wrong, which are proven no more.

        These are what it computed, what came from outside of this process, and what nobody has computed finite numbers
        over here; all of its blocks if it is the second one in a row over them that goes wrong. If it is the model that
        is broken, a request drops no more than its own blocks, and the next one finds none of them.
        """
        names = sequence.hashes[: sequence.num_committed]
        first = min(sequence.num_cached_tokens // block_size, self.leading(names))
        if sequence.first_outside is not None and sequence.first_outside >= sequence.num_proven:
            first = min(first, sequence.first_outside)
        self.discard(names)
        return names[first:]
