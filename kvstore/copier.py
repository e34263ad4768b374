"""Copies of blocks between the device's pool and page-locked host memory that run beside the device's steps.

On a GPU each direction has a stream of its own: a step computes while blocks leave and others come. The order is kept
by whoever uses this, with the end of each copy:

- a block is copied out only when the step that wrote it has ended, and is kept from being freed until the copy ended;
- a block is copied into only while nobody else references it, which no running step does, and nobody is told of it
  before the copy ended.

Without a copier (on a CPU, where the pool is the process's own memory) copies are made at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvstore.buffers import PAGE_NBYTES

_cuda: Any = torch.cuda  # parts of it have no types

Bytes = npt.NDArray[np.uint8]


class Copy(Protocol):
    """Copies that were begun together."""

    def is_done(self) -> bool:
        """Whether all bytes are there. Does not wait."""
        ...

    def wait(self) -> None:
        """Wait until they are."""
        ...

    def took_ms(self) -> float | None:
        """Once they are: how long the copies themselves took; None: nobody measured it."""
        ...


class Copier(Protocol):
    """Begins copies. For the engine's thread; neither method waits for any bytes."""

    def copy_out(self, block_ids: Sequence[int], into: Sequence[Bytes]) -> Copy:
        """Begin to copy blocks to host memory, one row of `block_nbytes` each, which must stay until the end."""
        ...

    def copy_in(self, rows: Sequence[Bytes], block_ids: Sequence[int]) -> Copy:
        """Begin to copy rows to blocks; the rows must not change until the end."""
        ...

    def buffers(self, count: int) -> list[Bytes]:
        """Page-locked rows for blocks that have no place in host."""
        ...

    def buffer(self) -> memoryview:
        """Page-locked memory for a block of a slow tier, from the begin of a page on. Any thread may ask."""
        ...

    def follow_compute(self) -> None:
        """Copies that are begun from now on come behind what the compute stream has been given so far.

        For bytes that are written into blocks through that stream: a block may change hands before they are there.
        """
        ...

    def close(self) -> None:
        """Let go of the pool."""
        ...


class CudaCopy:
    """Copies on a stream, from where it is made to where `end` is called."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._begun, self._ended = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
        self._begun.record(stream)

    def end(self) -> CudaCopy:
        """All its copies were queued; itself."""
        self._ended.record(self._stream)
        return self

    def is_done(self) -> bool:
        """As `Copy.is_done`."""
        return bool(self._ended.query())

    def wait(self) -> None:
        """As `Copy.wait`."""
        self._ended.synchronize()

    def took_ms(self) -> float | None:
        """As `Copy.took_ms`."""
        return float(self._begun.elapsed_time(self._ended))


class CudaCopier:
    """Copies block by block, straight from and to the slots of the host tier, on two streams of their own.

    A block is one run of bytes of a few hundred KiB or more on both sides, so nothing is gained by gathering several
    of them in a buffer first (measured on an H100 with blocks of 2 MiB: 47 GiB/s either way).
    """

    def __init__(self, raw: torch.Tensor) -> None:
        """Over the pool's bytes, [blocks, block_nbytes] uint8."""
        self._raw, self._nbytes, self._device = raw, raw.shape[1], raw.device
        with torch.cuda.device(raw.device):
            self._out, self._in = _cuda.Stream(), _cuda.Stream()
            # What was queued for the pool before, its first filling, comes before all copies.
            self._out.wait_stream(torch.cuda.current_stream())
            self._in.wait_stream(torch.cuda.current_stream())

    def copy_out(self, block_ids: Sequence[int], into: Sequence[Bytes]) -> Copy:
        """As `Copier.copy_out`."""
        with torch.cuda.stream(self._out):
            copy = CudaCopy(self._out)
            for block_id, row in zip(block_ids, into, strict=True):
                torch.from_numpy(row).copy_(self._raw[block_id], non_blocking=True)
            return copy.end()

    def copy_in(self, rows: Sequence[Bytes], block_ids: Sequence[int]) -> Copy:
        """As `Copier.copy_in`."""
        with torch.cuda.stream(self._in):
            copy = CudaCopy(self._in)
            for row, block_id in zip(rows, block_ids, strict=True):
                self._raw[block_id].copy_(torch.from_numpy(row), non_blocking=True)
            return copy.end()

    def buffers(self, count: int) -> list[Bytes]:
        """As `Copier.buffers`."""
        memory = torch.empty((count, self._raw.shape[1]), dtype=torch.uint8, pin_memory=True).numpy()
        return list(memory)

    def buffer(self) -> memoryview:
        """As `Copier.buffer`."""
        with torch.cuda.device(self._device):  # a thread's own is the first one, which another process may have
            memory = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=True).numpy()
            if memory.ctypes.data % PAGE_NBYTES:  # no allocator of page-locked memory gives such
                memory = torch.empty(self._nbytes + PAGE_NBYTES, dtype=torch.uint8, pin_memory=True).numpy()
        start = -memory.ctypes.data % PAGE_NBYTES
        return memory[start : start + self._nbytes].data

    def follow_compute(self) -> None:
        """As `Copier.follow_compute`."""
        event = _cuda.Event()
        event.record(torch.cuda.current_stream(self._raw.device))
        self._out.wait_event(event)
        self._in.wait_event(event)

    def close(self) -> None:
        """As `Copier.close`."""
        self._raw = torch.empty(0)
