"""What a simulated engine's tiers hold together, as operators see it. Questions only."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from kvstore.blocks import BlockHash
from kvstore.chains import select
from kvstore.tier import BlockMeta
from workers.chain_positions import positions
from workers.protocol import CachedBlock
from workers.simulated_store import SimulatedTier


def listed(
    tiers: Sequence[SimulatedTier],
    *,
    root: BlockHash | None,
    prefix: BlockHash | None,
    after: BlockHash | None,
    limit: int,
) -> list[CachedBlock]:
    """What the tiers, given from fast to slow, hold; as `workers.protocol.Cache.list_blocks`."""
    metas = {meta.hash: meta for tier in reversed(tiers) for meta in tier.metas()}
    chosen = select(list(metas.values()), root, prefix)
    page = heapq.nsmallest(limit, (name for name in chosen if after is None or name > after))
    at = positions(page, metas.get)
    return [_cached(metas[name], [tier for tier in tiers if name in tier], at.get(name)) for name in page]


def _cached(meta: BlockMeta, holders: Sequence[SimulatedTier], position: int | None) -> CachedBlock:
    left = [tier.ttl_left_s(meta.hash) for tier in holders]
    known = [each for each in left if each is not None]
    return CachedBlock(
        meta.hash,
        meta.before,
        meta.root,
        tuple(tier.name for tier in holders),
        ttl_s=meta.ttl_s,
        ttl_left_s=max(known) if len(known) == len(left) else None,
        leased=any(tier.leased(meta.hash) for tier in holders),
        priority=meta.priority,
        position=position,
    )
