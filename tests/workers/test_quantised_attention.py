"""Paged attention over a quantised pool against attention written out over the rows that were stored."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.device import DeviceTier
from kvstore.layout import KVLayout
from kvstore.quantised import dequantise, quantise, write_rows
from tests.kvstore.blocks_for_tests import ManualClock
from tests.workers.test_attention import BLOCK_SIZE, HEADS, K_DIM, KV_HEADS, V_DIM, _oracle, _steps
from workers.attention.step import Span, make_step
from workers.attention.torch_backend import TorchBackend

torch.set_num_threads(1)
DIMS = (K_DIM, V_DIM)


def _stored(rows: torch.Tensor, kind: str) -> torch.Tensor:
    return dequantise(*quantise(rows, kind), kind, rows.dtype)


@pytest.mark.parametrize("kind", ["fp8_e4m3", "int8"])
@settings(max_examples=60, deadline=None)
@given(
    sizes=_steps(),
    seed=st.integers(0, 10**6),
    window=st.sampled_from([None, 1, 3, 7, 100]),
    softcap=st.sampled_from([None, None, 2.0]),
    with_sinks=st.booleans(),
)
def test_any_mix_of_decodes_and_chunks_attends_over_what_was_stored(kind, sizes, seed, window, softcap, with_sinks):
    generator = torch.Generator().manual_seed(seed)
    total = sum(new for new, _ in sizes)
    query = torch.randn(HEADS, total, K_DIM, generator=generator)
    fresh = [torch.randn(KV_HEADS, total, dim, generator=generator) for dim in DIMS]
    counts = [math.ceil((new + cached) / BLOCK_SIZE) for new, cached in sizes]
    layout = KVLayout(1, KV_HEADS, *DIMS, "float32", BLOCK_SIZE, kind)
    # All that is not part of a context is NaN: one read of it and the result is NaN.
    tier = DeviceTier(layout, (sum(counts) + 3) * layout.block_nbytes, clock=ManualClock(), poison=True)
    pools, numbers = tier.kv(0), list(range(tier.num_blocks))
    random.Random(seed).shuffle(numbers)
    spans, wholes, row = [], [], 0
    for (new, cached), count in zip(sizes, counts, strict=True):
        table, numbers = numbers[:count], numbers[count:]
        past = [torch.randn(cached, KV_HEADS, dim, generator=generator) for dim in DIMS]
        places = torch.tensor([[table[at // BLOCK_SIZE], at % BLOCK_SIZE] for at in range(cached)], dtype=torch.int64)
        places = places.view(-1, 2)
        for pool, rows in zip(pools, past, strict=True):
            write_rows(pool, *places.unbind(1), rows)
        news = [each[:, row : row + new].transpose(0, 1) for each in fresh]
        wholes.append([_stored(torch.cat(pair), kind) for pair in zip(past, news, strict=True)])
        spans.append(Span(row, new, new + cached, table))
        row += new
    step = make_step([pools], spans, TorchBackend())
    sinks = torch.randn(HEADS, generator=generator) if with_sinks else None
    options = {"scale": 0.3, "window": window, "softcap": softcap, "sinks": sinks}
    found = step.backend.attend(step, 0, query, *fresh, **options)
    for span, (keys, values) in zip(spans, wholes, strict=True):
        rows = slice(span.row, span.row + span.length)
        assert torch.allclose(found[rows].double(), _oracle(query[:, rows], keys, values, **options), atol=1e-5)
