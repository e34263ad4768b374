"""A few places a node for workers that are starting, so that the first of many is ready early.

Starting means importing torch and reading weights: seconds of a core each. When more workers start at once than the
node has cores, all of them are ready late and none early; a fleet can serve from its first worker on. The places are
locked files, so they are free again when a process dies.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RETRY_S = 0.05


@contextmanager
def start_slot(*, slots: int | None = None, folder: Path | None = None) -> Iterator[int]:
    """Wait for a place and hold it; its number.

    Args:
        slots: how many there are; None: one a core of this process's.
        folder: where the lock files lie; None: this user's in the temporary folder.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"warmkv-starting-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    count = slots or len(os.sched_getaffinity(0))
    while True:
        for number in range(count):
            with (folder / f"{number}.lock").open("w") as place:
                try:
                    fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield number
                return
        time.sleep(_RETRY_S)
