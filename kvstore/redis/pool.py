"""Connections to one Redis server: opened by redis-py from a URL, logged in, kept while they are idle.

Covers: login, which connection is fit for use. Does not cover: URLs (`address`), what travels (`resp`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.redis.address import URL_FORMS as URL_FORMS
from kvstore.redis.address import mask_url as mask_url
from kvstore.redis.address import parse_address
from kvstore.redis.resp import Reply, Wire
from kvstore.tier import Clock

MAX_IDLE = 8


class WirePool:
    """Connections to one server, opened as they are needed. Thread-safe.

    Keeps at most MAX_IDLE idle ones, the last used on top, so that the others grow old and the server may close them.
    """

    def __init__(self, url: str, greet: Callable[[Wire], None], *, clock: Clock = time.monotonic) -> None:
        """Connect to nothing yet.

        Args:
            url: see URL_FORMS.
            greet: called with every new connection before its first use.
            clock: real seconds; sockets wait by no other.

        Raises:
            TierError: the URL cannot be used.
        """
        self._address = parse_address(url)
        self._greet = greet
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._is_open = True

    @contextmanager
    def lease(self, patience_s: float, ends_at: float = float("inf")) -> Iterator[Wire]:
        """A connection for the time of the block, renewed once; any exception that leaves the block closes it.

        Raises:
            redis.ConnectionError, redis.TimeoutError: none can be opened in time.
        """
        wire = self._take(patience_s, ends_at)
        try:
            yield wire
        except BaseException:
            wire.close()
            raise
        self._give(wire)

    def masked(self, text: str) -> str:
        """`text` without the password, which a server may echo in an error."""
        return self._address.masked(text)

    def close(self) -> None:
        """Close the idle connections, and the others when they come back."""
        with self._lock:
            self._is_open = False
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _take(self, patience_s: float, ends_at: float) -> Wire:
        while (wire := self._pop()) is not None:
            if wire.is_quiet():
                wire.patience_s, wire.ends_at = patience_s, ends_at
                wire.renew()
                return wire
            wire.close()
        return self._connect(patience_s, ends_at)

    def _pop(self) -> Wire | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give(self, wire: Wire) -> None:
        with self._lock:
            if self._is_open and len(self._idle) < MAX_IDLE:
                self._idle.append(wire)
                return
        wire.close()

    def _connect(self, patience_s: float, ends_at: float) -> Wire:
        wire = Wire(self._clock)
        wire.patience_s, wire.ends_at = patience_s, ends_at
        wire.renew()
        left = wire.left()
        ours: dict[str, Any] = {
            "socket_timeout": left,
            "socket_connect_timeout": left,
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": wire.attach,  # in place of redis-py's first words, two of which nobody here needs
        }
        connection = self._address.kind(**self._address.settings, **ours)
        try:
            connection.connect()  # type: ignore[no-untyped-call]
            self._log_in(wire)
            self._greet(wire)
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        return wire

    def _log_in(self, wire: Wire) -> None:
        settings = self._address.settings
        user, password = settings.get("username"), settings.get("password")
        if user or password:
            words = [password or ""] if user is None else [user, password or ""]
            _expect_ok(wire.ask(b"AUTH", *(word.encode() for word in words)))
        if database := self._address.database:
            _expect_ok(wire.ask(b"SELECT", b"%d" % database))


def _expect_ok(reply: Reply) -> None:
    if isinstance(reply, redis.ResponseError):
        raise reply
    if reply != b"OK":
        raise redis.InvalidResponse(f"the server answered a login with {reply!r:.64}")
