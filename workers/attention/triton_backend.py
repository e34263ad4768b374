"""Paged attention on a GPU: the plan of a step and the launches of its kernels, over a pool of either kind.

A sequence with one row goes to the decode kernels, one with several to the prefill kernel. The kernels look at the row
count themselves, so a graph, which no host can advise, launches both, and every sequence is still computed by the very
kernel that computes it in any other step. Where the host knows the spans, launches are limited to their sequences.

Importing this module imports triton; `choice` does it only where there is a GPU.
"""

from __future__ import annotations

from torch import Tensor

from kvstore.quantised import Rows, kv_dtype_of
from workers.attention.launches import LAUNCHES, Launches, Scoring, for_all, plan, score_with
from workers.attention.paged_inputs import PagedInputs
from workers.attention.step import Step
from workers.attention.tiles import Tiles, tiles_for
from workers.attention.triton_launching import Pool, launch_decode, launch_prefill, launch_write


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
        return self._attend(launches, *step.kv[layer], query, key, value, scoring)

    def attend_paged(
        self,
        inputs: PagedInputs,
        key_pool: Rows,
        value_pool: Rows,
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
        key_pool: Rows,
        value_pool: Rows,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        query, key, value = (_with_dense_lanes(each) for each in (query, key, value))
        _check_pools(query, key_pool, value_pool)
        tiles = self.tiles or tiles_for(max(query.shape[-1], value.shape[-1]), query.dtype, kv_dtype_of(key_pool))
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        if query.shape[1] != len(launches.inputs.slots):
            raise ValueError(f"{query.shape[1]} rows have {len(launches.inputs.slots)} slots; give each row one, or -1")
        if not query.shape[1]:
            return out
        keys, values = Pool.of(key_pool), Pool.of(value_pool)
        launch_write(launches.inputs, keys, values, key, value, out)
        if launches.decodes:
            launch_decode(launches, keys, values, query, out, scoring, tiles)
        if launches.prefills:
            launch_prefill(launches, keys, values, query, out, scoring, tiles)
        return out


def _check_pools(query: Tensor, key_pool: Rows, value_pool: Rows) -> None:
    for name, pool in (("K", key_pool), ("V", value_pool)):
        lanes = (pool if isinstance(pool, Tensor) else pool.codes).stride(-1)
        if lanes != 1 or pool.dtype != query.dtype:
            raise ValueError(
                f"the {name} pool has dtype {pool.dtype} and stride {lanes} of its last dimension; the"
                f" attention kernels read {query.dtype} and stride 1: give them views of such a pool"
            )


def _with_dense_lanes(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()
