"""Jobs that end with their prompt: what is said of them to the worker that will answer.

Covers: when a promise begins, how far it is, its end. Does not cover: who hears of it (`kvstore.peer.promises`),
computing (`engine`). Owned by the engine's thread.

Blocks are told when they were committed, so that they lie in the host tier, which is what is served: there every block
is written as soon as it is computed, whatever the admission rules of disk and Redis say.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.peer.promises import PromiseBoard
from workers.sequence import Sequence


class PrefillOnly:
    """Tells a board of the prefill-only jobs of an engine."""

    def __init__(self, board: PromiseBoard | None, block_size: int) -> None:
        """`board`: None: nobody hears of them."""
        self._board, self._block_size = board, block_size

    def begin(self, sequence: Sequence) -> None:
        """A job was taken in."""
        if self._board is not None and sequence.job.prefill_only and sequence.hashes:
            self._board.begin(sequence.job.block_hashes[-1])

    def stepped(self, sequences: Iterable[Sequence]) -> None:
        """A step has computed and committed chunks of these."""
        for sequence in sequences if self._board is not None else ():
            if sequence.job.prefill_only and sequence.job.block_hashes and self._board is not None:
                found = sequence.num_cached_tokens // self._block_size
                self._board.made(sequence.job.block_hashes[-1], sequence.num_committed, found=found)

    def ended(self, sequence: Sequence) -> None:
        """Its last output is out."""
        if self._board is not None and sequence.job.prefill_only and sequence.job.block_hashes:
            self._board.end(sequence.job.block_hashes[-1])
