"""The kernels under triton's interpreter: right for any step, whatever lies around in the pool."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton.cases import SMALL, Case, Shape, attend, attend_unadvised, check, padded_inputs
from workers.attention.step import Span, make_step
from workers.attention.torch_backend import TorchBackend
from workers.attention.triton_backend import TritonBackend

OPTIONS = [
    {},
    {"window": 1},
    {"window": 7},
    {"window": 33, "softcap": 2.0},
    {"softcap": 2.0, "with_sinks": True},
    {"window": 20, "with_sinks": True},
    {"window": 1000},
]


@st.composite
def _sizes(draw):
    """(new rows, cached tokens): decodes and chunks, short and over several splits."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 75)), min_size=1, max_size=3))
    return [(1 if draw(st.booleans()) else new, cached) for new, cached in sizes]


@settings(max_examples=8, deadline=None)
@given(sizes=_sizes(), seed=st.integers(0, 10**6), options=st.sampled_from(OPTIONS))
def test_any_mix_of_decodes_and_chunks_equals_the_maths(sizes, seed, options):
    case = Case(sizes, seed=seed, **options)
    check(case, attend(case, TritonBackend(SMALL)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_mixed_step_with_every_way_of_scoring(options):
    case = Case([(1, 70), (19, 30), (1, 0)], seed=3, **options)
    check(case, attend(case, TritonBackend(SMALL)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_head_size_and_dtype_with_the_tiles_that_serve(dim, dtype):
    shape = Shape(k_dim=dim, v_dim=dim, block_size=16, dtype=dtype)
    case = Case([(1, 540), (40, 60)], shape, scale=dim**-0.5, seed=dim)
    check(case, attend(case, TritonBackend()))


@pytest.mark.parametrize(
    ("kv_heads", "group"), [(3, 1), (1, 5), (2, 17)], ids=["MHA", "MQA", "a group larger than a tile"]
)
def test_groups_of_query_heads(kv_heads, group):
    case = Case([(1, 40), (3, 20)], Shape(kv_heads, group), with_sinks=True, window=30)
    check(case, attend(case, TritonBackend(SMALL)))


@pytest.mark.parametrize("window", [None, 32])
def test_contexts_on_the_edges_of_blocks_tiles_and_splits(window):
    edges = sorted({edge + near for edge in (4, 16, 32, 96) for near in (-1, 0, 1)} | {1})
    case = Case([(1, context - 1) for context in edges], window=window)
    check(case, attend(case, TritonBackend(SMALL)))


@pytest.mark.parametrize("window", [5, 16, 40])
def test_what_a_window_has_left_behind_is_not_read(window):
    """Those blocks may be freed: their K/V are NaN here, and whole blocks of them belong to nobody's table."""
    case = Case([(1, 90), (18, 60)], window=window, with_sinks=True)
    wanted = attend(case, TritonBackend(SMALL))
    keys, values = case.pool()
    for number, (_, cached) in enumerate(case.sizes):
        places = case.places(number, 0, max(0, cached + 1 - window))
        keys[places] = values[places] = math.nan
    assert torch.equal(attend(case, TritonBackend(SMALL), pool=(keys, values)), wanted)
    assert not wanted.isnan().any()


def test_padding_gives_zeros_and_writes_nothing():
    for sizes in ([(1, 40), (1, 3)], [(9, 40), (1, 3)]):
        case = Case(sizes, with_sinks=True)
        rows = sum(new for new, _ in sizes)
        pool, wanted_pool = case.pool(), case.pool()
        found = attend_unadvised(case, padded_inputs(case, rows + 5, 6, 40), padding=5, pool=pool)
        wanted = attend(case, TritonBackend(SMALL), pool=wanted_pool)
        assert torch.equal(found[:rows], wanted)
        assert torch.equal(found[rows:], torch.zeros_like(found[rows:]))
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(pool, wanted_pool, strict=True))


@pytest.mark.parametrize("rows_each", [1, 4])
def test_a_padding_sequence_with_rows_of_its_own_gives_zeros(rows_each):
    case = Case([(rows_each, 20)], with_sinks=True)
    inputs = padded_inputs(case, 2 * rows_each, 2, 9)
    inputs.row_starts[2] = 2 * rows_each
    found = attend_unadvised(case, inputs, padding=rows_each)
    assert not found[rows_each:].any()
    assert torch.equal(found[:rows_each], attend(case, TritonBackend(SMALL)))


def test_new_keys_go_to_their_slots_and_nowhere_else():
    shape = Shape(kv_heads=3, block_size=4)
    case = Case([(3, 3), (1, 5)], shape)
    pools = []
    for backend in (TorchBackend(), TritonBackend(SMALL)):
        k_size, v_size = 4 * 3 * shape.k_dim, 4 * 3 * shape.v_dim
        whole = torch.zeros(case.blocks, 3, k_size + v_size)
        keys = whole[:, 1, :k_size].view(-1, 4, 3, shape.k_dim)
        values = whole[:, 1, k_size:].view(-1, 4, 3, shape.v_dim)
        attend(case, backend, pool=(keys, values))
        pools.append(whole)
    assert torch.equal(*pools)
    assert not pools[0][:, [0, 2]].any()
    assert int((pools[0] != 0).sum()) == 4 * 3 * (shape.k_dim + shape.v_dim)


def test_a_pool_of_more_than_two_billion_elements():
    """Untouched memory costs nothing: only the last block is ever written."""
    blocks, stride = 2200, 1 << 20
    pool = torch.empty(blocks * stride).view(blocks, stride)
    shape = Shape(block_size=4)
    k_size = 4 * shape.k_dim
    keys = pool[:, :k_size].view(blocks, 4, 1, shape.k_dim)
    values = pool[:, k_size : k_size + 4 * shape.v_dim].view(blocks, 4, 1, shape.v_dim)
    for new in (1, 3):
        case = Case([(new, 0)])
        span = Span(0, new, new, [blocks - 1])
        backend = TritonBackend(SMALL)
        step = make_step([(keys, values)], [span], backend)
        check(case, backend.attend(step, 0, *case.rows(), **case.options))
        assert torch.equal(keys[-1, :new], case.keys[0])


def test_a_true_nan_is_not_hidden():
    case = Case([(1, 20), (5, 20)])
    keys, values = case.pool()
    keys[case.places(0, 3, 4)] = math.nan
    found = attend(case, TritonBackend(SMALL), pool=(keys, values))
    assert found[0].isnan().all()
    assert not found[1:].isnan().any()


def test_an_empty_step_and_what_the_kernels_do_not_know():
    case = Case([(1, 3)])
    backend = TritonBackend(SMALL)
    empty = make_step([case.pool()], [], backend)
    nothing = [rows[:, :0] for rows in case.rows()]
    assert backend.attend(empty, 0, *nothing, **case.options).shape == (0, 2, case.shape.v_dim)
    for wrong in ({"scale": -1.0}, {"softcap": 0.0}, {"window": 0}):
        step = make_step([case.pool()], case.spans(), backend)
        with pytest.raises(ValueError, match="device cpu"):
            backend.attend(step, 0, *case.rows(), **{**case.options, **wrong})
    half = Case([(1, 3)], replace(case.shape, dtype=torch.float16))
    step = make_step([half.pool()], case.spans(), backend)
    with pytest.raises(ValueError, match="float32"):
        backend.attend(step, 0, *case.rows(), **case.options)


def test_rows_without_slots_are_refused():
    case = Case([(1, 3)])
    inputs = padded_inputs(case, 1, 1, 2)
    with pytest.raises(ValueError, match="3 rows have 1 slots"):
        attend_unadvised(case, inputs, padding=2)
