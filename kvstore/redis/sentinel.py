"""The primary behind Redis Sentinel: asked for at every new connection, so that a failover needs nothing else.

Covers: asking the sentinels in turn within the caller's time. Does not cover: URLs (`address`), what becomes of
connections to the old primary (the sentinels close them; one that does not know yet that it is a replica refuses writes
and the connection is closed by us).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from kvstore.redis.facts import tls_words

DEFAULT_SENTINEL_PORT = 26379

Host = tuple[str, int]


class PrimaryOf:
    """Makes connections to whichever server the sentinels call the primary of a service now. Thread-safe."""

    def __init__(
        self,
        service: str,
        sentinels: Sequence[Host],
        *,
        kind: Callable[..., AbstractConnection],
        login: Mapping[str, str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask nobody yet.

        Args:
            service: what the sentinels call it (`sentinel monitor NAME ...`).
            sentinels: host and port of each.
            kind: of connection to the primary; with TLS the sentinels are spoken to with TLS, too.
            login: `username` and `password` for the sentinels themselves; None: without.
        """
        self._service = service
        self._sentinels = list(sentinels)
        self._kind = kind
        self._login = dict(login)
        self._clock = clock

    def __call__(self, **settings: Any) -> AbstractConnection:
        """A connection, not yet opened, whose timeouts are what the asking has left of `socket_connect_timeout`.

        Raises:
            redis.ConnectionError: no sentinel knows a primary. redis.TimeoutError: none answered in time.
        """
        patience_s = settings["socket_connect_timeout"]
        ends_at = self._clock() + patience_s
        host, port = self.find(ends_at, settings)
        left = self._left(ends_at)
        settings.update(socket_timeout=min(left, settings["socket_timeout"]), socket_connect_timeout=left)
        return self._kind(host=host, port=port, **settings)

    def find(self, ends_at: float, settings: Mapping[str, Any]) -> Host:
        """Where the primary is, by the first sentinel that knows; from now on that one is asked first.

        Each gets an equal share of the time that is left, so that a silent one cannot use up that of the others.

        Args:
            ends_at: on the clock. settings: of connections to the primary, for TLS.

        Raises:
            as `__call__`.
        """
        hosts = self._sentinels
        silent, said = 0, ""
        for i, host in enumerate(hosts):
            share = self._left(ends_at) / (len(hosts) - i)
            try:
                primary = self._ask(host, share, settings)
            except redis.TimeoutError:
                silent += 1
                continue
            except (redis.RedisError, OSError) as error:
                said = said or tls_words(str(error))
                continue
            self._sentinels = [host, *(other for other in hosts if other != host)]
            return primary
        asked = ", ".join(f"{host}:{port}" for host, port in hosts)
        if silent == len(hosts):
            raise redis.TimeoutError(f"no sentinel of {asked} answered in time")
        if said:
            raise redis.ConnectionError(f"no sentinel of {asked} could be asked: {said}")
        raise redis.ConnectionError(
            f"no sentinel of {asked} knows a living primary called {self._service!r}; "
            "compare the name with SENTINEL MASTERS, and check the logins of the sentinels"
        )

    def _ask(self, host: Host, share: float, settings: Mapping[str, Any]) -> Host:
        """What one sentinel says. Connecting and answering have half of the share each."""
        security = {name: value for name, value in settings.items() if name.startswith("ssl_")}
        asking = {
            **{name: value for name, value in self._login.items() if value is not None},
            **({"ssl": True, **security} if speaks_tls(self._kind) else {}),
            "socket_connect_timeout": share / 2,
            "socket_timeout": share / 2,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        sentinel = Sentinel([host], sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
        (client,) = sentinel.sentinels
        try:  # not by `discover_master`, whose error does not say what was wrong
            masters: Any = client.sentinel_masters()
            state = masters.get(self._service)
        finally:
            client.close()
        if not state or not sentinel.check_master_state(state, self._service):  # type: ignore[no-untyped-call]
            raise MasterNotFoundError(f"it knows no living primary called {self._service!r}")
        return str(state["ip"]), int(state["port"])

    def _left(self, ends_at: float) -> float:
        left = ends_at - self._clock()
        if left <= 0:
            raise redis.TimeoutError("the sentinels did not name the primary in time")
        return left


def speaks_tls(kind: Callable[..., AbstractConnection]) -> bool:
    """Whether connections of this kind speak TLS."""
    return isinstance(kind, type) and issubclass(kind, redis.SSLConnection)
