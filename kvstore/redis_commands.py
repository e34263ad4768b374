"""What the Redis tier says to the server, over one connection: look up, receive, send, lengthen, scan, unlink.

Covers: commands, their order and their batches. Does not cover: when to ask at all, counters, faults (`redis`). Every
function leaves the connection without an unread reply, or raises, and then the connection must be closed.

Raises, all of them: redis.RedisError, OSError (the server or the way to it), redis.ResponseError among them when the
server refuses a command.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import redis

from kvstore.blocks import BlockHash
from kvstore.codec import HEADER_NBYTES, Header, decode, decode_parts, encode_header, parse_header
from kvstore.errors import CodecError, LayoutError, MissReason
from kvstore.layout import KVLayout
from kvstore.resp import Reply, Wire, pack
from kvstore.tier import BlockMeta

HASH_NBYTES = 32
WINDOW = 4  # values under way: unread replies are charged to the server's memory and would evict our own blocks
BATCH = 1024  # small commands in one round trip
HEADER_BATCH = 128
UNLINK_BATCH = 16  # strings are freed at once, on the server's only thread

_MAX_EXCESS_NBYTES = 1 << 20  # of a value that is too long; beyond it the connection is cheaper than the bytes
_MAX_TTL_MS = 10 * 365 * 86400 * 1000

# For servers before 7.0, where EXPIRE knows no GT. A key without TTL keeps none.
_LENGTHEN = b"""
for i, key in ipairs(KEYS) do
  local left = redis.call('PTTL', key)
  if left >= 0 and left < tonumber(ARGV[i]) then redis.call('PEXPIRE', key, ARGV[i]) end
