"""An NVIDIA GPU as a device: one compute stream, graphs in one memory pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.device.interface import Event, Graph, Work

_cuda: Any = torch.cuda  # parts of it have no types
WARM_UPS = 2  # the first run compiles kernels and asks for workspaces, which a capture must not


class CudaEvent:
    """An event of the compute stream."""

    def __init__(self) -> None:
        self._event = _cuda.Event(blocking=False)
        self._event.record()

    def is_done(self) -> bool:
        """As `Event.is_done`."""
        return bool(self._event.query())

    def wait(self) -> None:
        """As `Event.wait`."""
        self._event.synchronize()


class CudaDevice:
    """A GPU. Graphs share one memory pool, so capture the largest first."""

    def __init__(self, torch_device: torch.device) -> None:
        """Of the GPU that the model lies on."""
        self.torch_device = torch_device
        self._stream = torch.cuda.current_stream(torch_device)
        self._aside: Any = None  # of warm-ups; PyTorch keeps a workspace for every stream that multiplied matrices
        self._pool: Any = None

    def queue(self, work: Work) -> Event:
        """As `Device.queue`."""
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._stream):
            work()
            return CudaEvent()

    def capture(self, work: Work) -> Graph:
        """As `Device.capture`."""
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its own stream as the current one: the outer block puts the right one back.
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._stream):
            self._warm_up(work)
            # Other threads page-lock host memory meanwhile, which a capture in the default mode would not survive.
            with _cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
            self._pool = graph.pool()
        return graph

    def _warm_up(self, work: Work) -> None:
        if self._aside is None:
            self._aside = _cuda.Stream()
        self._aside.wait_stream(self._stream)
        with torch.cuda.stream(self._aside):
            for _ in range(WARM_UPS):
                work()
        self._stream.wait_stream(self._aside)
        self.synchronise()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `Device.pinned`."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def synchronise(self) -> None:
        """As `Device.synchronise`."""
        torch.cuda.synchronize(self.torch_device)

    def used_bytes(self) -> int:
        """As `Device.used_bytes`, other users of the GPU included."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return total - free
