"""What operators' orders are on one rank: carried out by every rank alike, answered in plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvstore.errors import StoreError
from kvstore.events import TierName
from workers.engine_cache import EngineCache

# Status of a rank that has no shared tier's clears to do: (ended, negated failures).
NO_CLEARS = (1 << 62, 0)


class Reply(NamedTuple):
    """What came of an order on one rank: numbers by tier, or under an empty name; and what failed."""

    counts: dict[str, int]
    error: str


def carry_out(cache: EngineCache, name: str, arguments: Sequence[Any]) -> Reply:
    """Do it on this rank.

    Raises:
        KeyError: no such order.
    """
    try:
        return Reply(_ORDERS[name](cache, *arguments), "")
    except StoreError as error:
        return Reply({}, f"{error}")


def _clear(cache: EngineCache, root: Any, prefix: Any) -> dict[str, int]:
    return _by_name(cache.clear(root=root, prefix=prefix))


def _prefetch(cache: EngineCache, hashes: Any, root: Any, lifetime: Any) -> dict[str, int]:
    return {"": cache.prefetch(hashes, root=root, lifetime=lifetime)}


def _lease(cache: EngineCache, hashes: Any, for_s: Any) -> dict[str, int]:
    return _by_name(cache.lease(hashes, for_s))


def _end_leases(cache: EngineCache, hashes: Any) -> dict[str, int]:
    return _by_name(cache.end_leases(hashes))


def _check(cache: EngineCache) -> dict[str, int]:
    cache.check()
    return {}


def _share_running(cache: EngineCache) -> dict[str, int]:
    return {"": int(cache.share_running())}


def _owes_peers(cache: EngineCache) -> dict[str, int]:
    return {"": int(cache.owes_peers())}


def _by_name(counts: dict[TierName, int]) -> dict[str, int]:
    return {tier.value: count for tier, count in counts.items()}


_ORDERS: dict[str, Callable[..., dict[str, int]]] = {
    "clear": _clear,
    "prefetch": _prefetch,
    "lease": _lease,
    "end_leases": _end_leases,
    "check": _check,
    "share_running": _share_running,
    "owes_peers": _owes_peers,
}
