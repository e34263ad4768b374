"""Packed steps with everything known: a pool full of NaN but for what its sequences own, and two oracles."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvstore.device import DeviceTier
from kvstore.layout import UNQUANTISED, KVLayout
from kvstore.quantised import Rows, dequantise, quantise, write_rows
from workers.attention.paged_inputs import PagedInputs, from_spans
from workers.attention.step import Span, make_step
from workers.attention.tiles import Tile, Tiles
from workers.attention.torch_backend import TorchBackend
from workers.attention.triton_backend import TritonBackend

torch.set_num_threads(1)
SMALL = Tiles(prefill=Tile(16, 16, 4, 1), decode=Tile(16, 16, 4, 1), split=32)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Shape:
    """Of the heads and the pool."""

    kv_heads: int = 1
    group: int = 2
    k_dim: int = 20
    v_dim: int = 12
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    kv_dtype: str = UNQUANTISED

    @property
    def layout(self) -> KVLayout:
        """Of two layers; the cases lie in the second."""
        name = str(self.dtype).removeprefix("torch.")
        return KVLayout(2, self.kv_heads, self.k_dim, self.v_dim, name, self.block_size, self.kv_dtype)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@dataclass
class Case:
    """One step: (new rows, cached tokens) of each sequence, random numbers for all of it."""

    sizes: Sequence[tuple[int, int]]
    shape: Shape = field(default_factory=Shape)
    seed: int = 0
    scale: float = 0.3
    window: int | None = None
    softcap: float | None = None
    with_sinks: bool = False

    def __post_init__(self) -> None:
        shape, generator = self.shape, torch.Generator().manual_seed(self.seed)

        def numbers(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(shape.dtype)

        contexts = [new + cached for new, cached in self.sizes]
        # Whole sequences first, so that the same sequence has the same numbers however it is cut.
        self.keys = [numbers(context, shape.kv_heads, shape.k_dim) for context in contexts]
        self.values = [numbers(context, shape.kv_heads, shape.v_dim) for context in contexts]
        self.queries = [numbers(context, shape.heads, shape.k_dim) for context in contexts]
        self.sinks = numbers(shape.heads) if self.with_sinks else None
        counts = [math.ceil(context / shape.block_size) for context in contexts]
        free = list(range(sum(counts) + 3))
        random.Random(self.seed).shuffle(free)
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.blocks = sum(counts) + 3

    @property
    def options(self) -> dict:
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap, "sinks": self.sinks}

    def pool(self) -> tuple[Rows, Rows]:
        """Views of layer 1 of two; whatever is not a cached token of a sequence is NaN, scales and codes too."""
        return self.tier().kv(1)

    def tier(self) -> DeviceTier:
        """Whose layer 1 is `pool`."""
        layout = self.shape.layout
        tier = DeviceTier(layout, self.blocks * layout.block_nbytes, clock=lambda: 0.0, poison=True)
        for number, (_, cached) in enumerate(self.sizes):
            for part, rows in zip(tier.kv(1), (self.keys[number], self.values[number]), strict=True):
                write_rows(part, *self.places(number, 0, cached), rows[:cached])
        return tier

    def stored(self, rows: Tensor) -> Tensor:
        """What is read of rows that were written."""
        kind = self.shape.kv_dtype
        return rows if kind == UNQUANTISED else dequantise(*quantise(rows, kind), kind, torch.float32)

    def places(self, number: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Blocks and offsets of a sequence's tokens."""
        positions = torch.arange(start, stop)
        table = torch.tensor(self.tables[number], dtype=torch.int64)
        return table[positions // self.shape.block_size], positions % self.shape.block_size

    def spans(self, members: Sequence[int] | None = None) -> list[Span]:
        """Of these sequences, one after the other."""
        spans, row = [], 0
        for number in range(len(self.sizes)) if members is None else members:
            new, cached = self.sizes[number]
            spans.append(Span(row, new, new + cached, self.tables[number]))
            row += new
        return spans

    def rows(self, members: Sequence[int] | None = None, padding: int = 0) -> list[Tensor]:
        """Query [heads, T, k_dim], key and value [kv_heads, T, dim] of the new rows, as projections give them."""
        parts = []
        for wholes in (self.queries, self.keys, self.values):
            chosen = range(len(self.sizes)) if members is None else members
            rows = torch.cat([wholes[n][self.sizes[n][1] : sum(self.sizes[n])] for n in chosen])
            rows = torch.cat([rows, rows.new_full((padding, *rows.shape[1:]), math.nan)])
            parts.append(rows.transpose(0, 1))
        return parts


def attend(case: Case, backend, members: Sequence[int] | None = None, pool=None) -> Tensor:
    """[T, heads, v_dim] of these sequences' new rows, by a backend that is told the spans."""
    step = make_step([pool or case.pool()], case.spans(members), backend)
    return backend.attend(step, 0, *case.rows(members), **case.options)


def attend_unadvised(case: Case, inputs: PagedInputs, padding: int = 0, pool=None, tiles: Tiles = SMALL) -> Tensor:
    """The same from tensors alone, as in a graph."""
    return TritonBackend(tiles).attend_paged(
        inputs, *(pool or case.pool()), *case.rows(padding=padding), **case.options
    )


def padded_inputs(case: Case, rows: int, sequences: int, width: int) -> PagedInputs:
    """A step's inputs in buffers with room to spare; what must not be read there is out of every range."""
    real = from_spans(case.spans(), case.shape.block_size, "cpu")
    slots = torch.full((rows,), -1, dtype=torch.int64)
    slots[: len(real.slots)] = real.slots
    starts = torch.full((sequences + 1,), int(real.row_starts[-1]), dtype=torch.int32)
    starts[: len(real.row_starts)] = real.row_starts
    contexts = torch.zeros(sequences, dtype=torch.int32)
    contexts[: len(real.contexts)] = real.contexts
    tables = torch.full((sequences, width), 1 << 30, dtype=torch.int32)
    for number, table in enumerate(case.tables):
        tables[number, : len(table)] = torch.tensor(table, dtype=torch.int32)
    return PagedInputs(slots, starts, contexts, tables, real.longest)


def oracle(case: Case) -> Tensor:
    """[T, heads, v_dim] written out in float64, one row and head at a time."""
    out = []
    for number, (new, cached) in enumerate(case.sizes):
        keys, values = (case.stored(each[number]).double() for each in (case.keys, case.values))
        for position in range(cached, cached + new):
            first = 0 if case.window is None else max(0, position + 1 - case.window)
            for head in range(case.shape.heads):
                kv_head = head // case.shape.group
                k, v = keys[first : position + 1, kv_head], values[first : position + 1, kv_head]
                scores = k @ case.queries[number][position, head].double() * case.scale
                if case.softcap is not None:
                    scores = torch.tanh(scores / case.softcap) * case.softcap
                if case.sinks is not None:
                    scores = torch.cat([scores, case.sinks[head : head + 1].double()])
                out.append(torch.softmax(scores, -1)[: len(k)] @ v)
    return torch.stack(out).view(-1, case.shape.heads, case.shape.v_dim)


def check(case: Case, found: Tensor) -> None:
    """Against the maths and against the torch backend, and the pool against the torch backend's."""
    tolerance = TOLERANCE[case.shape.dtype]
    assert found.dtype == case.shape.dtype
    torch.testing.assert_close(found.double(), oracle(case), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found, attend(case, TorchBackend()), atol=tolerance, rtol=tolerance)
