"""Block <-> bytes for every tier that outlives the process or lies outside it.

Covers: the stored value's format, its identity and its checksum. Does not cover: what the payload's bytes mean
(`layout`), keys and TTLs of a server (`redis`).

A stored value is one run of bytes:

    0    4  magic `WKVB`
    4    2  length of the record, u16 little-endian
    6       the record, msgpack (see `Header`), then zeros
    504  8  xxh3-64 of bytes 0..503 and of the payload, little-endian
    512     payload: the block's raw K/V, exactly as it lies in the pool

The header's size is fixed, so that the payload starts on a 512-byte boundary and can be received straight into a slot.
The checksum covers header and payload in one: one block's bytes under another's name are as wrong as flipped bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgpack
import xxhash

from kvstore.blocks import BlockHash
from kvstore.errors import CodecError, LayoutError, MissReason
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta

HEADER_NBYTES = 512
FORMAT_VERSION = 1
RAW_CODEC = "raw"
CHECKSUM_ALGORITHM = "xxh3-64"

_MAGIC = b"WKVB"
_LENGTH_END = len(_MAGIC) + 2
_CHECKSUM_AT = HEADER_NBYTES - 8

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before a stored payload. The order of the fields is the order in the msgpack record.

    Attributes:
        version: FORMAT_VERSION.
        hash, parent, root: as in `BlockMeta`, 32 bytes each.
        layout: `KVLayout.describe()`. dtype: its dtype. num_tokens: its block size.
        codec: how the payload is encoded; only RAW_CODEC so far.
        payload_nbytes: length of the payload.
        created: seconds since the epoch, on the writer's clock.
        ttl_s: time to live after the last use; None: none.
        checksum: name of the checksum's algorithm.
    """

    version: int
    hash: BlockHash
    parent: BlockHash
    root: BlockHash
    layout: str
    dtype: str
    num_tokens: int
    codec: str
    payload_nbytes: int
    created: float
    ttl_s: float | None
    checksum: str

    @property
    def meta(self) -> BlockMeta:
        """The block's metadata, as a tier takes it."""
        return BlockMeta(self.hash, self.parent, self.root, self.ttl_s)


def encode_header(meta: BlockMeta, layout: KVLayout, payload: Buffer, created: float) -> bytes:
    """The HEADER_NBYTES bytes that go before `payload` (not copied).

    Args:
        meta: the block's name and place in its chain.
        layout: what the payload holds.
        payload: exactly `layout.block_nbytes` contiguous bytes.
        created: seconds since the epoch.

    Raises:
        LayoutError: the payload has another length, or the record does not fit the header.
    """
    nbytes = memoryview(payload).nbytes
    if nbytes != layout.block_nbytes:
        raise LayoutError(f"payload has {nbytes} bytes, layout {layout.describe()} has {layout.block_nbytes}")
    fields = (
        FORMAT_VERSION,
        meta.hash,
        meta.parent,
        meta.root,
        layout.describe(),
        layout.dtype,
        layout.block_size,
        RAW_CODEC,
        nbytes,
        float(created),
        None if meta.ttl_s is None else float(meta.ttl_s),
        CHECKSUM_ALGORITHM,
    )
    record: bytes = msgpack.packb(fields)
    if _LENGTH_END + len(record) > _CHECKSUM_AT:
        raise LayoutError(f"a header of {len(record)} bytes does not fit; shorten the layout's description")
    head = (_MAGIC + len(record).to_bytes(2, "little") + record).ljust(_CHECKSUM_AT, b"\0")
    return head + _checksum(head, payload)


def decode(value: Buffer, *, expect: BlockHash, layout: KVLayout) -> Header:
    """Verify a stored value (header and payload in one run of bytes); the payload is `value[HEADER_NBYTES:]`.

    Args:
        value: what the tier delivered; not copied.
        expect: the name that it was asked for by.
        layout: the layout that the reader needs.

    Raises:
        CodecError: TRUNCATED: shorter than it says. CORRUPT: bytes changed. FOREIGN: whole, but another block, another
            layout, another format or not a block at all.
    """
    view = memoryview(value)
    return decode_parts(view[:HEADER_NBYTES], view[HEADER_NBYTES:], expect=expect, layout=layout)


