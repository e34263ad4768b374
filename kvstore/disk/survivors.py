"""Which slots still count after blocks were cleared, should the log be lost: a bit a slot, in a small file of its own.

Covers: the file. Does not cover: who counts otherwise (`slab`), when it is written (`space`).

Whatever is cleared must not come back when the log is lost and the slots are asked, and to wipe the header of each slot
takes a third of a millisecond. So slots that are filled from then on get a new stamp, one page tells it, and of those
with an older stamp only the survivors count. A file that is lost, damaged or of another stamp names none: then blocks
are lost that could have been kept, and none comes back.

    0  12   xxh3-64 of the rest u64, its length u32, little-endian
    12      msgpack (stamp, bits: the lowest one of each byte is its first slot)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgpack
import numpy as np
import xxhash

from kvstore.disk.files import Files, read_all, write_all

_HEAD = struct.Struct("<QI")
_LONGEST_NBYTES = _HEAD.size + 16  # without the bits


class Survivors:
    """The file. Not thread-safe: one writes at a time, and it is asked while nobody writes."""

    def __init__(self, path: Path, num_slots: int, *, files: Files) -> None:
        """Open the file, or make it, as long as it will ever be: it must be written when the disk is full, too.

        Raises:
            OSError: it cannot be opened.
        """
        self._files = files
        self._fd = files.open(path, os.O_CREAT)
        self._bits = b""
        with suppress(OSError):  # who writes it is told
            found, nbytes = os.fstat(self._fd).st_size, _LONGEST_NBYTES + -(-num_slots // 8)
            if found < nbytes:
                write_all(files, self._fd, [memoryview(bytes(nbytes - found))], found)

    def read(self, stamp: int) -> None:
        """Take those that were written down for this stamp; none if there are none or they cannot be read."""
        self._bits = b""
        with suppress(OSError, ValueError, TypeError, msgpack.UnpackException):  # then none survive: see above
            body = self._body()
            if body is not None:
                found, bits = msgpack.unpackb(body)
                self._bits = bytes(bits) if found == stamp else b""

    def write(self, stamp: int, slots: Sequence[int], num_slots: int) -> None:
        """These slots count, though they do not have that stamp. O(slots).

        Raises:
            OSError: the system refused; none is written down then.
        """
        flags = np.zeros(num_slots, np.uint8)
        flags[np.asarray(slots, np.int64)] = 1
        bits = np.packbits(flags, bitorder="little").tobytes()
        body: bytes = msgpack.packb((stamp, bits))
        head = _HEAD.pack(xxhash.xxh3_64_intdigest(body), len(body))
        write_all(self._files, self._fd, [memoryview(head + body)], 0)
        self._bits = bits

    def __contains__(self, slot: int) -> bool:
        return slot // 8 < len(self._bits) and bool(self._bits[slot // 8] >> slot % 8 & 1)

    def sync(self) -> None:
        """Wait until it is on the device.

        Raises:
            OSError: it is not, and may never be.
        """
        self._files.sync(self._fd)

    def close(self) -> None:
        """Give the file back."""
        with suppress(OSError):  # nothing was written through it that `sync` has not seen
            self._files.close(self._fd)

    def _body(self) -> bytes | None:
        data = bytearray(os.fstat(self._fd).st_size)
        found = read_all(self._files, self._fd, [memoryview(data)], 0)
        if found < _HEAD.size:
            return None
        checksum, length = _HEAD.unpack_from(data)
        body = bytes(data[_HEAD.size : _HEAD.size + length])
        return body if len(body) == length and xxhash.xxh3_64_intdigest(body) == checksum else None
