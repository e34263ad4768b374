"""The host tier: blocks in this process's RAM, in fixed slots of one slab.

Making it takes a moment whatever its size: memory is reserved, and made ready in the background (`slab`). The
books (`books`) are kept under one lock, taken once a batch; bytes are copied outside it. A write is two-phase: the
slot is reserved, filled, and only then published, so that a half-written block is never found. A slot that is being
read or viewed is not evicted, and if its block is removed meanwhile, the slot is given back when the last reader goes.

Bytes here never leave the process, so a block is known by its name and carries no checksum.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.blocks import BlockHash
from kvstore.chains import stored_events, tree_runs
from kvstore.errors import MissReason, TierError
from kvstore.events import AllBlocksCleared, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.eviction.tail import DEFAULT_SPARE_BLOCKS, SpareBlocks
from kvstore.host.books import HostBooks, Slot
from kvstore.host.leaving import Evicted
from kvstore.host.memory import available_bytes
from kvstore.host.slab import Bytes, Pinner, Slab
from kvstore.host.views import VIEW_S, Views
from kvstore.host.views import BlockView as BlockView
from kvstore.layout import KVLayout
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta, Clock, Delivery, Honours, TierStats, select


@dataclass(frozen=True, slots=True)
class HostReading:
    """Blocks that are being copied out of host.

    Attributes:
        rows: bytes of each, in place; not to be written to. ended: why there are no more; None: all were there.
    """

    slots: list[Slot]
    rows: list[Bytes]
    ended: MissReason | None


@dataclass(frozen=True, slots=True)
class HostWriting:
    """Slots that are being filled.

    Attributes:
        count: leading blocks of the batch that host holds, or will. rows: (place in the batch, where its bytes go).
    """

    held: list[Slot]
    fresh: list[tuple[int, Slot]]
    count: int
    rows: list[tuple[int, Bytes]]


class HostTier:
    """Fixed slots of one slab; eviction by name, quotas, lifetimes, leases.

    Thread-safe. O(1) a block, and O(log n) where the eviction policy or a TTL needs it.
    """

    name = TierName.HOST
    honours = Honours(capacity=True, ttl=True, named_eviction=True, injected_clock=True, lease=True, quota=True)

    def __init__(
        self,
        layout: KVLayout,
        capacity_bytes: int,
        *,
        clock: Clock,
        wall_clock: Clock = time.time,
        eviction: str = "lru",
        shares: Mapping[BlockHash, int] | None = None,
        spare_blocks: SpareBlocks = DEFAULT_SPARE_BLOCKS,
        pinner: Pinner | None = None,
    ) -> None:
        """Reserve `capacity_bytes`, rounded down to whole blocks.

        Args:
            layout: what a block holds.
            capacity_bytes: size of the slab.
            clock: what TTLs, leases and the deadlines of views go by. wall_clock: seconds since the epoch; what fixed
                ends of lifetimes go by.
            eviction: a name that `make_eviction` knows.
            shares: bytes that a root may count on; what it does not use, others may. None: nobody has a share.
            spare_blocks: for the policy `tail_optimized`; see `make_eviction`.
            pinner: page-locks the slab, which a GPU then copies from and to at bus speed; None: no GPU.

        Raises:
            TierError: the capacity is less than a block, or more than the memory that this process may still take.
            ValueError: there is no eviction policy of that name, or the shares are more than the capacity.
        """
        slots = capacity_bytes // layout.block_nbytes
        if slots < 1:
            raise TierError(
                f"the host tier's {capacity_bytes} bytes hold no block of {layout.block_nbytes}; "
                "give it more bytes, or zero for no host tier"
            )
        _check_room(slots * layout.block_nbytes)
        self.layout = layout
        self._clock = clock
        self._slab = Slab(slots, layout.block_nbytes, pinner=pinner)
        self._books = HostBooks(
            self.name,
            self._slab,
            clock=clock,
            wall_clock=wall_clock,
            eviction=eviction,
            shares=None if shares is None else {root: size // layout.block_nbytes for root, size in shares.items()},
            spare_blocks=spare_blocks,
        )
        self._views = Views()
        self._wanted: Callable[[BlockHash], bool] = _by_nobody
        self._lock = threading.Lock()

    @property
    def num_slots(self) -> int:
        """Blocks that fit."""
        return self._slab.num_slots

    @property
    def pins(self) -> int:
        """Readers, writers and views of all slots; zero when nothing is going on. O(blocks)."""
        with self._lock:
            return self._books.pins()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until all memory is touched and, with a GPU, page-locked; it serves before. False: the time was up."""
        return self._slab.wait_ready(timeout_s)

    def holds(self, name: BlockHash) -> bool:
        """Whether the block can be read now."""
        with self._lock:
            return self._books.live(name)

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """As `Tier.match`; `deadline_s` is of no use here."""
        with self._lock:
            return self._books.leading(hashes)

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block is held; None when it is not."""
        with self._lock:
            return self._books.slots[name].meta if self._books.live(name) else None

    def find_run(self, hashes: Sequence[BlockHash]) -> list[BlockMeta]:
        """The metadata of the leading blocks that are held."""
        with self._lock:
            return [self._books.slots[name].meta for name in hashes[: self._books.leading(hashes)]]

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        """As `Tier.read`. The copies run outside the lock."""
        reading, done = self.begin_read(hashes), 0
        try:
            for row, buffer in zip(reading.rows, into, strict=False):
                np.copyto(np.frombuffer(buffer, np.uint8), row)
                done += 1
        finally:
            self.end_read(reading, done)
        return Delivery(len(reading.rows), reading.ended)

    def begin_read(self, hashes: Sequence[BlockHash]) -> HostReading:
        """Keep the leading blocks that are held in place, for who copies them by itself; then `end_read`."""
        books = self._books
        with self._lock:
            count = books.leading(hashes)
            ended = books.miss(hashes[count]) if count < len(hashes) else None
            slots = books.pin(hashes[:count])
        return HostReading(slots, [self._slab.row(slot.index) for slot in slots], ended)

    def end_read(self, reading: HostReading, done: int) -> None:
        """So many of its blocks were copied; they may go."""
        with self._lock:
            self._books.hits += done
            self._books.unpin(reading.slots)

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """As `Tier.write`. The copies run outside the lock; blocks removed while they run are not published."""
        writing, filled = self.begin_write(metas), 0
        try:
            for number, row in writing.rows:
                np.copyto(row, np.frombuffer(payloads[number], np.uint8))
                filled += 1
        finally:
            self.end_write(writing, filled)
        return writing.count

    def begin_write(self, metas: Sequence[BlockMeta]) -> HostWriting:
        """Reserve slots for those that are not held, for who fills them by itself; then `end_write`."""
        with self._lock:
            held, fresh, count = self._books.admit(metas)
        for _, slot in fresh:
            if slot.evicted is not None:
                self._keep_evicted(slot, slot.evicted)
        return HostWriting(held, fresh, count, [(number, self._slab.row(slot.index)) for number, slot in fresh])

    def end_write(self, writing: HostWriting, filled: int | None = None) -> None:
        """Let the first so many reserved slots be found, which are filled now; None: all. The others are given back."""
        with self._lock:
            for _, slot in writing.fresh[len(writing.fresh) if filled is None else filled :]:
                slot.removed = True
            self._books.publish([slot for _, slot in writing.fresh])
            self._books.unpin(writing.held)

    def keep_evicted(self, limit: int, wanted: Callable[[BlockHash], bool]) -> None:
        """From now on keep a copy of each block that is evicted, `limit` of them at most, until `take_evicted`.

        `wanted` is asked first whether the block is worth it, in whichever thread writes, without a lock.
        """
        with self._lock:
            self._books.leaving.limit = limit
            self._wanted = wanted

    def take_evicted(self) -> list[Evicted]:
        """The copies since the last call, in order of eviction. What was removed or cleared meanwhile is not among
        them, nor what had already expired."""
        with self._lock:
            return self._books.leaving.take()

    @property
    def lost_evicted(self) -> int:
        """Wanted blocks of which there is no copy, as too many were waiting."""
        return self._books.leaving.lost

    def gone(self) -> list[BlockMeta]:
        """The metadata of evicted blocks whose copies nobody has taken yet."""
        with self._lock:
            return self._books.gone()

    def latest_first(self) -> list[BlockMeta]:
        """What can be read, most recently used first. O(n log n)."""
        with self._lock:
            return self._books.latest_first()

    def view(self, hashes: Iterable[BlockHash], *, owner: str = "unnamed", for_s: float = VIEW_S) -> list[BlockView]:
        """Keep the bytes of those blocks in place that are held, and look at them. It is no use and no hit.

        A viewed block is not evicted; should it be removed or expire, its bytes stay all the same. Each view is a
        context manager; else end it by `end_view` or `end_views`.

        Args:
            hashes: names.
            owner: who reads, in a word; reported with views that are open for more than `for_s` seconds.
        """
        slab, deadline = self._slab, self._clock() + for_s
        with self._lock:
            views = [
                BlockView(
                    slot.meta,
                    slab.read_only(slot.index),
                    owner,
                    deadline,
                    slot,
                    slab.generations[slot.index],
                    self,
                )
                for slot in self._books.look(hashes)
            ]
            self._views.open(views, deadline)
        return views

    def end_view(self, view: BlockView) -> None:
        """Let the slot go. The payload must not be used any more."""
        with self._lock:
            if self._views.end(view):
                self._books.look_away(view.slot)

    def end_views(self, views: Iterable[BlockView]) -> None:
        """As `end_view`, for each that is still open."""
        with self._lock:
            for view in views:
                if self._views.end(view):
                    self._books.look_away(view.slot)

    def generation(self, slot: Slot) -> int:
        """How often a slot was given back; a view's bytes are there while it has not changed."""
        return self._slab.generations[slot.index]

    def overdue_views(self) -> list[BlockView]:
        """The views that are open past their deadline."""
        with self._lock:
            return self._views.overdue(self._clock())

    def touch(self, hashes: Sequence[BlockHash]) -> None:
        """As `Tier.touch`; last first, so that a chain's tail is evicted before its head."""
        with self._lock:
            self._books.use(hashes)

    def prolong(self, hashes: Sequence[BlockHash], lifetime: Lifetime) -> None:
        """As `LocalTier.prolong`."""
        with self._lock:
            self._books.prolong(hashes, lifetime)

    def ttl_left_s(self, hashes: Sequence[BlockHash]) -> dict[BlockHash, float | None]:
        """As `LocalTier.ttl_left_s`."""
        with self._lock:
            return {name: self._books.ttl_left_s(name) for name in hashes if self._books.live(name)}

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> int:
        """As `Tier.lease`."""
        with self._lock:
            return self._books.lease(hashes, None if for_s is None else self._clock() + for_s)

    def end_leases(self, hashes: Sequence[BlockHash]) -> int:
        """As `Tier.end_leases`."""
        with self._lock:
            return self._books.end_leases(hashes)

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """As `Tier.remove`; a block that is being written is dropped too, and not counted."""
        with self._lock:
            return self._books.remove(hashes, cause)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """As `Tier.clear`; blocks that are being written are dropped too, and not counted."""
        books = self._books
        with self._lock:
            metas = [slot.meta for slot in books.slots.values()]
            before = len(books.events)
            around = books.writing() + books.gone()
            count = books.remove(select(metas + around, root, prefix), RemovalCause.CLEARED)
            if root is None and prefix is None:
                books.events[before:] = [AllBlocksCleared(self.name)]
            return count

    def sweep(self) -> float | None:
        """As `Tier.sweep`. Logs views that have become overdue."""
        with self._lock:
            self._views.report(self._clock())
            return self._books.expire()

    def snapshot(self) -> list[BlockStored]:
        """All that can be read, as events."""
        # Only the list is made under the lock; what takes long is done outside.
        parents: dict[bytes, bytes | None] = dict(meta.link for meta in self.metas())
        return stored_events(self.name, tree_runs(parents))

    def drain_events(self) -> list[KvEvent]:
        """As `Tier.drain_events`."""
        with self._lock:
            events, self._books.events = self._books.events, []
        return events

    def metas(self) -> list[BlockMeta]:
        """The metadata of all blocks."""
        with self._lock:
            return [slot.meta for slot in self._books.slots.values()]

    def stats(self) -> TierStats:
        """As `Tier.stats`; overdue views and memory that could not be page-locked are a `problem`."""
        with self._lock:
            stats = self._books.stats()
            overdue = self._views.problem(self._clock())
        stats.problem = "; ".join(filter(None, (overdue, self._slab.problem)))
        return stats

    def check(self) -> None:
        """As `Tier.check`, O(blocks).

        Raises:
            InvariantError: the books disagree, or a view is overdue.
        """
        with self._lock:
            self._books.check()
            self._views.check(self._clock())

    def close(self) -> None:
        """Give the slab back; the memory goes when no view of it is left."""
        self._slab.close()

    def _keep_evicted(self, slot: Slot, evicted: BlockMeta) -> None:
        """Copy what a slot still holds of the block that was there before."""
        is_wanted = self._wanted(evicted.hash)
        fits = is_wanted and not self._books.leaving.is_full
        payload = self._slab.row(slot.index).tobytes() if fits else None
        with self._lock:
            if is_wanted:
                self._books.keep(slot, payload)
            else:
                slot.evicted = None


def _by_nobody(name: BlockHash) -> bool:
    return False


def _check_room(nbytes: int) -> None:
    """Refuse now what the system would end the process for later.

    Raises:
        TierError: there is no such room.
    """
    room = available_bytes()
    if nbytes > room:
        raise TierError(
            f"the host tier asks for {nbytes >> 20} MiB, and this process may take {room >> 20} MiB more; "
            "give the host tier fewer bytes, or raise the memory limit of the container"
        )