end
return 0
"""
_LENGTHEN_SHA = hashlib.sha1(_LENGTHEN).hexdigest().encode()


@dataclass(frozen=True, slots=True)
class BlockCommands:
    """The commands on blocks of one namespace and layout. Stateless.

    Attributes:
        prefix: of every key.
        layout: of every block.
    """

    prefix: bytes
    layout: KVLayout

    @property
    def value_nbytes(self) -> int:
        """Length of a stored block."""
        return HEADER_NBYTES + self.layout.block_nbytes

    def key(self, name: BlockHash) -> bytes:
        """The key of a block."""
        return self.prefix + name.hex().encode()

    def look_up(self, wire: Wire, names: Sequence[BlockHash]) -> tuple[int, list[BlockHash]]:
        """How many leading blocks are there, and which of those asked for are not. Asks no batch after a gap."""
        count = 0
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            wire.renew()
            there = [_integer(r) > 0 for r in self._ask_of_each(wire, b"EXISTS", batch)]
            if not all(there):
                return count + there.index(False), [n for n, held in zip(batch, there, strict=True) if not held]
            count += len(batch)
        return count, []

    def holds(self, wire: Wire, names: Sequence[BlockHash]) -> list[bool]:
        """For each block whether a value of its length is there. A use, in the eyes of the server's eviction."""
        lengths: list[int | redis.ResponseError] = []
        for start in range(0, len(names), BATCH):
            wire.renew()
            lengths += self._ask_of_each(wire, b"STRLEN", names[start : start + BATCH])
        return [not _is_wrong_type(reply) and _integer(reply) == self.value_nbytes for reply in lengths]

    def receive(self, wire: Wire, names: Sequence[BlockHash], into: Sequence[memoryview]) -> Iterator[Header]:
        """Leading blocks into the buffers, each verified before it is told; ends at the first that is absent.

        Raises:
            CodecError: the next value is not the block. The connection must be closed.
            LayoutError: a buffer has not the size of a block.
        """
        if any(payload.nbytes != self.layout.block_nbytes for payload in into):
            raise LayoutError(f"every buffer must have the {self.layout.block_nbytes} bytes of a block")
        gets = [pack(b"GET", self.key(name)) for name in names]
        head = memoryview(bytearray(HEADER_NBYTES))
        wire.renew()
        wire.send([b"".join(gets[:WINDOW])])
        for i, (name, payload) in enumerate(zip(names, into, strict=True)):
            wire.renew()
            if not self._receive_one(wire, name, head, payload):
                for other in range(i + 1, min(i + WINDOW, len(names))):
                    wire.renew()
                    self._receive_one(wire, names[other], head, into[other])
                return
            wire.send(gets[i + WINDOW : i + WINDOW + 1])
            yield decode_parts(head, payload, expect=name, layout=self.layout)

    def send(self, wire: Wire, blocks: Sequence[tuple[BlockMeta, memoryview]], created: float) -> Iterator[BlockMeta]:
        """Write blocks, telling each that the server has taken.

        Raises:
            redis.OutOfMemoryError: the server is full.
        """
        waiting: list[BlockMeta] = []
        for meta, payload in blocks:
            wire.renew()
            wire.send(self._set(meta, payload, created))
            waiting.append(meta)
            if len(waiting) == WINDOW:
                _expect_ok(wire)
                yield waiting.pop(0)
        while waiting:
            wire.renew()
            _expect_ok(wire)
            yield waiting.pop(0)

    def lengthen(self, wire: Wire, ttls: Sequence[tuple[BlockHash, float]], *, by_script: bool) -> None:
        """Give blocks at least these TTLs, in seconds. Absent ones, and those without a TTL, stay as they are."""
        for start in range(0, len(ttls), BATCH):
            wire.renew()
            keys = [self.key(name) for name, _ in ttls[start : start + BATCH]]
            limits = [_milliseconds(ttl_s) for _, ttl_s in ttls[start : start + BATCH]]
            if by_script:
                _run_script(wire, keys, limits)
                continue
            commands = [pack(b"PEXPIRE", k, ms, b"GT") for k, ms in zip(keys, limits, strict=True)]
            for reply in wire.ask_numbers(b"".join(commands), len(commands)):
                _integer(reply)

    def use(self, wire: Wire, names: Sequence[BlockHash]) -> None:
        """Make blocks recently used, whatever their TTL."""
        for start in range(0, len(names), BATCH):
            wire.renew()
            _integer(wire.ask(b"TOUCH", *(self.key(n) for n in names[start : start + BATCH])))

    def headers(self, wire: Wire, names: Sequence[BlockHash]) -> Iterator[tuple[BlockHash, Header | None]]:
        """The header of each block that is there, None where it cannot be read. Not verified."""
        for start in range(0, len(names), HEADER_BATCH):
            batch = names[start : start + HEADER_BATCH]
            wire.renew()
            commands = [pack(b"GETRANGE", self.key(n), b"0", b"%d" % (HEADER_NBYTES - 1)) for n in batch]
            for name, reply in zip(batch, wire.ask_all(commands), strict=True):
                if reply != b"":
                    yield name, _header(reply)

    def scan(self, wire: Wire) -> Iterator[BlockHash]:
        """Every block of the namespace; those that come or go meanwhile may be told or not, or twice."""
        cursor = b"0"
        while True:
            wire.renew()
            reply = wire.ask(b"SCAN", cursor, b"MATCH", self.prefix + b"*", b"COUNT", b"1000")
            if isinstance(reply, redis.ResponseError):
                raise reply
            if not isinstance(reply, list) or len(reply) != 2:
                raise redis.InvalidResponse("SCAN did not answer with a cursor and keys")
            cursor, keys = reply
            yield from filter(None, map(self._name, keys))
            if cursor == b"0":
                return

    def unlink(self, wire: Wire, names: Sequence[BlockHash]) -> Iterator[BlockHash]:
        """Drop blocks, telling each that was there."""
        for start in range(0, len(names), UNLINK_BATCH):
            batch = names[start : start + UNLINK_BATCH]
            wire.renew()
            dropped = [_integer(r) for r in self._ask_of_each(wire, b"UNLINK", batch)]
            yield from (name for name, there in zip(batch, dropped, strict=True) if there)

    def _ask_of_each(self, wire: Wire, verb: bytes, names: Sequence[BlockHash]) -> list[int | redis.ResponseError]:
        """`verb key` for each, all of them in one go. Keys are of one length, so most of a command is written once."""
        if any(len(name) != HASH_NBYTES for name in names):
            raise ValueError(f"a block hash has {HASH_NBYTES} bytes")
        front = b"*2\r\n%b$%d\r\n%b" % (_argument(verb), len(self.prefix) + 2 * HASH_NBYTES, self.prefix)
        keys = (b"\r\n" + front).join([name.hex().encode() for name in names])
        return wire.ask_numbers(front + keys + b"\r\n", len(names))

    def _receive_one(self, wire: Wire, name: BlockHash, head: memoryview, payload: memoryview) -> bool:
        length = wire.read_length()
        if length is None:
            return False
        if _is_wrong_type(length):
            raise CodecError(MissReason.FOREIGN, "the key holds something else than a string")
        length = _integer(length)
        if length != self.value_nbytes:
            raise self._wrong_length(wire, name, length)
        wire.read_into(head)
        wire.read_into(payload)
        wire.end_value()
        return True

    def _wrong_length(self, wire: Wire, name: BlockHash, length: int) -> CodecError:
        if length <= self.value_nbytes + _MAX_EXCESS_NBYTES:
            value = bytearray(length)
            wire.read_into(memoryview(value))
            try:
                decode(value, expect=name, layout=self.layout)
            except CodecError as error:
                return error
        return CodecError(MissReason.CORRUPT, f"value has {length} bytes, a block has {self.value_nbytes}")

    def _set(self, meta: BlockMeta, payload: memoryview, created: float) -> list[bytes | memoryview]:
        header = encode_header(meta, self.layout, payload, created)
        expiry = [] if meta.ttl_s is None else [b"PX", _milliseconds(meta.ttl_s)]
        front = b"*%d\r\n$3\r\nSET\r\n" % (3 + len(expiry)) + _argument(self.key(meta.hash))
        front += b"$%d\r\n%b" % (self.value_nbytes, header)
        return [front, payload, b"\r\n" + b"".join(_argument(word) for word in expiry)]

    def _name(self, key: object) -> BlockHash | None:
        try:
            name = bytes.fromhex(key[len(self.prefix) :].decode()) if isinstance(key, bytes) else b""
        except ValueError:
            return None
        return BlockHash(name) if len(name) == HASH_NBYTES else None  # else somebody else's key under our prefix


