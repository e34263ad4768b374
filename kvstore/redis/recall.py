"""Learning at the start what a shared tier holds already: of the blocks that workers wrote which are no more.

Covers: the thread that asks, how long the start waits for it. Does not cover: asking (`RedisTier.recall`). After all
workers were restarted nobody else could tell a router what the server still holds: it would send every prompt as if it
were new, until a request happened to find its blocks there.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

log = logging.getLogger(__name__)


class Recalls(Protocol):
    """A tier that outlives its workers."""

    def recall(self) -> int:
        """Learn what lies there; how many blocks."""
        ...


class Recalling:
    """One question for all that lies there, in a thread of its own."""

    def __init__(self, tier: Recalls) -> None:
        """Begin."""
        self._tier = tier
        self._thread = threading.Thread(target=self._run, name="redis-recall", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Until the answer is known, but not longer; whether it is."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            blocks = self._tier.recall()
        except Exception:  # a start without this knowledge costs time; one that fails costs the worker
            log.exception("what lies in the shared tier could not be learnt by a defect; report this")
            return
        log.info("shared tier recalled", extra={"blocks": blocks, "seconds": round(time.monotonic() - started, 3)})
