"""Jobs that end with their prompt: what is said of them to the worker that will answer.

Covers: when a promise begins, how far it is, its end. Does not cover: who hears of it (`kvstore.peer.promises`),
computing (`engine`). Owned by the engine's thread.

Blocks are told when they were committed and have come to the host tier, which is what is served: there every block is
written as soon as it is computed, whatever the admission rules of disk and Redis say. Where copies run beside the steps
that is later than the commit, and who heard of it before would ask in vain, and wait for nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from kvstore.blocks import BlockHash
from kvstore.peer.promises import PromiseBoard
from workers.sequence import Sequence


@dataclass(slots=True)
class _Promised:
    """A chain that is being made: its committed blocks, how many of them were found, whether no more will come."""

    ticket: BlockHash
    names: list[BlockHash] = field(default_factory=list)
    found: int = 0
    has_ended: bool = False


class PrefillOnly:
    """Tells a board of the prefill-only jobs of an engine."""

    def __init__(
        self, board: PromiseBoard | None, block_size: int, settled: Callable[[Items[BlockHash]], int] = len
    ) -> None:
        """`board`: None: nobody hears of them. `settled`: as `TieredStore.settled`."""
        self._board, self._block_size, self._settled = board, block_size, settled
        self._open: dict[Sequence, _Promised] = {}

    @property
    def awaits_copies(self) -> bool:
        """Whether a job has ended of which there will be more to tell."""
        return any(each.has_ended for each in self._open.values())

    def begin(self, sequence: Sequence) -> None:
        """A job was taken in."""
        if self._board is not None and sequence.job.prefill_only and sequence.job.block_hashes:
            promised = self._open[sequence] = _Promised(sequence.job.block_hashes[-1])
            self._board.begin(promised.ticket)

    def stepped(self, sequences: Iterable[Sequence]) -> None:
        """A step has computed and committed chunks of these."""
        for sequence in sequences if self._open else ():
            if (promised := self._open.get(sequence)) is not None:
                promised.found = sequence.num_cached_tokens // self._block_size
                promised.names = sequence.hashes[: sequence.num_committed]
                self._tell(promised)

    def ended(self, sequence: Sequence) -> None:
        """Its last output is out."""
        if (promised := self._open.get(sequence)) is not None:
            promised.has_ended = True
            self.pump()

    def pump(self) -> None:
        """Copies may have ended: tell what there is to tell by now."""
        for sequence, promised in list(self._open.items()):
            if self._tell(promised) and promised.has_ended and self._board is not None:
                self._board.end(promised.ticket)
                del self._open[sequence]

    def _tell(self, promised: _Promised) -> bool:
        """Whether that is all that was committed."""
        count = self._settled(promised.names)
        if self._board is not None and promised.names:
            self._board.made(promised.ticket, count, found=min(promised.found, count))
        return count == len(promised.names)
