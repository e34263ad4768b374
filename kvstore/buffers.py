"""Memory that blocks arrive in, used again and again: fresh memory costs a page fault every 4 KiB.

Page-aligned, as direct I/O wants it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

PAGE_NBYTES = 4096


class Buffers:
    """Writable buffers of one block each. Thread-safe; keeps at most so many that nobody uses."""

    def __init__(self, nbytes: int, *, keep: int, make: Callable[[], memoryview] | None = None) -> None:
        """Buffers of `nbytes`; nothing is reserved before it is needed. `make`: one of them; None: plain memory."""
        self._make = make or partial(aligned, nbytes)
        self._idle: deque[memoryview] = deque(maxlen=keep)  # a full one forgets, and the memory is freed

    def take(self, count: int) -> list[memoryview]:
        """That many buffers. What they hold means nothing."""
        return [self._one() for _ in range(count)]

    def give(self, buffers: Sequence[memoryview]) -> None:
        """They are not used any more, and no view of them is left."""
        self._idle.extend(buffers)

    def _one(self) -> memoryview:
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()


def aligned(nbytes: int) -> memoryview:
    """`nbytes` of writable memory that begin on a page."""
    raw = np.empty(nbytes + PAGE_NBYTES, np.uint8)
    start = -raw.ctypes.data % PAGE_NBYTES
    return raw[start : start + nbytes].data
