"""A packed step as tensors on the device: what attention kernels and CUDA graphs read.

`Step` holds the same facts as Python objects, for who plans on the host. Here nothing but tensors and one number is
left, so that static buffers may stand behind them: a graph is captured over the buffers once and replayed with what
was copied into them since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.attention.step import Span

NOWHERE = -1  # the slot of a padding row


@dataclass(slots=True)
class PagedInputs:
    """T rows of S sequences, padding included; sequence s has the rows `row_starts[s]` to `row_starts[s + 1]`.

    Attributes:
        slots: [T] int64, `block * block_size + offset` of each row's new K/V; -1: a padding row, nothing is written.
        row_starts: [S + 1] int32, not falling, from 0; rows beyond the last belong to no sequence.
        contexts: [S] int32, tokens that the sequence's last row sees, the new ones included; 0: a padding sequence.
        block_tables: [S, W] int32; what lies beyond `ceil(context / block_size)` entries is never read.
        longest: most rows of one sequence; 1: all are decode rows.
    """

    slots: Tensor
    row_starts: Tensor
    contexts: Tensor
    block_tables: Tensor
    longest: int


def from_spans(spans: Sequence[Span], block_size: int, device: torch.device | str) -> PagedInputs:
    """The inputs of these spans, which lie one after the other from row 0; W is the longest block table (at least 1).

    Three small tensors and one table are made on the host, then copied; the host does not wait for the copies.
    """
    width = max((len(span.block_table) for span in spans), default=0)
    tables = [[*span.block_table, *[0] * (max(width, 1) - len(span.block_table))] for span in spans]
    starts = [0]
    for span in spans:
        starts.append(starts[-1] + span.length)
    return PagedInputs(
        slots=_copied([slot for span in spans for slot in _slots(span, block_size)], torch.int64, device),
        row_starts=_copied(starts, torch.int32, device),
        contexts=_copied([span.context for span in spans], torch.int32, device),
        block_tables=_copied(tables, torch.int32, device).view(len(spans), max(width, 1)),
        longest=max((span.length for span in spans), default=0),
    )


def _slots(span: Span, block_size: int) -> list[int]:
    positions = range(span.context - span.length, span.context)
    return [span.block_table[at // block_size] * block_size + at % block_size for at in positions]


def _copied(numbers: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
