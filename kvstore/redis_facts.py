"""What a Redis server says of itself, and what a person should do about it.

Covers: reading INFO, judging the configuration, turning an error into words that end with a remedy. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import redis

GRANTS = "~warmkv:* +get +getrange +strlen +set +exists +pexpire +pttl +touch +unlink +scan +info +eval +evalsha"
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """One look at INFO.

    Attributes:
        version: (major, minor); (0, 0) unknown.
        run_id: changes with every start of the server; empty: unknown.
        maxmemory, used_memory: bytes, of the whole server. policy: what it evicts when it is full.
        cluster: whether it is a node of a cluster.
    """

    version: tuple[int, int] = (0, 0)
    run_id: str = ""
    maxmemory: int = 0
    used_memory: int = 0
    policy: str = ""
    cluster: bool = False

    @property
    def can_only_lengthen(self) -> bool:
        """Whether EXPIRE knows GT."""
        return self.version >= (7, 0)

    def advice(self) -> str:
        """What is wrong with its configuration and what to do; empty when nothing is or nothing is known."""
        if not self.run_id:
            return ""
        if self.cluster:
            return "the Redis server is a cluster node, which is not supported; name a standalone server"
        if not self.maxmemory:
            return "the Redis server has no memory limit and will grow; set maxmemory and maxmemory-policy allkeys-lru"
        if self.policy == "noeviction":
            return (
                f"the Redis server evicts nothing and refuses writes at {self.maxmemory // _MIB} MiB; "
                "set maxmemory-policy allkeys-lru"
            )
        return ""


def parse_info(text: bytes) -> ServerFacts:
    """Facts out of the reply to INFO; what is missing or odd stays unknown."""
    lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
    found = {name: value.strip() for name, colon, value in lines if colon}
    return ServerFacts(
        version=_version(found.get("redis_version", "")),
        run_id=found.get("run_id", ""),
        maxmemory=_whole(found.get("maxmemory", "")),
        used_memory=_whole(found.get("used_memory", "")),
        policy=found.get("maxmemory_policy", ""),
        cluster=found.get("cluster_enabled") == "1",
    )


def remedy(error: Exception, where: str, said: str) -> str:
    """One line: what went wrong at `where` (a masked URL), and what to do. `said`: the error's own words, masked."""
    if isinstance(error, redis.AuthenticationError):
        return f"{where} refused the login; put the right user and password into the Redis URL"
    if isinstance(error, redis.exceptions.NoPermissionError):
        return f"{where} forbids a command to this user; grant it with ACL SETUSER name {GRANTS}"
    if isinstance(error, redis.BusyLoadingError):
        return f"{where} is loading its data; wait, or turn its persistence off (save '', appendonly no)"
    if isinstance(error, redis.OutOfMemoryError):
        return f"{where} is full and evicts nothing; set maxmemory-policy allkeys-lru or raise maxmemory"
    if isinstance(error, redis.ReadOnlyError):
        return f"{where} is a read-only replica; name its primary in the Redis URL"
    if isinstance(error, redis.exceptions.MovedError | redis.exceptions.AskError):
        return f"{where} is a cluster node, which is not supported; name a standalone server"
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return f"{where} does not answer in time; check the server and the network, or raise the Redis timeout"
    if isinstance(error, redis.InvalidResponse):
        return f"{where} does not speak RESP ({said}); check that the Redis URL names a Redis server"
    if isinstance(error, redis.ResponseError):
        return f"{where} refused a command ({said}); check the server's version and log"
    return f"{where} cannot be reached ({said}); start the server or correct the Redis URL"


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    return _whole(major), _whole(rest.partition(".")[0])


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0
