"""Which request continues which: what a worker knows of a conversation from the requests that it has served. No torch.

The next turn of a conversation begins with the blocks of the turn before it, so a turn is remembered by the names of
the last full blocks of its prompt and of its answer. Names are salted by tenant: nobody continues another's turn.
The end of a prompt may be one that many conversations begin with, so it says who comes next only if the turns' numbers
do, too; an answer is its conversation's own. Steps of an agent that all are of one turn are known by their answers.

Covers: the seconds and tokens between two turns, for eviction policies. Does not cover: turns that another worker
served, or this one before it started.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from kvstore.blocks import BlockHash
from workers.protocol import Job

_REMEMBERED = 1 << 15  # names of blocks, two a turn: some 10 MB
_LOOKED_AT = 2048  # blocks of a prompt, from its end


@dataclass(frozen=True, slots=True)
class Turn:
    """A request as part of its conversation.

    Attributes:
        arrived_at: on the engine's clock. tokens: of its prompt. number: from 1; None: not known.
        think_s: seconds since the turn before arrived; None: it is the first, or that is not known.
        new_tokens: of its prompt, after that of the turn before: of a first turn, all; None: not known.
    """

    arrived_at: float
    tokens: int
    number: int | None = None
    think_s: float | None = None
    new_tokens: int | None = None


class Conversations:
    """The latest turns, by the names of the blocks that they ended with. Bounded."""

    def __init__(self) -> None:
        # None: turns of several conversations ended with that block, for example with a prompt that they share.
        self._latest: OrderedDict[BlockHash, tuple[Turn, bool] | None] = OrderedDict()  # and if by its answer

    def arrived(self, job: Job, now: float) -> Turn:
        """The turn that this job is. O(its blocks), at most 2,048 of them."""
        tokens = len(job.token_ids)
        name, before = self._before(job)
        if before is None:
            turn = Turn(now, tokens, job.turn, new_tokens=tokens if job.turn == 1 else None)
        else:
            turn = Turn(now, tokens, job.turn, now - before.arrived_at, tokens - before.tokens)
        if job.block_hashes:
            continues = name == job.block_hashes[-1]
            self._end(job.block_hashes[-1], turn, is_answer=False, continues=continues)
        return turn

    def answered(self, turn: Turn, last: BlockHash) -> None:
        """The turn's answer has ended; `last` is its last full block, behind those of its prompt."""
        self._end(last, turn, is_answer=True, continues=False)

    def _before(self, job: Job) -> tuple[BlockHash | None, Turn | None]:
        """The turn that it continues, and by which block that is known."""
        names: Sequence[BlockHash] = job.block_hashes
        for name in islice(reversed(names), _LOOKED_AT):
            if name in self._latest:
                found = self._latest[name]
                return (name, found[0]) if found is not None and _may_follow(*found, job) else (None, None)
        return None, None

    def _end(self, name: BlockHash, turn: Turn, *, is_answer: bool, continues: bool) -> None:
        is_known = name in self._latest
        self._latest[name] = None if is_known and not continues else (turn, is_answer)
        self._latest.move_to_end(name)
        if len(self._latest) > _REMEMBERED:
            self._latest.popitem(last=False)


def _may_follow(before: Turn, is_answer: bool, job: Job) -> bool:
    if before.tokens >= len(job.token_ids):
        return False
    if before.number is None or job.turn is None:
        return is_answer
    return before.number == job.turn - 1 or (is_answer and before.number == job.turn)
