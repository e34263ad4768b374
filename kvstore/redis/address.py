"""Redis URLs: what they say, and how a connection to what they name is opened.

Covers: a standalone server, the primary behind Sentinel, the seeds of a cluster; logins kept out of logs. Does not
cover: login itself (`pool`, redis-py), what travels (`resp`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import redis
from redis.connection import AbstractConnection, Connection, parse_url

from kvstore.errors import TierError
from kvstore.redis.sentinel import DEFAULT_SENTINEL_PORT, PrimaryOf

_AFTER_SCHEME = re.compile(r"([^/?#]*)([^?#]*)(?:\?([^#]*))?(?:#.*)?", re.DOTALL)

URL_FORMS = (
    "redis://[user:password@]host[:port][/db], rediss://... (TLS), unix://[user:password@]/path[?db=0], "
    "redis+sentinel://[user:password@]sentinel[:port][,sentinel[:port]...]/service[/db] or "
    "redis+cluster://[user:password@]node[:port][,node[:port]...]"
)
DEFAULT_PORT = 6379

# Ours to set; a URL's would undo what the tier promises.
_OURS = ("socket_timeout", "socket_connect_timeout", "protocol", "retry_on_timeout", "retry_on_error")
_OF_SENTINELS = ("sentinel_username", "sentinel_password")


class Address(NamedTuple):
    """What a URL names.

    Attributes:
        kind: makes a connection of `settings` and the caller's own; behind Sentinel it asks for the primary first, in
            the caller's `socket_connect_timeout`, and raises redis.RedisError when nobody knows one.
        settings: redis-py's, without timeouts.
    """

    kind: Callable[..., AbstractConnection]
    settings: dict[str, Any]

    @property
    def database(self) -> int:
        """Its number."""
        return int(self.settings.get("db") or 0)

    def masked(self, text: str) -> str:
        """`text` without the password, which a server may echo in an error."""
        password = self.settings.get("password")
        return text.replace(password, "***") if password else text


def mask_url(url: str) -> str:
    """The URL without its login, fit for logs."""
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"://.*@", "://***@", url))


def is_cluster(url: str) -> bool:
    """Whether the URL names a cluster."""
    return _split(url).scheme in ("redis+cluster", "rediss+cluster")


def parse_address(url: str) -> Address:
    """What a URL of a standalone server or of Sentinel names. Connects to nothing.

    Raises:
        TierError: the URL cannot be used.
    """
    try:
        if _split(url).scheme in ("redis+sentinel", "rediss+sentinel"):
            return _sentinel(url)
        return _standalone(url)
    except (ValueError, TypeError, redis.RedisError):
        raise _unusable(url) from None  # without the cause: its text may hold a piece of the password


def parse_seeds(url: str) -> list[str]:
    """One URL of a standalone server for each node that the URL of a cluster names.

    Raises:
        TierError: the URL cannot be used.
    """
    try:
        scheme, login, hosts, path, query = _pieces(url, DEFAULT_PORT)
        if path.strip("/") not in ("", "0"):
            raise ValueError("a cluster has one database, number 0")
        seeds = [f"{scheme}://{login}{_authority(host, port)}{query}" for host, port in hosts]
        for seed in seeds:
            _standalone(seed)
    except (ValueError, TypeError, redis.RedisError):
        raise _unusable(url) from None
    return seeds


def server_urls(url: str, patience_s: float) -> list[str]:
    """Plain URLs of the servers that a URL stands for now: itself, the primary (the sentinels are asked), the seeds.

    Raises:
        TierError: the URL cannot be used.
        redis.RedisError: no sentinel knows the primary.
    """
    if is_cluster(url):
        return parse_seeds(url)
    kind, settings = parse_address(url)
    if not isinstance(kind, PrimaryOf):
        return [url]
    host, port = kind.find(time.monotonic() + patience_s, settings)
    scheme, login, _, path, query = _pieces(url, DEFAULT_SENTINEL_PORT)
    kept = [word for word in query[1:].split("&") if word and word.partition("=")[0] not in _OF_SENTINELS]
    options = f"?{'&'.join(kept)}" if kept else ""
    return [f"{scheme}://{login}{_authority(host, port)}/{path.strip('/').partition('/')[2]}{options}"]


def at_node(seed: str, host: str, port: int) -> str:
    """The URL of another node of the cluster to which `seed` belongs, with the same login and options."""
    scheme, login, _, _, query = _pieces(seed, DEFAULT_PORT)
    return f"{scheme}://{login}{_authority(host, port)}{query}"


def _standalone(url: str) -> Address:
    settings = parse_url(url)  # type: ignore[no-untyped-call]
    kind = settings.pop("connection_class", Connection)
    kind(**settings)  # opens nothing; refuses options that it does not know
    for ours in _OURS:
        settings.pop(ours, None)
    return Address(kind, settings)


def _sentinel(url: str) -> Address:
    scheme, login, hosts, path, query = _pieces(url, DEFAULT_SENTINEL_PORT)
    service, _, database = path.strip("/").partition("/")
    if not service or "/" in database or (database and not database.isdigit()):
        raise ValueError("no service")
    server = parse_url(f"{scheme}://{login}host/{database}{query}")  # type: ignore[no-untyped-call]
    login_of_sentinels = {name.removeprefix("sentinel_"): server.pop(name, None) for name in _OF_SENTINELS}
    kind = server.pop("connection_class", Connection)
    kind(**server)
    for ours in (*_OURS, "host", "port"):
        server.pop(ours, None)
    return Address(PrimaryOf(service, hosts, kind=kind, login=login_of_sentinels), server)


def _split(url: str) -> SplitResult:
    """As `urlsplit`, which in some versions of Python refuses an address in brackets behind another host."""
    scheme, found, rest = url.partition("://")
    parts = _AFTER_SCHEME.fullmatch(rest if found else "")
    netloc, path, query = parts.groups(default="") if parts else ("", "", "")
    return SplitResult(scheme.lower() if found else "", netloc, path, query, "")


def _pieces(url: str, default_port: int) -> tuple[str, str, list[tuple[str, int]], str, str]:
    """(scheme, `login@`, hosts with ports, path, `?query`)."""
    parts = _split(url)
    login, at, hosts = parts.netloc.rpartition("@")
    found = [_host(text, default_port) for text in hosts.split(",")]
    return parts.scheme.partition("+")[0], login + at, found, parts.path, f"?{parts.query}" if parts.query else ""


def _host(text: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a host is missing")
    return parts.hostname, parts.port or default_port


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _unusable(url: str) -> TierError:
    return TierError(
        f"{mask_url(url)} is no Redis URL that can be used; write {URL_FORMS}, "
        "and percent-encode what is special in a password"
    )
