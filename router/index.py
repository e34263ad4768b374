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

from kvstore.chains import consecutive_runs
from kvstore.errors import InvariantError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from router.holders import NEVER, SHARED, Gone, Holders, HolderSets, end_of_life, slot_mask, tier_mask
from router.index_workers import IndexWorker, IndexWorkers
from router.overlap import NO_OVERLAP, End, Overlap, Overlaps, slots_of
from router.runs import LEAST_BYTES, TOMBSTONE_BYTES, Fewer, Fuller, Runs
from router.settling import SETTLE_EVERY, Settle, settle_nothing
from router.tombstones import Tombstones

__all__ = ["DEFAULT_BYTES", "NO_OVERLAP", "Overlap", "PrefixIndex"]

Clock = Callable[[], float]

DEFAULT_BYTES = 2 << 30
_TOMBSTONES_SHARE = 16  # at most this part of the memory
_REMOVED_BYTES = 200  # a removal that is remembered while a snapshot is read
_REMOVED_SHARE = 8  # at most this part of the memory

_GONE = {
    RemovalCause.EVICTED: Gone.EVICTED,
    RemovalCause.EXPIRED: Gone.EXPIRED,
    RemovalCause.CLEARED: Gone.CLEARED,
    # A broken or vanished value was dropped by the tier without being asked: to the user that is an eviction.
    RemovalCause.INVALID: Gone.EVICTED,
    RemovalCause.ABSENT: Gone.EVICTED,
}


