"""K/V that stay gathered between decode steps, against attention written out over all that each sequence has stored."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.test_attention import BLOCK_SIZE, HEADS, K_DIM, KV_HEADS, V_DIM, _oracle
from workers.attention import kept
from workers.attention.step import Span, make_step
from workers.attention.torch_backend import TorchBackend

torch.set_num_threads(1)
LAYERS, WIDTH = 2, 12
OPTIONS = {"scale": 0.3, "window": None, "softcap": None, "sinks": None}
SMALL_ROOM = 3  # tokens that a group may grow before it is gathered again


class Stored:
    """A sequence: its holder and, layer by layer, the rows that lie in its blocks."""

    def __init__(self, number: int) -> None:
        self.blocks = list(range(number * WIDTH, (number + 1) * WIDTH))
        self.holder: object = object()
        self.rows = [[torch.zeros(0, KV_HEADS, dim) for dim in (K_DIM, V_DIM)] for _ in range(LAYERS)]

    @property
    def tokens(self) -> int:
        return len(self.rows[0][0])


class Rig:
    """One backend over one pool; whatever is part of no context is NaN."""

    def __init__(self, sequences: int) -> None:
        self.backend, self._draw = TorchBackend(), torch.Generator().manual_seed(0)
        shapes = [(sequences * WIDTH, BLOCK_SIZE, KV_HEADS, dim) for dim in (K_DIM, V_DIM)]
        self.kv = [tuple(torch.full(shape, math.nan) for shape in shapes) for _ in range(LAYERS)]
        self.sequences = [Stored(number) for number in range(sequences)]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._draw)

    def move(self, sequence: Stored) -> None:
        """It loses its blocks, gets the same ones again, and other numbers are in them."""
        sequence.holder = object()
        for layer, parts in enumerate(sequence.rows):
            for place, rows in enumerate(parts):
                parts[place] = self.random(*rows.shape)
                for token, row in enumerate(parts[place]):
                    self.kv[layer][place][sequence.blocks[token // BLOCK_SIZE], token % BLOCK_SIZE] = row

    def step(self, lengths: list[tuple[Stored, int]], *, fails_at: int = LAYERS) -> None:
        """So many new tokens of each; all layers before `fails_at` are compared with the maths."""
        spans, row = [], 0
        for sequence, length in lengths:
            context = sequence.tokens + length
            table = sequence.blocks[: -(-context // BLOCK_SIZE)]
            spans.append(Span(row, length, context, table, holder=sequence.holder))
            row += length
        step = make_step(self.kv, spans, self.backend)
        for layer in range(fails_at):
            query, key = self.random(HEADS, row, K_DIM), self.random(KV_HEADS, row, K_DIM)
            value = self.random(KV_HEADS, row, V_DIM)
            found = self.backend.attend(step, layer, query, key, value, **OPTIONS)
            for span, (sequence, _) in zip(spans, lengths, strict=True):
                rows = slice(span.row, span.row + span.length)
                new = [
                    torch.cat([old, each[:, rows].transpose(0, 1)])
                    for old, each in zip(sequence.rows[layer], (key, value), strict=True)
                ]
                assert torch.allclose(found[rows].double(), _oracle(query[:, rows], *new, **OPTIONS), atol=1e-5)
                if fails_at == LAYERS:
                    sequence.rows[layer] = new


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_happens_between_steps_each_attends_over_what_is_stored(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "SPARE_TOKENS", SMALL_ROOM)
        rig = Rig(data.draw(st.integers(1, 4)))
        rig.step([(each, data.draw(st.integers(2, 9))) for each in rig.sequences])
        for _ in range(data.draw(st.integers(2, 8))):
            for sequence in rig.sequences:
                if data.draw(st.integers(0, 5)) == 0:
                    rig.move(sequence)
            left_out = data.draw(st.sampled_from([None, None, *rig.sequences]))
            lengths = [(each, data.draw(st.sampled_from([1] * 7 + [2]))) for each in rig.sequences]
            chosen = [pair for pair in lengths if pair[0] is not left_out] or lengths
            if data.draw(st.integers(0, 4)) == 0:
                rig.step(chosen, fails_at=1)
            rig.step(chosen)


@pytest.mark.parametrize("contexts", [(5,), (5, 5), (5, 9, 6)])
def test_a_step_reads_nothing_of_the_pool_that_the_step_before_read(contexts):
    rig = Rig(len(contexts))
    rig.step(list(zip(rig.sequences, contexts, strict=True)))
    decodes = [(each, 1) for each in rig.sequences]
    rig.step(decodes)
    for keys, values in rig.kv:
        keys.fill_(math.nan)
        values.fill_(math.nan)
    for _ in range(8):  # into blocks that were not there at first
        rig.step(decodes)


def test_blocks_with_another_holder_are_gathered_again():
    rig = Rig(1)
    rig.step([(rig.sequences[0], 5)])
    rig.step([(rig.sequences[0], 1)])
    rig.move(rig.sequences[0])
    rig.step([(rig.sequences[0], 1)])


def test_what_does_not_fit_is_gathered_in_every_step(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(2)
    monkeypatch.setattr(rig.backend, "_kept", kept.KeptGroups(nbytes=100))
    rig.step([(each, 5) for each in rig.sequences])
    for _ in range(3):
        rig.step([(each, 1) for each in rig.sequences])
        for sequence in rig.sequences:
            holder = sequence.holder
            rig.move(sequence)  # other numbers behind its back: what is gathered now shows them
            sequence.holder = holder


def test_blocks_that_nobody_is_said_to_hold_are_gathered_in_every_step():
    rig = Rig(1)
    rig.step([(rig.sequences[0], 5)])
    for _ in range(3):
        rig.move(rig.sequences[0])
        rig.sequences[0].holder = None
        rig.step([(rig.sequences[0], 1)])
