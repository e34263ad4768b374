"""A few places a node for workers that are starting, so that the first of many is ready early.

Starting means importing torch and reading weights: seconds of a core each. When more workers start at once than the
node has cores, all of them are ready late and none early; a fleet can serve from its first worker on. The places are
locked files, so they are free again when a process dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_RETRY_S = 0.05
_PATIENCE_S = 60.0


@contextmanager
def start_slot(
    *, slots: int | None = None, folder: Path | None = None, patience_s: float = _PATIENCE_S
) -> Iterator[None]:
    """Wait for a place and hold it. After `patience_s`, or where none can be had, go on without: it only saves time.

    Args:
        slots: how many there are; None: one a core of this process's.
        folder: where the lock files lie; None: this user's in the temporary folder.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"warmkv-starting-{os.getuid()}"
    place: int | None = None
    try:
        place = _wait_for_place(_own_folder(folder), slots or len(os.sched_getaffinity(0)), patience_s)
    except OSError as error:
        log.warning("worker starts without waiting for others", extra={"folder": str(folder), "why": str(error)})
    try:
        yield
    finally:
        if place is not None:
            os.close(place)


def _wait_for_place(folder: Path, count: int, patience_s: float) -> int:
    """The locked file.

    Raises:
        OSError: the time was up, or a file cannot be opened.
    """
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up:
        for number in range(count):
            place = os.open(folder / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(place)
                continue
            return place
        time.sleep(_RETRY_S)
    raise TimeoutError(f"no place was free for {patience_s:g} s")


def _own_folder(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        OSError: it is no folder of this user's; its name can be guessed, so somebody else may have made it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder of this user's")
    return folder
