"""Which sizes graphs are captured for, and which of them a step is padded to. Pure.

A decode graph has as many sequences as rows. A tail graph takes any mix of short chunks: the rest of prompts that were
found in the cache, and the decodes beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SMALL_DECODES = (1, 2, 4)
DECODE_STRIDE = 8
TAIL_ROWS = (16, 64, 256)
# Empty ones cost a little each, so the larger is for tails beside many decodes; beside still more, without a graph.
TAIL_SEQUENCES = (64, 128)


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size that a graph has been captured for.

    Attributes:
        rows: new tokens. sequences: at most. longest: most rows of one sequence; 1: a decode graph.
    """

    rows: int
    sequences: int
    longest: int


def decode_buckets(max_running: int) -> list[Bucket]:
    """1, 2, 4, 8, 16, 24, 32, ... until `max_running` sequences fit."""
    sizes = [*SMALL_DECODES, *range(DECODE_STRIDE, max_running + DECODE_STRIDE, DECODE_STRIDE)]
    wanted = [size for size in sizes if size < max_running]
    return [Bucket(size, size, 1) for size in [*wanted, max_running]]


def tail_buckets(max_running: int, max_batch_tokens: int) -> list[Bucket]:
    """16, 64 and 256 rows, as far as a step may have them; the largest also for more sequences."""
    sizes = [rows for rows in TAIL_ROWS if rows <= max_batch_tokens]
    return sorted({Bucket(rows, min(rows, max_running, most), rows) for rows in sizes for most in TAIL_SEQUENCES})


def choose(buckets: Sequence[Bucket], rows: int, sequences: int, longest: int) -> Bucket | None:
    """The smallest bucket that holds such a step; None: it goes without a graph.

    A batch of decodes takes a decode graph, whose attention is the decode kernel, and never a tail graph: so what
    a row computes depends on neither its neighbours nor how many there are.
    """
    fitting = [b for b in buckets if b.rows >= rows and b.sequences >= sequences and (b.longest == 1) == (longest == 1)]
    return min(fitting, default=None)


def largest_first(buckets: Sequence[Bucket]) -> list[Bucket]:
    """In the order of capture: what comes later finds room in the memory of what came before."""
    return sorted(buckets, reverse=True)
