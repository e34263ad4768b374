"""The host tier's books: which slot holds which block, who uses it, what was counted. No bytes, no lock.

Whoever calls it holds the tier's lock. All is O(1) a block, but for expiry, which is O(log n), and `check`.

A slot is being written (`_writing`), holds a block (`_slots`), or has lost its block while somebody still reads it
(`_zombies`: the last one gives it back); all others are free in the slab.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, stored_events
from kvstore.errors import InvariantError, MissReason
from kvstore.events import BlockRemoved, KvEvent, RemovalCause, TierName
from kvstore.eviction.entries import EXPIRED_AT_ONCE
from kvstore.eviction.policies import Eviction, hint_of, make_eviction
from kvstore.eviction.tail import SpareBlocks
from kvstore.host.leaving import Leaving
from kvstore.host.slab import Slab
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta, Clock, TierStats, prolonged

_ENDED = float("-inf")  # the end of no lease at all


@dataclass(slots=True, eq=False)
class Slot:
    """A slot that holds a block, or is about to.

    Attributes:
        pins: readers, views, and the writer. views: of them, those that are no use of the block.
        removed: its block is gone; the last pin gives the slot back.
        evicted: while it is being written: the block that was evicted for this one, if its bytes are still in the slot
        and somebody wants a copy.
    """

    index: int
    meta: BlockMeta
    pins: int = 0
    views: int = 0
    removed: bool = False
    evicted: BlockMeta | None = None


class HostBooks:
    """Slots, names, uses, events and counters of a host tier.

    Attributes:
        leaving: evicted blocks that somebody wants to have.
    """

    def __init__(
        self,
        name: TierName,
        slab: Slab,
        *,
        clock: Clock,
        wall_clock: Clock,
        eviction: str,
        shares: Mapping[Hashable, int] | None,
        spare_blocks: SpareBlocks,
    ) -> None:
        """Books of an empty slab; `shares` in slots.

        Raises:
            ValueError: there is no eviction policy of that name, or the shares do not fit.
        """
        self.events: list[KvEvent] = []
        self.hits = 0
        self.leaving = Leaving()
        self._misses: Counter[str] = Counter()
        self.slots: dict[BlockHash, Slot] = {}
        self._name = name
        self._slab = slab
        self._clock = clock
        self._writing: set[Slot] = set()
        self._zombies: set[Slot] = set()
        self._eviction: Eviction[BlockHash] = make_eviction(
            eviction, clock, slab.num_slots, wall_clock=wall_clock, shares=shares, spare_blocks=spare_blocks
        )
        # Blocks that would have been evicted but for a view, and the end of a lease given since. An endless lease keeps
        # them from the policy, so that only one of many evictions meets each of them.
        self._aside: dict[BlockHash, float | None] = {}
        self._stores = 0
        self._removals: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    def live(self, name: BlockHash) -> bool:
        """Whether the block can be read now."""
        return name in self.slots and not self._eviction.expired(name)

    def leading(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks can be read now."""
        for count, name in enumerate(hashes):
            if not self.live(name):
                return count
        return len(hashes)

    def writing(self) -> list[BlockMeta]:
        """Blocks that are being written."""
        return [slot.meta for slot in self._writing]

    def gone(self) -> list[BlockMeta]:
        """Blocks that were evicted, and that nobody has taken yet."""
        return [slot.evicted for slot in self._writing if slot.evicted is not None] + self.leaving.metas()

    def keep(self, slot: Slot, payload: bytes | None) -> None:
        """A copy of the block that was evicted for this slot's, unless that has been removed since; None: no copy."""
        evicted, slot.evicted = slot.evicted, None
        if evicted is not None:
            self.leaving.add(evicted, payload)

    def latest_first(self) -> list[BlockMeta]:
        """Blocks that can be read now, most recently used first."""
        return [self.slots[name].meta for name in self._eviction.latest_first() if self.live(name)]

    def pins(self) -> int:
        """Readers, writers and views of all slots. O(blocks)."""
        return sum(slot.pins for kind in (self.slots.values(), self._writing, self._zombies) for slot in kind)

    def pin(self, hashes: Sequence[BlockHash]) -> list[Slot]:
        """Keep held blocks for a reader."""
        for slot in (slots := [self.slots[name] for name in hashes]):
            self._hold(slot)
        return slots

    def unpin(self, slots: Sequence[Slot]) -> None:
        """Undo a pin of each, last first: that is a use, and the tail of a chain must be the oldest."""
        for slot in reversed(slots):
            slot.pins -= 1
            if slot.removed:
                self._give_back(slot)
            else:
                self._eviction.unpin(slot.meta.hash)

    def miss(self, name: BlockHash) -> MissReason:
        """Count why a block was not delivered; why."""
        reason = MissReason.EXPIRED if name in self.slots else MissReason.ABSENT
        self._misses[reason] += 1
        return reason

    def look(self, hashes: Iterable[BlockHash]) -> list[Slot]:
        """Keep those that can be read for a view each. It is no use."""
        slots = [self.slots[name] for name in hashes if self.live(name)]
        for slot in slots:
            slot.pins += 1
            slot.views += 1
        return slots

    def look_away(self, slot: Slot) -> None:
        """A view has ended."""
        slot.pins -= 1
        slot.views -= 1
        if slot.removed:
            self._give_back(slot)
        elif slot.views == 0 and slot.meta.hash in self._aside:
            self._take_back(slot.meta.hash)

    def use(self, hashes: Sequence[BlockHash]) -> None:
        """Blocks of a chain were used; last first, so that its tail is evicted before its head."""
        for name in reversed(hashes):
            if self.live(name):
                self._eviction.use(name)

    def prolong(self, hashes: Sequence[BlockHash], lifetime: Lifetime) -> None:
        """As `use`, and from now on each lives as long as the longer one of its own lifetime and this one says."""
        for name in reversed(hashes):
            if self.live(name):
                self._prolong(self.slots[name], lifetime)

    def ttl_left_s(self, name: BlockHash) -> float | None:
        """Seconds until a held block expires; None: never, or while it is in use."""
        return self._eviction.remaining_s(name)

    def lease(self, hashes: Sequence[BlockHash], until: float | None) -> int:
        """As `Tier.lease`; `until` on the clock."""
        count = 0
        for name in hashes:
            if name in self._aside:
                self._aside[name] = _later(self._aside[name], until)
                count += self._lasts(self._aside[name])
            elif self.live(name):
                count += self._eviction.lease(name, until)
        return count

    def end_leases(self, hashes: Sequence[BlockHash]) -> int:
        """As `Tier.end_leases`."""
        count = 0
        for name in hashes:
            if name in self._aside:
                count += self._lasts(self._aside[name])
                self._aside[name] = _ENDED
            elif name in self.slots:
                count += self._eviction.end_lease(name)
        return count

    def admit(self, metas: Sequence[BlockMeta]) -> tuple[list[Slot], list[tuple[int, Slot]], int]:
        """Pin what is held and reserve slots for the rest: (held, [(number in the batch, reserved)], how many)."""
        held: list[Slot] = []
        fresh: list[tuple[int, Slot]] = []
        for number, meta in enumerate(metas):
            known = self.slots.get(meta.hash)
            if known is not None:
                self._prolong(known, meta.lifetime)
                self._hold(known)
                held.append(known)
                continue
            slot = self._take_slot(meta)
            if slot is None:
                self._failures["full"] += 1
                return held, fresh, number
            self._writing.add(slot)
            fresh.append((number, slot))
        return held, fresh, len(metas)

    def publish(self, slots: Sequence[Slot]) -> None:
        """Slots were filled, or are `removed`: let the filled ones be found."""
        published = []
        for slot in reversed(slots):
            self._writing.discard(slot)
            slot.pins -= 1
            meta = slot.meta
            if slot.removed or meta.hash in self.slots:  # cleared, or another thread was faster
                self._slab.give_back(slot.index)
                continue
            self.slots[meta.hash] = slot
            self._eviction.add(meta.hash, meta.ttl_s, until=meta.until, hint=hint_of(meta))
            published.append(meta.link)
        self._stores += len(published)
        self.events += stored_events(self._name, consecutive_runs(reversed(published)))

    def remove(self, hashes: Iterable[BlockHash], cause: RemovalCause) -> int:
        """Drop those that are held, and count them, those that are being written, and those that were evicted."""
        chosen = dict.fromkeys(hashes)
        for slot in self._writing:
            slot.removed |= slot.meta.hash in chosen
            if slot.evicted is not None and slot.evicted.hash in chosen:
                slot.evicted = None
        self.leaving.drop(chosen)
        gone = [name for name in chosen if name in self.slots]
        for name in gone:
            self._eviction.remove(name)
        self._forget(gone, cause)
        return len(gone)

    def expire(self) -> float | None:
        """Drop what has expired, not too much at once; seconds until the next block expires, None when none will."""
        self._forget(self._eviction.pop_expired(EXPIRED_AT_ONCE), RemovalCause.EXPIRED)
        return self._eviction.next_expiry_s()

    def stats(self) -> TierStats:
        """Counters and fill."""
        nbytes = self._slab.nbytes
        return TierStats(
            used_bytes=self._slab.used * nbytes,
            capacity_bytes=self._slab.num_slots * nbytes,
            blocks=len(self.slots),
            hits=self.hits,
            misses=dict(self._misses),
            removals=dict(self._removals),
            stores=self._stores,
            store_failures=dict(self._failures),
            read_bytes=self.hits * nbytes,
            written_bytes=self._stores * nbytes,
            leased=self._eviction.leased - sum(not self._lasts(until) for until in self._aside.values()),
        )

    def check(self) -> None:
        """Audit the books, O(blocks).

        Raises:
            InvariantError: they disagree.
        """
        self._eviction.check()
        self._slab.check([s.index for kind in (self.slots.values(), self._writing, self._zombies) for s in kind])
        if set(self._eviction) != set(self.slots):
            raise InvariantError("names and eviction differ")
        for name, slot in self.slots.items():
            if slot.meta.hash != name or slot.removed or self._eviction.pins(name) != slot.pins - slot.views:
                raise InvariantError(f"slot {slot.index} is known under another name or with other pins")
        if any(name not in self.slots or self.slots[name].views == 0 for name in self._aside):
            raise InvariantError("a block that nobody views is set aside")
        if any(not slot.removed or slot.pins < 1 for slot in self._zombies):
            raise InvariantError("a removed slot without readers was not given back")

    def _hold(self, slot: Slot) -> None:
        slot.pins += 1
        self._eviction.pin(slot.meta.hash)

    def _give_back(self, slot: Slot) -> None:
        if slot.pins == 0:
            self._zombies.discard(slot)
            self._slab.give_back(slot.index)

    def _prolong(self, slot: Slot, lifetime: Lifetime) -> None:
        self._eviction.prolong(slot.meta.hash, lifetime)
        slot.meta = prolonged(slot.meta, lifetime)

    def _take_slot(self, meta: BlockMeta) -> Slot | None:
        """A free slot for this block, made by eviction if need be; None: no block may go for it."""
        evicted: BlockMeta | None = None
        index = self._slab.take()
        while index is None and self._eviction.next_expiry_s() == 0.0:  # not all may have been dropped yet
            self.expire()
            index = self._slab.take()
        while index is None and (victim := self._eviction.victim(root=meta.root)) is not None:
            if self.slots[victim].views > 0:
                self._set_aside(victim)
                continue
            slot = self.slots[victim]
            self._eviction.remove(victim)
            self._forget([victim], RemovalCause.EVICTED)
            index = self._slab.take()
            # With its whole lifetime: the place below knows of no other, and a hit there renews it.
            evicted = slot.meta if index == slot.index and self.leaving.limit > 0 else None
        return None if index is None else Slot(index, meta, pins=1, evicted=evicted)

    def _set_aside(self, name: BlockHash) -> None:
        self._aside[name] = _ENDED  # a leased block is never a victim
        self._eviction.lease(name, None)

    def _take_back(self, name: BlockHash) -> None:
        until = self._aside.pop(name)
        self._eviction.end_lease(name)
        self._eviction.lease(name, until)  # no lease if it has ended

    def _lasts(self, until: float | None) -> bool:
        return until is None or until > self._clock()

    def _forget(self, names: Sequence[BlockHash], cause: RemovalCause) -> None:
        """Drop blocks that eviction does not hold any more; slots are free now, or when the last reader goes."""
        if not names:
            return
        for name in names:
            slot = self.slots.pop(name)
            slot.removed = True
            self._aside.pop(name, None)
            self._zombies.add(slot)
            self._give_back(slot)
        self._removals[cause] += len(names)
        self.events.append(BlockRemoved(self._name, tuple(short(name) for name in names), cause))


def _later(until: float | None, other: float | None) -> float | None:
    """The later one of two ends; None: never."""
    return None if until is None or other is None else max(until, other)
