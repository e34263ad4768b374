"""How much of a file system the disk tier may take: never the last of it, which others and its own log need.

Covers: how many slots fit, whether a file may grow. Does not cover: the bound that the operator set (`folder`).

A file system that is asked for more room than it has may keep what it could give (ext4 does). So it is asked only for
what it has, less a floor: a twentieth of the file system, at most FLOOR_BYTES, and what the log may grow to.
"""

from __future__ import annotations

from pathlib import Path

from kvstore.disk.files import PAGE_NBYTES, Files
from kvstore.disk.log import RECORD_NBYTES, SPARE_LOG_BYTES

FLOOR_BYTES = 1 << 30
FLOOR_SHARE = 0.05  # of the file system


def slots_that_fit(slab: Path, slots: int, slot_nbytes: int, files: Files) -> int:
    """How many of `slots` the file system has room for, those that the file has taken already included; at least one.

    Raises:
        OSError: the file system does not tell.
    """
    taken = files.taken(slab)
    wanted = PAGE_NBYTES + slots * slot_nbytes
    if wanted <= taken + may_take(slab.parent, slots, files):
        return slots
    fitting = taken + max(0, may_take(slab.parent, slots, files)) - PAGE_NBYTES
    return min(slots, max(1, fitting // slot_nbytes))


def may_take(folder: Path, slots: int, files: Files) -> int:
    """Bytes that a tier of so many slots may still take; negative: the floor is not free.

    Raises:
        OSError: the file system does not tell.
    """
    free, total = files.room(folder)
    floor = min(FLOOR_BYTES, int(total * FLOOR_SHARE))
    # An old log at its longest, a new one beside it, and the survivors.
    logs = 3 * RECORD_NBYTES * slots + SPARE_LOG_BYTES + slots // 8 + 2 * PAGE_NBYTES
    return free - floor - logs
