"""The pages of a slab: what the file says of itself, and what each slot does. Pure: bytes in, bytes out.

    page 0       what the file is: a msgpack record and its checksum: the file's epoch, and the stamp
    then slots   one page of header, then the payload, padded to whole pages

    a slot's first page
    0    512  the block's header (`codec`)
    512   24  stamp, sequence number, xxh3-64 of bytes 0..527, each u64 little-endian

Does not cover: reading and writing them, what follows from a stamp (`slab`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import msgpack
import xxhash

from kvstore.buffers import aligned
from kvstore.codec import HEADER_NBYTES
from kvstore.disk.files import PAGE_NBYTES

SLAB_VERSION = 1
SAID_NBYTES = HEADER_NBYTES + 24  # of a slot's first page; the rest is zeros

_MAGIC = "warmkv slab"
_FOOTER = struct.Struct("<QQQ")
_SIGNED_NBYTES = HEADER_NBYTES + 16
_STAMP = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True)
class SlotPage:
    """A block's header, and under which stamp and number its slot was filled."""

    header: bytes
    stamp: int
    sequence: int


def signed(header: bytes, stamp: int, sequence: int) -> bytes:
    """What a slot's first page says, from its first byte on."""
    signed = header + _STAMP.pack(stamp, sequence)
    return signed + xxhash.xxh3_64_intdigest(signed).to_bytes(8, "little")


def slot_page(said: bytes) -> SlotPage | None:
    """Read the first `SAID_NBYTES` of a slot's first page; None: it is free or damaged."""
    stamp, sequence, checksum = _FOOTER.unpack(said[HEADER_NBYTES:])
    if checksum != xxhash.xxh3_64_intdigest(said[:_SIGNED_NBYTES]):
        return None
    return SlotPage(said[:HEADER_NBYTES], stamp, sequence)


def first_page(payload_nbytes: int, slot_nbytes: int, epoch: int, stamp: int) -> memoryview:
    """The file's first page, on a page's border."""
    page = aligned_zeros()
    record = msgpack.packb((_MAGIC, SLAB_VERSION, payload_nbytes, slot_nbytes, epoch, stamp))
    page[: len(record)] = record
    page[-8:] = xxhash.xxh3_64_intdigest(page[:-8]).to_bytes(8, "little")
    return page


def epoch_and_stamp(page: memoryview, payload_nbytes: int, slot_nbytes: int) -> tuple[int, int] | None:
    """Read the file's first page; None: it is damaged, or of a file with other slots."""
    checksum = xxhash.xxh3_64_intdigest(page[:-8]).to_bytes(8, "little")
    if bytes(page[-8:]) != checksum:
        return None
    unpacker = msgpack.Unpacker()
    unpacker.feed(page[:-8])
    match unpacker.unpack():
        case [str(magic), int(version), int(payload), int(slot), int(epoch), int(stamp)]:
            expected = (_MAGIC, SLAB_VERSION, payload_nbytes, slot_nbytes)
            return (epoch, stamp) if (magic, version, payload, slot) == expected else None
    return None


def aligned_zeros() -> memoryview:
    """A page of zeros, on a page's border."""
    page = aligned(PAGE_NBYTES)
    page[:] = bytes(PAGE_NBYTES)
    return page
