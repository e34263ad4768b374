"""How much a store of these sizes holds of a model, and which tier is fast enough: what `warmkv size` answers. Pure.

Covers: capacities as each tier really divides them (headers, pages, whole blocks), whole conversations, break-even
bandwidth. The arithmetic is `kvstore.sizing`, the layout comes from `model_shape`. Does not cover: measuring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvstore.disk.slab import slot_nbytes
from kvstore.layout import KVLayout
from kvstore.redis.values import TAIL_NBYTES
from kvstore.sizing import TierPlan, TierSize, break_even_bytes_per_s, size_tier

# Of one block beside its second field: header and tail, the key, the server's own records of a hash; rounded up.
_REDIS_RECORD_NBYTES = 1024
_STRING_NBYTES = 9  # of a string's own header


@dataclass(frozen=True, slots=True)
class SizedTier:
    """One tier of the plan.

    Attributes:
        name: of the tier. shared: one for the whole fleet; else every worker has one. capacity_bytes: as given.
        size: what fits into it, for one worker or, of a shared tier, for the fleet.
        conversations: how many of the plan's length fit. bytes_per_s: as given; zero: not known.
    """

    name: str
    shared: bool
    capacity_bytes: int
    size: TierSize
    conversations: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class SizePlan:
    """The answer.

    Attributes:
        layout: of a block. workers: how many the fleet has. conversation_tokens: length of the conversations counted.
        prefill_tokens_per_s: of one worker; None: not known. break_even_bytes_per_s: below it computing is faster.
        tiers: those with a capacity, fastest first.
    """

    layout: KVLayout
    workers: int
    conversation_tokens: int
    prefill_tokens_per_s: float | None
    break_even_bytes_per_s: float | None
    tiers: tuple[SizedTier, ...]


def plan_sizes(
    layout: KVLayout,
    capacities: Mapping[str, int],
    *,
    workers: int,
    conversation_tokens: int,
    prefill_tokens_per_s: float | None = None,
    bandwidths: Mapping[str, float] | None = None,
) -> SizePlan:
    """Size every tier that has a capacity.

    Args:
        capacities: bytes by tier: `device`, `host`, `disk` of one worker, `redis` of the fleet; zero: no such tier.
        bandwidths: bytes a second by tier, as far as they are known.

    Raises:
        ValueError: the prefill rate or the length of conversations is not positive.
    """
    if conversation_tokens < 1:
        raise ValueError(f"conversations of {conversation_tokens} tokens; give at least 1")
    speeds = bandwidths or {}
    tiers = []
    for name, capacity in capacities.items():
        if not capacity:
            continue
        plan = replace(_plan(name, capacity, layout.block_nbytes), bytes_per_s=speeds.get(name, 0.0))
        size = size_tier(layout, plan, prefill_tokens_per_s or 1.0)
        if prefill_tokens_per_s is None:
            size = replace(size, speedup=None, worth_tokens=None)
        each = max(1, conversation_tokens // layout.block_size)
        tiers.append(SizedTier(name, name == "redis", capacity, size, size.blocks // each, plan.bytes_per_s))
    rate = prefill_tokens_per_s
    break_even = None if rate is None else break_even_bytes_per_s(layout, rate)
    return SizePlan(layout, workers, conversation_tokens, rate, break_even, tuple(tiers))


def _plan(name: str, capacity: int, block_nbytes: int) -> TierPlan:
    """A tier as it divides its capacity: device and host in bare blocks, disk in pages, Redis as its allocator does."""
    if name == "disk":
        page = slot_nbytes(0)  # before each block, and once at the head of the file
        return TierPlan(max(0, capacity - page), overhead_bytes=page, align_bytes=page)
    if name == "redis":
        return TierPlan(capacity, overhead_bytes=_redis_overhead(block_nbytes))
    return TierPlan(capacity)


def _redis_overhead(block_nbytes: int) -> int:
    """What jemalloc adds: between two powers of two it knows four sizes. The tail goes with the header (`values`)."""
    rest = max(1, block_nbytes - TAIL_NBYTES + _STRING_NBYTES)
    step = 1 << max(0, (rest - 1).bit_length() - 3)
    return -(-rest // step) * step + _REDIS_RECORD_NBYTES - block_nbytes
