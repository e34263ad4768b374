"""What lives long is no business of the collector of garbage: a process that keeps many objects exempts them.

Python's collector visits every object that may be part of a cycle, all of them in a full collection: 0.3 us a run of
blocks, so that 160,000 runs (10 M blocks, each prompt a run of its own) would stop the router for 50 ms. What lives is
exempted (`gc.freeze`) whenever some thousands came. They are freed as ever when nothing refers to them; only a
cycle that was alive at that moment and is abandoned later is not found any more. Those that were abandoned before are
collected first. Not pure: this is about the whole process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

Settle = Callable[[], None]
SETTLE_EVERY = 4096  # objects; a collection that looks at so many takes 2 ms


def settle_process() -> None:
    """Collect garbage, and exempt what lives from every later collection."""
    gc.collect()
    gc.freeze()


def settle_nothing() -> None:
    """Leave the collector alone: for whoever shares the process with others."""
