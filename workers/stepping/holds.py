"""A store as the scheduler sees it while a step may still be running: what is given back is free when that has ended.

Else a block could be promoted into, or handed to a sequence and written to, while the step in flight reads it. The
invariant: a block that nobody references is used by no step in flight, so that tiers may copy into it beside the step.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from kvstore.store import ComputeMs, ReadTiers, TieredStore
from workers.sequence import Acquisition

ALL_TIERS = ReadTiers()


class Holds:
    """`workers.scheduler.BlockStore` over a store, whose `release` waits for the step in flight.

    Attributes:
        given_back: where blocks go that are given back now, until the step in flight has ended; None: none is in
        flight, and they are free at once.
    """

    def __init__(self, store: TieredStore) -> None:
        """With no step in flight."""
        self._store = store
        self.given_back: list[int] | None = None

    @property
    def available(self) -> int:
        """Blocks that could be allocated now, or when the step in flight has ended."""
        device = self._store.device
        return device.available + sum(device.refs(block) == 1 for block in self.given_back or ())

    def match(self, hashes: Items[BlockHash], reads: ReadTiers = ALL_TIERS) -> list[TierName]:
        """As `TieredStore.match`."""
        return self._store.match(hashes, reads)

    def acquire(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> Acquisition:
        """As `TieredStore.acquire`."""
        return self._store.acquire(hashes, reads=reads, compute_ms=compute_ms, root=root, lifetime=lifetime)

    def acquire_from_both_ends(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> Acquisition:
        """As `TieredStore.acquire_from_both_ends`."""
        return self._store.acquire_from_both_ends(
            hashes, reads=reads, compute_ms=compute_ms, root=root, lifetime=lifetime
        )

    def prefetch(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers = ALL_TIERS,
        compute_ms: ComputeMs | None = None,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> int:
        """As `TieredStore.prefetch`."""
        return self._store.prefetch(hashes, reads=reads, compute_ms=compute_ms, root=root, lifetime=lifetime)

    def allocate(self, count: int) -> list[int] | None:
        """As `TieredStore.allocate`."""
        return self._store.allocate(count)

    def release(self, block_ids: Items[int]) -> None:
        """As `TieredStore.release`, now or when the step in flight has ended."""
        if self.given_back is None:
            self._store.release(block_ids)
        else:
            self.given_back += reversed(block_ids)

    def end(self, given_back: Items[int]) -> None:
        """A step has ended: what was given back meanwhile is free."""
        self._store.release(given_back[::-1])
