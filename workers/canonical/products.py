"""Do matrix products of several row counts add in one order? Tried with numbers that tell.

In half precision a sum is rounded to so few bits that another order of adding shows in one element of ten thousand, so
that a comparison of ordinary activations passes and the promise breaks a minute later. Here every exact sum is zero,
each term comes with its negative in another place. What a kernel makes of it is nothing but the rounding on its way,
which is another one for another order.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

Shape = tuple[int, int]  # numbers that go into a row and come out


def shapes_of(model: torch.nn.Module) -> set[Shape]:
    """Of all products of a model with its weights."""
    return {(each.in_features, each.out_features) for each in model.modules() if isinstance(each, torch.nn.Linear)}


def agree(shapes: Iterable[Shape], size: int, anchor: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `size` rows give the bits that those of `anchor` rows give, for every shape."""
    return all(_agrees(shape, size, anchor, dtype, device) for shape in shapes)


def vanishing_product(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [rows, in] and weights [out, in] whose product is zero but for rounding."""
    inner, outer = shape
    draw = torch.Generator().manual_seed(inner + outer)
    places = torch.randperm(inner, generator=draw)
    half = torch.randn(rows, inner // 2, generator=draw)
    weights = torch.randn(outer, inner // 2, generator=draw)
    x = torch.cat([half, half, torch.zeros(rows, inner % 2)], 1)[:, places]
    w = torch.cat([weights, -weights, torch.zeros(outer, inner % 2)], 1)[:, places]
    return x.to(device, dtype).contiguous(), w.to(device, dtype).contiguous()


def _agrees(shape: Shape, size: int, anchor: int, dtype: torch.dtype, device: torch.device) -> bool:
    x, w = vanishing_product(shape, max(size, anchor), dtype, device)
    return torch.equal(_in_steps(x, w, size), _in_steps(x, w, anchor))


def _in_steps(x: Tensor, w: Tensor, rows: int) -> Tensor:
    return torch.cat([linear(part[None], w)[0] for part in torch.split(x, rows)])
