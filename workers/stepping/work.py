"""What one step computes, as plain numbers on the host: made of the scheduler's chunks, read by whoever launches it.

A sequence whose last token is still being sampled by the step before can be in the next step all the same: only the
device needs the token. Its id is then written as `-1 - n`: token n of that step.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from workers.attention.step import Span
from workers.sampler import Row
from workers.scheduler import Chunk
from workers.sequence import Sequence


@dataclass(slots=True)
class StepWork:
    """T rows of S chunks, in order.

    Attributes:
        chunks: S of them. spans: S, where their rows are and what they see. stops: S, tokens computed afterwards.
        token_ids, positions: T each; a negative id: see the module.
        is_fed: whether any id is negative.
        ready: sequences that are up to date after the step and get a token, R of them. rows: R, their last rows.
        draws: R, how to sample each.
    """

    chunks: list[Chunk]
    spans: list[Span] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    is_fed: bool = False
    ready: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    draws: list[Row] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Most rows of one chunk."""
        return max(chunk.length for chunk in self.chunks)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(new tokens, tokens before them) of each chunk."""
        return [(span.length, span.context - span.length) for span in self.spans]


def make_work(chunks: Items[Chunk], block_size: int, sampling: Items[Sequence]) -> StepWork:
    """The work of these chunks; `sampling`: the sequences that the step in flight samples for, in its order."""
    work, places = StepWork(list(chunks)), {sequence: place for place, sequence in enumerate(sampling)}
    for chunk in chunks:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        stop = start + chunk.length
        table = sequence.block_table[: -(-stop // block_size)]
        # The list is another one as soon as the sequence has lost its blocks.
        work.spans.append(Span(len(work.token_ids), chunk.length, stop, table, holder=sequence.block_table))
        work.token_ids += sequence.token_ids[start:stop]
        if stop > len(sequence.token_ids):
            work.token_ids.append(-1 - places[sequence])
            work.is_fed = True
        work.positions += range(start, stop)
        work.stops.append(stop)
        if stop == sequence.num_tokens:
            work.ready.append(sequence)
            work.rows.append(len(work.token_ids) - 1)
            work.draws.append(Row(sequence.job.sampling, stop, sequence.row))
    return work
