"""A row's result is its own: the same bits in any batch, in any cut, on any grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.triton.cases import SMALL, Case, Shape, attend, attend_unadvised, padded_inputs
from workers.attention import triton_launching
from workers.attention.tiles import Tile
from workers.attention.triton_backend import TritonBackend

SCORINGS = [{}, {"window": 21}, {"softcap": 2.0, "with_sinks": True}]
MIX = [(1, 70), (18, 30), (1, 0)]


@pytest.mark.parametrize(
    ("scoring", "dtype"), [(each, torch.float32) for each in SCORINGS] + [({}, torch.bfloat16)], ids=str
)
def test_a_sequence_alone_equals_itself_in_a_batch(scoring, dtype):
    case = Case(MIX, Shape(dtype=dtype), **scoring)
    together = attend(case, TritonBackend(SMALL))
    padded = attend_unadvised(case, padded_inputs(case, 24, 5, 60), padding=24 - len(together))
    assert torch.equal(padded[: len(together)], together)
    for number, span in enumerate(case.spans()):
        alone = attend(case, TritonBackend(SMALL), [number])
        assert torch.equal(alone, together[span.row : span.row + span.length])


@pytest.mark.parametrize("programs", [1, 5])
def test_the_grid_says_only_who_computes(programs, monkeypatch):
    case = Case(MIX)
    wanted = attend(case, TritonBackend(SMALL))
    monkeypatch.setattr(triton_launching, "DECODE_PROGRAMS", programs)
    assert torch.equal(attend(case, TritonBackend(SMALL)), wanted)


@pytest.mark.parametrize(
    ("scoring", "cuts"),
    [({}, (16, 32)), ({}, (2, 9, 40)), (SCORINGS[1], (7, 24)), (SCORINGS[1], (47,)), (SCORINGS[2], (15,))],
    ids=str,
)
def test_a_prompt_cut_anywhere_gives_the_same_bits(scoring, cuts):
    """A cut of a single row aside: that is a decode, which sums by splits."""
    whole = Case([(50, 0)], seed=5, **scoring)
    wanted = attend(whole, TritonBackend(SMALL))
    pool = whole.pool()
    found = []
    for start, stop in zip((0, *cuts), (*cuts, 50), strict=True):
        part = replace(whole, sizes=[(stop - start, start)])
        part.keys, part.values, part.queries = whole.keys, whole.values, whole.queries
        part.sinks, part.tables = whole.sinks, whole.tables
        found.append(attend(part, TritonBackend(SMALL), pool=pool))
    assert torch.equal(torch.cat(found), wanted)


def test_splits_of_any_size_agree():
    case = Case([(1, 99), (1, 64), (1, 7)])
    wanted = attend(case, TritonBackend(SMALL))
    for split, keys in ((16, 16), (256, 64)):
        tiles = replace(SMALL, decode=Tile(16, keys, 4, 1), split=split)
        torch.testing.assert_close(attend(case, TritonBackend(tiles)), wanted, atol=1e-6, rtol=1e-5)
