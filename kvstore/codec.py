"""Block <-> bytes for every tier that outlives the process or lies outside it.

Covers: the stored value's format, its identity, its checksum, and where its protection stands. Does not cover: what the
payload's bytes mean (`layout`), keys and tags (`crypto`), keys and TTLs of a server (`redis`).

A stored value is one run of bytes:

    0    4  magic `WKVB`
    4    2  length of the record, u16 little-endian
    6       the record, msgpack (see `Header`), then zeros
    488 16  tag of bytes 0..487 and of the payload when a secret is set, else zeros
    504  8  xxh3-64 of bytes 0..503, its seed the xxh3-64 of the payload as it is stored; little-endian
    512     payload: the block's raw K/V, exactly as it lies in the pool; or its ciphertext, of the same length

The header's size is fixed, so that the payload starts on a 512-byte boundary and can be received straight into a slot.
The checksum covers header and payload in one: one block's bytes under another's name are as wrong as flipped bits. It
is there with a secret too, because it tells an accident (corrupt) from another writer (foreign): whoever has not the
secret can make the one right, but not the tag.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import msgpack
import xxhash

from kvstore.blocks import BlockHash
from kvstore.crypto import NONCE_NBYTES, TAG_NBYTES, BlockKeys, Keyring, Protection
from kvstore.errors import CodecError, LayoutError, MissReason
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta

HEADER_NBYTES = 512
FORMAT_VERSION = 3
CHECKSUM_ALGORITHM = "xxh3-64"  # of the header, seeded with that of the payload
RAW_CODEC = "raw"
PROTECTED_CODECS = {Protection.AUTHENTICATE: "raw+gmac", Protection.ENCRYPT: "aes-256-gcm"}

_MAGIC = b"WKVB"
_LENGTH_END = len(_MAGIC) + 2
_CHECKSUM_AT = HEADER_NBYTES - 8
_TAG_AT = _CHECKSUM_AT - TAG_NBYTES
_PROTECTIONS = {codec: protection for protection, codec in PROTECTED_CODECS.items()}
_NO_TAG = bytes(TAG_NBYTES)
_IDENTITY = ("namespace", "layout", "dtype", "num_tokens", "payload_nbytes", "checksum")
_identity_of = attrgetter(*_IDENTITY)
_BEFORE_TTL = (int, bytes, bytes, bytes, bytes, str, str, int, str, int, float)
_NONE = type(None)
_FIELD_TYPES = {  # as msgpack gives them
    (*_BEFORE_TTL, ttl, until, int, turn, str, str, bytes)
    for ttl in (float, _NONE)
    for until in (float, _NONE)
    for turn in (int, _NONE)
}

Buffer = bytes | bytearray | memoryview


class Header(NamedTuple):
    """What stands before a stored payload. The order of the fields is the order in the msgpack record.

    A named tuple, because one is made for every block that is received, and a frozen dataclass takes ten times as long.

    Attributes:
        version: FORMAT_VERSION.
        namespace: `HashScheme.digest()`.
        hash, parent, root: as in `BlockMeta`, 32 bytes each.
        layout: `KVLayout.describe()`. dtype: its dtype. num_tokens: its block size.
        codec: how the payload is stored: RAW_CODEC or one of PROTECTED_CODECS.
        payload_nbytes: length of the payload.
        created: seconds since the epoch, on the writer's clock.
        ttl_s, until, priority, turn: as in `BlockMeta`, when the block was written.
        checksum: name of the checksum's algorithm.
        key_id: of the secret that protects it. nonce: of its protection, with a salt (`crypto`). Both empty without.
    """

    version: int
    namespace: bytes
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
    until: float | None
    priority: int
    turn: int | None
    checksum: str
    key_id: str
    nonce: bytes

    @property
    def meta(self) -> BlockMeta:
        """The block's metadata, as a tier takes it."""
        return BlockMeta(self.hash, self.parent, self.root, self.ttl_s, self.priority, self.until, self.turn)


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """How blocks of one namespace and layout are stored outside of the process. Thread-safe; holds no state but keys.

    With a keyring every value is protected, and a value that is not is refused; without one, one that is. Readers take
    authenticated and encrypted values alike, so that a fleet can go from one to the other.

    Attributes:
        layout: of every block.
        namespace: `HashScheme.digest()`, 32 bytes; part of every header.
        keyring: the operator's secrets; None: whoever can write to a tier is trusted.
        protection: what is written with a keyring.
    """

    layout: KVLayout
    namespace: bytes
    keyring: Keyring | None = None
    protection: Protection = Protection.AUTHENTICATE
    _keys: BlockKeys | None = field(init=False, repr=False, compare=False)
    _identity: tuple[bytes, str, str, int, int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        keys = None if self.keyring is None else self.keyring.for_namespace(self.namespace)
        object.__setattr__(self, "_keys", keys)
        layout = self.layout  # whose properties are computed anew each time
        shape = layout.describe(), layout.dtype, layout.block_size, layout.block_nbytes
        object.__setattr__(self, "_identity", (self.namespace, *shape, CHECKSUM_ALGORITHM))

    @property
    def value_nbytes(self) -> int:
        """Length of every stored block: header and payload."""
        return HEADER_NBYTES + self.layout.block_nbytes

    def encode(self, meta: BlockMeta, payload: Buffer, created: float) -> tuple[bytes, memoryview]:
        """The HEADER_NBYTES bytes of a header and the payload to store.

        Args:
            meta: the block's name and place in its chain.
            payload: exactly `layout.block_nbytes` contiguous bytes. Never changed; it is what is returned, unless it
                is encrypted.
            created: seconds since the epoch.

        Raises:
            LayoutError: the payload has another length, or the record does not fit the header.
        """
        stored = memoryview(payload)
        if stored.nbytes != self.layout.block_nbytes:
            raise LayoutError(
                f"payload has {stored.nbytes} bytes; a block of layout {self.layout.describe()} has "
                f"{self.layout.block_nbytes}: give it a buffer of that size"
            )
        keys, nonce, tag = self._keys, b"", _NO_TAG
        if keys is None:
            head = self._pack(meta, created, RAW_CODEC, "", nonce)
        else:
            nonce = keys.new_nonce()
            head = self._pack(meta, created, PROTECTED_CODECS[self.protection], keys.active, nonce)
            tag, stored = keys.protect(self.protection, nonce, head, stored)
        head += tag
        return head + _checksum(head, stored), stored

    def decode(
        self, header: Buffer, payload: memoryview, *, expect: BlockHash, parent: BlockHash | None = None
    ) -> Header:
        """Verify what a tier delivered and make `payload` the raw K/V, in place.

        Args:
            header: the first HEADER_NBYTES bytes of the value.
            payload: all bytes after it, contiguous; writable if values may be encrypted.
            expect: the name that it was asked for by.
            parent: the block before it, or the root, where the caller knows; None: not looked at.

        Raises:
            CodecError: `payload` holds garbage then. TRUNCATED: shorter than it says. CORRUPT: bytes changed. FOREIGN:
                whole, but another block, namespace, layout or format, no block at all, or not protected by our secret.
        """
        head = _whole(header)
        found = _parse(head)
        if payload.nbytes < found.payload_nbytes:
            raise CodecError(MissReason.TRUNCATED, f"payload has {payload.nbytes} of {found.payload_nbytes} bytes")
        if _checksum(head[:_CHECKSUM_AT], payload) != head[_CHECKSUM_AT:] or payload.nbytes != found.payload_nbytes:
            raise CodecError(MissReason.CORRUPT, "checksum does not match the bytes")
        self._identify(found, expect, parent)
        self._unprotect(found, head, payload)
        return found

    def parse(self, header: Buffer) -> Header:
        """A header without its payload, so not verified: for questions where a wrong answer delivers no bytes.

        Raises:
            CodecError: TRUNCATED, CORRUPT or FOREIGN (no block, or one of another format).
        """
        return _parse(_whole(header))

    def _pack(self, meta: BlockMeta, created: float, codec: str, key_id: str, nonce: bytes) -> bytes:
        """Bytes 0 to _TAG_AT of a header."""
        namespace, layout, dtype, num_tokens, payload_nbytes, checksum = self._identity
        fields = (
            FORMAT_VERSION,
            namespace,
            meta.hash,
            meta.parent,
            meta.root,
            layout,
            dtype,
            num_tokens,
            codec,
            payload_nbytes,
            float(created),
            None if meta.ttl_s is None else float(meta.ttl_s),
            None if meta.until is None else float(meta.until),
            meta.priority,
            meta.turn,
            checksum,
            key_id,
            nonce,
        )
        record: bytes = msgpack.packb(fields)
        if _LENGTH_END + len(record) > _TAG_AT:
            raise LayoutError(f"a header of {len(record)} bytes does not fit; shorten the layout's description")
        return (_MAGIC + len(record).to_bytes(2, "little") + record).ljust(_TAG_AT, b"\0")

    def _identify(self, found: Header, expect: BlockHash, parent: BlockHash | None) -> None:
        if found.hash != expect:
            raise _foreign("hash", found.hash, expect)
        if parent is not None and found.parent != parent:
            raise _foreign("parent", found.parent, parent)
        wanted = self._identity
        if _identity_of(found) != wanted:
            differ = zip(_IDENTITY, _identity_of(found), wanted, strict=True)
            raise _foreign(*next(fields for fields in differ if fields[1] != fields[2]))

    def _unprotect(self, found: Header, head: bytes, payload: memoryview) -> None:
        if self._keys is None:
            if found.codec != RAW_CODEC:
                raise _foreign("codec", found.codec, RAW_CODEC)
            return
        how = _PROTECTIONS.get(found.codec)
        if how is None or len(found.nonce) != NONCE_NBYTES:
            raise CodecError(MissReason.FOREIGN, f"value of codec {found.codec!r} is not protected by a secret")
        if not self._keys.knows(found.key_id):
            raise CodecError(MissReason.FOREIGN, f"value is protected by key {found.key_id!r}, which is not ours")
        tag = head[_TAG_AT:_CHECKSUM_AT]
        if not self._keys.unprotect(found.key_id, how, found.nonce, head[:_TAG_AT], payload, tag):
            raise CodecError(MissReason.FOREIGN, "value was not written with our secret: its tag is wrong")


def _foreign(name: str, found: object, wanted: object) -> CodecError:
    return CodecError(MissReason.FOREIGN, f"value has {name} {found!r}, not {wanted!r}")


def _whole(header: Buffer) -> bytes:
    head = bytes(memoryview(header)[:HEADER_NBYTES])
    if len(head) < HEADER_NBYTES:
        raise CodecError(MissReason.TRUNCATED, f"value ends after {len(head)} bytes, inside the header")
    return head


def _parse(head: bytes) -> Header:
    if not head.startswith(_MAGIC):
        raise CodecError(MissReason.FOREIGN, "value is not a block: it has another magic number")
    length = int.from_bytes(head[len(_MAGIC) : _LENGTH_END], "little")
    try:
        fields = msgpack.unpackb(head[_LENGTH_END : min(_LENGTH_END + length, _TAG_AT)])
    except (ValueError, msgpack.UnpackException) as error:
        raise CodecError(MissReason.CORRUPT, f"header cannot be unpacked: {error!r}") from error
    if not isinstance(fields, list) or not fields or type(fields[0]) is not int:
        raise CodecError(MissReason.CORRUPT, "header is not a list that starts with its version")
    if fields[0] != FORMAT_VERSION:
        raise CodecError(MissReason.FOREIGN, f"header has format version {fields[0]}, not {FORMAT_VERSION}")
    if tuple(map(type, fields)) not in _FIELD_TYPES:
        raise CodecError(MissReason.CORRUPT, "header has fields of other types")
    header = Header._make(fields)
    is_negative = min(header.num_tokens, header.payload_nbytes, header.priority, header.turn or 0) < 0
    if is_negative or math.isnan(header.ttl_s or 0.0) or math.isnan(header.until or 0.0):
        raise CodecError(MissReason.CORRUPT, "header has a negative number, or a lifetime that is none")
    return header


def _checksum(head: Buffer, payload: Buffer) -> bytes:
    # In two calls: the streaming interface, which could take both in one, is 8 % slower.
    return xxhash.xxh3_64_intdigest(head, seed=xxhash.xxh3_64_intdigest(payload)).to_bytes(8, "little")
