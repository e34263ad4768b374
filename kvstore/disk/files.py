"""What the disk tier asks of the operating system: one seam, so that tests can make any call fail.

Covers: files by descriptor, whole writes and reads in spite of short ones, reserving room. Does not cover: what the
bytes mean (`slab`, `log`).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from kvstore.buffers import aligned

PAGE_NBYTES = 4096
DIRECT = getattr(os, "O_DIRECT", 0)  # 0: this system has none
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_STAT_BLOCK_NBYTES = 512  # whatever the file system's own blocks are: stat(2)
_CANNOT_RESERVE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


class Files:
    """The calls. Stateless; every method raises OSError as the system does."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)

    def close(self, fd: int) -> None:
        """Give a descriptor back."""
        os.close(fd)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """One vectored write; how many bytes it took."""
        return os.pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """One vectored read; how many bytes it gave."""
        return os.preadv(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        """Wait until what was written is on the device."""
        os.fdatasync(fd)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Make the file that long."""
        os.ftruncate(fd, nbytes)

    def reserve(self, fd: int, nbytes: int) -> bool:
        """Reserve room up to `nbytes` without writing it; False: this file system cannot.

        A file system that has not got it may keep what it could give: ask `room` first.

        Not `posix_fallocate`: where the file system cannot, glibc writes to every page of the file instead.
        """
        function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
        if function is None:
            return False
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        while function(fd, 0, 0, nbytes) != 0:
            code = ctypes.get_errno()
            if code in _CANNOT_RESERVE:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True

    def room(self, folder: Path) -> tuple[int, int]:
        """Bytes of the file system that `folder` lies in: those that we may still take, and all of them."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def taken(self, path: Path) -> int:
        """Bytes of its file system that a file takes, which holes do not; zero: there is no such file."""
        try:
            return path.stat().st_blocks * _STAT_BLOCK_NBYTES
        except FileNotFoundError:
            return 0

    def replace(self, source: Path, target: Path) -> None:
        """Put a file in another one's place, at once."""
        os.replace(source, target)

    def sync_folder(self, folder: Path) -> None:
        """Wait until the names in a folder are on the device."""
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, path: Path) -> None:
        """Delete a file."""
        os.unlink(path)


def open_direct(files: Files, path: Path, *, direct: bool) -> tuple[int, bool]:
    """A descriptor, and whether it is for direct I/O: a trial read tells, as some file systems refuse only that.

    Raises:
        OSError: it cannot be opened.
    """
    if not (direct and DIRECT):
        return files.open(path, os.O_CREAT), False
    try:
        fd = files.open(path, os.O_CREAT | DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return files.open(path, os.O_CREAT), False
    try:
        files.preadv(fd, [aligned(PAGE_NBYTES)], 0)
    except OSError as error:
        files.close(fd)
        if error.errno != errno.EINVAL:
            raise
        return files.open(path, os.O_CREAT), False
    return fd, True


def write_all(files: Files, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write all of the buffers, one after the other, at `offset`.

    Raises:
        OSError: the system refused; some of the bytes may have been written.
    """
    left = _bytes_of(buffers)
    while left:
        count = files.pwritev(fd, left, offset)
        if count == 0:
            raise OSError(errno.EIO, "a write took no bytes")
        offset += count
        left = _after(left, count)


def read_all(files: Files, fd: int, buffers: Sequence[memoryview], offset: int, *, step: int = 1) -> int:
    """Fill the buffers from `offset`; how many bytes there were, fewer only at the end of the file.

    Args:
        files, fd, buffers, offset: what, where from and where to.
        step: what a read may end at before the end of the file: whole pages in direct reads.

    Raises:
        OSError: the system refused.
    """
    left, total = _bytes_of(buffers), 0
    while left:
        count = files.preadv(fd, left, offset + total)
        if count == 0:
            break
        total += count
        left = _after(left, count)
        if count % step:
            break
    return total


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def _bytes_of(buffers: Sequence[memoryview]) -> list[memoryview]:
    return [view for view in (memoryview(buffer).cast("B") for buffer in buffers) if view.nbytes]


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers after `count` bytes."""
    for number, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[number + 1 :]]
        count -= buffer.nbytes
    return []
