"""Where the numbers of a step lie: page-locked memory that the host fills, and the device's static buffers.

Both have one layout, so that a step's numbers go over in one copy, or two where few of many block tables are in use.
The device's buffers never move: captured graphs read them. The host's are two, used in turn: while the device may
still read the numbers of one step, those of the next are written.

Padding: rows beyond the last have slot -1 (nothing is written), token 0 and position 0; sequences beyond the last have
context 0 and no rows; logits that nobody wants are those of row 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.attention.paged_inputs import NOWHERE, PagedInputs
from workers.device.interface import Device
from workers.stepping.buckets import Bucket
from workers.stepping.work import StepWork

DRAW_COLUMNS = 5  # see `workers.stepping.sampling`
_ALIGN = 64

Fields = dict[str, tuple[int, tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest step. `rows`: new tokens. `sequences`. `width`: blocks of the longest context. `block_size`: tokens a
    block."""

    rows: int
    sequences: int
    width: int
    block_size: int


class StepBuffers:
    """One set of buffers of a capacity.

    Attributes:
        ids, positions: [rows] int64. slots, row_starts, contexts, tables: see `PagedInputs`.
        wanted: [sequences] int64, the rows whose logits are wanted. draws: [sequences, DRAW_COLUMNS] float64.
    """

    def __init__(self, memory: Tensor, capacity: Capacity) -> None:
        """Over `nbytes(capacity)` bytes of memory."""
        self.memory, self.capacity = memory, capacity
        fields, self._tables_at, _ = _fields(capacity)
        views = {name: _view(memory, *field) for name, field in fields.items()}
        self.ids, self.positions, self.slots = views["ids"], views["positions"], views["slots"]
        self.row_starts, self.contexts, self.tables = views["row_starts"], views["contexts"], views["tables"]
        self.wanted, self.draws = views["wanted"], views["draws"]

    def inputs(self, bucket: Bucket) -> PagedInputs:
        """The part of the buffers that a step of this size reads."""
        return PagedInputs(
            slots=self.slots[: bucket.rows],
            row_starts=self.row_starts[: bucket.sequences + 1],
            contexts=self.contexts[: bucket.sequences],
            block_tables=self.tables[: bucket.sequences],
            longest=bucket.longest,
        )

    def copy_from(self, other: StepBuffers, sequences: int) -> None:
        """Take the numbers of a step of so many sequences, padding included. Does not wait."""
        tables = self.capacity.width * self.tables.element_size()
        stop = self._tables_at + sequences * tables  # they lie last, one after the other
        self.memory[:stop].copy_(other.memory[:stop], non_blocking=True)


class HostBuffers(StepBuffers):
    """Buffers that the host writes to."""

    def __init__(self, device: Device, capacity: Capacity) -> None:
        """Page-locked ones."""
        super().__init__(device.pinned((nbytes(capacity),), torch.uint8), capacity)
        self._ids, self._positions, self._slots = self.ids.numpy(), self.positions.numpy(), self.slots.numpy()
        self._starts, self._contexts = self.row_starts.numpy(), self.contexts.numpy()
        self._tables, self._wanted, self._draws = self.tables.numpy(), self.wanted.numpy(), self.draws.numpy()

    def fill(self, work: StepWork, bucket: Bucket, draws: npt.NDArray[np.float64] | None) -> None:
        """Write a step's numbers and its padding; `draws`: [R, DRAW_COLUMNS], where the device samples."""
        rows, sequences = len(work.token_ids), len(work.spans)
        self._ids[:rows], self._positions[:rows] = work.token_ids, work.positions
        self._ids[rows : bucket.rows] = self._positions[rows : bucket.rows] = 0
        self._starts[:sequences] = [span.row for span in work.spans]
        self._starts[sequences : bucket.sequences + 1] = rows
        self._contexts[:sequences] = work.stops
        self._contexts[sequences : bucket.sequences] = 0
        for place, span in enumerate(work.spans):
            self._tables[place, : len(span.block_table)] = span.block_table
        self._fill_slots(work, bucket)
        self._wanted[: len(work.rows)] = work.rows
        self._wanted[len(work.rows) : bucket.sequences] = 0
        if draws is not None:
            self._draws[: len(draws)] = draws

    def _fill_slots(self, work: StepWork, bucket: Bucket) -> None:
        size, rows = self.capacity.block_size, len(work.token_ids)
        places = np.repeat(np.arange(len(work.spans)), [span.length for span in work.spans])
        positions = self._positions[:rows]
        blocks = self._tables[places, positions // size].astype(np.int64)
        self._slots[:rows] = blocks * size + positions % size
        self._slots[rows : bucket.rows] = NOWHERE


def nbytes(capacity: Capacity) -> int:
    """Bytes of a set of buffers."""
    return _fields(capacity)[2]


def _fields(capacity: Capacity) -> tuple[Fields, int, int]:
    """Where each field begins, its shape and type; where the tables begin; how long all is."""
    rows, sequences = capacity.rows, capacity.sequences
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "ids": ((rows,), torch.int64),
        "positions": ((rows,), torch.int64),
        "slots": ((rows,), torch.int64),
        "wanted": ((sequences,), torch.int64),
        "draws": ((sequences, DRAW_COLUMNS), torch.float64),
        "row_starts": ((sequences + 1,), torch.int32),
        "contexts": ((sequences,), torch.int32),
        "tables": ((sequences, capacity.width), torch.int32),
    }
    fields: Fields = {}
    at = 0
    for name, (shape, dtype) in shapes.items():
        fields[name] = (at, shape, dtype)
        at += -(-_size(shape, dtype) // _ALIGN) * _ALIGN
    return fields, fields["tables"][0], at


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _view(memory: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[at : at + _size(shape, dtype)].view(dtype).view(shape)
