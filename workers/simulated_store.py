"""The simulated engine's store: which blocks device and host would hold, in what order of use, until when. No bytes.

Covers: capacity in blocks, LRU, lifetimes, references, leases, events. Does not cover: time (`simulated` charges it),
a shared tier, payloads, what several tiers hold together (`simulated_listing`). Owned by one thread.

A device block is `private` (being filled, or never to be found), or it has a name. A named one is pinned while
sequences use it and evictable afterwards. Chains are released from their last block to their first, so that a suffix
is evicted before its prefix.

A lease is one reference that nobody's sequence holds. At most half of a tier is leased, or running sequences would find
no room.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash, short
from kvstore.chains import parent_of, select, stored_events, tree_runs
from kvstore.errors import InvariantError
from kvstore.events import BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.eviction.policies import LRU
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta, Clock, TierStats, prolonged


class EventLog:
    """Events in order; neighbours of one kind that continue one another become one event."""

    def __init__(self) -> None:
        self._events: list[KvEvent] = []

    def __len__(self) -> int:
        return len(self._events)

    def stored(self, tier: TierName, meta: BlockMeta) -> None:
        """A block became readable."""
        name, parent = short(meta.hash), parent_of(meta)
        parent_name = None if parent is None else short(parent)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockStored) and last.tier == tier and last.hashes[-1] == parent_name:
            self._events[-1] = BlockStored(tier, (*last.hashes, name), last.parent)
        else:
            self._events.append(BlockStored(tier, (name,), parent_name))

    def removed(self, tier: TierName, name: BlockHash, cause: RemovalCause) -> None:
        """A block left a tier."""
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.tier == tier and last.cause == cause:
            self._events[-1] = BlockRemoved(tier, (*last.hashes, short(name)), cause)
        else:
            self._events.append(BlockRemoved(tier, (short(name),), cause))

    def drain(self) -> list[KvEvent]:
        """The events since the last call."""
        drained, self._events = self._events, []
        return drained


@dataclass(slots=True, eq=False)
class Block:
    """A named block in a tier. Compared by identity: a cleared block and its successor of the same name are two."""

    meta: BlockMeta


class SimulatedTier:
    """One tier's books.

    `private` blocks take room without being held by name; only the device has them.
    """

    def __init__(
        self,
        name: TierName,
        capacity: int,
        block_nbytes: int,
        clock: Clock,
        log: EventLog,
        *,
        wall_clock: Clock = time.time,
    ) -> None:
        self.name = name
        self.capacity = capacity
        self.private = 0
        self._block_nbytes = block_nbytes
        self._log = log
        self._clock = clock
        self._blocks: dict[BlockHash, Block] = {}
        self._lru: LRU[Block] = LRU(clock, wall_clock=wall_clock)
        self._leases: dict[BlockHash, float | None] = {}  # until when; None: until it is ended
        self._hits = 0
        self._stores = 0
        self._removals: Counter[str] = Counter()

    def __contains__(self, name: BlockHash) -> bool:
        """Whether a lookup would find it."""
        block = self._blocks.get(name)
        return block is not None and not self._lru.expired(block)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def available(self) -> int:
        """Blocks that can be had, by eviction if need be."""
        return self.capacity - len(self._lru) - self.private + self._lru.evictable

    def match(self, names: Sequence[BlockHash]) -> int:
        """How many leading blocks it holds. A question."""
        for count, name in enumerate(names):
            if name not in self:
                return count
        return len(names)

    def has_room(self, count: int) -> bool:
        """Whether `make_room` would succeed. A question."""
        return count <= self.available

    def make_room(self, count: int) -> bool:
        """Evict until that many more blocks fit; False, and nothing evicted, when they cannot."""
        if not self.has_room(count):
            return False
        while len(self._lru) + self.private + count > self.capacity:
            victim = self._lru.victim()
            if victim is None:
                raise InvariantError("has_room promised what the LRU cannot give")
            self._drop(victim, RemovalCause.EVICTED)
        return True

    def allocate(self, count: int) -> bool:
        """Take private blocks, evicting as needed; all or none."""
        if not self.make_room(count):
            return False
        self.private += count
        return True

    def free(self, count: int) -> None:
        """Give private blocks back."""
        self.private -= count

    def add(self, meta: BlockMeta) -> bool:
        """Hold a block, or use and prolong the one that is held; False when there is no room."""
        self.sweep()
        held = self._blocks.get(meta.hash)
        if held is not None:
            self._prolong(held, meta.lifetime)
            return True
        if not self.make_room(1):
            return False
        self._insert(Block(meta))
        return True

    def name_private(self, meta: BlockMeta) -> Block:
        """Turn one private block into a findable one, pinned once for the caller. The name must not be held."""
        self.sweep()
        self.private -= 1
        block = Block(meta)
        self._insert(block)
        self._lru.pin(block)
        return block

    def pin(self, names: Iterable[BlockHash]) -> list[Block]:
        """Reference held blocks; each is a hit."""
        blocks = [self._blocks[name] for name in names]
        for block in blocks:
            self._lru.pin(block)
        self._hits += len(blocks)
        return blocks

    def release(self, blocks: Sequence[Block]) -> None:
        """Drop one reference of each, given in chain order."""
        for block in reversed(blocks):
            self._lru.unpin(block)
            if self._lru.pins(block) == 0 and self._blocks.get(block.meta.hash) is not block:
                self._lru.remove(block)  # cleared while it was in use

    def touch(self, names: Sequence[BlockHash]) -> None:
        """Use those that it holds; `names` in chain order."""
        for name in reversed(names):
            block = self._blocks.get(name)
            if block is not None:
                self._lru.use(block)

    def copy_from(self, other: SimulatedTier, names: Sequence[BlockHash], lifetime: Lifetime) -> int:
        """Hold blocks of another tier, in chain order, until there is no room; how many it did not hold before."""
        copied = 0
        for name in names:
            meta = other.meta(name)
            if name in self or meta is None:
                continue
            if not self.add(prolonged(meta, lifetime)):
                break
            copied += 1
        return copied

    def prolong(self, names: Sequence[BlockHash], lifetime: Lifetime) -> None:
        """As `touch`, and each lives from now on as long as the longer one of its own lifetime and this one says."""
        for name in reversed(names):
            if name in self:
                self._prolong(self._blocks[name], lifetime)

    def meta(self, name: BlockHash) -> BlockMeta | None:
        """What is known of a block; None: it is not held. A question."""
        return self._blocks[name].meta if name in self else None

    def metas(self) -> list[BlockMeta]:
        """Of all findable blocks. A question."""
        return [block.meta for name, block in self._blocks.items() if name in self]

    def ttl_left_s(self, name: BlockHash) -> float | None:
        """Seconds until a held block expires; None: never, or somebody uses it. A question."""
        return self._lru.remaining_s(self._blocks[name])

    def lease(self, names: Iterable[BlockHash], for_s: float | None) -> int:
        """As `kvstore.tier.Tier.lease`, for at most half of the capacity; how many it promised."""
        self.sweep()
        until = None if for_s is None else self._clock() + for_s
        return sum(self._lease(name, until) for name in names if name in self._blocks)

    def end_leases(self, names: Iterable[BlockHash]) -> int:
        """As `kvstore.tier.Tier.end_leases`."""
        self.sweep()
        leased = [name for name in dict.fromkeys(names) if name in self._leases]
        for name in reversed(leased):
            self._end_lease(name)
        return len(leased)

    def leased(self, name: BlockHash) -> bool:
        """Whether a lease holds it. A question."""
        if name not in self._leases:
            return False
        until = self._leases[name]
        return until is None or until > self._clock()

    def count_hits(self, count: int) -> None:
        """Blocks that were read from here."""
        self._hits += count

    def clear(self, root: BlockHash | None, prefix: BlockHash | None) -> int:
        """As `kvstore.tier.Tier.clear`. Pinned blocks stay with their users, unfindable."""
        names = select([block.meta for block in self._blocks.values()], root, prefix)
        for name in names:
            self._drop(self._blocks[name], RemovalCause.CLEARED)
        return len(names)

    def sweep(self) -> None:
        """End leases whose time is up, and drop what has expired."""
        now = self._clock()
        for name in [name for name, until in self._leases.items() if until is not None and until <= now][::-1]:
            self._end_lease(name)
        for block in self._lru.pop_expired():
            if self._blocks.get(block.meta.hash) is block:
                del self._blocks[block.meta.hash]
                self._count_removal(block, RemovalCause.EXPIRED)

    def next_expiry_s(self) -> float | None:
        """Seconds until the next block expires; None when none will."""
        return self._lru.next_expiry_s()

    def snapshot(self) -> list[BlockStored]:
        """All findable blocks, parents first."""
        parents: dict[bytes, bytes | None] = {name: parent_of(block.meta) for name, block in self._blocks.items()}
        return stored_events(self.name, tree_runs(parents))

    def stats(self) -> TierStats:
        """Counters and fill."""
        return TierStats(
            used_bytes=(len(self._lru) + self.private) * self._block_nbytes,
            capacity_bytes=self.capacity * self._block_nbytes,
            blocks=len(self._blocks),
            hits=self._hits,
            removals=dict(self._removals),
            stores=self._stores,
            read_bytes=self._hits * self._block_nbytes,
            written_bytes=self._stores * self._block_nbytes,
            leased=len(self._leases),
        )

    def check(self) -> None:
        """Audit the books.

        Raises:
            InvariantError: they disagree.
        """
        self._lru.check()
        if self.private < 0 or len(self._lru) + self.private > self.capacity:
            raise InvariantError(f"{self.name} holds {len(self._lru)} + {self.private} of {self.capacity} blocks")
        unnamed = [block for block in self._lru if self._blocks.get(block.meta.hash) is not block]
        if any(self._lru.pins(block) == 0 for block in unnamed):
            raise InvariantError(f"{self.name} keeps blocks that nobody uses and nobody can find")
        if any(name not in self._blocks or self._lru.pins(self._blocks[name]) == 0 for name in self._leases):
            raise InvariantError(f"{self.name} has leases on blocks that it could drop")

    def _prolong(self, block: Block, lifetime: Lifetime) -> None:
        self._lru.prolong(block, lifetime)
        block.meta = prolonged(block.meta, lifetime)

    def _insert(self, block: Block) -> None:
        self._blocks[block.meta.hash] = block
        self._lru.add(block, block.meta.ttl_s, until=block.meta.until)
        self._stores += 1
        self._log.stored(self.name, block.meta)

    def _lease(self, name: BlockHash, until: float | None) -> bool:
        if name in self._leases:
            held = self._leases[name]
            self._leases[name] = None if held is None or until is None else max(held, until)
            return True
        if 2 * (len(self._leases) + 1) > self.capacity:
            return False
        self._leases[name] = until
        self._lru.pin(self._blocks[name])
        return True

    def _end_lease(self, name: BlockHash) -> None:
        del self._leases[name]
        self._lru.unpin(self._blocks[name])

    def _drop(self, block: Block, cause: RemovalCause) -> None:
        if block.meta.hash in self._leases:
            self._end_lease(block.meta.hash)
        del self._blocks[block.meta.hash]
        if self._lru.pins(block) == 0:
            self._lru.remove(block)
        self._count_removal(block, cause)

    def _count_removal(self, block: Block, cause: RemovalCause) -> None:
        self._removals[cause.value] += 1
        self._log.removed(self.name, block.meta.hash, cause)
