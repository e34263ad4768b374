"""Paged attention on a GPU: the plan of a step and the launches of `triton_kernels`.

A sequence with one row goes to the decode kernels, one with several to the prefill kernel. The kernels look at the row
count themselves, so a graph, which no host can advise, launches both, and every sequence is still computed by the very
kernel that computes it in any other step. Where the host knows the spans, launches are limited to their sequences.

Importing this module imports triton; `choice` does it only where there is a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kvstore.quantised import unquantised
from workers.attention import triton_kernels as kernels
from workers.attention.launches import LAUNCHES, Launches, Scoring, for_all, plan, score_with
from workers.attention.paged_inputs import PagedInputs
from workers.attention.step import Step
from workers.attention.tiles import DECODE_PROGRAMS, DECODE_REGISTERS, MIN_TILE, SPLITS_TILE, Tiles, padded, tiles_for

INTERPRETED = bool(triton.knobs.runtime.interpret)


class TritonBackend:
    """See the module. Its results do not depend on a row's batch, to the bit.

    Attributes:
        tiles: how the work is cut; None: by head size and dtype, as `tiles_for` says.
    """

    def __init__(self, tiles: Tiles | None = None) -> None:
        self.tiles = tiles

    def attend(
        self,
        step: Step,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `AttentionBackend.attend`; goes by the step's spans.

        Raises:
            ValueError: the pool's dtype or layout, or the way of scoring, is none that the kernels know.
        """
        launches: Launches | None = step.plan.get(LAUNCHES)
        if launches is None:
            launches = step.plan[LAUNCHES] = plan(step)
        scoring = score_with(scale=scale, window=window, softcap=softcap, sinks=sinks)
        keys, values = map(unquantised, step.kv[layer])
        return self._attend(launches, keys, values, query, key, value, scoring)

    def attend_paged(
        self,
        inputs: PagedInputs,
        key_pool: Tensor,
        value_pool: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """The same from tensors alone, which a graph can capture: nothing here asks the host what they hold.

        Args:
            inputs: of T rows. key_pool, value_pool: one layer's, `[blocks, block_size, kv_heads, dim]`.
            query, key, value, scale, window, softcap, sinks: as in `AttentionBackend.attend`.

        Returns:
            [T, heads, v_dim]; zeros where a row is padding.

        Raises:
            ValueError: as `attend`.
        """
        scoring = score_with(scale=scale, window=window, softcap=softcap, sinks=sinks)
        return self._attend(for_all(inputs), key_pool, value_pool, query, key, value, scoring)

    def _attend(
        self,
        launches: Launches,
        key_pool: Tensor,
        value_pool: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        query, key, value = (_with_dense_lanes(each) for each in (query, key, value))
        _check_pools(query, key_pool, value_pool)
        tiles = self.tiles or tiles_for(max(query.shape[-1], value.shape[-1]), query.dtype)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        if query.shape[1] != len(launches.inputs.slots):
            raise ValueError(f"{query.shape[1]} rows have {len(launches.inputs.slots)} slots; give each row one, or -1")
        if not query.shape[1]:
            return out
        _write(launches.inputs, key_pool, value_pool, key, value, out)
        if launches.decodes:
            _decode(launches, key_pool, value_pool, query, out, scoring, tiles)
        if launches.prefills:
            _prefill(launches, key_pool, value_pool, query, out, scoring, tiles)
        return out


def _check_pools(query: Tensor, key_pool: Tensor, value_pool: Tensor) -> None:
    for name, pool in (("K", key_pool), ("V", value_pool)):
        if pool.stride(-1) != 1 or pool.dtype != query.dtype:
            raise ValueError(
                f"the {name} pool has dtype {pool.dtype} and stride {pool.stride(-1)} of its last dimension; the"
                f" attention kernels read {query.dtype} and stride 1: give them views of such a pool"
            )


def _with_dense_lanes(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _write(inputs: PagedInputs, key_pool: Tensor, value_pool: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    size = out.shape[1] * out.shape[2]
    kv_heads, rows, k_dim = key.shape
    v_dim = value.shape[-1]
    kernels.write_rows[(rows,)](
        key,
        value,
        key_pool,
        value_pool,
        inputs.slots,
        out,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_pool.stride()[:3],
        *value_pool.stride()[:3],
        out_size=size,
        out_pad=padded(size),
        block_size=key_pool.shape[1],
        kv_heads=kv_heads,
        heads_pad=1 << (kv_heads - 1).bit_length(),
        k_dim=k_dim,
        k_pad=padded(k_dim),
        v_dim=v_dim,
        v_pad=padded(v_dim),
        num_warps=4,
    )


def _shapes(query: Tensor, key_pool: Tensor, value_pool: Tensor, scoring: Scoring) -> dict[str, Any]:
    """What the two attention kernels both compile in."""
    k_dim, v_dim = query.shape[-1], value_pool.shape[-1]
    return {
        "group": query.shape[0] // key_pool.shape[2],
        "k_dim": k_dim,
        "k_pad": padded(k_dim),
        "v_dim": v_dim,
        "v_pad": padded(v_dim),
        "block_size": key_pool.shape[1],
        "window": scoring.window,
        "capped": scoring.capped,
        # Only float32 reads it: without it the tensor cores would drop 13 bits of every float.
        "precision": "ieee",
        "widen": INTERPRETED and query.dtype == torch.bfloat16,
    }


def _decode(
    launches: Launches,
    key_pool: Tensor,
    value_pool: Tensor,
    query: Tensor,
    out: Tensor,
    scoring: Scoring,
    tiles: Tiles,
) -> None:
    inputs, count, tile = launches.inputs, launches.decodes, tiles.decode
    heads, kv_heads, v_dim = query.shape[0], key_pool.shape[2], out.shape[-1]
    width = _most_splits(inputs.block_tables.shape[1] * key_pool.shape[1], scoring.window, tiles.split)
    partial = torch.empty(count, kv_heads, width, heads // kv_heads, v_dim, dtype=torch.float32, device=out.device)
    statistics = torch.empty(count, kv_heads, width, heads // kv_heads, 2, dtype=torch.float32, device=out.device)
    members = inputs.contexts if launches.decode is None else launches.decode
    programs = min(width, max(1, DECODE_PROGRAMS // (count * kv_heads)))
    group_pad = max(tile.rows, padded(heads // kv_heads))
    kernels.decode_splits[(count, kv_heads, programs)](
        query,
        key_pool,
        value_pool,
        inputs.row_starts,
        inputs.contexts,
        inputs.block_tables,
        members,
        partial,
        statistics,
        scoring.factor,
        scoring.inner,
        *query.stride()[:2],
        *key_pool.stride()[:3],
        *value_pool.stride()[:3],
        inputs.block_tables.stride(0),
        width,
        chosen=launches.decode is not None,
        group_pad=group_pad,
        split=tiles.split,
        keys_tile=tile.keys,
        **_shapes(query, key_pool, value_pool, scoring),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=DECODE_REGISTERS if group_pad == MIN_TILE else None,
    )
    kernels.combine_splits[(count, heads)](
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


def _prefill(
    launches: Launches,
    key_pool: Tensor,
    value_pool: Tensor,
    query: Tensor,
    out: Tensor,
    scoring: Scoring,
    tiles: Tiles,
) -> None:
    inputs, tile = launches.inputs, tiles.prefill
    grid = (-(-launches.longest // tile.rows), query.shape[0], launches.prefills)
    kernels.prefill_rows[grid](
        query,
        key_pool,
        value_pool,
        inputs.row_starts,
        inputs.contexts,
        inputs.block_tables,
        inputs.contexts if launches.prefill is None else launches.prefill,
        inputs.contexts if scoring.sinks is None else scoring.sinks,
        out,
        scoring.factor,
        scoring.inner,
        *query.stride()[:2],
        *key_pool.stride()[:3],
        *value_pool.stride()[:3],
        *out.stride()[:2],
        inputs.block_tables.stride(0),
        chosen=launches.prefill is not None,
        rows_tile=tile.rows,
        keys_tile=tile.keys,
        sunk=scoring.sinks is not None,
        **_shapes(query, key_pool, value_pool, scoring),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
