"""A block as a value in Redis: the form it has there, how it is written and how it arrives.

Covers: the two fields, the transaction that makes them visible, receiving them into the caller's buffer, what is wrong
with a value of another form. Does not cover: keys and windows (`commands`), header and checksum (`codec`).

A hash of two fields:

    h  the header's HEADER_NBYTES bytes, then the last TAIL_NBYTES of the payload (all of a shorter one)
    d  the rest of the payload

because the server's allocator knows 2 MiB and 2.5 MiB and nothing between: a payload of a power of two plus a header in
one string is charged 1.25 times its size (Redis 7.0 with jemalloc), and so is such a payload alone, for the string's
own header. Without its tail it fits: 1.001 at 2 MiB. The tail is copied once more at either end; nothing else is.

The server copies the fields of a hash out of its query buffer, while a plain SET takes that buffer over. So writing is
0.7 to 0.85 times as fast as a plain SET that is charged 1.25, whatever the client does. Of what keeps one key for a
block, written at once and charged 1.00, nothing was faster (2 MiB, Redis 7.0, unix socket, medians of interleaved
rounds against HSET of two fields; without transaction and checksum): a list of two elements 0.98 to 1.05, five fields
0.94 to 0.97. A stream (0.91) and SET with APPEND (0.80) are charged more as well. A string of the payload without its
tail would be 1.3 to 1.4 times as fast, but the rest would need a key of its own, which is evicted apart from it.

A write is one transaction (MULTI, UNLINK, HSET, PEXPIRE, EXEC) in one go. A connection that is cut inside it leaves
nothing of it: neither half a block nor one without its TTL, and whatever held the key before stays as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import redis

from kvstore.blocks import BlockHash
from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.errors import CodecError, MissReason
from kvstore.redis.resp import Reply, Wire, argument, pack
from kvstore.tier import BlockMeta

TAIL_NBYTES = 128
MAX_TTL_MS = 10 * 365 * 86400 * 1000

_MAX_EXCESS_NBYTES = 1 << 20  # of a value that is too long; beyond it the connection is cheaper than the bytes
_BEGIN = pack(b"MULTI") + b"*2\r\n$6\r\nUNLINK\r\n"
_COMMIT = pack(b"EXEC")
_TAKEN = b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n:0\r\n:2\r\n"  # what a new block is answered with
_TAKEN_WITH_TTL = b"+OK\r\n+QUEUED\r\n+QUEUED\r\n+QUEUED\r\n*3\r\n:0\r\n:2\r\n:1\r\n"


@dataclass(frozen=True, slots=True)
class ValueForm:
    """The values of one codec. Stateless.

    Attributes:
        codec: of every block.
        head_nbytes, rest_nbytes: length of the fields `h` and `d`.
    """

    codec: BlockCodec
    head_nbytes: int = field(init=False)
    rest_nbytes: int = field(init=False)
    _front: bytes = field(init=False, repr=False)
    _middle: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        nbytes = self.codec.layout.block_nbytes
        tail = min(TAIL_NBYTES, nbytes)
        object.__setattr__(self, "head_nbytes", HEADER_NBYTES + tail)
        object.__setattr__(self, "rest_nbytes", nbytes - tail)
        object.__setattr__(self, "_front", b"*2\r\n$%d\r\n" % self.head_nbytes)
        object.__setattr__(self, "_middle", b"\r\n$%d\r\n" % self.rest_nbytes)

    def buffer(self) -> memoryview:
        """A place for the field `h` of one block after another."""
        return memoryview(bytearray(self.head_nbytes))

    def write(self, key: bytes, meta: BlockMeta, payload: memoryview, created: float) -> list[bytes | memoryview]:
        """The transaction that puts a block under its key, in pieces; the payload is not copied but for its tail.

        Raises:
            LayoutError: as `BlockCodec.encode`.
        """
        header, stored = self.codec.encode(meta, payload, created)
        word = argument(key)
        front = b"%b%b*6\r\n$4\r\nHSET\r\n%b$1\r\nh\r\n$%d\r\n%b%b\r\n$1\r\nd\r\n$%d\r\n" % (
            *(_BEGIN, word, word, self.head_nbytes, header),
            *(bytes(stored[self.rest_nbytes :]), self.rest_nbytes),
        )
        left_s = meta.lifetime.left_s(created)
        expiry = b"" if left_s is None else pack(b"PEXPIRE", key, milliseconds(left_s))
        return [front, stored[: self.rest_nbytes], b"\r\n" + expiry + _COMMIT]

    def expect_written(self, wire: Wire, meta: BlockMeta) -> None:
        """Take the answers to `write`.

        Raises:
            redis.ResponseError: the server refused it; redis.OutOfMemoryError among them.
        """
        is_timed = meta.ttl_s is not None
        if wire.accept(_TAKEN_WITH_TTL if is_timed else _TAKEN):
            return
        replies: list[Reply] = [wire.read_reply() for _ in range(5 if is_timed else 4)]
        results = replies[-1]
        for reply in [*replies, *(results if isinstance(results, list) else [])]:
            if isinstance(reply, redis.ResponseError):
                raise reply
        if not isinstance(results, list) or len(results) != len(replies) - 2:
            raise redis.InvalidResponse(f"a transaction was answered with {results!r:.64}")

    def receive(self, wire: Wire, name: BlockHash, head: memoryview, payload: memoryview) -> bool:
        """Take the answer to `HMGET key h d` into the buffers; whether there was a value. Not verified.

        Raises:
            CodecError: the value has another form. The connection must be closed.
        """
        if not wire.accept(self._front):
            return self._receive_other(wire, name)
        wire.read_into(head)
        if not wire.accept(self._middle):
            wire.end_value()
            raise self._fault(name, bytes(head), self._field(wire))
        wire.read_into(payload[: self.rest_nbytes])
        wire.end_value()
        payload[self.rest_nbytes :] = head[HEADER_NBYTES:]
        return True

    def _receive_other(self, wire: Wire, name: BlockHash) -> bool:
        count = wire.read_count()
        if is_wrong_type(count):
            raise CodecError(MissReason.FOREIGN, "the key holds something else than a hash")
        if isinstance(count, redis.ResponseError):
            raise count
        if count != 2:
            raise redis.InvalidResponse(f"asked for two fields, got {count}")
        head, rest = self._field(wire), self._field(wire)
        if head is None and rest is None:
            return False
        raise self._fault(name, head, rest)

    def _field(self, wire: Wire) -> bytes | None:
        length = wire.read_length()
        if isinstance(length, redis.ResponseError):
            raise length
        if length is None:
            return None
        if length > self.codec.value_nbytes + _MAX_EXCESS_NBYTES:
            raise CodecError(MissReason.CORRUPT, f"a field has {length} bytes, a block {self.codec.value_nbytes}")
        value = bytearray(length)
        wire.read_into(memoryview(value))
        wire.end_value()
        return bytes(value)

    def _fault(self, name: BlockHash, head: bytes | None, rest: bytes | None) -> CodecError:
        """What is wrong with a value whose fields have not the lengths of a block of ours."""
        if head is None or rest is None:
            return CodecError(MissReason.TRUNCATED, "one of the value's two fields is missing")
        try:
            self.codec.decode(head, memoryview(bytearray(rest + head[HEADER_NBYTES:])), expect=name)
        except CodecError as error:
            return error
        return CodecError(MissReason.CORRUPT, f"fields have {len(head)} and {len(rest)} bytes, not those of a block")


def is_wrong_type(reply: Reply) -> bool:
    """Whether the server says that the key holds a value of another type."""
    return isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE")


def milliseconds(ttl_s: float) -> bytes:
    """A TTL as the server takes it: at least one, at most ten years."""
    ms = ttl_s * 1000
    return b"%d" % (MAX_TTL_MS if math.isinf(ms) else min(max(1, round(ms)), MAX_TTL_MS))
