"""How many different blocks the requests in flight on one worker use.

Covers: counting the union of chains, and how far one more would grow it. Does not cover: who is in flight (`traffic`).

Chains are kept sorted. A block's hash tells all blocks before it, so equal blocks at one depth mean equal beginnings:
where two chains part is found by halving, and the longest beginning that a chain shares with any other it shares with
a neighbour. Adding, removing and asking take O(log chains * log blocks) comparisons, where a counter of blocks would
touch every block of a prompt. Invariant: `distinct` is the size of the union of the chains' blocks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cmp_to_key

Chain = Sequence[bytes]


class ActiveBlocks:
    """The chains in use, the same one as often as it was added."""

    def __init__(self) -> None:
        self._chains: list[Chain] = []
        self.distinct = 0

    def add(self, chain: Chain) -> None:
        """One more request uses these blocks."""
        at = self._place(chain)
        self.distinct += self._new(at, chain)
        self._chains.insert(at, chain)

    def remove(self, chain: Chain) -> None:
        """One request less does. The chain must have been added."""
        at = self._place(chain)
        del self._chains[at]
        self.distinct -= self._new(at, chain)

    def new(self, chain: Chain) -> int:
        """By how many blocks this chain would grow the union."""
        return self._new(self._place(chain), chain)

    def _place(self, chain: Chain) -> int:
        return bisect_left(self._chains, _by_blocks(chain), key=_by_blocks)

    def _new(self, at: int, chain: Chain) -> int:
        neighbours = self._chains[max(at - 1, 0) : at + 1]
        return len(chain) - max((_common(chain, other) for other in neighbours), default=0)


def _common(one: Chain, other: Chain) -> int:
    """How many leading blocks two chains share."""
    low, high = 0, min(len(one), len(other))
    if not high or one[0] != other[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[middle - 1] == other[middle - 1] else (low, middle - 1)
    return low


def _compare(one: Chain, other: Chain) -> int:
    depth = _common(one, other)
    if depth == min(len(one), len(other)):
        return len(one) - len(other)
    return -1 if one[depth] < other[depth] else 1


_by_blocks = cmp_to_key(_compare)