def _argument(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)


def _run_script(wire: Wire, keys: Sequence[bytes], limits: Sequence[bytes]) -> None:
    arguments = (b"%d" % len(keys), *keys, *limits)
    reply = wire.ask(b"EVALSHA", _LENGTHEN_SHA, *arguments)
    if isinstance(reply, redis.exceptions.NoScriptError):
        reply = wire.ask(b"EVAL", _LENGTHEN, *arguments)
    _integer(reply)


def _expect_ok(wire: Wire) -> None:
    reply = wire.read_reply()
    if isinstance(reply, redis.ResponseError):
        raise reply
    if reply != b"OK":
        raise redis.InvalidResponse(f"SET answered {reply!r:.64}")


def _integer(reply: Reply) -> int:
    if isinstance(reply, redis.ResponseError):
        raise reply
    if not isinstance(reply, int):
        raise redis.InvalidResponse(f"asked for a number, got {reply!r:.64}")
    return reply


def _is_wrong_type(reply: Reply) -> bool:
    return isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE")


def _header(reply: Reply) -> Header | None:
    if not isinstance(reply, bytes):
        if isinstance(reply, redis.ResponseError) and not _is_wrong_type(reply):
            raise reply
        return None
    try:
        return parse_header(reply)
    except CodecError:
        return None


def _milliseconds(ttl_s: float) -> bytes:
    ms = ttl_s * 1000
    return b"%d" % (_MAX_TTL_MS if math.isinf(ms) else min(max(1, round(ms)), _MAX_TTL_MS))
