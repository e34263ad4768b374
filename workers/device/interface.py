"""What a step asks of the device that computes it: work in order behind the host, graphs, page-locked memory.

Two kinds implement it: `cuda`, and `cpu`, which does all work at once. Everything that decides (padding, which graph,
what lies in static buffers, when a buffer may be used again) stands above this line and runs on both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class Event(Protocol):
    """The end of some queued work."""

    def is_done(self) -> bool:
        """Whether it has been reached. Does not wait."""
        ...

    def wait(self) -> None:
        """Let the host wait for it.

        Raises:
            RuntimeError: the work, or some before it, failed.
        """
        ...


class Graph(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Queue it again, over the same memory. Only from within queued work."""
        ...


class Device(Protocol):
    """A device and its compute queue. For one thread.

    Attributes:
        torch_device: where tensors lie.
    """

    torch_device: torch.device

    def queue(self, work: Work) -> Event:
        """Do `work` behind all that was queued before; the event is the end of what it gave the device to do.

        Host memory that it reads must not change, and what it writes must not be read, before the event.

        Raises:
            RuntimeError: it failed at once.
        """
        ...

    def capture(self, work: Work) -> Graph:
        """Run `work` to warm it up, then capture it. All memory that it reads from outside must stay where it is.

        Raises:
            RuntimeError: it cannot be captured, or failed; the device can still be used, unless it says otherwise.
        """
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory, not initialised, that the device copies from and to while the host goes on."""
        ...

    def synchronise(self) -> None:
        """Wait until all queued work is done."""
        ...

    def used_bytes(self) -> int:
        """Memory of the device that this process has taken; zero where nobody counts."""
        ...
