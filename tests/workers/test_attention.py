"""Paged attention against attention written out over plain tensors, in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.attention.step import Span, make_step
from workers.attention.torch_backend import TorchBackend, partition

torch.set_num_threads(1)
BLOCK_SIZE, KV_HEADS, HEADS, K_DIM, V_DIM = 4, 2, 6, 8, 5


def _oracle(query, keys, values, *, scale, window, softcap, sinks):
    """query [heads, length, k_dim]: the last rows; keys, values [context, kv_heads, dim] -> [length, heads, v_dim]."""
    length, context = query.shape[1], len(keys)
    out = torch.zeros(length, HEADS, V_DIM, dtype=torch.float64)
    for head in range(HEADS):
        k, v = keys[:, head // (HEADS // KV_HEADS)].double(), values[:, head // (HEADS // KV_HEADS)].double()
        for row in range(length):
            last = context - length + row + 1
            first = 0 if window is None else max(0, last - window)
            scores = k[first:last] @ query[head, row].double() * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            out[row, head] = torch.softmax(scores, -1)[: last - first] @ v[first:last]
    return out


@st.composite
def _steps(draw):
    """(new tokens, context) of each sequence."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 23)), min_size=1, max_size=6))
    return [(1 if draw(st.booleans()) else new, cached) for new, cached in sizes]


@settings(max_examples=120, deadline=None)
@given(
    sizes=_steps(),
    seed=st.integers(0, 10**6),
    window=st.sampled_from([None, 1, 3, 7, 100]),
    softcap=st.sampled_from([None, None, 2.0]),
    with_sinks=st.booleans(),
)
def test_any_mix_of_decodes_and_chunks_equals_the_maths(sizes, seed, window, softcap, with_sinks):
    generator = torch.Generator().manual_seed(seed)
    total = sum(new for new, _ in sizes)
    query = torch.randn(HEADS, total, K_DIM, generator=generator)
    key, value = (torch.randn(KV_HEADS, total, dim, generator=generator) for dim in (K_DIM, V_DIM))
    sinks = torch.randn(HEADS, generator=generator) if with_sinks else None
    counts = [math.ceil((new + cached) / BLOCK_SIZE) for new, cached in sizes]
    numbers = list(range(sum(counts) + 3))
    random.Random(seed).shuffle(numbers)
    # All that is not part of a context is NaN: one read of it and the result is NaN.
    pool = torch.full((len(numbers), BLOCK_SIZE, KV_HEADS, K_DIM), math.nan)
    pool_v = torch.full((len(numbers), BLOCK_SIZE, KV_HEADS, V_DIM), math.nan)
    spans, wholes, row = [], [], 0
    for (new, cached), count in zip(sizes, counts, strict=True):
        table, numbers = numbers[:count], numbers[count:]
        past = [torch.randn(cached, KV_HEADS, dim, generator=generator) for dim in (K_DIM, V_DIM)]
        for position in range(cached):
            place = table[position // BLOCK_SIZE], position % BLOCK_SIZE
            pool[place], pool_v[place] = past[0][position], past[1][position]
        fresh = [each[:, row : row + new].transpose(0, 1) for each in (key, value)]
        wholes.append([torch.cat(pair) for pair in zip(past, fresh, strict=True)])
        spans.append(Span(row, new, new + cached, table))
        row += new
    step = make_step([(pool, pool_v)], spans, TorchBackend())
    options = {"scale": 0.3, "window": window, "softcap": softcap, "sinks": sinks}
    found = step.backend.attend(step, 0, query, key, value, **options)
    for span, (keys, values) in zip(spans, wholes, strict=True):
        rows = slice(span.row, span.row + span.length)
        wanted = _oracle(query[:, rows], keys, values, **options)
        assert torch.allclose(found[rows].double(), wanted, atol=1e-5)


def test_long_chunks_are_cut_into_slices_of_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workers.attention.torch_backend.PREFILL_ROWS", 3)
    monkeypatch.setattr("workers.attention.torch_backend.PACKED_ROWS", 2)
    test_any_mix_of_decodes_and_chunks_equals_the_maths.hypothesis.inner_test([(9, 10), (8, 0)], 1, 5, None, False)
    test_any_mix_of_decodes_and_chunks_equals_the_maths.hypothesis.inner_test([(9, 10), (8, 0)], 1, None, None, False)
    test_any_mix_of_decodes_and_chunks_equals_the_maths.hypothesis.inner_test([(9, 10), (8, 0)], 1, None, 2.0, True)


def test_new_keys_go_to_their_slots_and_nowhere_else():
    pool = [torch.zeros(3, BLOCK_SIZE, KV_HEADS, dim) for dim in (K_DIM, V_DIM)]
    step = make_step([(pool[0], pool[1])], [Span(0, 3, 6, [2, 0])], TorchBackend())
    new = torch.ones(KV_HEADS, 3, K_DIM), torch.ones(KV_HEADS, 3, V_DIM)
    step.backend.attend(step, 0, torch.zeros(HEADS, 3, K_DIM), *new, scale=1.0, window=None, softcap=None, sinks=None)
    written = [(int(block), int(offset)) for block, offset in pool[0].flatten(2).any(-1).nonzero()]
    assert written == [(0, 0), (0, 1), (2, 3)]
    assert torch.equal(pool[0].flatten(2).any(-1), pool[1].flatten(2).any(-1))


def test_decode_groups_hold_every_row_once_within_their_limit():
    draw = random.Random(0)
    contexts = [draw.randrange(1, 400) for _ in range(50)]
    spans = [Span(n, 1, context, list(range(math.ceil(context / 16)))) for n, context in enumerate(contexts)]
    groups = partition(spans, 40)
    assert sorted(span.row for group in groups for span in group) == list(range(50))
    for group in groups:
        widths = [len(span.block_table) for span in group]
        assert len(group) == 1 or len(group) * max(widths) <= 40
        assert max(widths) <= 2 * min(widths)
