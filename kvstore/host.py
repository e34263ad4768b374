"""The host tier: blocks in this process's RAM, in fixed slots of one slab.

The slab is reserved and touched when the tier is made: no allocation, no page fault and no fragmentation afterwards.
Books are kept under one lock; bytes are copied outside it. A write is two-phase: the slot is reserved, filled, and only
then published, so that a half-written block is never found. A slot that is being read or is leased is not evicted, and
if its block is removed meanwhile, the slot is given back when the last reader goes.

Bytes here never leave the process, so a block is known by its name and carries no checksum.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, stored_events, tree_runs
from kvstore.errors import InvariantError, MissReason, TierError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.eviction import LRU
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta, Clock, Honours, TierStats, prolonged, select


@dataclass(slots=True, eq=False)
class _Slot:
    """A slot that holds a block, or is about to.

    Attributes:
        pins: readers, leases, and the writer. leases: of them, those that are no use of the block.
        removed: its block is gone; the last pin gives the slot back.
    """

    index: int
    meta: BlockMeta
    pins: int = 0
    leases: int = 0
    removed: bool = False


@dataclass(slots=True, eq=False)
class Lease:
    """A block's bytes, kept in place until `HostTier.end_lease`, even if the block is removed meanwhile."""

    meta: BlockMeta
    payload: memoryview
    _slot: _Slot