def decode_parts(header: Buffer, payload: Buffer, *, expect: BlockHash, layout: KVLayout) -> Header:
    """As `decode`, for a header and a payload that were received into two buffers.

    Raises:
        CodecError: see `decode`.
    """
    if len(header) < HEADER_NBYTES:
        raise CodecError(MissReason.TRUNCATED, f"value ends after {len(header)} bytes, inside the header")
    head = bytes(header)
    found = _parse(head)
    nbytes = memoryview(payload).nbytes
    if nbytes < found.payload_nbytes:
        raise CodecError(MissReason.TRUNCATED, f"payload has {nbytes} of {found.payload_nbytes} bytes")
    if _checksum(head[:_CHECKSUM_AT], payload) != head[_CHECKSUM_AT:] or nbytes != found.payload_nbytes:
        raise CodecError(MissReason.CORRUPT, "checksum does not match the bytes")
    _identify(found, expect, layout)
    return found


def parse_header(header: Buffer) -> Header:
    """A header without its payload, so not verified: for questions where a wrong answer delivers no bytes.

    Raises:
        CodecError: TRUNCATED, CORRUPT or FOREIGN.
    """
    if len(header) < HEADER_NBYTES:
        raise CodecError(MissReason.TRUNCATED, f"value ends after {len(header)} bytes, inside the header")
    return _parse(bytes(header))


def _parse(head: bytes) -> Header:
    if not head.startswith(_MAGIC):
        raise CodecError(MissReason.FOREIGN, "value is not a block: it has another magic number")
    length = int.from_bytes(head[len(_MAGIC) : _LENGTH_END], "little")
    try:
        fields = msgpack.unpackb(head[_LENGTH_END : _LENGTH_END + length])
    except (ValueError, msgpack.UnpackException) as error:
        raise CodecError(MissReason.CORRUPT, f"header cannot be unpacked: {error!r}") from error
    if not isinstance(fields, list) or not fields or not _is_whole(fields[0]):
        raise CodecError(MissReason.CORRUPT, "header is not a list that starts with its version")
    if fields[0] != FORMAT_VERSION:
        raise CodecError(MissReason.FOREIGN, f"header has format version {fields[0]}, not {FORMAT_VERSION}")
    if len(fields) != len(Header.__slots__) or not _well_typed(fields):
        raise CodecError(MissReason.CORRUPT, "header has fields of other types")
    return Header(*fields)


def _well_typed(fields: list[object]) -> bool:
    _, block, parent, root, layout, dtype, tokens, codec, nbytes, created, ttl_s, checksum = fields
    return (
        all(isinstance(f, bytes) for f in (block, parent, root))
        and all(isinstance(f, str) for f in (layout, dtype, codec, checksum))
        and all(_is_whole(f) for f in (tokens, nbytes))
        and isinstance(created, float)
        and (ttl_s is None or (isinstance(ttl_s, float) and not math.isnan(ttl_s)))
    )


def _is_whole(field: object) -> bool:
    return isinstance(field, int) and not isinstance(field, bool) and field >= 0


def _identify(found: Header, expect: BlockHash, layout: KVLayout) -> None:
    wanted = {
        "hash": expect,
        "layout": layout.describe(),
        "dtype": layout.dtype,
        "num_tokens": layout.block_size,
        "codec": RAW_CODEC,
        "payload_nbytes": layout.block_nbytes,
        "checksum": CHECKSUM_ALGORITHM,
    }
    for name, value in wanted.items():
        if getattr(found, name) != value:
            raise CodecError(MissReason.FOREIGN, f"value has {name} {getattr(found, name)!r}, not {value!r}")


def _checksum(head: Buffer, payload: Buffer) -> bytes:
    digest = xxhash.xxh3_64(head)
    digest.update(payload)
    return int(digest.intdigest()).to_bytes(8, "little")
