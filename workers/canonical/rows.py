"""How many rows a forward of the canonical mode has: always one of a few sizes, whatever there is to compute.

A library's matrix product chooses its kernel by the number of rows, and kernels add in different orders. With a few
sizes, all of which were seen to give the same bits for a row (`workers.canonical.check`), neither the cut of a prompt
nor its companions in a step matter any more. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.attention.step import Span

# The size that all others are compared with. Measured with PyTorch 2.13 on AVX-512: float32 products of fewer than 16
# rows add in other orders, and on two threads some of 64 or 128, too; of bfloat16 those of 1 or 2 do.
CPU_ANCHOR = 16
CPU_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
# cuBLAS splits sums of narrow products; from 256 rows on it was not seen to (H100, bf16).
CUDA_ANCHOR = 256
CUDA_SIZES = (256, 512, 1024, 2048)
PAD_FREELY = 64  # up to so many rows padding costs less than a second forward
PAD_AT_MOST = 0.25  # of a larger forward


@dataclass(frozen=True, slots=True)
class Part:
    """One forward: rows `start` to `stop` of a step, followed by padding up to `size` rows."""

    start: int
    stop: int
    size: int


def parts(total: int, sizes: Sequence[int]) -> list[Part]:
    """Cut a step of `total` rows into forwards, each of one of the `sizes` (ascending)."""
    found, start = list[Part](), 0
    while start < total:
        size = _next_size(total - start, sizes)
        stop = min(total, start + size)
        found.append(Part(start, stop, size))
        start = stop
    return found


def padded(count: int, sizes: Sequence[int]) -> int:
    """The smallest of the sizes that holds `count` rows, which is at most the largest; zero for none."""
    return next(size for size in sizes if size >= count) if count else 0


def spans_of(spans: Iterable[Span], part: Part, block_size: int) -> list[Span]:
    """The spans' rows that lie in a part, numbered from its first row."""
    found = []
    for span in spans:
        first, last = max(span.row, part.start), min(span.row + span.length, part.stop)
        if first < last:
            context = span.context - (span.row + span.length - last)
            table = span.block_table[: -(-context // block_size)]
            found.append(Span(first - part.start, last - first, context, table))
    return found


def _next_size(rest: int, sizes: Sequence[int]) -> int:
    above = next((size for size in sizes if size >= rest), None)
    below = next((size for size in reversed(sizes) if size <= rest), None)
    if below is None or (above is not None and (above <= PAD_FREELY or above - rest <= PAD_AT_MOST * above)):
        return above or sizes[-1]
    return below
