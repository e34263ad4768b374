"""A shared tier in memory whose reads each wait until a test lets them go on, and an estimate that learns nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvstore.blocks import BlockHash
from kvstore.estimate import TransferEstimate
from kvstore.tier import Clock, Delivery
from tests.kvstore.fake_tier import FakeSharedTier

PATIENCE_S = 30.0


class GatedTier(FakeSharedTier):
    """Attributes: begun, ended: reads so far. is_open: reads wait for nothing."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._changed = threading.Condition()
        self._permits = 0
        self.begun = self.ended = 0
        self.is_open = False

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        with self._changed:
            self.begun += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._permits > 0 or self.is_open, PATIENCE_S)
            self._permits -= not self.is_open
        try:
            return super().read(hashes, into, deadline_s=deadline_s)
        finally:
            with self._changed:
                self.ended += 1
                self._changed.notify_all()

    def let_go(self, count: int = 1) -> None:
        """So many more reads end."""
        with self._changed:
            self._permits += count
            self._changed.notify_all()

    def open(self) -> None:
        """No read waits any more."""
        with self._changed:
            self.is_open, self._permits = True, 0
            self._changed.notify_all()

    def close(self) -> None:
        self.open()
        super().close()


class FixedPace(TransferEstimate):
    """Reads take so long a block, whatever was measured by a clock that stands still."""

    def __init__(self, block_nbytes: int, block_ms: float) -> None:
        super().__init__()
        super().observe(100 * block_nbytes, 100 * block_ms)

    def observe(self, nbytes: int, ms: float) -> None:
        """Nothing is learnt."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for what threads do."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.0005)
