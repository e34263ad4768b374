"""Sequences that compute the front of their prompt while its back comes from a slow tier: where the two meet.

A step computes a chunk of the front that ends at a block boundary where something may have changed: where blocks of the
tail are, or where they should be by then. When the front has come up to blocks that are there, they go into its table
and it goes on behind them, whether or not the step that computes the last of the front has been taken in: what is
committed by then is told apart by `Sequence.joined`. Nothing ever waits for a tail, and a tail takes no block that a
sequence needs: it is given up before anybody is preempted.

Covers: what the scheduler does about tails. Does not cover: which blocks come, and when (`kvstore.tail`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from workers.sequence import Rank, Sequence


class Tails:
    """The tails of the sequences of a scheduler."""

    def __init__(
        self, block_size: int, release: Callable[[Items[int]], None], made: Callable[[Sequence, int, int], None]
    ) -> None:
        """`release` gives blocks back. `made`: as `Scheduler.made`."""
        self._block_size, self._release, self._made = block_size, release, made

    def meet(self, running: Items[Sequence]) -> None:
        """Let those go on behind blocks that they have come up to."""
        for sequence in running:
            if sequence.tail is not None:
                self._meet(sequence)

    def reach(self, sequence: Sequence) -> int:
        """Tokens that it may compute in the next step."""
        if sequence.tail is None:
            return sequence.remaining
        place = self._next_block(sequence.num_computed)
        blocks = sequence.tail.reach(place)
        if blocks is None:
            return sequence.remaining
        return min(sequence.remaining, (place + blocks) * self._block_size - sequence.num_computed)

    def going(self, sequence: Sequence, length: int) -> None:
        """It computes so many more tokens in the next step."""
        if sequence.tail is not None:
            sequence.tail.passed(self._next_block(sequence.num_computed + length))

    def give_up_one(self, running: Items[Sequence], rank: Rank) -> bool:
        """Free the blocks of the tail of the lowest in rank, of this rank or below; False: none of them holds any."""
        for sequence in reversed(running):
            if sequence.rank < rank:
                break
            if sequence.tail is not None and sequence.tail.block_ids:
                sequence.tail.cancel()
                sequence.tail = None
                return True
        return False

    def _meet(self, sequence: Sequence) -> None:
        tail, place = sequence.tail, sequence.num_computed // self._block_size
        if tail is None:
            return
        if sequence.num_computed % self._block_size == 0:
            block_ids, tiers = tail.take(place)
            if block_ids:
                self._release(sequence.block_table[place:])  # of a step that was too large, and is made smaller
                del sequence.block_table[place:]
                sequence.join(block_ids, tiers, self._block_size)
                self._made(sequence, place, sequence.num_committed)
        if tail.is_over:
            tail.cancel()
            sequence.tail = None

    def _next_block(self, tokens: int) -> int:
        """The first block that lies behind so many tokens."""
        return -(-tokens // self._block_size)
