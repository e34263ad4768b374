"""The CPU as a device: work is done at once, and a graph does its work again over the same buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.device.interface import Event, Graph, Work


class Done:
    """The end of work that has been done."""

    def is_done(self) -> bool:
        """Yes."""
        return True

    def wait(self) -> None:
        """Nothing to wait for."""


class Again:
    """Captured work of the CPU."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def replay(self) -> None:
        """Do it again."""
        self._work()


class CpuDevice:
    """See the module."""

    torch_device = torch.device("cpu")

    def queue(self, work: Work) -> Event:
        """As `Device.queue`; it is done on return."""
        work()
        return Done()

    def capture(self, work: Work) -> Graph:
        """As `Device.capture`."""
        work()
        return Again(work)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `Device.pinned`; plain memory."""
        return torch.empty(tuple(shape), dtype=dtype)

    def synchronise(self) -> None:
        """Nothing is ever left to do."""

    def used_bytes(self) -> int:
        """Nobody counts."""
        return 0
