"""The index of a slab as an append-only log: what was stored, removed, used and leased, in order.

Covers: records, frames, reading a log that a crash has cut short, putting a new log in the place of a long one. Does
not cover: what follows from the records (`recovery`), when to write (`disk`).

A frame is `length u32 | xxh32 of the length u32 | xxh3-64 of the rest u64 | msgpack array of records`, little-endian.
The first one is the head: the log's version and the slab's epoch. A log of another epoch belongs to other slots, and is
not read.

A crash leaves the last frame short: the torn tail, which is cut off. Anything else that is no frame is damage: records
may be missing in the middle, and the slots themselves must be asked.

Frames are handed to the system at once, so `kill -9` loses none; a power cut loses those since the last `sync`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

import msgpack
import xxhash

from kvstore.disk.files import Files, read_all, write_all
from kvstore.disk.folder import NEW_LOG_SUFFIX

LOG_VERSION = 2
RECORD_NBYTES = 150  # of one block's store, about
SPARE_LOG_BYTES = 4 << 20  # a log may be so much longer than twice what it would be if it were new

_MAGIC = "warmkv log"
_FRAME = struct.Struct("<IIQ")
_LENGTH = struct.Struct("<I")

Record = Sequence[Any]  # a Kind and its fields, as msgpack gives them back
Found = list[Any]  # what a slot holds: a STORED record with what later ones have changed, and its LEASED fields, if any

# Places in a Found.
INDEX, SEQUENCE, HASH, PARENT, ROOT, TTL_S, UNTIL, PRIORITY, TURN, USED, PROMISED, FOR_S = range(1, 13)


class Kind(IntEnum):
    """What a record says. Times are seconds since the epoch, on the writer's clock.

    STORED: slot, sequence, hash, parent, root, ttl_s, until, priority, turn, time of the last
    use.
    REMOVED: slots. USED: slots and times in turns, oldest use first. PROLONGED: slot, ttl_s, until.
    LEASED: slot, when it was promised, for how many seconds (None: until it is ended). RELEASED: slots.
    """

    STORED = 0
    REMOVED = 1
    USED = 2
    PROLONGED = 3
    LEASED = 4
    RELEASED = 5


class Condition(StrEnum):
    """How a log was found."""

    WHOLE = "whole"
    TORN = "torn"  # cut short by a crash; what was read is all that counts
    DAMAGED = "damaged"  # records are missing
    MISSING = "missing"  # no log, or of another slab or version


@dataclass(slots=True)
class Contents:
    """What a log says.

    Attributes:
        condition: how it was found. records: those that can be read, in order. nbytes: of the file that they take.
    """

    condition: Condition
    records: list[list[Any]] = field(default_factory=list)
    nbytes: int = 0


class IndexLog:
    """The file. Not thread-safe: its owner has a lock for it.

    Attributes:
        nbytes: its length. is_damaged: an append has failed and left garbage; only `replace` helps.
    """

    def __init__(self, path: Path, *, files: Files) -> None:
        """Open the file, or make it.

        Raises:
            OSError: it cannot be opened.
        """
        self.nbytes = 0
        self.is_damaged = False
        self._path = path
        self._files = files
        self._fd = files.open(path, os.O_CREAT)

    def read(self, epoch: int) -> Contents:
        """All records, if the log belongs to that epoch of its slab. Appends go on behind them.

        Raises:
            OSError: the file cannot be read.
        """
        contents = parse(self.data(), epoch)
        if contents.condition is Condition.TORN:
            self._files.truncate(self._fd, contents.nbytes)
        self.nbytes = contents.nbytes
        self.is_damaged = contents.condition in (Condition.DAMAGED, Condition.MISSING)
        return contents

    def data(self) -> memoryview:
        """The bytes of the file, for `parse`. Changes nothing.

        Raises:
            OSError: the file cannot be read.
        """
        data = memoryview(bytearray(os.fstat(self._fd).st_size))
        found = read_all(self._files, self._fd, [data], 0)
        return data[:found]

    def append(self, records: Sequence[Record]) -> None:
        """Add records; all of them or, after an error, none.

        Raises:
            OSError: the system refused.
        """
        frame = memoryview(_frame(records))
        try:
            write_all(self._files, self._fd, [frame], self.nbytes)
        except OSError:
            self._cut()
            raise
        self.nbytes += frame.nbytes

    def begin(self, epoch: int) -> None:
        """Start a new log beside this one.

        Raises:
            OSError: the system refused.
        """
        self._drop_new()
        self._new = IndexLog(self._new_path, files=self._files)
        self._files.truncate(self._new._fd, 0)
        self._new.append([(_MAGIC, LOG_VERSION, epoch)])

    def add(self, records: Sequence[Record]) -> None:
        """Add records to the new log.

        Raises:
            OSError: the system refused.
        """
        if self._new is not None:
            self._new.append(records)

    def sync_new(self) -> None:
        """Wait until what the new log says so far is on the device.

        Raises:
            OSError: it is not.
        """
        if self._new is not None:
            self._new.sync()

    def sync_folder(self) -> None:
        """Wait until the last `replace` outlives a power cut.

        Raises:
            OSError: it may not.
        """
        self._files.sync_folder(self._path.parent)

    def replace(self) -> None:
        """Put the new log in this one's place, at once. Does not wait for the device.

        Raises:
            OSError: the system refused; this log stays.
        """
        if self._new is None:
            return
        self._files.replace(self._new_path, self._path)
        self._files.close(self._fd)
        self._fd, self.nbytes, self.is_damaged = self._new._fd, self._new.nbytes, False
        self._new = None

    def abandon(self) -> None:
        """Forget the new log."""
        self._drop_new()

    def sync(self) -> None:
        """Wait until all is on the device.

        Raises:
            OSError: it is not, and may never be.
        """
        self._files.sync(self._fd)

    def close(self) -> None:
        """Give the file back."""
        self._drop_new()
        with suppress(OSError):  # nothing was written through it that `sync` has not seen
            self._files.close(self._fd)

    _new: IndexLog | None = None

    @property
    def _new_path(self) -> Path:
        return self._path.with_suffix(NEW_LOG_SUFFIX)

    def _drop_new(self) -> None:
        if self._new is not None:
            new, self._new = self._new, None
            new.close()
            with suppress(OSError):  # the next new log overwrites it
                self._files.remove(self._new_path)

    def _cut(self) -> None:
        """Take away what a failed append left."""
        try:
            self._files.truncate(self._fd, self.nbytes)
        except OSError:
            self.is_damaged = True


def parse(data: memoryview, epoch: int) -> Contents:
    """The records of a log's bytes."""
    records: list[list[Any]] = []
    end = 0
    while (frame := _frame_at(data, end)) is not None:
        records += frame[0]
        end = frame[1]
    if records[:1] != [[_MAGIC, LOG_VERSION, epoch]]:
        return Contents(Condition.MISSING)
    del records[0]
    if end == len(data):
        return Contents(Condition.WHOLE, records, end)
    condition = Condition.TORN if _is_tail(data, end) else Condition.DAMAGED
    return Contents(condition, records, end)


