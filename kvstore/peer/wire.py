"""What two workers say to one another about blocks: frames, how long they wait, and how each proves who it is.

Covers: one connection's bytes and deadlines, the handshake. Does not cover: what is served (`server`), what is
asked and what a fault means (`peer`).

    frame      4 bytes length, little-endian; msgpack
    item       HEADER_NBYTES of a stored block's header, then its payload; or HEADER_NBYTES that start with END or BUSY

    server     [magic, protocol version, nonce]
    client     [nonce, claims, HMAC(key, "client", both nonces, claims)]        claims: namespace and layout, msgpack
    server     [HMAC(key, "server", both nonces, claims), refusal or ""]

    client     ["match", hashes]    server  [count]
    client     ["touch", hashes]    server  [0]
    client     ["read", hashes]     server  an item for each leading block that it holds, then END; BUSY instead of more
    client     ["await", tickets, [[state, made]], ms]
                                    server  [[state, made, found]] as soon as one is not as the client saw it last, or
                                            after so many milliseconds; see `promises`. Asked only of peers that are
                                            said to make something: who does not know the question hangs up.

The key is derived from the fleet's secret, which never travels. Each side signs a nonce that the other has just made,
under a name of its own role: neither a recording nor an echo of the other's proof opens anything (ISO/IEC 9798-4,
mutual authentication in three passes). The connection is not encrypted. Bytes of a block are protected as its codec
does it, so give workers on several hosts a keyring.

Anything else than what stands here ends the connection: a stream is never resynchronised.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

import msgpack
import redis

from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.errors import TierError
from kvstore.redis.resp import FLOW_NBYTES, LOOK_S, MAX_LOOKS
from kvstore.redis.sockets import PlainTransport

PROTOCOL_VERSION = 1
MAX_HASHES = 8192  # in one question
END = b"END ".ljust(HEADER_NBYTES, b"\0")
BUSY = b"BUSY".ljust(HEADER_NBYTES, b"\0")

_MAGIC = b"WKVP"
_NONCE_NBYTES = 32
_MAX_GREETING_NBYTES = 1024
_MAX_FRAME_NBYTES = MAX_HASHES * (2 + 32) + 64


class PeerProtocolError(Exception):
    """The other side said something else than the protocol."""


class HungUpError(PeerProtocolError):
    """The other side closed the connection."""


class PeerRefusedError(Exception):
    """The other side has not our secret, or not our blocks. The message ends with what to do."""


class Channel:
    """One connection, used by one thread at a time. Any exception ends its use; only `hang_up` may come from elsewhere.

    When a patience that was granted is up, what has come meanwhile is still taken: it may be this process that had to
    wait for a processor, and not the other side that was silent (as `kvstore.redis.resp.Wire`).

    Attributes:
        until: `time.monotonic()` when all waits end. heard_at: when the last bytes came.
    """

    def __init__(self, sock: socket.socket, until: float) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._transport = PlainTransport(sock, self._left)
        self.until = until
        self.heard_at = -math.inf
        self._patience_s, self._ends_at = 0.0, until
        self._flowed = 0  # bytes since the patience began anew
        self._looks = 0  # after the patience was up, until it begins anew
        self._has_news = False  # since the last look

    def grant(self, patience_s: float, ends_at: float) -> None:
        """From now on the other side may be silent for that long: it begins anew with each FLOW_NBYTES that come."""
        self._patience_s, self._ends_at, self._flowed = patience_s, ends_at, 0
        self.until = min(time.monotonic() + patience_s, ends_at)
        self._looks, self._has_news = MAX_LOOKS, True

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send them all, joined by the kernel.

        Raises:
            TimeoutError: not in time. OSError: the connection is gone.
        """
        self._transport.send(parts)

    def receive_into(self, target: memoryview) -> None:
        """Fill `target`.

        Raises:
            TimeoutError: not in time. HungUpError, OSError: the connection is gone.
        """
        done = 0
        while done < len(target):
            try:
                count = self._transport.receive(target[done:], whole=True)
            except redis.ConnectionError as error:
                raise HungUpError("the other side closed the connection") from error
            self.heard_at, self._has_news = time.monotonic(), True
            done += count
            self._flowed += count
            if self._patience_s and self._flowed >= FLOW_NBYTES:
                self.grant(self._patience_s, self._ends_at)

    def send_frame(self, *fields: object) -> None:
        """Send one list. Raises as `send`."""
        body: bytes = msgpack.packb(fields)
        self.send([len(body).to_bytes(4, "little") + body])

    def receive_frame(self, limit: int = _MAX_FRAME_NBYTES) -> list[object]:
        """The next list.

        Raises:
            PeerProtocolError: longer than `limit`, or no list. Otherwise as `receive_into`.
        """
        length = int.from_bytes(self._receive(4), "little")
        if length > limit:
            raise PeerProtocolError(f"a frame of {length} bytes is longer than any that was asked for")
        try:
            fields = msgpack.unpackb(self._receive(length))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise PeerProtocolError("a frame holds no msgpack") from error
        if not isinstance(fields, list):
            raise PeerProtocolError("a frame holds no list")
        return fields

    def is_quiet(self) -> bool:
        """Whether nothing lies unread, not even the end. Between questions it must be so."""
        return self._transport.is_quiet()

    def hang_up(self) -> None:
        """End all waits on it, from any thread."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; only by the thread that uses it."""
        self.hang_up()
        self._sock.close()

    def _receive(self, count: int) -> bytes:
        target = bytearray(count)
        self.receive_into(memoryview(target))
        return bytes(target)

    def _left(self) -> float:
        now = time.monotonic()
        left = self.until - now
        if left <= 0:
            if not (self._has_news and self._looks and now < self._ends_at):
                raise TimeoutError("the other side did not answer in time")
            self._has_news, self._looks, left = False, self._looks - 1, min(LOOK_S, self._ends_at - now)
        return left


