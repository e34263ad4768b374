"""How the attention kernels cut their work: sizes of splits and tiles, warps and stages, by head size and dtype.

All are fixed before the first request and none is tuned while serving: a choice made by a stopwatch could change the
order of a sum, and with it a token, from one run to the next. Figures are of a prototype with the same inner loops, on
one H100 with 32/8 heads of 128 in bfloat16; `bench.gpu_attention --tiles` measures them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstore.layout import UNQUANTISED

# Tokens of a split. 256: 2.56 TB/s at 256 sequences of 1k; 512: 2.71; 1024: 2.80, but one sequence of 8k takes 29 us
# where splits of 512 take 21, because too few programs share its work.
SPLIT = 512
# Splits that are combined at a time.
SPLITS_TILE = 16
# Programs of a decode beyond which more would find nothing to do: a graph's tables have room for the longest context,
# and a program for every split of it that most rows do not have costs more than the work (13 us for 32k of them).
DECODE_PROGRAMS = 8192
# Of a thread of the decode kernel, so that four of its programs share a processor and their loads hide one another; it
# would take 160 for heads of 128, the rest for addresses that it needs once a split. For groups of up to MIN_TILE query
# heads; larger ones need the registers for their sums.
DECODE_REGISTERS = 128
MIN_TILE = 16  # what matrix units take


@dataclass(frozen=True, slots=True)
class Tile:
    """One launch: `rows` x `keys` of scores at a time, by that many warps, loads `stages` deep."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """How to cut one model's attention. `decode.rows` is the least; a larger group of query heads takes more.

    Attributes:
        split: tokens, a multiple of `decode.keys`.
    """

    prefill: Tile
    decode: Tile
    split: int = SPLIT


def tiles_for(dim: int, dtype: torch.dtype, kv_dtype: str = UNQUANTISED) -> Tiles:
    """The sizes for the larger of a model's K and V head sizes, and what K/V is stored as.

    Prefill with 128 x 64, 8 warps and 3 stages: 221 TFLOP/s for 2048 rows over 2048 tokens, 313 over 8192. 64 x 64 is
    better for the first (249), 128 x 128 for the second (362); one that is good for both keeps a row's order of sums
    the same for both. Decode reads 16 KiB of keys a tile, as was measured. Heads of 256 and float32 double the bytes
    of a row, so they take fewer rows, keys and stages to fit the same memory. Codes of heads of 256 become numbers in
    registers, which have room for half the keys.
    """
    pad = padded(dim)
    if dtype == torch.float32:
        # For tests and float32 models: no matrix units, so nothing to be won by large tiles.
        return Tiles(Tile(32, 32, 4, 1), Tile(MIN_TILE, 32, 4, 1))
    if pad <= 64:
        return Tiles(Tile(128, 64, 4, 3), Tile(MIN_TILE, 128, 4, 3))
    if pad <= 128:
        return Tiles(Tile(128, 64, 8, 3), Tile(MIN_TILE, 64, 4, 3))
    keys = 64 if kv_dtype == UNQUANTISED else 32
    return Tiles(Tile(64, keys, 8, 2), Tile(MIN_TILE, 32, 4, 3))


def padded(size: int) -> int:
    """The next power of two, at least MIN_TILE: what a tile's side must be."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())
