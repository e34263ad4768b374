"""A copier whose copies are made when a test says so, or when somebody waits: too early or too late, and it shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from kvstore.buffers import aligned
from kvstore.copier import Bytes
from kvstore.device import DeviceTier


class LateCopy:
    def __init__(self, copier: LateCopier, pairs: list[tuple[Bytes, Bytes]]) -> None:
        self._copier, self.pairs, self.done = copier, pairs, False

    def is_done(self) -> bool:
        return self.done

    def wait(self) -> None:
        while not self.done:
            self._copier.make_one()

    def took_ms(self) -> float | None:
        return None


class LateCopier:
    """Needs its device after it was made: `copier.device = DeviceTier(..., copier=copier)`."""

    def __init__(self) -> None:
        self.device: DeviceTier | None = None
        self.running: deque[LateCopy] = deque()
        self.rows_apart = 0
        self.locked = 0

    def copy_out(self, block_ids: Sequence[int], into: Sequence[Bytes]) -> LateCopy:
        return self._begin([(row, self._block(block)) for block, row in zip(block_ids, into, strict=True)])

    def copy_in(self, rows: Sequence[Bytes], block_ids: Sequence[int]) -> LateCopy:
        return self._begin([(self._block(block), row) for block, row in zip(block_ids, rows, strict=True)])

    def buffers(self, count: int) -> list[Bytes]:
        self.rows_apart += count
        return [np.full(self.device.block_nbytes, 0xEE, np.uint8) for _ in range(count)]

    def buffer(self) -> memoryview:
        self.locked += 1
        return aligned(self.device.block_nbytes)

    def follow_compute(self) -> None:
        """The tests' pool is written at once."""

    def close(self) -> None:
        assert not self.running

    def make_one(self) -> None:
        copy = self.running.popleft()
        for into, source in copy.pairs:
            np.copyto(into, source)
        copy.done = True

    def make_all(self) -> None:
        while self.running:
            self.make_one()

    def _begin(self, pairs: list[tuple[Bytes, Bytes]]) -> LateCopy:
        copy = LateCopy(self, pairs)
        self.running.append(copy)
        return copy

    def _block(self, block_id: int) -> Bytes:
        return self.device._host_view[block_id]
