"""A device that computes late: queued work runs when somebody waits for it, or earlier, as chance will have it.

Everything that must not be touched while work is queued is full of garbage as soon as it may be: static buffers after
each step, page-locked memory when it is new, free blocks (the pool's own poison). So what is read too early, or
overwritten too soon, shows.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.device.cpu import CpuDevice
from workers.device.interface import Work

GARBAGE = 0x7F


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self.done = False
        self.error: RuntimeError | None = None

    def is_done(self) -> bool:
        return self.done

    def wait(self) -> None:
        self._device.run_until(self)
        if self.error is not None:
            raise self.error


class LateDevice(CpuDevice):
    def __init__(self, seed: int = 0, *, eagerness: float = 0.3) -> None:
        self._draw = random.Random(seed)
        self._eagerness = eagerness
        self._queue: deque[tuple[Work, LateEvent]] = deque()
        self.after_work: Callable[[], None] = lambda: None
        self.failures: list[RuntimeError | None] = []  # of the next works, in order
        self.most_queued = 0

    def queue(self, work: Work) -> LateEvent:
        event = LateEvent(self)
        self._queue.append((work, event))
        self.most_queued = max(self.most_queued, len(self._queue))
        while self._queue and self._draw.random() < self._eagerness:
            self._run_one()
        return event

    def run_until(self, event: LateEvent) -> None:
        while not event.done:
            self._run_one()

    def synchronise(self) -> None:
        while self._queue:
            self._run_one()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = torch.empty(tuple(shape), dtype=dtype)
        memory.view(-1).view(torch.uint8).fill_(GARBAGE)
        return memory

    def _run_one(self) -> None:
        work, event = self._queue.popleft()
        failure = self.failures.pop(0) if self.failures else None
        try:
            if failure is not None:
                raise failure
            work()
        except RuntimeError as error:
            event.error = error
        event.done = True
        self.after_work()
