"""When a slab gets a new stamp, which empties all slots but those that still hold a block.

Covers: after clears, and as the way out where the log takes no more records. Does not cover: what a stamp is (`slab`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from kvstore.disk.books import DiskBooks
from kvstore.disk.health import DiskHealth
from kvstore.disk.index import DiskIndex
from kvstore.disk.slab import Slab

log = logging.getLogger(__name__)


class Stamps:
    """Signs a slab anew. Its own lock is taken before those of `index` and of the books."""

    def __init__(
        self, slab: Slab, index: DiskIndex, books: DiskBooks, lock: threading.Lock, health: DiskHealth
    ) -> None:
        """Of an open folder; `lock` guards the books."""
        self._slab, self._index, self._books, self._lock, self._health = slab, index, books, lock, health
        self._is_due = False  # something was cleared, and the slots do not say so yet
        self._stamping = threading.Lock()

    def due(self) -> None:
        """Something was cleared, so the slots must say so."""
        with self._lock:
            self._is_due = True

    def begin_when_due(self) -> None:
        """Let the slots of what was cleared say so. Raises OSError: the disk refuses; it stays due."""
        with self._stamping:
            if self._is_due:
                self._sign(self._slab.begin_stamp)

    def begin_epoch(self) -> bool:
        """Let neither the log count that lies there nor slots that hold nothing; whether the slab says so.

        That takes no room: so it is the way out where the log takes no more records.
        """
        try:
            with self._stamping:
                self._index.forsake(lambda: self._sign(self._sign_epoch))
        except OSError as error:
            self._health.failed_to_write(error)
            return False
        return True

    def _sign_epoch(self, held: Sequence[int]) -> None:
        try:
            self._slab.begin_epoch(held)
        except OSError as error:
            log.warning("blocks on disk are lost with the process: none could be named", extra={"reason": str(error)})
            self._slab.begin_epoch()

    def _sign(self, sign: Callable[[Sequence[int]], None]) -> None:
        """Sign the slab, with the slots that still count, holding `_stamping`."""
        with self._lock:  # in one: what is cleared from now on makes the next stamp due
            held = self._books.held_slots()
            self._is_due = False
        try:
            sign(held)
        except OSError:
            with self._lock:
                self._is_due = True
            raise