def _frame(records: Sequence[Record]) -> bytes:
    body: bytes = msgpack.packb(list(records))
    return _FRAME.pack(len(body), _length_checksum(len(body)), xxhash.xxh3_64_intdigest(body)) + body


def _frame_at(data: memoryview, start: int) -> tuple[list[list[Any]], int] | None:
    """The records of the frame at `start` and where it ends; None: there is no whole one."""
    begin = start + _FRAME.size
    if begin > len(data):
        return None
    length, length_checksum, checksum = _FRAME.unpack_from(data, start)
    body = data[begin : begin + length]
    if _length_checksum(length) != length_checksum or len(body) < length:
        return None
    if xxhash.xxh3_64_intdigest(body) != checksum:
        return None
    records = msgpack.unpackb(body)
    return (records, begin + length) if isinstance(records, list) else None


def _is_tail(data: memoryview, start: int) -> bool:
    """Whether what begins at `start` is the begin of a frame, or room that was never written."""
    rest = data[start:]
    if len(rest) < _FRAME.size or not any(rest):
        return True
    length, length_checksum, _ = _FRAME.unpack_from(rest)
    is_begin: bool = _length_checksum(length) == length_checksum and _FRAME.size + length > len(rest)
    return is_begin


def _length_checksum(length: int) -> int:
    return int(xxhash.xxh32_intdigest(_LENGTH.pack(length)))


def batches(records: Iterable[Record], size: int) -> Iterable[list[Record]]:
    """Records in lists of at most `size`."""
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
