"""Quantised rows against rounding written out number by number, and what of them attention reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvstore.device import DeviceTier
from kvstore.errors import LayoutError
from kvstore.layout import KVLayout
from kvstore.quantised import LARGEST_CODE, QuantisedRows, dequantise, quantise, read_blocks, unquantised, write_rows
from tests.kvstore.blocks_for_tests import ManualClock

torch.set_num_threads(1)
KINDS = ["fp8_e4m3", "int8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every number that a code can stand for, by its byte.
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
CODES = {"int8": sorted(range(-127, 128)), "fp8_e4m3": sorted({v for v in E4M3 if not math.isnan(v)})}

# From the least normal float to the largest: a row may hold both.
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
rows = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=floats)
usual_rows = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-50, 50, width=32)
)


def _nearest(number: float, codes: list[float]) -> float:
    """The distance to the nearest code."""
    return min(abs(number - code) for code in codes)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(numbers=usual_rows)
def test_every_number_becomes_the_nearest_code_of_its_rows_scale(kind: str, numbers: np.ndarray):
    given_rows = torch.from_numpy(numbers)
    codes, scales = quantise(given_rows, kind)
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (
        torch.int8,
        torch.bfloat16,
        given_rows.shape,
        given_rows.shape[:1],
    )
    values = codes.tolist() if kind == "int8" else [[E4M3[code & 0xFF] for code in row] for row in codes.tolist()]
    for row, found, scale in zip(numbers.tolist(), values, scales.double().tolist(), strict=True):
        wanted = max(map(abs, row)) / LARGEST_CODE[kind]
        assert abs(scale - wanted) <= 2**-8 * wanted + 1e-40
        for number, code in zip(row, found, strict=True):
            if scale < 1e-36:
                assert code * scale == pytest.approx(number, abs=1e-34)
            else:
                assert abs(number / scale - code) <= _nearest(number / scale, CODES[kind]) * (1 + 1e-6) + 1e-5


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(numbers=rows)
def test_no_finite_row_is_read_as_anything_but_finite_and_near(kind: str, numbers: np.ndarray):
    given_rows = torch.from_numpy(numbers)
    found = dequantise(*quantise(given_rows, kind), kind, torch.float32).double()
    largest = given_rows.double().abs().amax(-1, keepdim=True)
    # Half a step of 127, or of fp8's three bits, and the rounding of the scale for the largest.
    bound = largest * (0.5 / 127 + 2**-8) if kind == "int8" else given_rows.double().abs() / 16 + largest * 2**-8
    assert ((found - given_rows.double()).abs() <= bound + 1e-37).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_code_times_scale_rounded_once(kind: str, dtype: torch.dtype):
    bytes_of_codes = [byte for byte in range(256) if not math.isnan(E4M3[byte]) and byte != 0x80]
    codes = torch.tensor(bytes_of_codes, dtype=torch.uint8).view(torch.int8)
    exact = codes.double() if kind == "int8" else codes.view(torch.float8_e4m3fn).double()
    for scale in (0.0, 1.0, 0.0123, 2.0**-12, 100.5):
        scales = torch.tensor(scale).to(torch.bfloat16)
        found = dequantise(codes, scales, kind, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, (exact * scales.double()).float().to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_spoils_its_row_and_no_other(kind: str, wrong: float, dtype: torch.dtype):
    numbers = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = dequantise(*quantise(numbers, kind), kind, dtype)
    numbers[1, 0, 5] = wrong
    codes, scales = quantise(numbers, kind)
    found = dequantise(codes, scales, kind, dtype)
    assert found[1, 0].isnan().all()
    assert not (codes[1, 0] & 0x7F).any()  # fp8 has a minus zero
    found[1, 0] = clean[1, 0]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_is_read_as_zeros(kind: str):
    codes, scales = quantise(torch.zeros(2, 3), kind)
    assert not codes.any()
    assert not scales.any()
    assert torch.equal(dequantise(codes, scales, kind, torch.float32), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_whose_scale_is_below_the_normal_floats_has_codes_in_range(kind: str):
    """A scale there is a multiple of 2**-133; rounding it down by a third would put codes out of range."""
    numbers = torch.tensor([[1.49 * 2.0**-133 * LARGEST_CODE[kind], 0.0]], dtype=torch.float32)
    codes, scales = quantise(numbers, kind)
    assert scales.item() == 2.0**-133
    assert codes[0, 0].item() == (127 if kind == "int8" else 0x7E)  # not the bits of a NaN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bytes_follow_from_the_row_alone(kind: str, dtype: torch.dtype):
    numbers = torch.randn(37, 3, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = quantise(numbers, kind)
    for row in (0, 17, 36):
        alone = quantise(numbers[row : row + 1], kind)
        assert torch.equal(alone[0][0], codes[row])
        assert torch.equal(alone[1][0], scales[row])
    strided = quantise(numbers.transpose(0, 1).contiguous().transpose(0, 1), kind)
    assert torch.equal(strided[0], codes)


layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    k_dim=st.integers(1, 20),
    v_dim=st.integers(1, 20),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    block_size=st.integers(1, 5),
    kv_dtype=st.sampled_from(["auto", *KINDS]),
)


@settings(deadline=None, max_examples=60)
@given(layout=layouts)
def test_the_views_of_a_pool_never_overlap_and_lie_within_their_block(layout: KVLayout):
    """Each byte of every view is counted where it lies: once, in its own block and layer."""
    blocks = 3
    tier = DeviceTier(layout, blocks * layout.block_nbytes, clock=ManualClock())
    for layer in range(layout.layers):
        for rows_of in tier.kv(layer):
            for part in (rows_of.codes, rows_of.scales) if isinstance(rows_of, QuantisedRows) else (rows_of,):
                whole = part.view(torch.uint8) if part.dim() == 4 else part[..., None].view(torch.uint8)
                whole += 1
    counts = np.array([np.frombuffer(payload, np.uint8) for payload in tier.payloads(range(blocks + 1))])
    assert counts.max() == 1
    assert counts.sum() == (blocks + 1) * layout.token_nbytes * layout.block_size
    in_layers = counts.reshape(blocks + 1, layout.layers, -1).sum(-1)
    assert (in_layers == in_layers[0, 0]).all()


def test_attention_that_reads_no_codes_is_told_what_to_set():
    tier = DeviceTier(KVLayout(1, 1, 4, 4, "float32", 2, "int8"), 100, clock=ManualClock())
    with pytest.raises(LayoutError, match=r"reads no K/V of type int8; set engine\.kv_dtype to auto"):
        unquantised(tier.kv(0)[0])
    plain = torch.zeros(1)
    assert unquantised(plain) is plain


@pytest.mark.parametrize("kind", ["auto", *KINDS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_come_back_from_where_they_were_put(kind: str, dtype: str):
    layout = KVLayout(layers=2, kv_heads=3, k_dim=6, v_dim=5, dtype=dtype, block_size=4, kv_dtype=kind)
    tier = DeviceTier(layout, 5 * layout.block_nbytes, clock=ManualClock(), poison=True)
    generator = torch.Generator().manual_seed(2)
    for pool in (pool for layer in range(2) for pool in tier.kv(layer)):
        numbers = torch.randn(6, 3, pool.shape[-1], generator=generator).to(getattr(torch, dtype))
        blocks, offsets = torch.tensor([4, 4, 1, 1, 1, 1]), torch.tensor([2, 3, 0, 1, 2, 3])
        write_rows(pool, blocks, offsets, numbers)
        found = read_blocks(pool, torch.tensor([4, 1, 0])).view(3, 4, 3, -1)
        wanted = numbers if kind == "auto" else dequantise(*quantise(numbers, kind), kind, numbers.dtype)
        assert found.dtype == numbers.dtype
        assert torch.equal(found[0, 2:], wanted[:2])
        assert torch.equal(found[1], wanted[2:])
        assert found[0, :2].isnan().all()  # poisoned, and so is block 0
        assert found[2].isnan().all()
        assert pool.element_size() == numbers.element_size()
        assert pool.device == numbers.device
