"""What a Redis server says of itself, and what a person should do about it.

Covers: reading INFO and CONFIG, turning an error into words that end with a remedy. Does not cover: judging what was
read (`judgement`). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import redis

GRANTS = (
    "~warmkv:* +hset +hmget +hget +hstrlen +multi +exec +exists +pexpire +persist +pttl +touch +unlink +scan +info "
    "+ping +eval +evalsha +cluster|slots"
)
SETTINGS = (b"save", b"maxmemory-clients")  # what INFO does not tell; users often may not ask for it


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """One look at INFO, and at CONFIG where that is allowed.

    Attributes:
        version: (major, minor); (0, 0) unknown.
        run_id: changes with every start of the server; empty: unknown.
        maxmemory, used_memory: bytes, of the whole server; of the latter `uncounted_memory` does not count against the
            limit. policy: what it evicts when it is full.
        cluster: whether it is a node of a cluster.
        data: names what it holds (the server's replication id); data_before: what it held as a replica, before it
            became a primary.
        system_memory: bytes of the machine; zero: unknown.
        appends, saves: whether it logs every write to disk, and whether it writes all it holds there at times.
        limits_clients: whether buffers of its clients are limited together; None: unknown, or it cannot.
    """

    version: tuple[int, int] = (0, 0)
    run_id: str = ""
    maxmemory: int = 0
    used_memory: int = 0
    policy: str = ""
    cluster: bool = False
    data: str = ""
    data_before: str = ""
    system_memory: int = 0
    appends: bool = False
    saves: bool = False
    limits_clients: bool | None = None
    uncounted_memory: int = 0

    def with_settings(self, replies: Sequence[object]) -> ServerFacts:
        """The same with the replies to CONFIG GET of each of SETTINGS; what was refused stays unknown."""
        save, clients = (r[1] if isinstance(r, list) and len(r) == 2 else None for r in replies)
        return replace(
            self,
            saves=isinstance(save, bytes) and save.strip() not in (b"", b'""'),
            limits_clients=clients != b"0" if isinstance(clients, bytes) else None,
        )

    def inherits(self, earlier: ServerFacts) -> bool:
        """Whether it goes on with what an earlier run, or another server, held: after a failover, or from a file."""
        return bool(earlier.data.strip("0")) and earlier.data in (self.data, self.data_before)

    @property
    def can_only_lengthen(self) -> bool:
        """Whether EXPIRE knows GT."""
        return self.version >= (7, 0)


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
        data=found.get("master_replid", ""),
        data_before=found.get("master_replid2", ""),
        system_memory=_whole(found.get("total_system_memory", "")),
        appends=found.get("aof_enabled") == "1",
        uncounted_memory=_whole(found.get("mem_not_counted_for_evict", "")),
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
        return f"{where} is a cluster node; write redis+cluster:// instead of redis:// in the Redis URL"
    if isinstance(error, redis.TimeoutError | TimeoutError):
        tls = ", see whether it speaks TLS" if where.startswith("rediss") else ""
        return f"{where} does not answer in time; check the server and the network{tls}, or raise the Redis timeout"
    if isinstance(error, redis.InvalidResponse):
        return f"{where} does not speak RESP ({said}); check that the Redis URL names a Redis server"
    if isinstance(error, redis.ResponseError):
        return f"{where} refused a command ({said}); check the server's version and log"
    if trouble := _tls_trouble(where, said):
        return f"{where} {trouble}"
    return f"{where} cannot be reached ({said}); start the server or correct the Redis URL"


def tls_words(said: str) -> str:
    """What TLS itself says in the text of an error; empty: nothing."""
    found = re.search(r"\[SSL[^\]]*\][^()\"']*", said)
    return found.group().strip() if found else ""


def _tls_trouble(where: str, said: str) -> str:
    """What is wrong with certificates and what to do; empty when an error is not about them."""
    words = tls_words(said)
    if "mismatch" in words or "not valid for" in words:
        return f"shows a certificate for another name ({words}); write the name that it is for into the Redis URL"
    if "has expired" in words or "not yet valid" in words:
        return f"shows a certificate that is out of date ({words}); renew it, and compare the clocks"
    if "CERTIFICATE_VERIFY_FAILED" in words:
        return (
            f"shows a certificate of an authority that is unknown here ({words}); "
            "name the authority's file with ssl_ca_certs=FILE in the Redis URL"
        )
    if "ALERT" in words:
        return (
            f"does not accept our certificate, or wants one ({words}); name one that it trusts with "
            "ssl_certfile=FILE&ssl_keyfile=FILE in the Redis URL"
        )
    if words:
        return f"and we do not agree on TLS ({words}); check that it speaks TLS, and the files in the Redis URL"
    if "EOF occurred in violation of protocol" in said:
        return (
            "hung up in the middle of TLS; start the server, or, if it wants to see a certificate, name one with "
            "ssl_certfile=FILE&ssl_keyfile=FILE in the Redis URL"
        )
    if where.startswith("rediss") and "No such file" in said:
        return "needs a file that is not on this machine; put the files that the Redis URL names on every node"
    return ""


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    return _whole(major), _whole(rest.partition(".")[0])


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0
