"""Kernels over a quantised pool: they store the bytes that the CPU stores, and attend over what those stand for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvstore.device import DeviceTier
from kvstore.quantised import LARGEST_CODE, quantise
from tests.triton.cases import SMALL, Case, Shape, attend, attend_unadvised, check, padded_inputs
from workers.attention.choice import backend_for
from workers.attention.paged_inputs import PagedInputs
from workers.attention.torch_backend import TorchBackend
from workers.attention.triton_backend import TritonBackend
from workers.attention.triton_launching import Pool, launch_write

# What is zero by zero is IEEE's business; the interpreter's numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

KINDS = ["int8", "fp8_e4m3"]
HEADS, K_DIM, V_DIM, BLOCK_SIZE = 3, 20, 12, 4


def _bytes(tier: DeviceTier) -> Tensor:
    """All of the pool, what is between the areas included."""
    return torch.stack([torch.frombuffer(each, dtype=torch.uint8) for each in tier.payloads(range(tier.num_blocks))])


def _hard_rows(count: int, dim: int, kind: str, dtype: torch.dtype) -> Tensor:
    """[HEADS, count, dim] from the least number to the largest, ties between codes, zeros of both signs, NaN and
    infinity."""
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(count, HEADS, dim, generator=generator)
    rows *= torch.randn(count, HEADS, dim, generator=generator).mul(3).exp()
    rows *= torch.logspace(-36, 36, count)[:, None, None]
    rows[0], rows[1] = 0.0, torch.tensor([0.0, -0.0] * (dim // 2))
    # With the largest code in the row its scale is 1, so halves of int8 and sixteenths of fp8 are ties.
    ties = (torch.arange(HEADS * dim) - dim).view(HEADS, dim)
    rows[2], rows[3], rows[4] = ties + 0.5, (ties + 0.5) / 16, ties * 2.0**-10
    rows[2:5, :, 0] = LARGEST_CODE[kind]
    # The interpreter reads no bfloat16 below the normal ones.
    rows[5], rows[6] = torch.finfo(dtype).max, torch.finfo(dtype).tiny / (1 if dtype == torch.bfloat16 else 64)
    rows[8], rows[8, :, 0] = 1.0, LARGEST_CODE[kind] * (1 + 3 / 256)  # its scale is a tie between two of bfloat16
    rows[7, 0, 3], rows[7, 1, 4], rows[7, 2, 5] = math.nan, math.inf, -math.inf
    return rows.to(dtype).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_stored_bytes_are_those_that_the_cpu_stores(kind: str, dtype: torch.dtype):
    count = 44
    shape = Shape(HEADS, 1, K_DIM, V_DIM, BLOCK_SIZE, dtype, kind)
    key, value = (_hard_rows(count, dim, kind, dtype) for dim in (K_DIM, V_DIM))
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:count]
    tiers = [DeviceTier(shape.layout, 15 * shape.layout.block_nbytes, clock=lambda: 0.0) for _ in range(2)]
    nothing = torch.zeros(1, dtype=torch.int32)
    inputs = PagedInputs(slots, nothing, nothing, nothing[:, None], 1)
    launch_write(inputs, *map(Pool.of, tiers[0].kv(1)), key, value, torch.empty(count, HEADS, V_DIM))
    for part, rows in zip(tiers[1].kv(1), (key, value), strict=True):
        codes, scales = quantise(rows.transpose(0, 1), kind)
        part.codes[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = codes
        part.scales[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = scales
    for found, wanted in zip(tiers[0].kv(1), tiers[1].kv(1), strict=True):
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scales.isnan(), wanted.scales.isnan())
        assert torch.equal(found.scales.isinf(), wanted.scales.isinf())
        for part in (found, wanted):
            part.scales.nan_to_num_(7.0)  # NaN has more than one spelling
    assert torch.equal(*map(_bytes, tiers))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("int8", {}),
        ("fp8_e4m3", {}),
        ("int8", {"window": 13, "softcap": 2.0}),
        ("fp8_e4m3", {"with_sinks": True, "window": 7}),
        ("int8", {"softcap": 2.0, "with_sinks": True}),
    ],
    ids=str,
)
def test_a_mixed_step_with_every_way_of_scoring(kind: str, options: dict):
    """All that no sequence owns is NaN in its scales and in its codes: one read of it, and the result is NaN."""
    case = Case([(1, 37), (5, 14), (1, 0)], Shape(kv_dtype=kind), seed=3, **options)
    check(case, attend(case, TritonBackend(SMALL)))


@pytest.mark.parametrize(
    ("dim", "kind", "dtype"),
    [
        (64, "int8", torch.bfloat16),
        (80, "fp8_e4m3", torch.bfloat16),
        (96, "int8", torch.float16),
        (128, "fp8_e4m3", torch.float16),
        (256, "int8", torch.float32),
        (256, "fp8_e4m3", torch.bfloat16),
    ],
    ids=str,
)
def test_every_head_size_and_dtype_with_the_tiles_that_serve(dim: int, kind: str, dtype: torch.dtype):
    shape = Shape(k_dim=dim, v_dim=dim, block_size=16, dtype=dtype, kv_dtype=kind)
    case = Case([(1, 70), (4, 9)], shape, scale=dim**-0.5, seed=dim)
    check(case, attend(case, TritonBackend()))


@pytest.mark.parametrize(("heads", "group", "kind"), [(3, 1, "int8"), (1, 5, "fp8_e4m3")], ids=["MHA", "MQA"])
def test_groups_of_query_heads(heads: int, group: int, kind: str):
    case = Case([(1, 20), (3, 9)], Shape(heads, group, kv_dtype=kind), with_sinks=True, window=15)
    check(case, attend(case, TritonBackend(SMALL)))


def test_small_values_keep_their_digits_in_float16():
    """A weight times a scale would fall below what float16 has."""
    case = Case([(1, 40), (3, 9)], Shape(dtype=torch.float16, kv_dtype="int8"))
    case.values = [each * 2.0**-12 for each in case.values]
    found, wanted = attend(case, TritonBackend(SMALL)), attend(case, TorchBackend())
    torch.testing.assert_close(found, wanted, atol=2e-7, rtol=4e-3)


def test_a_row_has_the_same_bits_alone_padded_and_however_its_prompt_is_cut():
    case = Case([(1, 40), (9, 20)], Shape(kv_dtype="int8"), with_sinks=True)
    together = attend(case, TritonBackend(SMALL))
    padded = attend_unadvised(case, padded_inputs(case, 13, 4, 30), padding=3)
    assert torch.equal(padded[:10], together)
    assert not padded[10:].any()
    assert torch.equal(attend(case, TritonBackend(SMALL), [1]), together[1:])
    tier = case.tier()
    for start, stop in ((20, 24), (24, 29)):
        part = replace(case, sizes=[(1, 40), (stop - start, start)])
        part.keys, part.values, part.queries, part.sinks = case.keys, case.values, case.queries, case.sinks
        part.tables = case.tables
        found = attend(part, TritonBackend(SMALL), [1], pool=tier.kv(1))
        assert torch.equal(found, together[1 + start - 20 : 1 + stop - 20])


def test_what_a_window_has_left_behind_is_not_read():
    case = Case([(1, 50), (5, 30)], Shape(kv_dtype="fp8_e4m3"), window=11)
    wanted, pool = attend(case, TritonBackend(SMALL)), case.pool()
    for number, (_, cached) in enumerate(case.sizes):
        places = case.places(number, 0, cached + 1 - 11)
        for part in pool:
            part.codes[places], part.scales[places] = -1, math.nan
    assert torch.equal(attend(case, TritonBackend(SMALL), pool=pool), wanted)
    assert not wanted.isnan().any()


@pytest.mark.parametrize(("kind", "broken"), [("int8", math.nan), ("fp8_e4m3", math.inf)])
def test_a_row_that_is_not_finite_shows_in_its_own_sequence(kind: str, broken: float):
    for name in ("keys", "values"):
        case = Case([(1, 20), (1, 20)], Shape(kv_dtype=kind))
        getattr(case, name)[0][3, 0, 2] = broken
        found = attend(case, TritonBackend(SMALL))
        assert found[0].isnan().all()
        assert not found[1].isnan().any()


@pytest.mark.parametrize(
    ("kind", "capability", "backend"),
    [
        ("auto", (8, 0), TritonBackend),
        ("int8", (8, 0), TritonBackend),
        ("fp8_e4m3", (8, 0), TorchBackend),
        ("fp8_e4m3", (8, 9), TritonBackend),
    ],
)
def test_a_gpu_that_knows_no_fp8_says_that_it_goes_without_kernels(kind, capability, backend, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert type(backend_for(torch.device("cuda"), kind)) is backend
    assert ("set engine.kv_dtype to int8" in caplog.text) is (backend is TorchBackend)
