"""What a tier that belongs to other workers answers to those who would change it: nothing.

Covers: the writing side of `kvstore.tier.Tier` for tiers that are only read from. Does not cover: reading (`tier`,
`peers`).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.blocks import BlockHash
from kvstore.events import KvEvent, RemovalCause, TierName
from kvstore.tier import BlockMeta, Honours


class OfOthers:
    """Its owners write, evict, expire, lease and tell of what they hold."""

    name = TierName.PEER
    honours = Honours(capacity=False, ttl=True, named_eviction=False, injected_clock=False)

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """None: other workers' tiers are their own."""
        return 0

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> int:
        """As `Tier.lease`: others evict as they like."""
        return 0

    def end_leases(self, hashes: Sequence[BlockHash]) -> int:
        """As `Tier.end_leases`."""
        return 0

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """None: other workers' tiers are their own."""
        return 0

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """None: other workers' tiers are their own."""
        return 0

    def drain_events(self) -> list[KvEvent]:
        """None: each worker tells its own."""
        return []
