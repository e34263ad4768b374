"""Quantised K/V rows in the paged pool: how they are written, and how they are read back.

Covers: rounding rows to codes and scales, the views of one layer's K or V (`QuantisedRows`), and the two things that
attention does with a pool of either kind (`write_rows`, `read_blocks`). Does not cover: where the bytes lie (`layout`).

A row is the numbers of one token, one K/V head and one layer. Its scale is its largest magnitude divided by the largest
code (127, or 448 of fp8 e4m3), rounded to bfloat16; its codes are its numbers divided by that scale, rounded to the
nearest with ties to even. A row's bytes follow from the row alone: neither the batch nor the chunk it came in matters.

What attention sees is `code * scale`, here worked out in float32 and rounded once to the model's dtype; a GPU's kernels
multiply sums by the scale instead, and so leave out that rounding. On one device everybody must see the same: the step
that writes a row attends over what it wrote and not over what it was given. Else a prompt computed whole would attend
over other numbers than one whose first part is found in a cache, and differ by the quantisation's error.

A row of zeros has scale zero. One with a NaN or an infinity has no codes but zeros, and a scale that is not finite: it
reads as NaN from end to end, as it would have given NaN unquantised, and touches no other row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import LayoutError
from kvstore.layout import UNQUANTISED

LARGEST_CODE = {"fp8_e4m3": 448.0, "int8": 127.0}


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """K or V of one layer over the whole pool.

    Attributes:
        codes: [blocks, block_size, kv_heads, dim], the codes' bytes as int8, any stride.
        scales: [blocks, block_size, kv_heads] bfloat16, any stride.
        kv_dtype: `fp8_e4m3` or `int8`, what the codes are. dtype: what rows are read as, the model's.
    """

    codes: Tensor
    scales: Tensor
    kv_dtype: str
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[blocks, block_size, kv_heads, dim], as of plain rows."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where the pool lies."""
        return self.codes.device

    def element_size(self) -> int:
        """Bytes of an element once it is read."""
        return self.dtype.itemsize


Rows = Tensor | QuantisedRows  # K or V of one layer over the pool: [blocks, block_size, kv_heads, dim], any stride


def write_rows(pool: Rows, blocks: Tensor, offsets: Tensor, rows: Tensor) -> None:
    """Put new rows [T, kv_heads, dim] of the model's dtype into the pool, at blocks and offsets, [T] int64 each."""
    if isinstance(pool, Tensor):
        pool[blocks, offsets] = rows
    else:
        pool.codes[blocks, offsets], pool.scales[blocks, offsets] = quantise(rows, pool.kv_dtype)


def read_blocks(pool: Rows, blocks: Tensor) -> Tensor:
    """All rows of these blocks, [N * block_size, kv_heads, dim] of the model's dtype; a copy that may be written."""
    if isinstance(pool, Tensor):
        return pool.index_select(0, blocks).flatten(0, 1)
    codes, scales = (part.index_select(0, blocks).flatten(0, 1) for part in (pool.codes, pool.scales))
    return dequantise(codes, scales, pool.kv_dtype, pool.dtype)


def kv_dtype_of(rows: Rows) -> str:
    """What they are stored as, one of `layout.KV_DTYPES`."""
    return UNQUANTISED if isinstance(rows, Tensor) else rows.kv_dtype


def unquantised(rows: Rows) -> Tensor:
    """The pool's own tensor, for attention that reads no codes.

    Raises:
        LayoutError: these rows are quantised.
    """
    if isinstance(rows, Tensor):
        return rows
    raise LayoutError(f"this attention backend reads no K/V of type {rows.kv_dtype}; set engine.kv_dtype to auto")


def quantise(rows: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """Codes (int8, for fp8 its bytes) of the shape of `rows`, and the bfloat16 scale of each row of its last axis."""
    largest, numbers = LARGEST_CODE[kv_dtype], rows.float()
    scales = (numbers.abs().amax(-1) / largest).to(torch.bfloat16)
    # A zero row divides zero by zero, and one that is not finite by its scale: both give codes of zero.
    codes = (numbers / scales[..., None]).nan_to_num_(0.0, largest, -largest)
    # Below the normal floats a scale has too few bits, and its codes leave the range.
    codes.clamp_(-largest, largest)
    if kv_dtype == "int8":
        return codes.round_().to(torch.int8), scales
    return codes.to(torch.float8_e4m3fn).view(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor, kv_dtype: str, dtype: torch.dtype) -> Tensor:
    """The numbers that codes [..., dim] and scales [...] stand for, in `dtype`."""
    if dtype == torch.float16:  # whose range is too small for scales
        return dequantise(codes, scales, kv_dtype, torch.float32).to(dtype)
    numbers = codes.to(dtype) if kv_dtype == "int8" else _from_fp8(codes, dtype)
    return numbers.mul_(scales[..., None].to(dtype))


def _from_fp8(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Exact. PyTorch's own conversion on the CPU handles one number at a time and takes ten times as long.

    The seven bits below the sign, put where exponent and mantissa of the wider type begin, are the number with the
    wider exponent's bias: too small by a power of two, the numbers below e4m3's normal ones included. The two codes
    that stand for NaN are not told apart: `quantise` never makes one.
    """
    bits, shift, mask = _WIDER[dtype]
    wide = codes.to(bits).bitwise_left_shift_(shift).bitwise_and_(mask)
    return wide.view(dtype).mul_(2.0**120)


# By dtype: integers of its width, places from e4m3's mantissa to its own, and what is no copy of the sign.
_WIDER: dict[torch.dtype, tuple[torch.dtype, int, int]] = {
    torch.bfloat16: (torch.int16, 4, 0x87F0 - (1 << 16)),
    torch.float32: (torch.int32, 20, 0x87F00000 - (1 << 32)),
}
