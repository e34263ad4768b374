"""Eviction by name: the store's policies, and what a tier asks for one by. Pure, on an injected clock; knows no bytes.

Which entries may go is the same for all (`entries`); which of them goes first is the policy's, each in a module
of its own (`order` says what one is). `bench.eviction` compares them on recorded traces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from kvstore.eviction.arc import ArcOrder
from kvstore.eviction.entries import Eviction as Eviction
from kvstore.eviction.lfu_da import LfuDaOrder
from kvstore.eviction.lru import LruOrder
from kvstore.eviction.order import Hint as Hint
from kvstore.eviction.order import Key, Order
from kvstore.eviction.priority import PriorityOrder
from kvstore.eviction.quota import QuotaOrder
from kvstore.eviction.reuse import ReuseOrder
from kvstore.eviction.s3fifo import S3FifoOrder
from kvstore.eviction.tail import DEFAULT_SPARE_BLOCKS, TailOrder
from kvstore.tier import BlockMeta, Clock

_ORDERS: dict[str, Callable[[Clock, int, int], Order[Any]]] = {
    "lru": lambda clock, capacity, spare: LruOrder(),
    "s3fifo": lambda clock, capacity, spare: S3FifoOrder(capacity),
    "lfu_da": lambda clock, capacity, spare: LfuDaOrder(),
    "arc": lambda clock, capacity, spare: ArcOrder(capacity),
    "tail_optimized": lambda clock, capacity, spare: TailOrder(spare),
    "priority": lambda clock, capacity, spare: PriorityOrder(),
    "reuse": lambda clock, capacity, spare: ReuseOrder(clock, capacity),
}
POLICIES = tuple(_ORDERS)


class LRU(Eviction[Key]):
    """Least recently used first, with a lifetime for each entry."""

    def __init__(self, clock: Clock, *, wall_clock: Clock = time.time) -> None:
        super().__init__(clock, LruOrder(), wall_clock=wall_clock)


def make_eviction(
    name: str,
    clock: Clock,
    capacity: int,
    *,
    wall_clock: Clock = time.time,
    spare_blocks: int = DEFAULT_SPARE_BLOCKS,
    shares: Mapping[Hashable, int] | None = None,
) -> Eviction[Key]:
    """Eviction by the policy of that name for a tier of `capacity` entries.

    Args:
        name: one of `POLICIES`.
        clock: what times to live, leases and `reuse` go by, in seconds.
        capacity: entries that fit.
        wall_clock: seconds since the epoch, for lifetimes with a fixed end.
        spare_blocks: for `tail_optimized`: what a turn may compute again, from `tail.spare_blocks`.
        shares: quotas, in entries by root; see `quota`. None: all share everything.

    Raises:
        ValueError: there is none of that name, or the shares are more than the capacity.
    """
    if name not in _ORDERS:
        raise ValueError(f"unknown eviction policy {name!r}; choose one of {', '.join(POLICIES)}")

    def make(entries: int) -> Order[Key]:
        return _ORDERS[name](clock, entries, spare_blocks)

    order = make(capacity) if shares is None else QuotaOrder(make, capacity, shares)
    return Eviction(clock, order, wall_clock=wall_clock)


def hint_of(meta: BlockMeta) -> Hint:
    """What policies are told of a block."""
    return Hint(meta.hash, meta.before, meta.root, meta.priority, turn=meta.turn)
