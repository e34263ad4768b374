"""A disk tier of small blocks in a folder, that tests can close, crash and open again, on a system that can fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.codec import BlockCodec
from kvstore.disk.files import PAGE_NBYTES, Files
from kvstore.disk.folder import slab_path
from kvstore.disk.slab import slot_nbytes
from kvstore.disk.tier import DiskTier
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock

CODEC = BlockCodec(LAYOUT, b"n" * 32)
SLOT = slot_nbytes(LAYOUT.block_nbytes)


def capacity(blocks: int) -> int:
    """Bytes of a folder for so many blocks."""
    return PAGE_NBYTES + blocks * SLOT


def slab_file(folder: Path) -> Path:
    return slab_path(folder, CODEC.namespace, CODEC.value_nbytes)


def log_file(folder: Path) -> Path:
    return slab_file(folder).with_suffix(".log")


def payload_at(slot: int) -> int:
    """Where in the slab a slot's payload begins."""
    return PAGE_NBYTES + slot * SLOT + PAGE_NBYTES


def flip(path: Path, offset: int) -> None:
    """One bit of a file changes."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


@dataclass
class FaultyFiles(Files):
    """The system, which fails where a test says so.

    Attributes:
        writes, reads: an errno that every one fails with from now on; 0: none.
        suffix: of the files whose writes fail, or several. short: writes and reads do at most so many bytes at once.
        before_write: called before each write. disk: bytes of a disk on which only our files lie; None: the real one.
    """

    writes: int = 0
    reads: int = 0
    suffix: str | tuple[str, ...] = ""
    short: int = 0
    before_write: Callable[[], None] | None = None
    calls: int = 0
    disk: int | None = None
    _paths: dict[int, Path] = field(default_factory=dict)

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self._paths[fd] = path
        return fd

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.calls += 1
        if self.before_write is not None:
            self.before_write()
        if self.writes and str(self._paths[fd]).endswith(self.suffix):
            raise OSError(self.writes, os.strerror(self.writes))
        return super().pwritev(fd, self._shortened(buffers), offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.reads:
            raise OSError(self.reads, os.strerror(self.reads))
        return super().preadv(fd, self._shortened(buffers), offset)

    def room(self, folder: Path) -> tuple[int, int]:
        if self.disk is None:
            return super().room(folder)
        return self.disk - sum(self.taken(path) for path in folder.iterdir()), self.disk

    def reserve(self, fd: int, nbytes: int) -> bool:
        """As ext4: what there is is taken, even if it is not enough."""
        if self.disk is None:
            return super().reserve(fd, nbytes)
        path = self._paths[fd]
        fitting = min(nbytes, self.taken(path) + self.room(path.parent)[0])
        super().reserve(fd, fitting)
        if fitting < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True

    def _shortened(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        if not self.short:
            return buffers
        return [next(buffer for buffer in buffers if buffer.nbytes)[: self.short]]


class NoDirectFiles(Files):
    """A file system without direct I/O, and without reserved room."""

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return super().open(path, flags)

    def reserve(self, fd: int, nbytes: int) -> bool:
        return False


@dataclass
class Place:
    """A folder, clocks, and the tier that is open there."""

    folder: Path
    blocks: int = 8
    clock: ManualClock = field(default_factory=ManualClock)
    wall: ManualClock = field(default_factory=lambda: ManualClock(1_800_000_000.0))
    files: Files = field(default_factory=Files)
    options: dict[str, Any] = field(default_factory=dict)
    tier: DiskTier = field(init=False)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> DiskTier:
        self.tier = DiskTier(
            self.folder,
            capacity(self.blocks),
            codec=CODEC,
            clock=self.clock,
            wall_clock=self.wall,
            files=self.files,
            **self.options,
        )
        return self.tier

    def restart(self, *, down_s: float = 0.0) -> DiskTier:
        """Close it, and open it again in a process whose clock starts elsewhere."""
        self.tier.close()
        return self._come_back(down_s)

    def crash(self, *, down_s: float = 0.0) -> DiskTier:
        """The process ends without a word: its descriptors are closed, nothing more is written."""
        self.abandon()
        return self._come_back(down_s)

    def abandon(self) -> None:
        tier = self.tier
        tier._transfer.close()
        tier._space.index.end_loading()
        if tier._space._loader is not None:
            tier._space._loader.join()
        tier._space.index.close()
        tier._space.slab.close()
        os.close(tier._space.folder._fd)

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.wall.now += seconds

    def _come_back(self, down_s: float) -> DiskTier:
        self.wall.now += down_s
        self.clock.now = 77.0
        return self.open()
