"""The shape of a block: one contiguous run of bytes over all layers, the same in every tier and on the wire.

Covers: shapes, sizes, the choice of the block size. Does not cover: the header that goes before stored bytes (`codec`).

Block-major: `[blocks, layers, K (block_size, kv_heads, k_dim) | V (block_size, kv_heads, v_dim)]`. Spilling a block is
one copy, the stored value is those bytes, and attention kernels see only another stride.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvstore.errors import LayoutError

DEFAULT_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 64
SMALL_BLOCK_BYTES = 256 << 10
LARGE_BLOCK_BYTES = 4 << 20

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one block holds.

    Attributes:
        layers, kv_heads, k_dim, v_dim: learned from the model by a probe forward.
        dtype: name of the torch dtype, a key of DTYPE_BYTES.
        block_size: tokens a block.
    """

    layers: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    block_size: int = DEFAULT_BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise LayoutError(f"dtype {self.dtype} cannot be stored; choose one of {', '.join(DTYPE_BYTES)}")
        if min(self.layers, self.kv_heads, self.k_dim, self.v_dim, self.block_size) < 1:
            raise LayoutError(f"every size of a layout must be positive: {self}")

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's K/V over all layers."""
        return self.layers * self.kv_heads * (self.k_dim + self.v_dim) * DTYPE_BYTES[self.dtype]

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""
        return self.token_nbytes * self.block_size

    @property
    def layer_elements(self) -> int:
        """Elements of one layer of one block: K first, then V."""
        return self.block_size * self.kv_heads * (self.k_dim + self.v_dim)

    def describe(self) -> str:
        """One line that names every property; part of the hash scheme. Example: `L8 KVH4 K64 V64 float32 B16`."""
        return f"L{self.layers} KVH{self.kv_heads} K{self.k_dim} V{self.v_dim} {self.dtype} B{self.block_size}"

    def with_chosen_block_size(self) -> KVLayout:
        """The same layout with a block size that keeps a block between 256 KiB and 4 MiB where it can be.

        16 tokens; up to 64 (doubling) where a block would be smaller than 256 KiB; fewer (halving) where it would be
        larger than 4 MiB.
        """
        size = DEFAULT_BLOCK_SIZE
        while size < MAX_BLOCK_SIZE and self.token_nbytes * size < SMALL_BLOCK_BYTES:
            size *= 2
        while size > 1 and self.token_nbytes * size > LARGE_BLOCK_BYTES:
            size //= 2
        return replace(self, block_size=size)
