"""Does a row of attention have the same bits whatever rows share its call? Tried with numbers that tell.

As `products` has it: in half precision ordinary numbers hide another order of adding. Here each value comes with its
negative under an equal key, so that what a row gets is nothing but the rounding on its way.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kvstore.layout import KVLayout
from workers.attention.exact_backend import BLOCK, KEYS, ROWS, ExactBackend
from workers.attention.step import Span, make_step

CONTEXT = 2 * KEYS
BLOCK_SIZE = 16
SOFTCAP = 50.0  # with it goes the algorithm that is written out; without, the library's


def rows_agree(backend: ExactBackend, layout: KVLayout, device: torch.device) -> bool:
    """Whether calls of every number of packed rows give the bits of calls of ROWS."""
    return all(_agrees(backend, layout, device, softcap) for softcap in (None, SOFTCAP))


def _agrees(backend: ExactBackend, layout: KVLayout, device: torch.device, softcap: float | None) -> bool:
    drawn = [each.to(device, getattr(torch, layout.dtype)) for each in _vanishing(layout)]
    whole = _attend(backend, layout, drawn, ROWS, softcap)
    return all(torch.equal(_attend(backend, layout, drawn, rows, softcap), whole) for rows in range(BLOCK, ROWS, BLOCK))


def _vanishing(layout: KVLayout) -> list[Tensor]:
    """query [heads, ROWS, k_dim], of the last rows; key [heads, CONTEXT, k_dim], value [heads, CONTEXT, v_dim].

    The last ROWS values are zero: some rows see them and some do not.
    """
    draw, heads, half = torch.Generator().manual_seed(0), layout.kv_heads, (CONTEXT - ROWS) // 2
    places = torch.randperm(2 * half, generator=draw)
    keys = torch.randn(heads, half, layout.k_dim, generator=draw)
    values = torch.randn(heads, half, layout.v_dim, generator=draw)
    last = torch.randn(heads, ROWS, layout.k_dim, generator=draw)
    key = torch.cat([torch.cat([keys, keys], 1)[:, places], last], 1)
    value = torch.cat([torch.cat([values, -values], 1)[:, places], torch.zeros(heads, ROWS, layout.v_dim)], 1)
    return [torch.randn(heads, ROWS, layout.k_dim, generator=draw), key, value]


def _attend(backend: ExactBackend, layout: KVLayout, drawn: list[Tensor], rows: int, softcap: float | None) -> Tensor:
    """[ROWS, kv_heads, v_dim]; so many rows a span, and the last span what is left over."""
    query, key, value = drawn
    first, table = CONTEXT - ROWS, list(range(CONTEXT // BLOCK_SIZE))
    pool = [each.transpose(0, 1).reshape(len(table), BLOCK_SIZE, layout.kv_heads, -1).clone() for each in (key, value)]
    found = []
    for start, stop in pairwise([*range(0, ROWS, rows), ROWS]):
        step = make_step([(pool[0], pool[1])], [Span(0, stop - start, first + stop, table)], backend)
        part, new = slice(start, stop), slice(first + start, first + stop)
        found.append(
            backend.attend(
                step,
                0,
                query[:, part],
                key[:, new],
                value[:, new],
                scale=layout.k_dim**-0.5,
                window=None,
                softcap=softcap,
                sinks=None,
            )
        )
    return torch.cat(found)
