"""Which worker holds which block at which tier: the router's picture of every cache in the fleet.

Covers: applying workers' K/V events, snapshots, fencing by incarnation, the shared tier as an owner of its own, and the
leading run of a prompt on every worker. Does not cover: choosing (`policy`), pricing (`cost`), the stream (`link`).
Pure and synchronous; time comes from the injected clock.

A block's holders are kept by the run (`runs`): a stretch of consecutive blocks with one interned set of holders
(`holders`). `match` costs one probe and one compare a run, and mask arithmetic only where the holders change. Losing a
worker, or the end of shared blocks' lives, edits the few sets instead of millions of blocks: the credit is gone at
once, and blocks that nobody holds any more are swept out later in slices. Worst case: another holder set at every
block costs one probe a block, so a question ends after `max_probes` runs, and its answer is then a lower bound.

Memory is bounded at every moment. When it ends, the blocks of the least recently placed run are forgotten (placed: a
request was sent along it, or blocks were stored into it). What was forgotten is held and not credited: an
underestimate, never a wrong claim.

Invariant: a worker's bits are counted only between the end of a complete snapshot and the next gap, loss or restart.
What the index says is a prediction: the worker checks what it holds, so a wrong entry costs time and never a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvstore.chains import consecutive_runs
from kvstore.errors import InvariantError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from router.holders import LEVELS, NEVER, SHARED, Gone, Holders, HolderSets, end_of_life, slot_mask, tier_mask
from router.runs import LEAST_BYTES, TOMBSTONE_BYTES, Fewer, Fuller, Runs
from router.tombstones import Tombstones

Clock = Callable[[], float]

DEFAULT_BYTES = 2 << 30
_TOMBSTONES_SHARE = 16  # at most this part of the memory
_REMEMBERED_MASKS = 4096
_LANE = (1 << LEVELS) - 1
_Parts = tuple[list[str], list[tuple[int, int]]]

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

    def __init__(
        self,
        clock: Clock,
        *,
        limit_bytes: int = DEFAULT_BYTES,
        max_tombstones: int = 65_536,
        max_probes: int = 512,
    ) -> None:
        """Nothing is known.

        Args:
            limit_bytes: what blocks, runs, holder sets and tombstones may take together. max_tombstones: causes kept
            of blocks that are gone. max_probes: runs that a question looks at.

        Raises:
            ValueError: the memory is too small to work with.
        """
        if limit_bytes < LEAST_BYTES:
            raise ValueError(f"the index was given {limit_bytes} bytes; give it at least {LEAST_BYTES}")
        self._clock = clock
        self._sets = HolderSets()
        self._tombstones = Tombstones(min(max_tombstones, limit_bytes // _TOMBSTONES_SHARE // TOMBSTONE_BYTES))
        self._runs = Runs(self._sets, self._tombstones, limit=limit_bytes)
        self._workers: dict[str, _Worker] = {}
        self._names: dict[int, str] = {}  # of the workers, by slot
        self._counted = 0  # what of every holder set's reach counts
        self._incarnations: dict[str, int] = {}
        self._free: list[int] = []
        self._shared_id = ""
        self._max_probes = max_probes
        self._parts: dict[int, _Parts] = {}  # mask of reach -> whose it is, while the same workers count

    def __len__(self) -> int:
        """Blocks known, those that still wait for the sweep included."""
        return self._runs.blocks

    @property
    def nbytes(self) -> int:
        """Memory taken, by measured sizes; at most `limit_bytes`."""
        return self._runs.nbytes

    @property
    def limit_bytes(self) -> int:
        """Memory that may be taken."""
        return self._runs.limit

    @property
    def runs(self) -> int:
        """Stretches of blocks with the same holders: the fewer, the faster."""
        return len(self._runs)

    @property
    def evicted_blocks(self) -> int:
        """Blocks that were forgotten for want of memory, since the start."""
        return self._runs.evicted

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
        slot = self._take_slot()
        self._workers[worker] = _Worker(slot, incarnation, shares=bool(shared_id))
        self._names[slot] = worker
        if shared_id and shared_id != self._shared_id:
            if self._shared_id:
                self._take_out(SHARED, Gone.CLEARED)
            self._shared_id = shared_id
        return True

    def drop(self, worker: str) -> None:
        """The worker is lost: its credit is zero from now on. The shared tier's credit stays."""
        known = self._workers.pop(worker, None)
        if known is None:
            return
        self._take_out(slot_mask(known.slot), Gone.WORKER_LOST)
        del self._names[known.slot]
        self._free.append(known.slot)
        self._count_bits()

    def distrust(self, worker: str) -> None:
        """Events were missed: no credit until a new snapshot is complete."""
        if known := self._workers.get(worker):
            known.counted = False
            self._count_bits()

    def begin_snapshot(self, worker: str, incarnation: int) -> None:
        """Forget the worker's blocks; `apply` fills them in, and they count from `end_snapshot` on."""
        known = self._fenced(worker, incarnation)
        if known is None:
            return
        self._take_out(slot_mask(known.slot), Gone.EVICTED)
        known.counted = False
        known.removed = set()
        self._count_bits()

    def snapshot(self, worker: str, incarnation: int, blocks: Iterable[BlockStored]) -> None:
        """A piece of a snapshot. Blocks whose removal was reported since it began stay removed."""
        known = self._fenced(worker, incarnation)
        if known is None:
            return
        for event in blocks:
            for kept in _without(event, known.removed or set()):
                self._store(known, kept)

    def end_snapshot(self, worker: str, incarnation: int) -> None:
        """The snapshot is complete: the worker's blocks count."""
        known = self._fenced(worker, incarnation)
        if known is not None:
            known.counted = True
            known.removed = None
            self._count_bits()

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
        """For every known worker the leading blocks of a chain of short hashes. O(runs + workers).

        A lower bound when the chain lies in more than `max_probes` runs.
        """
        self._expire()
        runs, alive, seen = self._runs, self._counted, None
        rows, numbered, agreed = runs.rows, runs.numbered, runs.agreed
        ends: list[tuple[int, int]] = []  # bits of reach that are lost, after so many blocks
        at, total = 0, len(hashes)
        for _ in range(self._max_probes):
            if at >= total:
                break
            block = hashes[at]
            number = rows[block[0]][block[-1] & 15].get(block)
            if number is None:
                break
            run = numbered[number]
            if run.holders is not seen:
                seen = run.holders
                still = alive & seen.reach
                if still != alive:
                    ends.append((alive ^ still, at))
                    alive = still
                    if not alive:
                        break
            end = at + run.length
            if run.proved == run.length and end <= total and hashes[end - 1] == run.last:
                at = end
            else:
                at += agreed(run, hashes, at)
        ends.append((alive, at))
        return self._overlaps(ends)

    def shared_run(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that the shared tier alone holds."""
        self._expire()
        depth = 0
        while depth < len(hashes):
            run = self._runs.find(hashes[depth])
            if run is None or not run.holders.mask & SHARED:
                break
            depth += self._runs.agreed(run, hashes, depth)
        return depth

    def held(self, block: bytes) -> bool:
        """Whether anybody is known to hold the block."""
        self._expire()
        run = self._runs.find(block)
        return run is not None and run.holders.mask != 0

    def gone(self, block: bytes) -> Gone | None:
        """Why nobody holds a block that was known; None: it was never seen, or that is forgotten."""
        self._expire()
        run = self._runs.find(block)
        if run is not None:
            return None if run.holders.mask else run.holders.gone
        return self._tombstones.get(block)

    def shared_blocks(self) -> int:
        """Blocks in the shared tier. O(different holder sets)."""
        self._expire()
        return sum(holders.blocks for holders in self._sets if holders.mask & SHARED)

    # Upkeep

    def placed(self, hashes: Sequence[bytes]) -> None:
        """A request was sent along this chain: what is known of it is the last to be forgotten. O(runs)."""
        self._runs.placed(hashes, self._max_probes)

    def sweep(self, limit: int) -> bool:
        """Throw out up to `limit` blocks that nobody holds since a worker was lost; whether more may wait."""
        return self._runs.sweep(limit)

    def check(self) -> None:
        """Raises InvariantError when the books are wrong. O(everything): for tests and diagnosis."""
        self._runs.check()
        taken = SHARED
        for known in self._workers.values():
            taken |= slot_mask(known.slot)
        for holders in self._sets:
            _expect(not holders.mask & ~taken, "a block is held by a worker that is gone")
            _expect(holders.reach == self._sets.reach(holders.mask), "a holder set has a stale reach")
        _expect(len(self._tombstones) <= self._tombstones.limit, "more tombstones than allowed")
        slots = [known.slot for known in self._workers.values()] + self._free
        _expect(len(slots) == len(set(slots)), "a slot has two owners")
        _expect(self._names == {known.slot: name for name, known in self._workers.items()}, "a slot has another's name")

    # Events

    def _fenced(self, worker: str, incarnation: int) -> _Worker | None:
        known = self._workers.get(worker)
        return known if known is not None and known.incarnation == incarnation else None

    def _note_stored(self, known: _Worker, event: BlockStored) -> None:
        if known.removed:
            known.removed.difference_update((event.tier, h) for h in event.hashes)

    def _store(self, known: _Worker, event: BlockStored) -> None:
        if event.tier is TierName.REDIS:
            fuller = self._with_shared(end_of_life(self._clock(), event.ttl_s))
        else:
            fuller = self._with_bit(tier_mask(known.slot, event.tier))
        self._runs.store(event.hashes, event.parent, fuller)

    def _with_bit(self, bit: int) -> Fuller:
        sets, moved = self._sets, dict[Holders | None, Holders]()  # neighbours mostly change alike

        def fuller(old: Holders | None) -> Holders:
            new = moved.get(old)
            if new is None:
                new = moved[old] = sets.get(bit) if old is None else sets.get(old.mask | bit, old.until)
            return new

        return fuller

    def _with_shared(self, until: float) -> Fuller:
        return lambda old: self._sets.get((old.mask if old else 0) | SHARED, until)

    def _remove(self, known: _Worker, event: BlockRemoved) -> None:
        if known.removed is not None:
            known.removed.update((event.tier, h) for h in event.hashes)
        bit = tier_mask(known.slot, event.tier)
        self._runs.take(event.hashes, bit, self._without_bit(bit), _GONE[event.cause])

    def _without_bit(self, bit: int) -> Fewer:
        def fewer(old: Holders) -> Holders | None:
            rest = old.mask & ~bit
            return self._sets.get(rest, old.until if rest & SHARED else NEVER) if rest else None

        return fewer

    def _clear(self, known: _Worker, tier: TierName) -> None:
        self._take_out(tier_mask(known.slot, tier), Gone.CLEARED)

    def _expire(self) -> None:
        """Drop shared blocks whose time has come."""
        if self._sets.expire(self._clock()):
            self._runs.begin_sweep()

    # Upkeep, inside

    def _take_out(self, bits: int, cause: Gone) -> None:
        if self._sets.take_out(bits, cause):
            self._runs.begin_sweep()

    # Answers

    def _overlaps(self, ends: list[tuple[int, int]]) -> dict[str, Overlap]:
        found = dict.fromkeys(self._workers, NO_OVERLAP)
        depths: dict[int, list[int]] = {}  # by level, of the slots whose tiers end at different depths
        for bits, depth in ends:
            if not depth:
                continue
            whole, levels = self._parts.get(bits) or self._parts_of(bits)
            if whole:
                overlap = Overlap(depth, depth, depth, depth)
                for worker in whole:
                    found[worker] = overlap
            for slot, level in levels:
                if slot not in depths:
                    depths[slot] = [0] * LEVELS
                depths[slot][level] = depth
        for slot, (device, host, disk, shared) in depths.items():
            found[self._names[slot]] = Overlap(device, host, disk, max(disk, shared))
        return found

    def _parts_of(self, bits: int) -> _Parts:
        """Who loses all of its levels with these bits of reach, and the other levels, by slot; remembered."""
        if len(self._parts) >= _REMEMBERED_MASKS:
            self._parts.clear()
        whole, levels, rest = [], [], bits
        while rest:
            slot = ((rest & -rest).bit_length() - 1) // LEVELS
            lane = rest >> slot * LEVELS & _LANE
            rest ^= lane << slot * LEVELS
            if lane == self._counted >> slot * LEVELS & _LANE:
                whole.append(self._names[slot])
            else:
                levels += [(slot, level) for level in range(LEVELS) if lane >> level & 1]
        self._parts[bits] = (whole, levels)
        return self._parts[bits]

    # Slots

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        slot = len(self._workers)
        if slot >= self._sets.slots:
            self._sets.grow()
        return slot

    def _count_bits(self) -> None:
        self._counted = 0
        self._parts.clear()
        for known in self._workers.values():
            if known.counted:
                self._counted |= (0b1111 if known.shares else 0b0111) << (known.slot * LEVELS)


def _without(event: BlockStored, gone: set[tuple[TierName, bytes]]) -> Iterable[BlockStored]:
    """What is left of an event, as stretches of consecutive blocks."""
    if not gone:
        return (event,)
    links = zip(event.hashes, (event.parent, *event.hashes), strict=False)
    kept = consecutive_runs(link for link in links if (event.tier, link[0]) not in gone)
    return [BlockStored(event.tier, tuple(names), parent, event.ttl_s) for parent, names in kept]


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(f"prefix index: {message}; please report this with the router's log")
