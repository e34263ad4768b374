"""The books of the paged pool: who references which device block, which block holds which name, what to evict.

Pure bookkeeping over block numbers: no torch, no bytes (`device` adds them). Not thread-safe but for `stats`: one
thread, the engine's, owns it.

A block is in exactly one of three states. Free: no reference, no name, on the free list. Private: referenced, no name.
Cached: it has a name that `acquire` finds; while referenced it is pinned in the LRU, unreferenced it may be evicted.
All operations are O(1) a block, expiry O(log n).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, stored_events, tree_runs
from kvstore.errors import InvariantError, MissReason
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.eviction.entries import EXPIRED_AT_ONCE
from kvstore.eviction.policies import LRU
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta, Clock, TierStats, prolonged, select


class BlockPool:
    """Reference counts, names, LRU and TTL of `num_blocks` numbered blocks.

    Attributes:
        num_blocks: blocks that can be allocated, numbered from 0. block_nbytes: bytes of each, for `stats`.
    """

    name = TierName.DEVICE

    def __init__(self, num_blocks: int, block_nbytes: int, *, clock: Clock, wall_clock: Clock = time.time) -> None:
        self.num_blocks = num_blocks
        self.block_nbytes = block_nbytes
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: what was freed last is warmest in the caches
        self._refs = [0] * num_blocks
        self._metas: list[BlockMeta | None] = [None] * num_blocks
        self._held: dict[BlockHash, int] = {}
        self._lru: LRU[int] = LRU(clock, wall_clock=wall_clock)
        self._events: list[KvEvent] = []
        self._hits = self._stores = 0
        self._misses: Counter[str] = Counter()
        self._removals: Counter[str] = Counter()
        self._store_failures: Counter[str] = Counter()

    @property
    def available(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + self._lru.evictable

    def holds(self, name: BlockHash) -> bool:
        """Whether a cached, unexpired block has this name."""
        block = self._held.get(name)
        return block is not None and not self._lru.expired(block)

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """How many leading blocks are cached and unexpired. `deadline_s` is of no use here."""
        for count, name in enumerate(hashes):
            if not self.holds(name):
                return count
        return len(hashes)

    def meta(self, block_id: int) -> BlockMeta | None:
        """What a cached block is; None for a private or a free one."""
        return self._metas[block_id]

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a name is cached; None when it is not."""
        return self._metas[self._held[name]] if self.holds(name) else None

    def refs(self, block_id: int) -> int:
        """How often a block is referenced."""
        return self._refs[block_id]

    def acquire(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The leading cached blocks, each referenced once more for the caller. The first miss is counted."""
        block_ids = []
        for name in hashes:
            if not self.holds(name):
                self._misses[self.why_missing(name)] += 1
                break
            block_ids.append(self.reference(name))
        self._hits += len(block_ids)
        return block_ids

    def why_missing(self, name: BlockHash) -> MissReason:
        """Why a block that is not cached, or no more, cannot be had."""
        return MissReason.EXPIRED if name in self._held else MissReason.ABSENT

    def reference(self, name: BlockHash) -> int:
        """Reference a cached block without counting a hit; its number.

        Raises:
            KeyError: nothing is cached under this name.
        """
        block_id = self._held[name]
        self._refs[block_id] += 1
        self._lru.pin(block_id)
        return block_id

    def allocate(self, count: int) -> list[int] | None:
        """That many private blocks with one reference each, or None and nothing changed when there is no room.

        Drops expired blocks, then evicts unreferenced cached ones, least recently used first, when free ones do not
        suffice.
        """
        if count > self.available:
            return None
        while len(self._free) < count and self._lru.next_expiry_s() == 0.0:
            self.sweep()
        self._evict(count - len(self._free))
        block_ids = [self._free.pop() for _ in range(count)]
        for block_id in block_ids:
            self._refs[block_id] = 1
        return block_ids

    def commit(self, block_ids: Sequence[int], metas: Sequence[BlockMeta]) -> list[tuple[int, BlockMeta]]:
        """Name private blocks whose bytes are whole; those that got their name.

        A name that another block holds stays there (and that block lives as long as the longer lifetime says); the
        caller's block stays private. Committing a block again under its own name changes nothing but that.

        Raises:
            InvariantError: a block is not referenced, or has another name already.
        """
        named = []
        for block_id, meta in zip(block_ids, metas, strict=True):
            if self._refs[block_id] == 0:
                raise InvariantError(f"block {block_id} was committed without a reference")
            if self._name(block_id, meta):
                named.append((block_id, meta))
        self._stores += len(named)
        self._events += stored_events(self.name, consecutive_runs(meta.link for _, meta in named))
        return named

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each, last block first, so that a chain's tail is evicted before its head.

        Raises:
            InvariantError: a block has no reference.
        """
        for block_id in reversed(block_ids):
            if self._refs[block_id] == 0:
                raise InvariantError(f"block {block_id} was released more often than it was referenced")
            self._refs[block_id] -= 1
            if self._metas[block_id] is not None:
                self._lru.unpin(block_id)
            elif self._refs[block_id] == 0:
                self._return([block_id])

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """Refresh recency and TTL of the cached ones, last first."""
        for name in reversed(hashes):
            if self.holds(name):
                self._lru.use(self._held[name])

    def prolong(self, hashes: Sequence[BlockHash], lifetime: Lifetime) -> None:
        """As `LocalTier.prolong`."""
        for name in reversed(hashes):
            if self.holds(name):
                self._prolong(self._held[name], lifetime)

    def ttl_left_s(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, float | None]:
        """As `LocalTier.ttl_left_s`."""
        return {name: self._lru.remaining_s(self._held[name]) for name in hashes if self.holds(name)}

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> int:
        """As `Tier.lease`: a lease forbids dropping, and a device block may always go to a lower tier."""
        return 0

    def end_leases(self, hashes: Sequence[BlockHash]) -> int:
        """As `Tier.end_leases`."""
        return 0

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """Take the names away from the cached ones; how many. Referenced blocks stay with their holders as private."""
        gone = [name for name in dict.fromkeys(hashes) if name in self._held]
        for name in gone:
            self._lru.remove(self._held[name])
        self._forget(gone, cause)
        return len(gone)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """As `Tier.clear`. Referenced blocks stay with their holders as private ones."""
        if root is not None or prefix is not None:
            return self.remove(select(self.metas(), root, prefix), RemovalCause.CLEARED)
        before = len(self._events)
        count = self.remove(list(self._held), RemovalCause.CLEARED)
        self._events[before:] = [AllBlocksCleared(self.name)]
        return count

    def sweep(self) -> float | None:
        """As `Tier.sweep`."""
        expired = self._lru.pop_expired(EXPIRED_AT_ONCE)
        due = [meta.hash for block in expired if (meta := self._metas[block]) is not None]
        self._forget(due, RemovalCause.EXPIRED)
        return self._lru.next_expiry_s()

    def metas(self) -> list[BlockMeta]:
        """The metadata of all cached blocks."""
        return [meta for meta in self._metas if meta is not None]

    def snapshot(self) -> list[BlockStored]:
        """All that is cached, as events."""
        parents: dict[bytes, bytes | None] = dict(meta.link for meta in self.metas())
        return stored_events(self.name, tree_runs(parents))

    def drain_events(self) -> list[KvEvent]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stats(self) -> TierStats:
        """Counters and fill; `used_bytes` counts private blocks too, `blocks` counts cached ones."""
        return TierStats(
            used_bytes=(self.num_blocks - len(self._free)) * self.block_nbytes,
            capacity_bytes=self.num_blocks * self.block_nbytes,
            blocks=len(self._held),
            hits=self._hits,
            misses=dict(self._misses),
            removals=dict(self._removals),
            stores=self._stores,
            store_failures=dict(self._store_failures),
            read_bytes=self._hits * self.block_nbytes,
            written_bytes=self._stores * self.block_nbytes,
        )

    def check(self) -> None:
        """Audit the books against each other, O(blocks).

        Raises:
            InvariantError: they disagree.
        """
        self._lru.check()
        free = set(self._free)
        if len(free) != len(self._free):
            raise InvariantError("a block is twice on the free list")
        for block_id, (refs, meta) in enumerate(zip(self._refs, self._metas, strict=True)):
            cached = meta is not None
            if meta is not None and self._held.get(meta.hash) != block_id:
                raise InvariantError(f"block {block_id} has a name that leads elsewhere")
            if cached != (block_id in self._lru) or (cached and self._lru.pins(block_id) != refs):
                raise InvariantError(f"block {block_id} has {refs} references, and the LRU disagrees")
            if (block_id in free) != (refs == 0 and not cached):
                raise InvariantError(f"block {block_id} is free and in use at once, or lost")
        if len(self._held) != sum(meta is not None for meta in self._metas):
            raise InvariantError("names and cached blocks differ in number")

    def _freed(self, block_ids: Sequence[int]) -> None:
        """Called with blocks that have just become free. Their bytes mean nothing from now on."""

    def _name(self, block_id: int, meta: BlockMeta) -> bool:
        holder = self._held.get(meta.hash)
        if holder is not None:
            self._prolong(holder, meta.lifetime)
            return False
        if self._metas[block_id] is not None:
            raise InvariantError(f"block {block_id} was committed under two names")
        self._held[meta.hash] = block_id
        self._metas[block_id] = meta
        self._lru.add(block_id, meta.ttl_s, until=meta.until)
        for _ in range(self._refs[block_id]):
            self._lru.pin(block_id)
        return True

    def _prolong(self, block_id: int, lifetime: Lifetime) -> None:
        self._lru.prolong(block_id, lifetime)
        if (meta := self._metas[block_id]) is not None:
            self._metas[block_id] = prolonged(meta, lifetime)

    def _evict(self, count: int) -> None:
        names = []
        for _ in range(count):
            block_id = self._lru.victim()
            meta = None if block_id is None else self._metas[block_id]
            if block_id is None or meta is None:
                raise InvariantError("fewer blocks can be evicted than were counted")
            self._lru.remove(block_id)
            names.append(meta.hash)
        self._forget(names, RemovalCause.EVICTED)

    def _forget(self, names: Sequence[BlockHash], cause: RemovalCause) -> None:
        """Take names away from blocks that are in the LRU no more, and free those that nobody references."""
        if not names:
            return
        blocks = [self._held.pop(name) for name in names]
        for block_id in blocks:
            self._metas[block_id] = None
        self._return([block_id for block_id in blocks if self._refs[block_id] == 0])
        self._removals[cause] += len(names)
        self._events.append(BlockRemoved(self.name, tuple(short(name) for name in names), cause))

    def _return(self, block_ids: Sequence[int]) -> None:
        self._free.extend(block_ids)
        self._freed(block_ids)