class PrefixIndex:
    """Block holders of a whole fleet. All methods are synchronous; none blocks."""

    def __init__(
        self,
        clock: Clock,
        *,
        limit_bytes: int = DEFAULT_BYTES,
        max_tombstones: int = 65_536,
        max_probes: int = 512,
        settle: Settle = settle_nothing,
    ) -> None:
        """Nothing is known.

        Args:
            limit_bytes: what blocks, runs, holder sets and tombstones may take together. max_tombstones: causes kept
            of blocks that are gone. max_probes: runs that a question looks at. settle: called at once, and whenever
            some thousands of objects were made that live on (see `settling`).

        Raises:
            ValueError: the memory is too small to work with.
        """
        if limit_bytes < LEAST_BYTES:
            raise ValueError(f"the index was given {limit_bytes} bytes; give it at least {LEAST_BYTES}")
        self._clock = clock
        self._sets = HolderSets()
        self._tombstones = Tombstones(min(max_tombstones, limit_bytes // _TOMBSTONES_SHARE // TOMBSTONE_BYTES))
        self._runs = Runs(self._sets, self._tombstones, limit=limit_bytes)
        self._workers = IndexWorkers()
        self._shared_id = ""
        self._max_probes = max_probes
        self._settle, self._settled = settle, 0  # how many runs had been made
        settle()
        self._overlaps = Overlaps(self._workers)

    def __len__(self) -> int:
        """Blocks known, those that still wait for the sweep included."""
        return self._runs.table.blocks

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
        return len(self._runs.table)

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
        if self._workers.is_past(worker, incarnation):
            return False
        self.drop(worker)
        if self._workers.add(worker, incarnation, shares=bool(shared_id)) >= self._sets.slots:
            self._sets.grow()
        if shared_id and shared_id != self._shared_id:
            if self._shared_id:
                self._take_out(SHARED, Gone.CLEARED)
            self._shared_id = shared_id
        return True

    def shares(self, worker: str) -> None:
        """It reads from the shared tier after all: its hello named no server, which had not answered it yet."""
        if known := self._workers.get(worker):
            known.shares = True
            self._workers.count()

    def unfence(self, worker: str) -> None:
        """Its latest incarnation is gone for good: whichever joins next is heard, be it an older one."""
        self._workers.unfence(worker)

    def drop(self, worker: str) -> None:
        """The worker is lost: its credit is zero from now on. The shared tier's credit stays."""
        if known := self._workers.get(worker):
            self._forget_removed(known)
        slot = self._workers.remove(worker)
        if slot is not None:
            self._take_out(slot_mask(slot), Gone.WORKER_LOST)

    def distrust(self, worker: str) -> None:
        """Events were missed: no credit until a new snapshot is complete."""
        if known := self._workers.get(worker):
            known.counted = False
            self._workers.count()

    def begin_snapshot(self, worker: str, incarnation: int) -> None:
        """Forget the worker's blocks; `apply` fills them in, and they count from `end_snapshot` on."""
        known = self._workers.fenced(worker, incarnation)
        if known is None:
            return
        self._take_out(slot_mask(known.slot), Gone.EVICTED)
        known.counted = known.deaf = False
        self._forget_removed(known)
        known.removed, known.cleared = set(), set()
        self._workers.count()

    def snapshot(self, worker: str, incarnation: int, blocks: Iterable[BlockStored]) -> None:
        """A piece of a snapshot. Blocks that were reported removed or cleared since it began stay gone."""
        known = self._workers.fenced(worker, incarnation)
        if known is None:
            return
        for event in blocks:
            if known.deaf:
                break
            if event.tier in known.cleared:
                continue
            for kept in _without(event, known.removed or set()):
                self._store(known, kept)
        if self._runs.table.made - self._settled >= SETTLE_EVERY:
            self._settle_runs()

    def end_snapshot(self, worker: str, incarnation: int) -> None:
        """The snapshot is complete: the worker's blocks count."""
        known = self._workers.fenced(worker, incarnation)
        if known is not None:
            known.counted, known.cleared = True, set()
            self._forget_removed(known)
            self._workers.count()

    def apply(self, worker: str, incarnation: int, events: Iterable[KvEvent]) -> bool:
        """Apply a worker's events in order. False, and nothing happened, when it is not that incarnation's turn."""
        known = self._workers.fenced(worker, incarnation)
        if known is None:
            return False
        for event in events:
            match event:
                case BlockStored():
                    if known.removed:
                        self._note_back(known.removed, event)
                    self._store(known, event)
                case BlockRemoved():
                    self._remove(known, event)
                case AllBlocksCleared():
                    self._clear(known, event.tier)
        if self._runs.table.made - self._settled >= SETTLE_EVERY:
            self._settle_runs()
        return True

    # Questions

    def match(self, hashes: Sequence[bytes]) -> dict[str, Overlap]:
        """For every known worker the leading blocks of a chain of short hashes. O(runs + workers).

        Exact, but for the workers in `lower_bounds`.
        """
        ends, _ = self._follow(hashes)
        return self._overlaps.of(ends)

    def lower_bounds(self, hashes: Sequence[bytes]) -> frozenset[str]:
        """The workers of which `match` answers a lower bound: they hold the chain past `max_probes` runs of it."""
        _, open_bits = self._follow(hashes)
        return frozenset(self._workers.names[slot] for slot in slots_of(open_bits))

    def _follow(self, hashes: Sequence[bytes]) -> tuple[list[End], int]:
        """Where bits of reach end along a chain, and which were not followed to their end."""
        self._expire()
        alive, seen = self._workers.counted, None
        rows, numbered = self._runs.table.rows, self._runs.table.numbered
        ends: list[End] = []
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
                at += run.agreed(hashes, at)
        else:
            ends.append((alive, at))
            beyond = self._runs.find(hashes[at]) if at < total else None
            return ends, alive & beyond.holders.reach if beyond is not None else 0
        ends.append((alive, at))
        return ends, 0

    def shared_run(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that the shared tier alone holds."""
        self._expire()
        depth = 0
        while depth < len(hashes):
            run = self._runs.find(hashes[depth])
            if run is None or not run.holders.mask & SHARED:
                break
            depth += run.agreed(hashes, depth)
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
        taken = self._workers.taken()
        for holders in self._sets:
            _expect(not holders.mask & ~taken, "a block is held by a worker that is gone")
            _expect(holders.reach == self._sets.reach(holders.mask), "a holder set has a stale reach")
        _expect(len(self._tombstones) <= self._tombstones.limit, "more tombstones than allowed")
        _expect(self._workers.is_sound(), "a slot has two owners, or another's name")
        removed = sum(len(known.removed or ()) for name in self._workers if (known := self._workers.get(name)))
        _expect(self._runs.aside == removed * _REMOVED_BYTES, "removals of a snapshot are counted wrongly")

    # Events

    def _store(self, known: IndexWorker, event: BlockStored) -> None:
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

    def _remove(self, known: IndexWorker, event: BlockRemoved) -> None:
        if known.removed is not None and not known.deaf:
            self._note_removed(known, known.removed, event)
        bit = tier_mask(known.slot, event.tier)
        self._runs.take(event.hashes, bit, self._without_bit(bit), _GONE[event.cause])

    def _note_removed(self, known: IndexWorker, removed: set[tuple[TierName, bytes]], event: BlockRemoved) -> None:
        """A snapshot that is being read may still name these. Of too many, none is remembered and none believed."""
        before = len(removed)
        removed.update((event.tier, block) for block in event.hashes)
        self._runs.aside += (len(removed) - before) * _REMOVED_BYTES
        if self._runs.aside > self._runs.limit // _REMOVED_SHARE:
            self._forget_removed(known)
            known.deaf = True

    def _note_back(self, removed: set[tuple[TierName, bytes]], event: BlockStored) -> None:
        before = len(removed)
        removed.difference_update((event.tier, block) for block in event.hashes)
        self._runs.aside -= (before - len(removed)) * _REMOVED_BYTES

    def _forget_removed(self, known: IndexWorker) -> None:
        self._runs.aside -= len(known.removed or ()) * _REMOVED_BYTES
        known.removed = None

    def _without_bit(self, bit: int) -> Fewer:
        def fewer(old: Holders) -> Holders | None:
            rest = old.mask & ~bit
            return self._sets.get(rest, old.until if rest & SHARED else NEVER) if rest else None

        return fewer

    def _clear(self, known: IndexWorker, tier: TierName) -> None:
        if known.removed is not None:
            known.cleared.add(tier)
        self._take_out(tier_mask(known.slot, tier), Gone.CLEARED)

    def _expire(self) -> None:
        """Drop shared blocks whose time has come."""
        if self._sets.expire(self._clock()):
            self._runs.begin_sweep()

    # Upkeep, inside

    def _settle_runs(self) -> None:
        self._settled = self._runs.table.made
        self._settle()

    def _take_out(self, bits: int, cause: Gone) -> None:
        if self._sets.take_out(bits, cause):
            self._runs.begin_sweep()


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
