"""A connection to a Redis server that puts values straight into the caller's buffers, within a deadline.

Covers: framing (RESP2) and deadlines. Does not cover: system calls (`sockets`), opening connections (`pool`),
what is asked (`commands`). We speak ourselves, because redis-py's reader copies every value several times and
grants its timeout anew with every packet.

A connection is used by one thread at a time. Anything that is not a whole, well-formed reply in time closes it: a
stream of replies is never resynchronised, so no reply can be taken for the answer to another question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis
from redis._parsers import BaseParser
from redis.connection import AbstractConnection

from kvstore.redis.sockets import Transport, transport
from kvstore.tier import Clock

Reply = int | bytes | None | list[Any] | redis.ResponseError

FLOW_NBYTES = 64 << 10
LOOK_S = 0.001  # how long a look takes for what has come, when the patience is up
MAX_LOOKS = 4  # in a row: the beginning of an answer, its value, its end
_READ_AHEAD = 1 << 10  # in front of a value: its length and its header in one call, little of its payload
_BUFFER_NBYTES = 64 << 10
_MAX_LINE_NBYTES = 32 << 10
_MAX_NUMBER_NBYTES = 1 << 10  # an error in place of a number included
_BITS = {b":0": 0, b":1": 1}  # nearly all of them
_MAX_REPLY_NBYTES = 64 << 20  # of a reply that is no block


def pack(*args: bytes) -> bytes:
    """One command in RESP."""
    return b"*%d\r\n" % len(args) + b"".join([b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args])


def argument(word: bytes) -> bytes:
    """One word of a command in RESP."""
    return b"$%d\r\n%b\r\n" % (len(word), word)


class Wire:
    """One connection.

    Time, on the clock: all waits since the last `renew` together take `patience_s` at most, and none goes beyond
    `ends_at`. FLOW_NBYTES that have come renew it, too: a large value on a slow line is no silence. When the patience
    is up, what has come meanwhile is still taken: it may be this process that had to wait for a processor, and not the
    server that was silent. `heard_at` is when the last byte came.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._connection: AbstractConnection | None = None
        self._transport: Transport | None = None
        self._bytes = bytearray(_BUFFER_NBYTES)
        self._buffer = memoryview(self._bytes)
        self._low = self._high = 0  # unread bytes of the buffer
        self._until = float("inf")
        self._flowed = 0  # bytes since the last renewal
        self._looks = MAX_LOOKS  # after the patience was up, until the next renewal
        self._has_news = True  # since the last look
        self.patience_s = self.ends_at = float("inf")
        self.heard_at = float("-inf")

    def attach(self, connection: AbstractConnection) -> None:
        """Take over the socket of a connection that has just been opened."""
        self._connection, self._transport = connection, transport(connection._sock, self.left)

    def renew(self) -> None:
        """Grant the server its time anew, for one more answer."""
        self._until = min(self._clock() + self.patience_s, self.ends_at)
        self._flowed, self._looks, self._has_news = 0, MAX_LOOKS, True

    def close(self) -> None:
        """Close the connection. May be called twice."""
        if self._connection is not None:
            self._connection.disconnect()  # type: ignore[no-untyped-call]
            self._connection = self._transport = None

    def is_quiet(self) -> bool:
        """Whether it is open and nothing lies unread. Between questions it must be; else it is of no more use."""
        return self._transport is not None and self._low == self._high and self._transport.is_quiet()

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send them all, without joining them.

        Raises:
            redis.TimeoutError: not in time. redis.ConnectionError, OSError: the connection is gone.
        """
        self._open().send(parts)

    def ask(self, *args: bytes) -> Reply:
        """Send one command and wait for its reply."""
        self.send([pack(*args)])
        return self.read_reply()

    def ask_all(self, commands: Sequence[bytes]) -> list[Reply]:
        """Send packed commands in one go and wait for all replies, which must be small: one round trip."""
        self.send([b"".join(commands)])
        return [self.read_reply() for _ in commands]

    def ask_numbers(self, commands: bytes, count: int) -> list[int | redis.ResponseError]:
        """Send that many packed commands that are answered with numbers: one round trip, replies parsed in bulk.

        Raises:
            redis.InvalidResponse: another kind of reply, or more of them.
        """
        self.send([commands])
        text = b""
        while text.count(b"\r\n") < count:
            if len(text) > count * _MAX_NUMBER_NBYTES:
                raise redis.InvalidResponse("replies are too long for numbers")
            if self._low == self._high:
                self._fill(_BUFFER_NBYTES)
            text += self._bytes[self._low : self._high]
            self._low = self._high
        lines = text.split(b"\r\n")
        if len(lines) != count + 1 or lines[-1]:
            raise redis.InvalidResponse(f"{count} questions had more answers")
        return [_BITS[line] if line in _BITS else self._number_or_error(line) for line in lines[:-1]]

    def read_reply(self) -> Reply:
        """The next reply. An error reply is returned, except those that end the conversation.

        Raises:
            redis.ConnectionError: login refused, server loading, stream ended. redis.TimeoutError: not in time.
            redis.InvalidResponse: not RESP.
        """
        line = self._line(_BUFFER_NBYTES)
        kind, rest = line[:1], line[1:]
        if kind == b":":
            return _number(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            return self._error(rest)
        if kind not in (b"$", b"*"):
            raise redis.InvalidResponse(f"a reply cannot start with {line[:32]!r}")
        length = _length(rest)
        if length is None:
            return None
        return self._bulk(length) if kind == b"$" else [self.read_reply() for _ in range(length)]

    def accept(self, expected: bytes) -> bool:
        """Take the next bytes if they are exactly these; else take nothing.

        Waits only while all that has come is the beginning of `expected`, so `expected` must not go on after the end of
        a shorter reply that begins like it. No reply in RESP is the beginning of another one of its kind.
        """
        while True:
            count = min(len(expected), self._high - self._low)
            if self._bytes[self._low : self._low + count] != expected[:count]:
                return False
            if count == len(expected):
                self._low += count
                return True
            self._fill(_READ_AHEAD)

    def read_count(self) -> int | redis.ResponseError | None:
        """How many replies come next as one array; None: a null array. The caller must take them all."""
        line = self._line(_READ_AHEAD)
        if line[:1] == b"-":
            return self._error(line[1:])
        if line[:1] != b"*":
            raise redis.InvalidResponse(f"asked for several values, got {line[:32]!r}")
        return _length(line[1:])

    def read_length(self) -> int | redis.ResponseError | None:
        """Length of the value that comes next, None when there is none.

        The caller must take all its bytes by `read_into` and then call `end_value`.
        """
        line = self._line(_READ_AHEAD)
        if line[:1] == b"-":
            return self._error(line[1:])
        if line[:1] != b"$":
            raise redis.InvalidResponse(f"asked for a value, got {line[:32]!r}")
        return _length(line[1:])

    def read_number(self) -> int | redis.ResponseError:
        """The next reply, which is a number between values.

        Raises:
            redis.InvalidResponse: it is none.
        """
        return self._number_or_error(self._line(_READ_AHEAD))

    def read_into(self, target: memoryview) -> None:
        """Fill `target` with the value's next bytes."""
        done = self._from_buffer(target)
        while done < len(target):
            done += self._receive(target[done:], whole=True)

    def end_value(self) -> None:
        """Take the end of a value.

        Raises:
            redis.InvalidResponse: the value goes on.
        """
        mark = bytearray(2)
        while self._high - self._low < 2:
            self._fill(_READ_AHEAD)
        self._from_buffer(memoryview(mark))
        if mark != b"\r\n":
            raise redis.InvalidResponse("a value is longer than the server said")

    def _bulk(self, length: int) -> bytes:
        if length > _MAX_REPLY_NBYTES:
            raise redis.InvalidResponse(f"a reply of {length} bytes is longer than any that was asked for")
        value = bytearray(length)
        self.read_into(memoryview(value))
        self.end_value()
        return bytes(value)

    def _number_or_error(self, line: bytes) -> int | redis.ResponseError:
        if line[:1] == b"-":
            return self._error(line[1:])
        if line[:1] != b":":
            raise redis.InvalidResponse(f"asked for a number, got {line[:32]!r}")
        return _number(line[1:])

    def _error(self, text: bytes) -> redis.ResponseError:
        error = BaseParser.parse_error(text.decode(errors="replace"))  # type: ignore[no-untyped-call]
        if isinstance(error, redis.ResponseError):
            return error
        raise error

    def _line(self, ahead: int) -> bytes:
        while (end := self._bytes.find(b"\r\n", self._low, self._high)) < 0:
            if self._high - self._low > _MAX_LINE_NBYTES:
                raise redis.InvalidResponse("a line of a reply does not end")
            self._fill(ahead)
        line = bytes(self._buffer[self._low : end])
        self._low = end + 2
        return line

    def _fill(self, ahead: int) -> None:
        unread = self._bytes[self._low : self._high]
        self._buffer[: len(unread)] = unread
        self._low, self._high = 0, len(unread)
        self._high += self._receive(self._buffer[self._high : self._high + ahead])

    def _from_buffer(self, target: memoryview) -> int:
        count = min(len(target), self._high - self._low)
        target[:count] = self._buffer[self._low : self._low + count]
        self._low += count
        return count

    def _receive(self, target: memoryview, *, whole: bool = False) -> int:
        count = self._open().receive(target, whole=whole)
        self.heard_at, self._has_news = self._clock(), True
        self._flowed += count
        if self._flowed >= FLOW_NBYTES:
            self.renew()
        return count

    def _open(self) -> Transport:
        if self._transport is None:
            raise redis.ConnectionError("the connection is closed; take another one")
        return self._transport

    def left(self) -> float:
        """Seconds that the server has left.

        Raises:
            redis.TimeoutError: none.
        """
        now = self._clock()
        left = self._until - now
        if left <= 0:
            if not (self._has_news and self._looks and now < self.ends_at):
                raise redis.TimeoutError("the server did not answer in time")
            self._has_news, self._looks, left = False, self._looks - 1, min(LOOK_S, self.ends_at - now)
        return left


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise redis.InvalidResponse(f"not a number: {text[:32]!r}") from None


def _length(text: bytes) -> int | None:
    length = _number(text)
    if length < -1:
        raise redis.InvalidResponse(f"a length cannot be {length}")
    return None if length == -1 else length
