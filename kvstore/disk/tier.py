"""The disk tier: blocks in one file of this machine, which outlive the process. The durable tier that needs no server.

Covers: what a tier promises, in terms of an open folder (`space`) and of blocks on their way (`transfer`).
Does not cover: the stored value (`codec`), whether reading is worth it (`store`).

A write is two-phase: a slot is reserved and filled, then the log is told, and only then can the block be found. The log
is told of a removal before the slot is filled again. So whenever the process ends, each slot that the log names is
whole. Every read is verified all the same (identity and checksum); what is wrong is a miss by reason, and is dropped.

What is safe when: against `kill -9`, a block once `write` has returned, a removal once `remove` has; uses (recency and
sliding TTLs) with the next write, `sweep` or `flush`. Against a power cut, all of it after `flush` or `close`, and else
what the system has written by itself, some tens of seconds later; what is half-written then fails verification.

One lock guards the books, for microseconds; files are read and written outside of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvstore.blocks import BlockHash
from kvstore.chains import select, stored_events, tree_runs
from kvstore.codec import BlockCodec
from kvstore.disk.entries import Entry
from kvstore.disk.files import Files
from kvstore.disk.space import DiskSpace
from kvstore.disk.transfer import DiskTransfer
from kvstore.errors import InvariantError, MissReason
from kvstore.events import AllBlocksCleared, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.eviction.tail import DEFAULT_SPARE_BLOCKS, SpareBlocks
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta, Clock, Delivery, Honours, TierStats

log = logging.getLogger(__name__)

LOADING_SWEEP_S = 1.0  # when to sweep again while restored blocks are loaded

_DELETED = "the disk tier's file was deleted: what it holds ends with this process; restart it to begin a new one"
_WRONG = (MissReason.CORRUPT, MissReason.TRUNCATED, MissReason.FOREIGN, MissReason.UNREADABLE)


class DiskTier:
    """Fixed slots of one file, in a folder that only this tier uses. Thread-safe."""

    name = TierName.DISK
    honours = Honours(
        capacity=True, ttl=True, named_eviction=True, injected_clock=True, lease=True, quota=True, restart=True
    )

    def __init__(
        self,
        path: str | Path,
        capacity_bytes: int,
        *,
        codec: BlockCodec,
        clock: Clock,
        wall_clock: Clock = time.time,
        eviction: str = "lru",
        shares: Mapping[BlockHash, int] | None = None,
        spare_blocks: SpareBlocks = DEFAULT_SPARE_BLOCKS,
        direct: bool = True,
        files: Files | None = None,
    ) -> None:
        """Own the folder, and hold what an earlier process left there.

        Args:
            path: the folder; made if need be. It belongs to one process at a time.
            capacity_bytes: of the whole folder, blocks of other models included (see `folder`); rounded down to
                whole slots, which are a page longer than a block. The log, some 150 bytes a block, comes on top.
            codec: how blocks are stored.
            clock: what TTLs and leases go by while the process runs. wall_clock: seconds since the epoch; what they
                go by while it does not, and fixed ends of lifetimes always.
            eviction: name of the policy. After a restart it knows the blocks' last uses, not the earlier ones.
            shares: bytes of the capacity that a root may count on; what it does not use, others may. Where blocks of
            other models leave less room, each has as much less. None: nobody has a share.
            spare_blocks: for the policy `tail_optimized`; see `make_eviction`.
            direct: pass the page cache by where the file system can.
            files: the operating system; for tests.

        Raises:
            TierError: somebody else owns the folder, it cannot be used, or the capacity is less than a block.
            ValueError: there is no such eviction policy, or the shares are more than the capacity.
        """
        self._nbytes = codec.layout.block_nbytes
        self._closed = False
        self._space = DiskSpace(
            Path(path),
            capacity_bytes,
            codec=codec,
            clock=clock,
            wall_clock=wall_clock,
            eviction=eviction,
            shares=shares,
            spare_blocks=spare_blocks,
            direct=direct,
            files=files or Files(),
        )
        self._books, self._lock = self._space.books, self._space.lock
        self._faults: dict[Entry, int] = {}  # slots that could not be read, and how many reads had succeeded by then
        self._under_way: set[Entry] = set()  # slots that some call of `write` fills
        self._transfer = DiskTransfer(self._space, codec, wall_clock)

    @property
    def num_slots(self) -> int:
        """Blocks that fit."""
        return self._space.slab.num_slots

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is passed by."""
        return self._space.slab.direct

    def match(self, hashes: Sequence[BlockHash], *, deadline_s: float | None = None) -> int:
        """As `Tier.match`; never asks the disk."""
        with self._lock:
            return self._books.leading(hashes)

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block is held; None when it is not."""
        with self._lock:
            entry = self._books.entry(name) if self._books.live(name) else None
            return None if entry is None else entry.meta

    def read(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        """As `Tier.read`. The deadline is looked at between blocks: a read that the device does not end is not cut."""
        ends_at = None if deadline_s is None else time.monotonic() + deadline_s
        with self._lock:
            count = self._books.leading(hashes)
            entries = self._books.pin(hashes[:count])
        try:
            reasons = self._transfer.fetch(entries, into, ends_at)
        finally:
            with self._lock:
                self._books.unpin(entries)
        arrived = next((n for n, reason in enumerate(reasons) if reason is not None), count)
        with self._lock:
            self._books.hits += arrived
            ended = reasons[arrived] if arrived < count else None
            if ended in _WRONG and entries[arrived].removed:  # its slot was given away meanwhile
                ended = MissReason.ABSENT
            elif arrived == count < len(hashes):
                ended = self._books.why_missing(hashes[count])
            elif ended is MissReason.UNREADABLE and not self._is_lost(entries[arrived]):
                ended = MissReason.ERROR
            if ended is not None:
                self._books.misses[ended] += 1
            for entry in entries[:arrived] if self._faults else ():
                self._faults.pop(entry, None)
        if arrived < count and ended in _WRONG:
            self._drop_wrong(entries[arrived], str(ended))
        return Delivery(arrived, ended)

    def write(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> int:
        """As `Tier.write`. While the disk refuses writes, only counts and refreshes what is already held."""
        if self._books.is_loading and self._books.free_slots < len(metas):
            self._space.index.load()
        with self._lock:  # in one: what is held now must still be when nothing else may be written
            held = self._books.leading([meta.hash for meta in metas])
            if held < len(metas) and not self._space.health.may_write():
                self._books.unpin(self._books.reserve(metas[:held])[0])
                self._books.failures[self._space.health.reason] += len(metas) - held
                return held
            stamp = self._space.slab.stamp
            kept, fresh, count = self._books.reserve(metas)
            self._under_way.update(entry for _, entry in fresh)
        done: list[Entry] = []
        try:
            done = self._transfer.store(fresh, payloads, stamp)
        finally:
            with self._lock:
                self._books.publish([entry for _, entry in fresh])
                self._under_way.difference_update(entry for _, entry in fresh)
                self._books.unpin(kept)
        if len(done) < len(fresh):
            count = fresh[len(done)][0]
        elif fresh:
            self._space.health.wrote()
        self._space.index.rewrite_when_long()
        return count

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
        """As `Tier.lease`; holds across restarts, by the wall clock. Never waits for the device."""
        with self._lock:
            count = self._books.lease(hashes, for_s)
        self._space.write_down(rewrites=False)
        return count

    def end_leases(self, hashes: Sequence[BlockHash]) -> int:
        """As `Tier.end_leases`."""
        with self._lock:
            count = self._books.end_leases(hashes)
        self._space.write_down(rewrites=False)
        return count

    def leases(self) -> dict[BlockHash, float | None]:
        """As `Lasting.leases`."""
        with self._lock:
            return self._books.leases()

    def remove(self, hashes: Sequence[BlockHash], cause: RemovalCause) -> int:
        """As `Tier.remove`; a block that is being written is dropped too, and not counted.

        Raises:
            TierError: as `clear`, where the cause is CLEARED.
        """
        with self._lock:
            gone = self._books.take_out(hashes, cause)
        self._space.erase(gone, cause)
        return len(gone)

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """As `Tier.clear`; blocks that are being written are dropped too, and not counted.

        None of them comes back, even should the log be lost (`survivors`); bytes of payloads stay on the disk
        until their slots are used again.

        Raises:
            TierError: they are dropped, but the disk refuses to be told so: they come back should the process end now.
        """
        everything = root is None and prefix is None
        with self._lock:
            before = len(self._books.events)
            chosen = select(self._books.metas(coming=True), root, prefix)
            gone = self._books.take_out(chosen, RemovalCause.CLEARED)
            if everything:
                self._books.events[before:] = [AllBlocksCleared(self.name)]
        if everything:
            self._space.erase_all(gone)
        else:
            self._space.erase(gone, RemovalCause.CLEARED)
        return len(gone)

    def sweep(self) -> float | None:
        """As `Tier.sweep`; also writes down the uses since the last time.

        While restored blocks are being loaded, it drops of those that are and says to come again soon.
        """
        with self._lock:
            next_s = self._books.expire()
            if self._books.is_loading:
                next_s = LOADING_SWEEP_S if next_s is None else min(LOADING_SWEEP_S, next_s)
        self._space.write_down()
        return next_s

    def flush(self) -> None:
        """Let all of it outlive a power cut. Waits for the device.

        Raises:
            OSError: the disk refuses.
        """
        self._space.flush()

    def snapshot(self) -> list[BlockStored]:
        """All that can be read, as events."""
        with self._lock:
            parents: dict[bytes, bytes | None] = dict(meta.link for meta in self._books.metas(coming=False))
        return stored_events(self.name, tree_runs(parents))

    def metas(self) -> list[BlockMeta]:
        """The metadata of all blocks."""
        with self._lock:
            return self._books.metas(coming=False)

    def drain_events(self) -> list[KvEvent]:
        """As `Tier.drain_events`."""
        with self._lock:
            events, self._books.events = self._books.events, []
        return events

    def stats(self) -> TierStats:
        """As `Tier.stats`; fill in bytes of the disk: a slot is a page longer than its block."""
        slot, books = self._space.slab.slot_nbytes, self._books
        deleted = _DELETED if self._space.slab.is_deleted else ""
        with self._lock:
            return TierStats(
                used_bytes=books.used_slots * slot,
                capacity_bytes=self.num_slots * slot,
                blocks=books.blocks,
                hits=books.hits,
                misses=dict(books.misses),
                removals=dict(books.removals),
                stores=books.stores,
                store_failures=dict(books.failures),
                read_bytes=books.hits * self._nbytes,
                written_bytes=books.stores * self._nbytes,
                healthy=self._space.health.can_read,
                problem="; ".join(filter(None, (self._space.problem, deleted))),
                leased=books.leased,
            )

    def check(self) -> None:
        """As `Tier.check`: books, log, and the headers of some held slots: each audit goes on where the last one ended.

        Any thread may call it; others wait for the books' part, which is O(blocks) and takes 20 us a block.
        A header that cannot be read or parsed is the disk's fault, not the books': the next read drops the block.
        """
        self._space.check()
        with self._lock:
            if self._books.coming != self._under_way:
                raise InvariantError("slots are reserved for writes that have ended, or the other way round")

    def close(self) -> None:
        """As `Tier.close`: everything is on the device then. Nobody may be using the tier."""
        if self._closed:
            return
        self._closed = True
        self._transfer.close()
        self._space.close()

    def _is_lost(self, entry: Entry) -> bool:
        """A slot could not be read: whether that is for good, as a device that reads others has refused it twice.

        Else the device may only be away, and what is on it will be read again. A lease forbids to drop it either way.
        """
        before = self._faults.get(entry)
        if before is not None:
            return before < self._space.health.reads and entry.lease is None
        self._faults = {other: reads for other, reads in self._faults.items() if not other.removed}
        self._faults[entry] = self._space.health.reads
        return False

    def _drop_wrong(self, entry: Entry, reason: str) -> None:
        name = entry.meta.hash
        with self._lock:
            is_held = self._books.entry(name) is entry
            gone = self._books.take_out([name], RemovalCause.INVALID) if is_held else []
        if gone:
            log.warning("block on disk was wrong", extra={"block": name.hex(), "slot": entry.index, "reason": reason})
            self._space.erase(gone, RemovalCause.INVALID)
