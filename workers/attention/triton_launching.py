"""Launches of the attention kernels: their grids, and what they are given of a step and a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kvstore.quantised import LARGEST_CODE, Rows
from workers.attention.kernels import decode, prefill, write
from workers.attention.launches import Launches, Scoring
from workers.attention.paged_inputs import PagedInputs
from workers.attention.tiles import DECODE_PROGRAMS, DECODE_REGISTERS, MIN_TILE, SPLITS_TILE, Tiles, padded

INTERPRETED = bool(triton.knobs.runtime.interpret)
_TYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Pool:
    """K or V of one layer as kernels take it.

    Attributes:
        numbers: [blocks, block_size, kv_heads, dim], codes in their own type.
        scales: None, or scales [blocks, block_size, kv_heads] and their strides. largest: the largest code, else 0.
    """

    numbers: Tensor
    scales: tuple[Tensor, int, int, int] | None
    largest: float

    @classmethod
    def of(cls, rows: Rows) -> Pool:
        """Of these, quantised or not."""
        if isinstance(rows, Tensor):
            return cls(rows, None, 0.0)
        block, token, head = rows.scales.stride()
        codes = rows.codes.view(_TYPES[rows.kv_dtype])
        return cls(codes, (rows.scales, block, token, head), LARGEST_CODE[rows.kv_dtype])


def launch_write(inputs: PagedInputs, keys: Pool, values: Pool, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Put new K and V [kv_heads, T, dim] into their slots; what `out` [T, heads, v_dim] has of padding becomes zero."""
    size = out.shape[1] * out.shape[2]
    kv_heads, rows, k_dim = key.shape
    v_dim = value.shape[-1]
    write.write_rows[(rows,)](
        key,
        value,
        keys.numbers,
        values.numbers,
        keys.scales,
        values.scales,
        inputs.slots,
        out,
        *key.stride()[:2],
        *value.stride()[:2],
        *keys.numbers.stride()[:3],
        *values.numbers.stride()[:3],
        largest=keys.largest,
        out_size=size,
        out_pad=padded(size),
        block_size=keys.numbers.shape[1],
        kv_heads=kv_heads,
        heads_pad=1 << (kv_heads - 1).bit_length(),
        k_dim=k_dim,
        k_pad=padded(k_dim),
        v_dim=v_dim,
        v_pad=padded(v_dim),
        num_warps=4,
    )


def _shapes(query: Tensor, keys: Pool, values: Pool, scoring: Scoring) -> dict[str, Any]:
    """What the two attention kernels both compile in."""
    k_dim, v_dim = query.shape[-1], values.numbers.shape[-1]
    return {
        "group": query.shape[0] // keys.numbers.shape[2],
        "k_dim": k_dim,
        "k_pad": padded(k_dim),
        "v_dim": v_dim,
        "v_pad": padded(v_dim),
        "block_size": keys.numbers.shape[1],
        "window": scoring.window,
        "capped": scoring.capped,
        # Only float32 reads it: without it the tensor cores would drop 13 bits of every float.
        "precision": "ieee",
        "widen": INTERPRETED and query.dtype == torch.bfloat16,
    }


def launch_decode(
    launches: Launches,
    keys: Pool,
    values: Pool,
    query: Tensor,
    out: Tensor,
    scoring: Scoring,
    tiles: Tiles,
) -> None:
    """Attend the rows of sequences that have one, [heads, T, k_dim], into their places of `out`."""
    inputs, count, tile = launches.inputs, launches.decodes, tiles.decode
    heads, kv_heads, v_dim = query.shape[0], keys.numbers.shape[2], out.shape[-1]
    width = _most_splits(inputs.block_tables.shape[1] * keys.numbers.shape[1], scoring.window, tiles.split)
    partial = torch.empty(count, kv_heads, width, heads // kv_heads, v_dim, dtype=torch.float32, device=out.device)
    statistics = torch.empty(count, kv_heads, width, heads // kv_heads, 2, dtype=torch.float32, device=out.device)
    members = inputs.contexts if launches.decode is None else launches.decode
    programs = min(width, max(1, DECODE_PROGRAMS // (count * kv_heads)))
    group_pad = max(tile.rows, padded(heads // kv_heads))
    decode.decode_splits[(count, kv_heads, programs)](
        query,
        keys.numbers,
        values.numbers,
        keys.scales,
        values.scales,
        inputs.row_starts,
        inputs.contexts,
        inputs.block_tables,
        members,
        partial,
        statistics,
        scoring.factor,
        scoring.inner,
        *query.stride()[:2],
        *keys.numbers.stride()[:3],
        *values.numbers.stride()[:3],
        inputs.block_tables.stride(0),
        width,
        chosen=launches.decode is not None,
        group_pad=group_pad,
        split=tiles.split,
        keys_tile=tile.keys,
        **_shapes(query, keys, values, scoring),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=DECODE_REGISTERS if group_pad == MIN_TILE else None,
    )
    decode.combine_splits[(count, heads)](
        partial,
        statistics,
        inputs.row_starts,
        inputs.contexts,
        members,
        inputs.contexts if scoring.sinks is None else scoring.sinks,
        out,
        *out.stride()[:2],
        width,
        chosen=launches.decode is not None,
        group=heads // kv_heads,
        v_dim=v_dim,
        v_pad=padded(v_dim),
        split=tiles.split,
        splits_tile=SPLITS_TILE,
        window=scoring.window,
        sunk=scoring.sinks is not None,
        num_warps=4,
    )


def _most_splits(tokens: int, window: int, split: int) -> int:
    """Of one row that sees so many tokens; a window that starts within a split reaches into one more."""
    most = -(-tokens // split)
    return min(most, -(-window // split) + 1) if window else most


def launch_prefill(
    launches: Launches,
    keys: Pool,
    values: Pool,
    query: Tensor,
    out: Tensor,
    scoring: Scoring,
    tiles: Tiles,
) -> None:
    """Attend the rows of sequences that have several, as `launch_decode`."""
    inputs, tile = launches.inputs, tiles.prefill
    grid = (-(-launches.longest // tile.rows), query.shape[0], launches.prefills)
    prefill.prefill_rows[grid](
        query,
        keys.numbers,
        values.numbers,
        keys.scales,
        values.scales,
        inputs.row_starts,
        inputs.contexts,
        inputs.block_tables,
        inputs.contexts if launches.prefill is None else launches.prefill,
        inputs.contexts if scoring.sinks is None else scoring.sinks,
        out,
        scoring.factor,
        scoring.inner,
        *query.stride()[:2],
        *keys.numbers.stride()[:3],
        *values.numbers.stride()[:3],
        *out.stride()[:2],
        inputs.block_tables.stride(0),
        chosen=launches.prefill is not None,
        rows_tile=tile.rows,
        keys_tile=tile.keys,
        sunk=scoring.sinks is not None,
        **_shapes(query, keys, values, scoring),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
