"""A file of fixed slots, each of which holds one block: written and read past the page cache where that is possible.

Covers: where a slot lies, direct and buffered I/O. Does not cover: the format of its pages (`slab_format`), which slot
holds what (`books`), what is written where after a crash (`recovery`).

A slot's first page has a checksum of its own, so that the whole index can be rebuilt from the slots' first pages alone;
payloads are verified when they are read. Only slots that were filled under the file's stamp count, and survivors of
older ones (`survivors`): a new stamp empties the file in one write, or all but the survivors. A new epoch is a new
stamp to which no log belongs yet. Sequence numbers rise, so that of two slots that name one block the later one wins.

The file is as long as all its slots from the start, reserved and not written: opening takes milliseconds whatever its
size. Where no room can be reserved it grows as it is written, as long as that leaves some to others (`room`). Data is
on the device after `sync`; a direct write has left the process before that, so `kill -9` loses none.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from kvstore.buffers import Buffers
from kvstore.codec import HEADER_NBYTES
from kvstore.disk.files import NO_ROOM, PAGE_NBYTES, Files, open_direct, pages, read_all, write_all
from kvstore.disk.folder import SURVIVORS_SUFFIX
from kvstore.disk.room import may_take
from kvstore.disk.slab_format import (
    SAID_NBYTES,
    SlotPage,
    aligned_zeros,
    epoch_and_stamp,
    first_page,
    signed,
    slot_page,
)
from kvstore.disk.survivors import Survivors

log = logging.getLogger(__name__)

KEPT_BUFFERS = 8


class Slab:
    """The file. Thread-safe as long as no two threads use one slot, of which one writes.

    Attributes:
        num_slots: how many. slot_nbytes: bytes of each. direct: whether the page cache is passed by.
        epoch: of the file, for its log. stamp: of what is filled from now on. is_new: nothing was found to go on with.
    """

    def __init__(self, path: Path, num_slots: int, payload_nbytes: int, *, files: Files, direct: bool = True) -> None:
        """Open the file, or make it.

        Args:
            path: of the file.
            num_slots: what it holds from now on; slots past that are cut off.
            payload_nbytes: bytes of a payload.
            files: the operating system. direct: try direct I/O.

        Raises:
            OSError: it cannot be opened, or its first page cannot be read or written.
        """
        self.num_slots = num_slots
        self.payload_nbytes = payload_nbytes
        self.slot_nbytes = slot_nbytes(payload_nbytes)
        self.epoch = self.stamp = 0
        self.is_new = True
        self._files = files
        self._path = path
        self._nbytes = 0  # of the file; slots behind it have no room yet
        self._refused: OSError | None = None  # why no room could be reserved
        self._heads = Buffers(PAGE_NBYTES, keep=KEPT_BUFFERS)
        self._bounces = Buffers(pages(payload_nbytes), keep=KEPT_BUFFERS)
        self._fd, self.direct = open_direct(files, path, direct=direct)
        with ExitStack() as opened:
            opened.callback(files.close, self._fd)
            self._survivors = Survivors(path.with_suffix(SURVIVORS_SUFFIX), num_slots, files=files)
            opened.callback(self._survivors.close)
            self._prepare()
            opened.pop_all()

    @property
    def is_deleted(self) -> bool:
        """Whether the file has no name any more, so that all goes when we do."""
        try:
            return os.fstat(self._fd).st_nlink == 0
        except OSError:
            return False

    @property
    def problem(self) -> str:
        """What is wrong with the file's room and what to do; empty when nothing is."""
        left = self._offset(self.num_slots) - self._nbytes
        if self._refused is None or left <= 0:
            return ""
        return (
            f"the disk did not reserve room for the disk tier's {self._offset(self.num_slots)} bytes "
            f"({self._refused.strerror}): it may fill up and then keeps nothing new; free room or "
            "give the tier fewer bytes"
        )

    def write(self, slot: int, header: bytes, payload: memoryview, *, stamp: int, sequence: int) -> None:
        """Fill a slot. The payload is not copied if it lies on a page's border and is whole pages long.

        Raises:
            OSError: the system refused; the slot holds garbage. There is no room left but what others need.
        """
        self._see_room(slot)
        heads = self._heads.take(1)
        bounces: list[memoryview] = []
        try:
            heads[0][:] = signed(header, stamp, sequence).ljust(PAGE_NBYTES, b"\0")  # nothing of what lay there before
            if self.direct and not _fits(payload):
                bounces = self._bounces.take(1)
                payload = _padded(payload, bounces[0])
            write_all(self._files, self._fd, [heads[0], payload], self._offset(slot))
            self._nbytes = max(self._nbytes, self._offset(slot + 1))
        finally:
            self._heads.give(heads)
            self._bounces.give(bounces)

    def read(self, slot: int, into: memoryview) -> tuple[bytes, int]:
        """Fetch a slot: its header, and how many bytes of the payload there were. Nothing is verified.

        Raises:
            OSError: the system refused.
        """
        heads = self._heads.take(1)
        bounces = self._bounces.take(1) if self.direct and not _fits(into) else []
        try:
            target = bounces[0] if bounces else into
            found = read_all(self._files, self._fd, [heads[0], target], self._offset(slot), step=self._step)
            count = max(0, min(found - PAGE_NBYTES, into.nbytes))
            if bounces:
                np.copyto(np.frombuffer(into, np.uint8)[:count], np.frombuffer(bounces[0], np.uint8)[:count])
            return bytes(heads[0][: min(found, HEADER_NBYTES)]), count
        finally:
            self._heads.give(heads)
            self._bounces.give(bounces)

    def page(self, slot: int) -> SlotPage | None:
        """What the slot says of itself; None: it is free or damaged.

        Raises:
            OSError: the system refused.
        """
        heads = self._heads.take(1)
        try:
            found = read_all(self._files, self._fd, heads, self._offset(slot), step=self._step)
            head = bytes(heads[0][:SAID_NBYTES])
        finally:
            self._heads.give(heads)
        return None if found < PAGE_NBYTES else slot_page(head)

    def counts(self, slot: int, page: SlotPage) -> bool:
        """Whether what the slot says was not cleared. For the time before anything is written."""
        return page.stamp == self.stamp or slot in self._survivors

    def wipe(self, slot: int) -> None:
        """Let the slot say of itself that it is free.

        Raises:
            OSError: the system refused.
        """
        write_all(self._files, self._fd, [aligned_zeros()], self._offset(slot))

    def begin_epoch(self, survivors: Sequence[int] = ()) -> None:
        """Let all slots but these say of themselves that they are free, and let no log count that lies there.

        Raises:
            OSError: the system refused.
        """
        epoch = secrets.randbits(63)
        if survivors:
            self._survivors.write(epoch, survivors, self.num_slots)
        self._sign(epoch, epoch)

    def begin_stamp(self, survivors: Sequence[int]) -> None:
        """Let all slots but these say of themselves that they are free; the log goes on.

        Raises:
            OSError: the system refused.
        """
        self._survivors.write(stamp := secrets.randbits(63), survivors, self.num_slots)
        self._sign(self.epoch, stamp)

    def sync(self) -> None:
        """Wait until all is on the device.

        Raises:
            OSError: it is not, and may never be.
        """
        self._survivors.sync()
        self._files.sync(self._fd)

    def close(self) -> None:
        """Give the file back. Nobody may be reading or writing."""
        with suppress(OSError):  # nothing was written through it that `sync` has not seen
            self._files.close(self._fd)
        self._survivors.close()

    @property
    def _step(self) -> int:
        return PAGE_NBYTES if self.direct else 1

    def _offset(self, slot: int) -> int:
        return PAGE_NBYTES + slot * self.slot_nbytes

    def _prepare(self) -> None:
        found = self._read_epoch()
        self.is_new = found is None
        self._reserve()
        with suppress(OSError):  # tells when it was used last, should another model need its room
            os.utime(self._fd)
        if found is None:
            self.begin_epoch()
        else:
            self.epoch, self.stamp = found
            self._survivors.read(self.stamp)

    def _sign(self, epoch: int, stamp: int) -> None:
        page = first_page(self.payload_nbytes, self.slot_nbytes, epoch, stamp)
        write_all(self._files, self._fd, [page], 0)
        self.epoch, self.stamp = epoch, stamp

    def _read_epoch(self) -> tuple[int, int] | None:
        """Epoch and stamp; None: it is no slab of ours."""
        page = aligned_zeros()
        found = read_all(self._files, self._fd, [page], 0, step=self._step)
        return None if found < PAGE_NBYTES else epoch_and_stamp(page, self.payload_nbytes, self.slot_nbytes)

    def _reserve(self) -> None:
        """Reserve the file's room where the file system can; else it grows as it is written."""
        nbytes, found = self._offset(self.num_slots), os.fstat(self._fd).st_size
        if found > nbytes:
            self._files.truncate(self._fd, nbytes)
            found = nbytes
        self._nbytes = found
        try:
            if self._files.reserve(self._fd, nbytes):
                self._nbytes = nbytes
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self._refused = error
            log.warning("no room to reserve the disk tier's file", extra={"bytes": nbytes})
            with suppress(OSError):  # give back what it got: see `Files.reserve`
                self._files.truncate(self._fd, found)

    def _see_room(self, slot: int) -> None:
        """Before a slot is filled that makes the file longer.

        Raises:
            OSError: it would take what others need.
        """
        missing = self._offset(slot + 1) - self._nbytes
        if missing > 0 and may_take(self._path.parent, self.num_slots, self._files) < missing:
            raise OSError(errno.ENOSPC, "what is left of the disk is for others")


def slot_nbytes(payload_nbytes: int) -> int:
    """Bytes that a block takes on disk: its payload in whole pages, and one page more."""
    return PAGE_NBYTES + pages(payload_nbytes)


def _fits(buffer: memoryview) -> bool:
    """Whether direct I/O can use the buffer itself."""
    if buffer.nbytes % PAGE_NBYTES:
        return False
    address: int = np.frombuffer(buffer, np.uint8).ctypes.data
    return address % PAGE_NBYTES == 0


def _padded(payload: memoryview, bounce: memoryview) -> memoryview:
    """The payload and zeros, in `bounce`: nothing of the block that lay there before is written to disk."""
    row = np.frombuffer(bounce, np.uint8)
    np.copyto(row[: payload.nbytes], np.frombuffer(payload, np.uint8))
    row[payload.nbytes :] = 0
    return bounce
