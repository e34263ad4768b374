"""What is wrong with how a Redis server is set up, and what could be better, each with what to do.

Covers: judging facts (`facts`) that INFO and CONFIG told. Does not cover: asking (`link`, `inspection`), errors
(`facts.remedy`). Pure.

Wrong is what loses blocks, refuses them or endangers the server: `TierStats.problem` tells it. The rest is advice: it
stands in the log, in `RedisTier.advice` and in `warmkv doctor`. Of what nobody knows, because the server may not be
asked, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvstore.redis.facts import ServerFacts

FLAGS = "Egxe"  # of notify-keyspace-events: generic commands (del), expired and evicted keys, by event
LEAST_BLOCKS = 64  # that a server should have room for

_MIB = 1 << 20
_MEMORY_SHARE = 0.9  # of the machine's; what goes beyond it is swapped or killed
_NEARLY_FULL = 0.9  # of maxmemory
_OVERFULL = 1.1


class Advice(NamedTuple):
    """One thing.

    Attributes:
        found: what is so. remedy: what to do. is_wrong: or else it could only be better.
    """

    found: str
    remedy: str
    is_wrong: bool = True

    def __str__(self) -> str:
        return f"{self.found}; {self.remedy}"


def judge(facts: ServerFacts, *, in_cluster: bool = False, block_nbytes: int = 0) -> list[Advice]:
    """All that can be said of a server; empty when it is set up well or nothing is known of it.

    Args:
        in_cluster: whether it is spoken to as a node of one. block_nbytes: of the blocks; zero: not known.
    """
    if not facts.run_id:
        return []
    if facts.cluster and not in_cluster:
        remedy = "write redis+cluster:// instead of redis:// in the Redis URL"
        return [Advice("the Redis server is a cluster node", remedy)]
    return [*_memory(facts), *_room(facts, block_nbytes), *_disk(facts), *_clients(facts), *_version(facts)]


def judge_events(flags: str) -> list[Advice]:
    """What `notify-keyspace-events` lacks for a watch to hear of removals themselves."""
    missing = missing_flags(flags)
    if not missing:
        return []
    return [
        Advice(
            "the Redis server does not tell of removals itself (hints and samples do, later)",
            f"CONFIG SET notify-keyspace-events {flags + missing} there, or set redis.watch=configure here",
            is_wrong=False,
        )
    ]


def missing_flags(flags: str) -> str:
    """Those of FLAGS that a value of `notify-keyspace-events` does not hold; A stands for all classes of events."""
    return "".join(flag for flag in FLAGS if flag not in flags and not (flag != "E" and "A" in flags))


def _memory(facts: ServerFacts) -> Iterator[Advice]:
    limit, used = facts.maxmemory, facts.used_memory
    if not limit:
        remedy = "set maxmemory and maxmemory-policy allkeys-lru"
        yield Advice("the Redis server has no memory limit and will grow", remedy)
        return
    if facts.policy == "noeviction":
        left = f" ({max(0, limit - used) // _MIB} MiB are left)" if used > _NEARLY_FULL * limit else ""
        found = f"the Redis server evicts nothing and refuses writes at {limit // _MIB} MiB{left}"
        yield Advice(found, "set maxmemory-policy allkeys-lru")
    elif facts.policy.startswith("volatile-"):
        found = f"the Redis server evicts by {facts.policy}: blocks without a TTL stay for ever and fill it up"
        yield Advice(found, "set maxmemory-policy allkeys-lru", is_wrong=False)
    if facts.system_memory and limit > _MEMORY_SHARE * facts.system_memory:
        found = (
            f"the Redis server may fill {limit // _MIB} of its machine's {facts.system_memory // _MIB} MiB "
            "and will be swapped or killed"
        )
        yield Advice(found, "set maxmemory to three quarters of that")


def _room(facts: ServerFacts, block_nbytes: int) -> Iterator[Advice]:
    limit = facts.maxmemory
    evictable = facts.used_memory - facts.uncounted_memory
    if limit and facts.policy != "noeviction" and evictable > _OVERFULL * limit:
        found = f"the Redis server uses {evictable // _MIB} of {limit // _MIB} MiB and cannot evict enough"
        yield Advice(found, "look for clients that do not read (CLIENT LIST), or raise maxmemory")
    if limit and limit < LEAST_BLOCKS * block_nbytes:
        found = f"the Redis server has room for {limit // block_nbytes} blocks of {block_nbytes} bytes at most"
        yield Advice(found, "raise maxmemory", is_wrong=False)


def _disk(facts: ServerFacts) -> Iterator[Advice]:
    settings = (("appendonly no", facts.appends), ("save ''", facts.saves))
    remedy = " and ".join(name for name, is_on in settings if is_on)
    if remedy:
        found = "the Redis server writes every block to its disk, too, which a cache does not need"
        yield Advice(found, f"set {remedy}")


def _clients(facts: ServerFacts) -> Iterator[Advice]:
    if facts.limits_clients is False:
        found = (
            "the Redis server counts its clients' buffers as its own memory without a limit, and a slow reader can "
            "push blocks out"
        )
        yield Advice(found, "set maxmemory-clients 10%", is_wrong=False)


def _version(facts: ServerFacts) -> Iterator[Advice]:
    if not facts.can_only_lengthen:
        found = "the Redis server is older than 7.0, so TTLs are lengthened by a script"
        yield Advice(found, "upgrade it", is_wrong=False)
