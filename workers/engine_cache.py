"""What operators and routers do with an engine's blocks, between two of its steps: list, warm, lease, clear, audit.

Covers: `workers.protocol.Cache` on a `kvstore` store. Does not cover: jobs (`engine`), how an operator's order comes
and is answered (`cache_commands`, `engine_thread`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from kvstore.store import ReadTiers, TieredStore
from kvstore.tier import BlockMeta
from workers.chain_positions import positions
from workers.protocol import CachedBlock
from workers.scheduler import Scheduler

if TYPE_CHECKING:  # what serves and reads other workers is loaded by whoever opens it
    from workers.peers import Peers


class EngineCache:
    """An engine's blocks. Belongs to the engine's thread.

    Attributes:
        changed: blocks changed since the last step, which has their events to tell.
    """

    def __init__(self, store: TieredStore, scheduler: Scheduler, peers: Peers | None, default: Lifetime) -> None:
        """Over a store; says to `scheduler` what may be read. `default`: of blocks that are named no lifetime."""
        self.changed = False
        self._store, self._scheduler, self._peers, self._default = store, scheduler, peers, default
        self._shared_reads, self._shared_clears = True, 0

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> dict[TierName, int]:
        """Drop blocks of this worker's own tiers; how many, by tier. The events come with the next step."""
        self.changed = True
        return self._store.clear(root=root, prefix=prefix, shared=False)

    def shared_clearing(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None
    ) -> Callable[[], dict[TierName, int]] | None:
        """What drops the same in the shared tier, for another thread; its events come with a later step.

        Nothing is read from there before `shared_cleared`: what a request brought back would outlive the clear.
        """
        self._shared_clears += 1
        self._set_reads()
        return lambda: {TierName.REDIS: self._store.clear_shared(root=root, prefix=prefix)}

    def shared_cleared(self) -> None:
        """What `shared_clearing` gave has ended, well or not."""
        self._shared_clears -= 1
        self._set_reads()

    def hold_peers(self, key: Hashable, for_s: float) -> None:
        """Start no read from other workers until `release_peers`, or for so long: they may hold what is cleared."""
        if self._peers is not None:
            self._peers.hold(key, for_s)

    def release_peers(self, key: Hashable) -> None:
        """End a hold; none of that key: nothing happens."""
        if self._peers is not None:
            self._peers.release(key)

    def promise_broken(self, address: str, ticket: BlockHash) -> None:
        """Wait no longer for the blocks that were promised there, and compute them."""
        if self._peers is not None:
            self._store.promise_broken(self._peers.in_rank(address), ticket)

    def list_blocks(
        self, *, root: BlockHash | None, prefix: BlockHash | None, after: BlockHash | None, limit: int
    ) -> list[CachedBlock]:
        """The first `limit` blocks behind `after`, in the order of their hashes."""
        held = self._store.list_blocks(root=root, prefix=prefix, after=after, limit=limit)
        at = positions([block.meta.hash for block in held], self._find_block)
        return [
            CachedBlock(
                block.meta.hash,
                block.meta.before,
                block.meta.root,
                block.tiers,
                ttl_s=block.meta.ttl_s,
                ttl_left_s=block.ttl_left_s,
                leased=block.leased,
                priority=block.meta.priority,
                position=at.get(block.meta.hash),
            )
            for block in held
        ]

    def prefetch(self, hashes: Items[BlockHash], *, root: BlockHash, lifetime: Lifetime | None) -> int:
        """Bring a chain's blocks up from slow tiers without waiting; how many are on their way now."""
        self.changed = True
        lifetime = lifetime or self._default
        return self._store.prefetch(hashes, reads=self._scheduler.reads, root=root, lifetime=lifetime)

    def lease(self, hashes: Items[BlockHash], for_s: float | None) -> dict[TierName, int]:
        """Forbid to drop them for so long (None: until `end_leases`); how many each tier promised."""
        return self._store.lease(hashes, for_s)

    def end_leases(self, hashes: Items[BlockHash]) -> dict[TierName, int]:
        """Allow it again; how many leases each tier ended."""
        return self._store.end_leases(hashes)

    def where(self, hashes: Items[BlockHash]) -> list[tuple[TierName, ...]]:
        """For each block the tiers of this worker alone that hold it now. A question; no I/O."""
        tiers = [tier for tier in (self._store.device, self._store.host, self._store.disk) if tier is not None]
        return [tuple(tier.name for tier in tiers if tier.find(name) is not None) for name in hashes]

    def owes_peers(self) -> bool:
        """Whether blocks that were made for other workers are, or may be, still to be read by them. A question."""
        board = None if self._peers is None else self._peers.board
        return board is not None and board.is_owed()

    def share_running(self) -> bool:
        """Queue what running jobs have made for the shared tier, whatever admission says; whether it is all there."""
        shared = [self._store.share(sequence.hashes[: sequence.num_committed]) for sequence in self._scheduler.running]
        return all(shared)

    def check(self) -> None:
        """Audit the store. Raises InvariantError: its books are wrong; says how."""
        self._store.check()

    def set_shared_reads(self, *, enabled: bool) -> None:
        """Whether requests may read blocks from the shared tier."""
        self._shared_reads = enabled
        self._set_reads()

    def _set_reads(self) -> None:
        self._scheduler.reads = ReadTiers(shared=self._shared_reads and self._shared_clears == 0)

    def _find_block(self, name: BlockHash) -> BlockMeta | None:
        tiers = (self._store.device, self._store.host, self._store.disk)
        return next((meta for tier in tiers if tier is not None and (meta := tier.find(name)) is not None), None)
