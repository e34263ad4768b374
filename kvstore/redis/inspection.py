"""One look at a Redis server, over a connection like those of the tier: for a person who asks how it is set up."""

from __future__ import annotations

from dataclasses import dataclass

import redis

from kvstore.redis.facts import SETTINGS, ServerFacts, parse_info
from kvstore.redis.pool import WirePool
from kvstore.redis.resp import Reply, pack

_EVENTS = b"notify-keyspace-events"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a server told.

    Attributes:
        version: as it names it. facts: what it is and how it is set up.
        events: its `notify-keyspace-events`; None: this login may not ask.
        clock_s: its time, in seconds since the epoch; None: this login may not ask.
    """

    version: str
    facts: ServerFacts
    events: str | None
    clock_s: float | None


def inspect(url: str, patience_s: float) -> Inspection:
    """Ask the server at a plain URL; changes nothing.

    Raises:
        TierError: the URL cannot be used.
        redis.RedisError, OSError: the server cannot be reached in time, or refuses the login or INFO.
    """
    pool = WirePool(url, lambda wire: None)
    try:
        with pool.lease(patience_s) as wire:
            questions = [pack(b"CONFIG", b"GET", name) for name in (*SETTINGS, _EVENTS)]
            info, seconds, *settings = wire.ask_all([pack(b"INFO"), pack(b"TIME"), *questions])
    finally:
        pool.close()
    if isinstance(info, redis.ResponseError):
        raise info
    if not isinstance(info, bytes):
        raise redis.InvalidResponse("INFO is no text")
    facts = parse_info(info).with_settings(settings[: len(SETTINGS)])
    return Inspection(_version(info), facts, _value(settings[-1]), _moment(seconds))


def _version(info: bytes) -> str:
    """Valkey names the version of Redis that it is like, and its own."""
    lines = dict(line.split(":", 1) for line in info.decode(errors="replace").splitlines() if ":" in line)
    own = lines.get("valkey_version")
    return f"Valkey {own}" if own else f"version {lines.get('redis_version', 'unknown')}"


def _value(reply: Reply) -> str | None:
    if isinstance(reply, list) and len(reply) == 2 and isinstance(reply[1], bytes):
        return reply[1].decode(errors="replace")
    return None


def _moment(reply: Reply) -> float | None:
    if isinstance(reply, list) and len(reply) == 2 and all(isinstance(part, bytes) for part in reply):
        return float(reply[0]) + float(reply[1]) / 1e6
    return None