class HostTier:
    """Fixed slots of one slab; LRU and a sliding TTL per block. Thread-safe; O(1) a block, expiry O(log n)."""

    name = TierName.HOST
    honours = Honours(capacity=True, ttl=True, named_eviction=True, injected_clock=True)

    def __init__(self, layout: KVLayout, capacity_bytes: int, *, clock: Clock, pinned: bool = False) -> None:
        """Reserve `capacity_bytes`, rounded down to whole blocks.

        Args:
            layout: what a block holds.
            capacity_bytes: size of the slab.
            clock: what TTLs go by.
            pinned: page-lock the slab, which a GPU copies from and to at bus speed.

        Raises:
            TierError: the capacity is less than a block, or there is no such room.
        """
        slots = capacity_bytes // layout.block_nbytes
        if slots < 1:
            raise TierError(
                f"the host tier's {capacity_bytes} bytes hold no block of {layout.block_nbytes}; "
                "give it more bytes, or zero for no host tier"
            )
        self.layout = layout
        self._slab = _reserve(slots, layout.block_nbytes, pinned=pinned)
        self._lock = threading.Lock()
        self._free = list(range(slots - 1, -1, -1))
        self._slots: dict[BlockHash, _Slot] = {}
        self._writing: set[_Slot] = set()
        self._zombies: set[_Slot] = set()  # removed, and still pinned
        self._leased: set[BlockHash] = set()  # keep their place in the LRU, but are not evicted
        self._lru: LRU[BlockHash] = LRU(clock)
        self._events: list[KvEvent] = []
        self._hits = self._stores = 0
        self._misses: Counter[str] = Counter()
        self._removals: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    @property
    def num_slots(self) -> int:
        """Blocks that fit."""
        return len(self._slab)

    def holds(self, name: BlockHash) -> bool:
        """Whether the block can be read now."""
        with self._lock:
            return self._live(name)

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """As `Tier.match`; `deadline_s` is of no use here."""
        with self._lock:
            return self._leading(hashes)

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block is held; None when it is not."""
        with self._lock:
            return self._slots[name].meta if self._live(name) else None

    def find_run(self, hashes: Sequence[BlockHash]) -> list[BlockMeta]:
        """The metadata of the leading blocks that are held."""
        with self._lock:
            return [self._slots[name].meta for name in hashes[: self._leading(hashes)]]

    def read(self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None) -> int:
        """As `Tier.read`. The copies run outside the lock."""
        with self._lock:
            count = self._leading(hashes)
            if count < len(hashes):
                known = hashes[count] in self._slots
                self._misses[MissReason.EXPIRED if known else MissReason.ABSENT] += 1
            slots = self._pin(hashes[:count])
        try:
            for slot, buffer in zip(slots, into, strict=False):
                np.copyto(np.frombuffer(buffer, np.uint8), self._slab[slot.index])
        finally:
            with self._lock:
                self._hits += count
                self._unpin(slots)
        return count

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """As `Tier.write`. The copies run outside the lock; blocks removed while they run are not published."""
        with self._lock:
            held, fresh, count = self._admit(metas)
        filled = 0
        try:
            for number, slot in fresh:
                np.copyto(self._slab[slot.index], np.frombuffer(payloads[number], np.uint8))
                filled += 1
        finally:
            with self._lock:
                for _, slot in fresh[filled:]:
                    slot.removed = True
                self._publish([slot for _, slot in fresh])
                self._unpin(held)
        return count

    def lease(self, hashes: Iterable[BlockHash]) -> list[Lease]:
        """Keep the bytes of those blocks in place that are held, and look at them. It is no use and no hit.

        A leased block is not evicted; should it be removed or expire, its bytes stay all the same. Give each lease back
        by `end_lease`.
        """
        with self._lock:
            slots = [self._slots[name] for name in hashes if self._live(name)]
            for slot in slots:
                slot.pins += 1
                slot.leases += 1
                self._leased.add(slot.meta.hash)
        return [Lease(slot.meta, memoryview(self._slab[slot.index]).toreadonly(), slot) for slot in slots]

    def end_lease(self, lease: Lease) -> None:
        """Let the slot go. The payload must not be used any more."""
        slot = lease._slot
        with self._lock:
            slot.pins -= 1
            slot.leases -= 1
            if slot.removed:
                self._give_back(slot)
            elif slot.leases == 0:
                self._leased.discard(slot.meta.hash)

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """As `Tier.touch`; last first, so that a chain's tail is evicted before its head."""
        with self._lock:
            for name in reversed(hashes):
                if self._live(name):
                    self._lru.use(name)

    def prolong(self, hashes: Sequence[BlockHash], ttl_s: float | None) -> None:
        """As `touch`, and from now on give each the longer one of its own TTL and `ttl_s`."""
        with self._lock:
            for name in reversed(hashes):
                if self._live(name):
                    self._prolong(self._slots[name], ttl_s)

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """As `Tier.remove`; a block that is being written is dropped too, and not counted."""
        with self._lock:
            return self._remove(hashes, cause)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """As `Tier.clear`; blocks that are being written are dropped too, and not counted."""
        with self._lock:
            coming = [slot.meta for slot in self._writing]
            metas = [slot.meta for slot in self._slots.values()]
            before = len(self._events)
            count = self._remove(select(metas + coming, root, prefix), RemovalCause.CLEARED)
            if root is None and prefix is None:
                self._events[before:] = [AllBlocksCleared(self.name)]
            return count

    def sweep(self) -> float | None:
        """As `Tier.sweep`."""
        with self._lock:
            due = self._lru.pop_expired()
            self._forget(due, RemovalCause.EXPIRED)
            return self._lru.next_expiry_s()

    def snapshot(self) -> list[BlockStored]:
        """All that can be read, as events."""
        with self._lock:
            parents: dict[bytes, bytes | None] = dict(slot.meta.link for slot in self._slots.values())
        return stored_events(self.name, tree_runs(parents))

    def drain_events(self) -> list[KvEvent]:
        """As `Tier.drain_events`."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def metas(self) -> list[BlockMeta]:
        """The metadata of all blocks."""
        with self._lock:
            return [slot.meta for slot in self._slots.values()]

    def stats(self) -> TierStats:
        """As `Tier.stats`."""
        nbytes = self.layout.block_nbytes
        with self._lock:
            return TierStats(
                used_bytes=(self.num_slots - len(self._free)) * nbytes,
                capacity_bytes=self.num_slots * nbytes,
                blocks=len(self._slots),
                hits=self._hits,
                misses=dict(self._misses),
                removals=dict(self._removals),
                stores=self._stores,
                store_failures=dict(self._failures),
                read_bytes=self._hits * nbytes,
                written_bytes=self._stores * nbytes,
            )

    def check(self) -> None:
        """As `Tier.check`, O(blocks)."""
        with self._lock:
            self._lru.check()
            kinds = (self._slots.values(), self._writing, self._zombies)
            used = [slot.index for kind in kinds for slot in kind]
            if sorted(used + self._free) != list(range(self.num_slots)):
                raise InvariantError("a slot is used twice, or lost")
            if set(self._lru) != set(self._slots):
                raise InvariantError("names and LRU differ")
            for name, slot in self._slots.items():
                if slot.meta.hash != name or slot.removed or self._lru.pins(name) != slot.pins - slot.leases:
                    raise InvariantError(f"slot {slot.index} is known under another name or with other pins")
            if self._leased != {name for name, slot in self._slots.items() if slot.leases > 0}:
                raise InvariantError("leased names are not those of leased slots")
            if any(not slot.removed or slot.pins < 1 for slot in self._zombies):
                raise InvariantError("a removed slot without readers was not given back")

    def close(self) -> None:
        """Give the slab back once no view of it is left."""
        with self._lock:
            self._slab = self._slab[:0]
            self._free, self._slots, self._writing, self._zombies = [], {}, set(), set()
            self._leased = set()
            self._lru = LRU(lambda: 0.0)

    def _live(self, name: BlockHash) -> bool:
        return name in self._slots and not self._lru.expired(name)

    def _leading(self, hashes: Sequence[BlockHash]) -> int:
        for count, name in enumerate(hashes):
            if not self._live(name):
                return count
        return len(hashes)

    def _hold(self, slot: _Slot) -> None:
        slot.pins += 1
        self._lru.pin(slot.meta.hash)

    def _pin(self, hashes: Sequence[BlockHash]) -> list[_Slot]:
        slots = [self._slots[name] for name in hashes]
        for slot in slots:
            self._hold(slot)
        return slots

    def _unpin(self, slots: Sequence[_Slot]) -> None:
        """Undo a pin of each, last first: that is a use, and the tail of a chain must be the oldest."""
        for slot in reversed(slots):
            slot.pins -= 1
            if slot.removed:
                self._give_back(slot)
            else:
                self._lru.unpin(slot.meta.hash)

    def _give_back(self, slot: _Slot) -> None:
        if slot.pins == 0:
            self._zombies.discard(slot)
            self._free.append(slot.index)

    def _admit(self, metas: Sequence[BlockMeta]) -> tuple[list[_Slot], list[tuple[int, _Slot]], int]:
        """Pin what is held and reserve slots for the rest: (held, [(number in the batch, reserved)], how many)."""
        held: list[_Slot] = []
        fresh: list[tuple[int, _Slot]] = []
        for number, meta in enumerate(metas):
            known = self._slots.get(meta.hash)
            if known is not None:
                self._prolong(known, meta.ttl_s)
                self._hold(known)
                held.append(known)
                continue
            index = self._take_slot()
            if index is None:
                self._failures["full"] += 1
                return held, fresh, number
            slot = _Slot(index, meta, pins=1)
            self._writing.add(slot)
            fresh.append((number, slot))
        return held, fresh, len(metas)

    def _prolong(self, slot: _Slot, ttl_s: float | None) -> None:
        self._lru.prolong(slot.meta.hash, ttl_s)
        slot.meta = prolonged(slot.meta, ttl_s)

    def _take_slot(self) -> int | None:
        if not self._free and (victim := self._lru.victim(self._leased)) is not None:
            self._lru.remove(victim)
            self._forget([victim], RemovalCause.EVICTED)
        return self._free.pop() if self._free else None

    def _publish(self, slots: Sequence[_Slot]) -> None:
        published = []
        for slot in reversed(slots):
            self._writing.discard(slot)
            slot.pins -= 1
            if slot.removed or slot.meta.hash in self._slots:  # cleared, or another thread was faster
                self._free.append(slot.index)
                continue
            self._slots[slot.meta.hash] = slot
            self._lru.add(slot.meta.hash, slot.meta.ttl_s)
            published.append(slot.meta.link)
        self._stores += len(published)
        self._events += stored_events(self.name, consecutive_runs(reversed(published)))

    def _remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        chosen = set(hashes)
        for slot in self._writing:
            if slot.meta.hash in chosen:
                slot.removed = True
        gone = [name for name in dict.fromkeys(hashes) if name in self._slots]
        for name in gone:
            self._lru.remove(name)
        self._forget(gone, cause)
        return len(gone)

    def _forget(self, names: Sequence[BlockHash], cause: RemovalCause) -> None:
        """Drop blocks that are in the LRU no more; their slots are free now, or when their last reader goes."""
        if not names:
            return
        for name in names:
            slot = self._slots.pop(name)
            slot.removed = True
            self._leased.discard(name)
            if slot.pins == 0:
                self._free.append(slot.index)
            else:
                self._zombies.add(slot)
        self._removals[cause] += len(names)
        self._events.append(BlockRemoved(self.name, tuple(short(name) for name in names), cause))


def _reserve(slots: int, nbytes: int, *, pinned: bool) -> npt.NDArray[np.uint8]:
    try:
        slab = torch.empty((slots, nbytes), dtype=torch.uint8, pin_memory=pinned).numpy()
    except (RuntimeError, MemoryError) as error:
        raise TierError(f"no room for {slots * nbytes} bytes of host RAM; give the host tier fewer bytes") from error
    slab.fill(0)  # every page is touched now, so that none is faulted in while a request waits
    return slab
