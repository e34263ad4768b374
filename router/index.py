"""Which worker holds which block at which tier: the router's picture of every cache in the fleet.

Covers: applying workers' K/V events, snapshots, fencing by incarnation, the shared tier as an owner of its own, and the
leading run of a prompt on every worker. Does not cover: choosing (`policy`), pricing (`cost`), the stream (`link`).
Pure and synchronous; time comes from the injected clock.

The structure is one dict from short hash to an interned holder set (`holders`): all blocks with the same holders point
to one object. Neighbours in a chain mostly share it, so `match` costs one probe and one identity test a block, and mask
arithmetic only where the holders change. Losing a worker edits the few holder sets instead of its millions of blocks:
its credit is gone at once, and blocks that nobody holds any more are swept out later in slices. Worst case: another
holder set at every block costs one mask operation a block. An entry costs about 110 bytes.

Invariant: a worker's bits are counted only between the end of a complete snapshot and the next gap, loss or restart.
What the index says is a prediction: the worker checks what it holds, so a wrong entry costs time and never a token.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import NamedTuple

from kvstore.errors import InvariantError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from router.holders import LEVELS, SHARED, Gone, Holders, HolderSets, slot_mask, tier_mask

Clock = Callable[[], float]

_GONE = {
    RemovalCause.EVICTED: Gone.EVICTED,
    RemovalCause.EXPIRED: Gone.EXPIRED,
    RemovalCause.CLEARED: Gone.CLEARED,
    # A broken or vanished value was dropped by the tier without being asked: to the user that is an eviction.
    RemovalCause.INVALID: Gone.EVICTED,
    RemovalCause.ABSENT: Gone.EVICTED,
}


class Overlap(NamedTuple):
    """Leading blocks of a prompt that a worker could reuse, cumulative from the fastest tier to the slowest.

    `device` blocks lie in its paged pool; `host` in pool or host RAM; `disk` in those or on its disk; `shared` in any
    of those or in the shared tier. device <= host <= disk <= shared.
    """

    device: int
    host: int
    disk: int
    shared: int


NO_OVERLAP = Overlap(0, 0, 0, 0)


class _Worker:
    """What the index knows of a worker. `removed` collects removals while a snapshot is being read."""

    __slots__ = ("counted", "incarnation", "removed", "shares", "slot")

    def __init__(self, slot: int, incarnation: int, *, shares: bool) -> None:
        self.slot = slot
        self.incarnation = incarnation
        self.shares = shares
        self.counted = False
        self.removed: set[tuple[TierName, bytes]] | None = None


class PrefixIndex:
    """Block holders of a whole fleet. All methods are synchronous; none blocks."""

    def __init__(self, clock: Clock, *, max_tombstones: int = 65_536) -> None:
        self._clock = clock
        self._blocks: dict[bytes, Holders] = {}
        self._sets = HolderSets()
        self._workers: dict[str, _Worker] = {}
        self._incarnations: dict[str, int] = {}
        self._free: list[int] = []
        self._shared_id = ""
        self._expiry: dict[bytes, float] = {}
        self._due: list[tuple[float, int, tuple[bytes, ...]]] = []
        self._order = count()
        self._tombstones: OrderedDict[bytes, Gone] = OrderedDict()
        self._max_tombstones = max_tombstones
        self._sweeping: list[bytes] = []

    def __len__(self) -> int:
        """Blocks known, those that still wait for the sweep included."""
        return len(self._blocks)

    # Workers

    def join(self, worker: str, incarnation: int, *, shared_id: str = "") -> bool:
        """A worker said hello. False when a later incarnation is known: the caller must not listen to this one.

        Another incarnation than before forgets the old blocks at once. `shared_id` names its shared tier's server;
        another one than before (the server was replaced) forgets what the shared tier held. The first name that is
        heard is that of the server that was spoken of before without one.
        """
        if incarnation < self._incarnations.get(worker, 0):
            return False
        self.drop(worker)
        self._incarnations[worker] = incarnation
        self._workers[worker] = _Worker(self._take_slot(), incarnation, shares=bool(shared_id))
        if shared_id and shared_id != self._shared_id:
            if self._shared_id:
                self._clear_shared()
            self._shared_id = shared_id
        return True

    def drop(self, worker: str) -> None:
        """The worker is lost: its credit is zero from now on. The shared tier's credit stays."""
        known = self._workers.pop(worker, None)
        if known is None:
            return
        self._take_out(slot_mask(known.slot), Gone.WORKER_LOST)
        self._free.append(known.slot)

    def distrust(self, worker: str) -> None:
        """Events were missed: no credit until a new snapshot is complete."""
        if known := self._workers.get(worker):
            known.counted = False

    def begin_snapshot(self, worker: str, incarnation: int) -> None:
        """Forget the worker's blocks; `apply` fills them in, and they count from `end_snapshot` on."""
        known = self._fenced(worker, incarnation)
        if known is None:
            return
        self._take_out(slot_mask(known.slot), Gone.EVICTED)
        known.counted = False
        known.removed = set()

    def snapshot(self, worker: str, incarnation: int, blocks: Iterable[BlockStored]) -> None:
        """A piece of a snapshot. Blocks whose removal was reported since it began stay removed."""
        known = self._fenced(worker, incarnation)
        if known is None:
            return
        for event in blocks:
            gone = known.removed
            if gone:
                kept = tuple(h for h in event.hashes if (event.tier, h) not in gone)
                event = BlockStored(event.tier, kept, event.parent, event.ttl_s)
            self._store(known, event)

    def end_snapshot(self, worker: str, incarnation: int) -> None:
        """The snapshot is complete: the worker's blocks count."""
        known = self._fenced(worker, incarnation)
        if known is not None:
            known.counted = True
            known.removed = None

    def apply(self, worker: str, incarnation: int, events: Iterable[KvEvent]) -> bool:
        """Apply a worker's events in order. False, and nothing happened, when it is not that incarnation's turn."""
        known = self._fenced(worker, incarnation)
        if known is None:
            return False
        for event in events:
            match event:
                case BlockStored():
                    self._note_stored(known, event)
                    self._store(known, event)
                case BlockRemoved():
                    self._remove(known, event)
                case AllBlocksCleared():
                    self._clear(known, event.tier)
        return True

    # Questions

    def match(self, hashes: Sequence[bytes]) -> dict[str, Overlap]:
        """For every known worker the leading blocks of a chain of short hashes. O(blocks + workers + changes)."""
        self._expire()
        alive = self._counted_bits()
        runs = [0] * (self._sets.slots * LEVELS)
        depth = 0
        seen: Holders | None = None
        for holders in map(self._blocks.get, hashes):
            if holders is None:
                break
            if holders is not seen:
                if lost := alive & ~holders.reach:
                    _record(runs, lost, depth)
                    alive ^= lost
                    if not alive:
                        break
                seen = holders
            depth += 1
        _record(runs, alive, depth)
        return {name: _overlap(runs, known) for name, known in self._workers.items()}

    def shared_run(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that the shared tier alone holds."""
        self._expire()
        depth = 0
        for holders in map(self._blocks.get, hashes):
            if holders is None or not holders.mask & SHARED:
                break
            depth += 1
        return depth

    def held(self, block: bytes) -> bool:
        """Whether anybody is known to hold the block."""
        self._expire()
        holders = self._blocks.get(block)
        return holders is not None and holders.mask != 0

    def gone(self, block: bytes) -> Gone | None:
        """Why nobody holds a block that was known; None: it was never seen, or that is forgotten."""
        self._expire()
        holders = self._blocks.get(block)
        if holders is not None:
            return None if holders.mask else holders.gone
        return self._tombstones.get(block)

    def shared_blocks(self) -> int:
        """Blocks in the shared tier. O(different holder sets)."""
        self._expire()
        return sum(holders.blocks for holders in self._sets if holders.mask & SHARED)

    # Upkeep

    def sweep(self, limit: int) -> bool:
        """Throw out up to `limit` blocks that nobody holds since a worker was lost; whether more may wait."""
        for _ in range(min(limit, len(self._sweeping))):
            block = self._sweeping.pop()
            holders = self._blocks.get(block)
            if holders is not None and not holders.mask:
                del self._blocks[block]
                holders.blocks -= 1
                self._bury(block, holders.gone)
        return bool(self._sweeping)

    def check(self) -> None:
        """Raises InvariantError when the books are wrong. O(everything): for tests and diagnosis."""
        _expect(sum(h.blocks for h in self._sets) == len(self._blocks), "holder sets count other blocks than there are")
        taken = SHARED
        for known in self._workers.values():
            taken |= slot_mask(known.slot)
        for block, holders in self._blocks.items():
            _expect(not holders.mask & ~taken, f"block {block.hex()} is held by a worker that is gone")
            _expect(holders.reach == self._sets.reach(holders.mask), f"block {block.hex()} has a stale reach")
            _expect(block not in self._tombstones, f"block {block.hex()} is known and buried")
        scheduled = {h for _, _, hashes in self._due for h in hashes}
        for block in self._expiry:
            _expect(bool(self._blocks[block].mask & SHARED), f"block {block.hex()} expires and is not shared")
            _expect(block in scheduled, f"block {block.hex()} would never expire")
        _expect(len(self._tombstones) <= self._max_tombstones, "more tombstones than allowed")
        slots = [known.slot for known in self._workers.values()] + self._free
        _expect(len(slots) == len(set(slots)), "a slot has two owners")

    # Events

    def _fenced(self, worker: str, incarnation: int) -> _Worker | None:
        known = self._workers.get(worker)
        return known if known is not None and known.incarnation == incarnation else None

    def _note_stored(self, known: _Worker, event: BlockStored) -> None:
        if known.removed:
            known.removed.difference_update((event.tier, h) for h in event.hashes)

    def _store(self, known: _Worker, event: BlockStored) -> None:
        if event.tier is TierName.REDIS:
            self._schedule(event)
        bit = tier_mask(known.slot, event.tier)
        blocks = self._blocks
        moved: dict[Holders | None, Holders] = {}  # neighbours mostly change alike
        for block in event.hashes:
            old = blocks.get(block)
            new = moved.get(old)
            if new is None:
                new = moved[old] = self._sets.get((old.mask if old else 0) | bit)
            if new is not old:
                blocks[block] = new
                new.blocks += 1
                if old is None:
                    self._tombstones.pop(block, None)
                else:
                    old.blocks -= 1

    def _remove(self, known: _Worker, event: BlockRemoved) -> None:
        if known.removed is not None:
            known.removed.update((event.tier, h) for h in event.hashes)
        if event.tier is TierName.REDIS:
            for block in event.hashes:
                self._expiry.pop(block, None)
        self._take(event.hashes, tier_mask(known.slot, event.tier), _GONE[event.cause])

    def _take(self, hashes: Iterable[bytes], bit: int, cause: Gone) -> None:
        for block in hashes:
            holders = self._blocks.get(block)
            if holders is None or not holders.mask & bit:
                continue
            holders.blocks -= 1
            if rest := holders.mask & ~bit:
                fewer = self._blocks[block] = self._sets.get(rest)
                fewer.blocks += 1
            else:
                del self._blocks[block]
                self._bury(block, cause)

    def _clear(self, known: _Worker, tier: TierName) -> None:
        if tier is TierName.REDIS:
            self._clear_shared()
        else:
            self._take_out(tier_mask(known.slot, tier), Gone.CLEARED)

    def _clear_shared(self) -> None:
        self._expiry.clear()
        self._due.clear()
        self._take_out(SHARED, Gone.CLEARED)

    def _schedule(self, event: BlockStored) -> None:
        if event.ttl_s is None:
            for block in event.hashes:
                self._expiry.pop(block, None)
            return
        at = self._clock() + event.ttl_s
        self._expiry.update(dict.fromkeys(event.hashes, at))
        heapq.heappush(self._due, (at, next(self._order), event.hashes))

    def _expire(self) -> None:
        """Drop shared blocks whose time has come. A refreshed block stands in a later entry, so this one skips it."""
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            at, _, hashes = heapq.heappop(self._due)
            for block in hashes:
                if self._expiry.get(block) == at:
                    del self._expiry[block]
                    self._take((block,), SHARED, Gone.EXPIRED)

    # Upkeep, inside

    def _take_out(self, bits: int, cause: Gone) -> None:
        if self._sets.take_out(bits, cause):
            self._sweeping = list(self._blocks)

    def _bury(self, block: bytes, cause: Gone) -> None:
        self._tombstones[block] = cause
        self._tombstones.move_to_end(block)
        if len(self._tombstones) > self._max_tombstones:
            self._tombstones.popitem(last=False)

    # Slots

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        slot = len(self._workers)
        if slot >= self._sets.slots:
            self._sets.grow()
        return slot

    def _counted_bits(self) -> int:
        bits = 0
        for known in self._workers.values():
            if known.counted:
                bits |= (0b1111 if known.shares else 0b0111) << (known.slot * LEVELS)
        return bits


def _record(runs: list[int], lost: int, depth: int) -> None:
    """The lowest set bits of `lost` end their run at `depth`."""
    while lost:
        lowest = lost & -lost
        runs[lowest.bit_length() - 1] = depth
        lost ^= lowest


def _overlap(runs: list[int], known: _Worker) -> Overlap:
    at = known.slot * LEVELS
    device, host, disk, shared = runs[at : at + LEVELS]
    return Overlap(device, host, disk, max(disk, shared))


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(f"prefix index: {message}; please report this with the router's log")