class FleetKey:
    """What the workers of one fleet prove to one another. Shows nothing of the secret."""

    __slots__ = ("_key",)

    def __init__(self, secret: str) -> None:
        """Derive the key from the fleet's secret.

        Raises:
            TierError: it is empty.
        """
        if not secret:
            raise TierError("workers give blocks to one another only with a fleet secret; set auth.fleet_secret")
        self._key = hmac.digest(secret.encode(), b"warmkv peer 1", hashlib.sha256)

    def greet(self, channel: Channel, codec: BlockCodec) -> None:
        """The client's side.

        Raises:
            PeerRefusedError: the peer refuses us, or cannot prove itself. Otherwise as `Channel`.
        """
        theirs = _hello(channel.receive_frame(_MAX_GREETING_NBYTES))
        ours, claims = os.urandom(_NONCE_NBYTES), _claims(codec)
        channel.send_frame(ours, claims, self._proof(b"client", theirs, ours, claims))
        try:
            answer = channel.receive_frame(_MAX_GREETING_NBYTES)
        except HungUpError as error:
            raise PeerRefusedError("it does not accept our secret; give all workers one auth.fleet_secret") from error
        match answer:
            case [bytes(proof), str(refusal)]:
                if not hmac.compare_digest(proof, self._proof(b"server", theirs, ours, claims)):
                    raise PeerRefusedError("it does not know our secret; give all workers one auth.fleet_secret")
                if refusal:
                    raise PeerRefusedError(refusal)
            case _:
                raise PeerProtocolError("the greeting ends with something else than a proof")

    def admit(self, channel: Channel, codec: BlockCodec) -> None:
        """The server's side. To whoever has not the secret nothing is said.

        Raises:
            PeerRefusedError: the client has not our secret, or not our blocks. Otherwise as `Channel`.
        """
        ours = os.urandom(_NONCE_NBYTES)
        channel.send_frame(_MAGIC, PROTOCOL_VERSION, ours)
        match channel.receive_frame(_MAX_GREETING_NBYTES):
            case [bytes(theirs), bytes(claims), bytes(proof)] if len(theirs) == _NONCE_NBYTES:
                if not hmac.compare_digest(proof, self._proof(b"client", ours, theirs, claims)):
                    raise PeerRefusedError("a client without our secret was turned away")
            case _:
                raise PeerProtocolError("a client greets with something else than a proof")
        refusal = "" if claims == _claims(codec) else _OTHER_BLOCKS
        channel.send_frame(self._proof(b"server", ours, theirs, claims), refusal)
        if refusal:
            raise PeerRefusedError(refusal)

    def __repr__(self) -> str:
        return "FleetKey()"

    def _proof(self, role: bytes, servers: bytes, clients: bytes, claims: bytes) -> bytes:
        # All but the last have a fixed length, so that no two lists run into the same bytes.
        return hmac.digest(self._key, role + servers + clients + claims, hashlib.sha256)


_OTHER_BLOCKS = "it holds blocks of another model or layout; route to workers of one model"


def _claims(codec: BlockCodec) -> bytes:
    claims: bytes = msgpack.packb((codec.namespace, codec.layout.describe()))
    return claims


def _hello(fields: list[object]) -> bytes:
    match fields:
        case [bytes(magic), int(version), bytes(nonce)] if magic == _MAGIC and len(nonce) == _NONCE_NBYTES:
            if version != PROTOCOL_VERSION:
                raise PeerRefusedError(f"it speaks version {version}, we {PROTOCOL_VERSION}; upgrade the older worker")
            return nonce
        case _:
            raise PeerProtocolError("it does not greet as a worker does")
