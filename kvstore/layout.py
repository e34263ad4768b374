"""The shape of a block: one contiguous run of bytes over all layers, the same in every tier and on the wire.

Covers: shapes, sizes, where each part of a block lies, the choice of the block size. Does not cover: the header that
goes before stored bytes (`codec`), how quantised rows are made and read (`quantised`).

Block-major: `[blocks, layers, K (block_size, kv_heads, k_dim) | V (block_size, kv_heads, v_dim)]`. Spilling a block is
one copy, the stored value is those bytes, and attention kernels see only another stride. All numbers little-endian.

Quantised K/V (`kv_dtype`) is one code of a byte an element and one scale a row, where a row is the `k_dim` or `v_dim`
numbers of one token, one K/V head and one layer. A layer of a block then is four areas, one after the other:

    K codes    block_size * kv_heads * k_dim bytes   [block_size, kv_heads, k_dim], int8 or float8_e4m3fn
    K scales   block_size * kv_heads * 2 bytes       [block_size, kv_heads], bfloat16
    V codes    block_size * kv_heads * v_dim bytes   [block_size, kv_heads, v_dim]
    V scales   block_size * kv_heads * 2 bytes       [block_size, kv_heads], bfloat16

Each area is padded with bytes that mean nothing up to a multiple of 16, so that areas, layers and blocks all start on
16 bytes from the pool's base, and a kernel may load any area by vectors of 16 (rows, where `dim` is a multiple of 16).
A number is `code * scale`. Scales are beside their codes and not inside of them, so that both stay plain strided views.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from kvstore.errors import LayoutError

DEFAULT_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 64
SMALL_BLOCK_BYTES = 256 << 10
LARGE_BLOCK_BYTES = 4 << 20

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
UNQUANTISED = "auto"
# What a quantised layout is called in `describe`. A change of its bytes or of how rows are rounded needs another name:
# the name is what keeps old blocks from being read as new ones.
_DESCRIBED = {"fp8_e4m3": "fp8_e4m3/row", "int8": "int8/row"}
KV_DTYPES = (UNQUANTISED, *_DESCRIBED)
SCALE_NBYTES = 2  # bfloat16: the range of float32, so that no finite row overflows it
ALIGNMENT = 16


class Area(NamedTuple):
    """A part of a layer of a block: its first byte and its length without padding."""

    start: int
    nbytes: int


class LayerAreas(NamedTuple):
    """Where K and V of one layer of one block lie; the scales are None where K/V is not quantised."""

    k: Area
    k_scales: Area | None
    v: Area
    v_scales: Area | None


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one block holds.

    Attributes:
        layers, kv_heads, k_dim, v_dim: learned from the model by a probe forward.
        dtype: name of the torch dtype that the model computes in, a key of DTYPE_BYTES.
        block_size: tokens a block.
        kv_dtype: one of KV_DTYPES, what is stored; `auto`: numbers of `dtype`, as they are.
    """

    layers: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    block_size: int = DEFAULT_BLOCK_SIZE
    kv_dtype: str = UNQUANTISED

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise LayoutError(f"dtype {self.dtype} cannot be stored; choose one of {', '.join(DTYPE_BYTES)}")
        if self.kv_dtype not in KV_DTYPES:
            raise LayoutError(f"kv_dtype {self.kv_dtype} is not known; choose one of {', '.join(KV_DTYPES)}")
        if min(self.layers, self.kv_heads, self.k_dim, self.v_dim, self.block_size) < 1:
            raise LayoutError(f"every size of a layout must be positive: {self}")

    @property
    def quantised(self) -> bool:
        """Whether rows are stored as codes with a scale."""
        return self.kv_dtype != UNQUANTISED

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's K/V over all layers, the scales of quantised rows included, padding of areas not."""
        row_nbytes = (self.k_dim + self.v_dim) * self._element_nbytes + 2 * self._scale_nbytes
        return self.layers * self.kv_heads * row_nbytes

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""
        return self.layers * self.layer_nbytes

    @property
    def layer_nbytes(self) -> int:
        """Bytes of one layer of one block: the stride from one layer to the next."""
        rows = self.block_size * self.kv_heads
        return sum(self._padded(rows * dim * self._element_nbytes) for dim in (self.k_dim, self.v_dim)) + (
            2 * self._padded(rows * self._scale_nbytes)
        )

    @property
    def areas(self) -> LayerAreas:
        """Where K and V, and their scales, lie in a layer of a block."""
        rows, starts, at = self.block_size * self.kv_heads, [], 0
        sizes = [(rows * dim * self._element_nbytes, rows * self._scale_nbytes) for dim in (self.k_dim, self.v_dim)]
        for codes, scales in sizes:
            starts += [Area(at, codes), Area(at + self._padded(codes), scales) if self.quantised else None]
            at += self._padded(codes) + self._padded(scales)
        return LayerAreas._make(starts)

    def describe(self) -> str:
        """One line that names every property; part of the hash scheme.

        Examples: `L8 KVH4 K64 V64 float32 B16`, and quantised `L8 KVH4 K64 V64 float32 B16 int8/row`.
        """
        plain = f"L{self.layers} KVH{self.kv_heads} K{self.k_dim} V{self.v_dim} {self.dtype} B{self.block_size}"
        return f"{plain} {_DESCRIBED[self.kv_dtype]}" if self.quantised else plain

    def with_chosen_block_size(self) -> KVLayout:
        """The same layout with a block size that keeps a block between 256 KiB and 4 MiB where it can be.

        16 tokens; up to 64 (doubling) where a block would be smaller than 256 KiB; fewer (halving) where it would be
        larger than 4 MiB.
        """
        size = DEFAULT_BLOCK_SIZE
        while size < MAX_BLOCK_SIZE and replace(self, block_size=size).block_nbytes < SMALL_BLOCK_BYTES:
            size *= 2
        while size > 1 and replace(self, block_size=size).block_nbytes > LARGE_BLOCK_BYTES:
            size //= 2
        return replace(self, block_size=size)

    @property
    def _element_nbytes(self) -> int:
        return 1 if self.quantised else DTYPE_BYTES[self.dtype]

    @property
    def _scale_nbytes(self) -> int:
        return SCALE_NBYTES if self.quantised else 0

    def _padded(self, nbytes: int) -> int:
        return -(-nbytes // ALIGNMENT) * ALIGNMENT if self.quantised else nbytes
