"""A connection over which a Redis server speaks first: keyevents and client-side caching's invalidations, over RESP3.

Covers: what is subscribed to, what a message says, questions in between. Does not cover: what follows from it
(`watch`). redis-py reads and parses: these messages are small and nobody waits for them.

All methods raise redis.RedisError or OSError when the server or the way to it fails; then the connection must be
closed.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, NoPermissionError
from redis.retry import Retry

from kvstore.events import RemovalCause
from kvstore.redis.address import Address
from kvstore.redis.judgement import FLAGS, judge_events, missing_flags

CAUSES = {
    b"evicted": RemovalCause.EVICTED,
    b"expired": RemovalCause.EXPIRED,
    b"del": RemovalCause.CLEARED,
}
GRANTS = "+hello +ping +exists +dbsize +config|get +client|tracking +subscribe &__keyevent@*"


class Hearing(StrEnum):
    """How a server tells of removals."""

    EVENTS = "keyevents"
    HINTS = "invalidations"
    NONE = "not at all"


@dataclass(frozen=True, slots=True)
class Heard:
    """One message.

    Attributes:
        key: that may be gone; None: all keys may be.
        cause: as far as it says so. is_hint: the key may as well have been written.
    """

    key: bytes | None
    cause: RemovalCause = RemovalCause.ABSENT
    is_hint: bool = False


class PushConnection:
    """A connection; also a context manager. One thread uses it, any thread may `interrupt` it."""

    def __init__(self, address: Address, patience_s: float) -> None:
        """Connect and log in, within the patience; later it is the longest wait for one answer."""
        self._database = address.database
        self._messages: deque[Heard] = deque()
        self._lacks_flags = False
        self._patience_s = patience_s
        self._connection = address.kind(
            **address.settings,
            socket_timeout=patience_s,
            socket_connect_timeout=patience_s,
            retry=Retry(NoBackoff(), 0),
            protocol=3,
        )
        try:
            self._connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            self.close()
            raise
        parser: Any = self._connection._parser
        parser.set_pubsub_push_handler(_Push)
        parser.set_invalidation_push_handler(_Push)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        self._connection.disconnect()  # type: ignore[no-untyped-call]

    def interrupt(self) -> None:
        """Make whoever waits for a message or an answer fail at once."""
        sock = self._connection._sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def listen(self, prefix: bytes, *, may_configure: bool) -> tuple[Hearing, str]:
        """Have the server tell of keys that begin with `prefix`; in which way it will, and what would better that."""
        advice: list[str] = []
        notifies = self._notifies(may_configure, advice)
        is_subscribed = self._subscribe(advice)
        has_events = notifies and is_subscribed
        # Without hints one tracks no key at all: a flush is pushed to every tracking client all the same.
        tracked = prefix + b"~none" if has_events else prefix
        is_tracking = self._permitted(["CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", tracked, "NOLOOP"], advice)
        text = "; ".join(dict.fromkeys(advice))
        if has_events:
            return Hearing.EVENTS, text
        return (Hearing.HINTS if is_tracking else Hearing.NONE), text

    def could_hear_better(self) -> bool:
        """Whether the server tells of every removal by now, after it did not when `listen` asked."""
        return self._lacks_flags and self._notifies(False, [])

    def hear(self, wait_s: float) -> Iterator[Heard]:
        """What the server says now; the first message may take `wait_s`."""
        ends_at = time.monotonic() + wait_s
        while True:
            yield from self.heard_meanwhile()
            left = ends_at - time.monotonic()
            if not self._connection.can_read(timeout=max(0.0, left) if wait_s else 0.0):
                return
            wait_s = 0.0
            self._note(self._read())

    def heard_meanwhile(self) -> Iterator[Heard]:
        """What the server said while it was asked something."""
        while self._messages:
            yield self._messages.popleft()

    def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """For each key whether it is there. Of a key that lies on another node nobody can say: it counts as there."""
        packed = self._connection.pack_commands([("EXISTS", key) for key in keys])  # type: ignore[no-untyped-call]
        self._connection.send_packed_command(packed)  # type: ignore[no-untyped-call]
        answers = []
        for _ in keys:
            try:
                answers.append(self._answer() != 0)
            except (MovedError, AskError):
                answers.append(True)
        return answers

    def is_empty(self) -> bool:
        """Whether the database has no key at all; False: not known."""
        with suppress(redis.ResponseError):
            return bool(self._ask("DBSIZE") == 0)
        return False

    def ping(self) -> None:
        """Fail if the server does not answer."""
        self._ask("PING")

    def _notifies(self, may_configure: bool, advice: list[str]) -> bool:
        """Whether the server tells of every removal on its keyevent channels."""
        setting = "notify-keyspace-events"
        try:
            found = self._ask("CONFIG", "GET", setting)
        except redis.ResponseError:
            advice.append(_grant("CONFIG GET", f"and set {setting} {FLAGS}"))
            return False
        flags = found.get(setting.encode(), b"").decode() if isinstance(found, dict) else ""
        missing = missing_flags(flags)
        self._lacks_flags = bool(missing)
        if not missing:
            return True
        if may_configure and self._permitted(["CONFIG", "SET", setting, flags + missing], advice, "+config|set"):
            return True
        advice.extend(map(str, judge_events(flags)))
        return False

    def _subscribe(self, advice: list[str]) -> bool:
        channels = [f"__keyevent@{self._database}__:{event.decode()}" for event in CAUSES]
        self._connection.send_command("SUBSCRIBE", *channels)  # type: ignore[no-untyped-call]
        try:
            for _ in channels:
                while not self._note(self._read()):
                    continue
        except redis.ResponseError as error:
            advice.append(_grant("SUBSCRIBE", _said(error)))
            return False
        return True

    def _permitted(self, command: list[str | bytes], advice: list[str], grants: str = GRANTS) -> bool:
        try:
            self._ask(*command)
        except redis.ResponseError as error:
            words = " ".join(word if isinstance(word, str) else word.decode() for word in command[:2])
            advice.append(_grant(words, _said(error), grants))
            return False
        return True

    def _ask(self, *command: str | bytes) -> Any:
        self._connection.send_command(*command)  # type: ignore[no-untyped-call]
        return self._answer()

    def _answer(self) -> Any:
        while isinstance(reply := self._read(), _Push):
            self._note(reply)
        return reply

    def _read(self) -> Any:
        return self._connection.read_response(disable_decoding=True, push_request=True)

    def _note(self, reply: Any) -> bool:
        """Keep what a message says; whether it was the answer to SUBSCRIBE."""
        if not isinstance(reply, _Push) or not isinstance(reply.words, list) or len(reply.words) < 2:
            raise redis.InvalidResponse("the server pushed something that nobody asked for")
        kind, subject, *rest = reply.words
        if kind == b"message" and rest:
            event = bytes(subject).rpartition(b":")[2]
            self._messages.append(Heard(rest[0], CAUSES.get(event, RemovalCause.ABSENT)))
        elif kind == b"invalidate":
            keys = [None] if subject is None else subject
            self._messages.extend(Heard(key, is_hint=key is not None) for key in keys)
        return bool(kind == b"subscribe")


class _Push:
    """A message, as against an answer."""

    __slots__ = ("words",)

    def __init__(self, words: object) -> None:
        self.words = words


def _said(error: redis.ResponseError) -> str:
    return "" if isinstance(error, NoPermissionError) else f"({error})"


def _grant(command: str, more: str, grants: str = GRANTS) -> str:
    return f"the Redis server refuses {command} {more}".rstrip() + f"; grant it with ACL SETUSER name {grants}"
