"""The disk tier's folder: what may lie in it, and how much room a slab of it may take.

Covers: making and locking it, naming files, making room for one namespace among others. Does not cover: what lies in
the files.

A folder holds one slab and one log for each namespace and block size that ever used it, and is bounded as a whole. What
belongs to another model is kept, so that going back to that model finds it warm; but it keeps at most half of the
folder, the last used first, and what nobody opened for a week goes.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvstore.disk.files import Files
from kvstore.disk.lock import FolderLock
from kvstore.errors import TierError
from kvstore.tier import Clock

log = logging.getLogger(__name__)

SLAB_SUFFIX, LOG_SUFFIX, NEW_LOG_SUFFIX, SURVIVORS_SUFFIX = ".slab", ".log", ".new", ".held"
_OURS = re.compile(r"([0-9a-f]{16}|blocks)-[0-9]+")  # as `slab_path` names them
KEEP_OTHERS_S = 7 * 24 * 3600.0
OTHERS_SHARE = 0.5  # of the folder


@dataclass(frozen=True, slots=True)
class Other:
    """Another namespace's slab: its file, its bytes, when it was last opened or written."""

    slab: Path
    nbytes: int
    used: float


def lock_folder(path: Path) -> FolderLock:
    """Make the folder if need be, and own it.

    Raises:
        TierError: it cannot be made or used, or somebody else owns it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise TierError(f"{path} is not a folder; name a folder for the disk tier") from error
    except OSError as error:
        raise TierError(
            f"cannot make the disk tier's folder {path}: {error.strerror}; name a folder that we may write to"
        ) from error
    return FolderLock(path)


def slab_path(folder: Path, namespace: bytes, value_nbytes: int) -> Path:
    """The slab of a namespace and value size. Its log has the same name with LOG_SUFFIX."""
    return folder / f"{namespace[:8].hex() or 'blocks'}-{value_nbytes}{SLAB_SUFFIX}"


def room_beside_others(slab: Path, capacity_bytes: int, *, files: Files, wall_clock: Clock = time.time) -> int:
    """Bytes that `slab` may take of a folder of `capacity_bytes`, after others have gone that must.

    Raises:
        OSError: the folder cannot be read, or what must go cannot be deleted.
    """
    now, left = wall_clock(), int(capacity_bytes * OTHERS_SHARE)
    for other in sorted(_others(slab), key=lambda other: other.used, reverse=True):
        if other.nbytes <= left and now - other.used < KEEP_OTHERS_S:
            left -= other.nbytes
            continue
        log.info("another model's blocks make room in the disk tier", extra={"file": other.slab.name})
        with suppress(FileNotFoundError):
            files.remove(other.slab)
    _remove_orphans(slab, files)
    return capacity_bytes - sum(other.nbytes for other in _others(slab))


def _remove_orphans(slab: Path, files: Files) -> None:
    """Delete what belongs to slabs that are no more, and new logs that a crash left unfinished.

    Raises:
        OSError: one cannot be deleted.
    """
    for path in slab.parent.iterdir():
        belongs = path.suffix in (LOG_SUFFIX, SURVIVORS_SUFFIX) and not path.with_suffix(SLAB_SUFFIX).exists()
        if (belongs or path.suffix == NEW_LOG_SUFFIX) and _OURS.fullmatch(path.stem):
            with suppress(FileNotFoundError):
                files.remove(path)


def _others(slab: Path) -> list[Other]:
    found = []
    for path in slab.parent.glob(f"*{SLAB_SUFFIX}"):
        if path != slab:
            stat = path.stat()
            found.append(Other(path, stat.st_size, stat.st_mtime))
    return found
