"""TieredStore: blocks over device, host RAM and a shared tier.

This file ties the parts together: `promotion` brings blocks up, `spill` takes them down and keeps them fresh, the tiers
hold them. Write-through to host, write-behind to the shared tier. Every method is for the engine's thread, except
`wait` and `stats`, which any thread may call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvstore.blocks import BlockHash, short
from kvstore.chains import consecutive_runs, stored_events
from kvstore.device import DeviceTier
from kvstore.directory import Directory
from kvstore.errors import InvariantError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.host import HostTier
from kvstore.layout import KVLayout
from kvstore.promotion import Acquisition, ComputeMs, Promoter, ReadTiers
from kvstore.spill import QueuedWrite, RefreshSchedule, WriteBehind
from kvstore.tier import BlockMeta, Clock, SharedTier, TierStats, select

__all__ = ["Acquisition", "ComputeMs", "ReadTiers", "TieredStore"]

ALL_TIERS = ReadTiers()
DEFAULT_QUEUE_BYTES = 256 << 20
DEFAULT_DIRECTORY_ENTRIES = 1 << 18
CANCEL_WAIT_S = 5.0  # how long `clear` waits for a write that it overtook


class TieredStore:
    """Blocks over device, host RAM and a shared tier.

    Attributes:
        layout: what a block holds. device: the paged pool; the engine takes `device.kv(layer)` from it.
        host: the tier below it; None: without.
    """

    def __init__(
        self,
        layout: KVLayout,
        device: DeviceTier,
        host: HostTier | None,
        shared: SharedTier | None,
        *,
        clock: Clock,
        default_ttl_s: float | None,
        io_threads: int = 2,
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
        directory_entries: int = DEFAULT_DIRECTORY_ENTRIES,
    ) -> None:
        """Take over the tiers; `close` closes them.

        Args:
            layout: what a block holds.
            device, host, shared: the tiers; None: without.
            clock: what TTLs and measured times go by, the same as the tiers'.
            default_ttl_s: for blocks that come without one; None: they live until they are evicted.
            io_threads: reads of the shared tier at once. Writes have one thread more.
            queue_bytes: blocks that wait for the shared tier; beyond it they are dropped. At most half of the host
                tier's slots are kept from eviction by it.
            directory_entries: blocks of the shared tier, and their last refreshes, to remember.
        """
        self.layout = layout
        self.device = device
        self.host = host
        self._shared = shared
        self._default_ttl_s = default_ttl_s
        self._promoter = Promoter(
            device, host, shared, clock=clock, io_threads=io_threads, on_shared_read=self._on_shared_read
        )
        self._directory = Directory(TierName.REDIS if shared is None else shared.name, directory_entries, clock=clock)
        self._schedule = RefreshSchedule(directory_entries, clock=clock)
        self._writer = None if shared is None else self._make_writer(shared, queue_bytes)
        self._events: list[KvEvent] = []  # of the shared tier: its own, and what the store learnt of it, in order

    def match(self, hashes: Sequence[BlockHash], reads: ReadTiers = ALL_TIERS) -> list[TierName]:
        """The fastest local tier (device, host) of each leading block. A question; the shared tier is not asked."""
        tiers: list[TierName] = []
        for name in hashes:
            if reads.device and self.device.holds(name):
                tiers.append(self.device.name)
            elif reads.host and self.host is not None and self.host.holds(name):
                tiers.append(self.host.name)
            else:
                break
        return tiers

    def acquire(
        self,
        hashes: Sequence[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        ttl_s: float | None = None,
    ) -> Acquisition:
        """Start to bring the longest prefix that is worth loading to the device. Never blocks on I/O of a server.

        Device blocks are referenced at once. A lower tier is read only for runs where its predicted time is below
        `compute_ms` for the same blocks. Needs free device blocks for what it loads: with too few it loads fewer.

        Give the chain's `root` and the request's `ttl_s` (None: the store's default): blocks that come from the shared
        tier are registered under them. Without a root they count as any root's in `clear`.
        """
        ttl_s = self._default_ttl_s if ttl_s is None else ttl_s
        acquisition = Acquisition(self._promoter, hashes, reads, compute_ms, root, ttl_s)
        self._promoter.start(acquisition)
        self._used(hashes[: len(acquisition.block_ids)])
        return acquisition

    def allocate(self, count: int) -> list[int] | None:
        """That many empty device blocks, referenced for the caller, evicting unreferenced cached ones; None: no room.

        All or nothing. Unreferenced cached blocks are evicted least recently used first, a suffix before its prefix.
        """
        return self.device.allocate(count)

    def commit(self, block_ids: Sequence[int], metas: Sequence[BlockMeta]) -> None:
        """These device blocks are full: make them findable, copy them to host, queue them for the shared tier.

        If a name is already held by another device block, the caller's copy stays private to it.
        """
        metas = [self._with_ttl(meta) for meta in metas]
        named = self.device.commit(block_ids, metas)
        fresh_names = {meta.hash for _, meta in named}
        self._used([meta.hash for meta in metas if meta.hash not in fresh_names])
        if not named:
            return
        fresh = [meta for _, meta in named]
        if self.host is not None or self._shared is not None:
            self._spill(fresh, self.device.payloads([block_id for block_id, _ in named]))

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each. Committed ones stay cached until evicted; the others are free at once."""
        metas = [meta for block_id in block_ids if (meta := self.device.meta(block_id)) is not None]
        self.device.release(block_ids)
        self._used([meta.hash for meta in metas])

    def pump(self) -> None:
        """Take in what I/O threads finished, expire what is due, refresh lower tiers. Called once an engine step."""
        self._hear_shared()
        self._promoter.pump()
        self.device.sweep()
        if self.host is not None:
            self.host.sweep()
        if self._writer is not None:
            self._refresh(self._writer)

    def wait(self, timeout_s: float) -> None:
        """Sleep until an I/O thread finished something, or the timeout. `pump` takes it in."""
        self._promoter.arrived.wait(timeout_s)

    def drain_events(self) -> list[KvEvent]:
        """Events of all tiers since the last call; each tier's are in order."""
        events = self.device.drain_events()
        if self.host is not None:
            events += self.host.drain_events()
        self._hear_shared()
        of_shared, self._events = self._events, []
        return events + of_shared

    def snapshot(self) -> list[BlockStored]:
        """All that device and host hold and what is known of the shared tier, as events.

        Drops no events: those not drained yet may follow it though it includes them. Replayed in order after it they
        lead to the same state.
        """
        self._hear_shared()
        held = self.device.snapshot()
        if self.host is not None:
            held += self.host.snapshot()
        return held + self._directory.snapshot()

    def clear(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None, shared: bool = False
    ) -> dict[TierName, int]:
        """Drop blocks in device and host, and with `shared` in the shared tier too; blocks dropped, by tier.

        Without `shared` another worker may clear the shared tier, so what is known of it there is forgotten, too, and
        writes that run are taken back: blocks that are computed afterwards are written there again.

        Running sequences keep their blocks but nobody finds them any more. Queued writes of those blocks are dropped.
        """
        if self._writer is not None:
            self._take_refreshed(self._writer)
        names = self._select(root, prefix)
        self._promoter.discard(set(names))
        everything = root is None and prefix is None
        dropped = {
            tier.name: tier.clear() if everything else tier.remove(names, RemovalCause.CLEARED)
            for tier in (self.device, self.host)
            if tier is not None
        }
        if self._writer is not None:
            self._writer.drop(set(names))
            self._writer.settle_cancelled(CANCEL_WAIT_S)
        for name in names:
            self._schedule.lost(name)
        if self._shared is not None:
            try:
                if shared:
                    dropped[self._shared.name] = self._shared.clear(root=root, prefix=prefix)
            finally:  # of a server that failed half-way nothing is known either
                self._forget_scope(self._shared, names, root, prefix)
        return dropped

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that is queued for the shared tier has been tried; False: the time was up."""
        return True if self._writer is None else self._writer.flush(timeout_s)

    def stats(self) -> dict[TierName, TierStats]:
        """Counters of every tier. Any thread may ask."""
        stats = {tier.name: tier.stats() for tier in (self.device, self.host, self._shared) if tier is not None}
        if self._shared is not None and self._writer is not None and self._writer.queue_full:
            failures = stats[self._shared.name].store_failures
            failures["queue_full"] = failures.get("queue_full", 0) + self._writer.queue_full
        return stats

    def read_ms(self) -> dict[TierName, tuple[float, float]]:
        """For each tier below device: measured (latency of a read, time a block), milliseconds; zeros: not measured."""
        nbytes = self.layout.block_nbytes
        return {name: (fit.latency_ms, fit.ms_per(nbytes)) for name, fit in self._promoter.estimates.items()}

    def check(self) -> None:
        """Audit every tier and the store's own books.

        Raises:
            InvariantError: they disagree.
        """
        for tier in (self.device, self.host, self._shared):
            if tier is not None:
                tier.check()
        self._promoter.check()
        if self._writer is not None:
            self._writer.check()

    def close(self, *, flush_s: float = 0.0) -> None:
        """Write out what is queued for the shared tier for at most `flush_s` seconds, then give everything back."""
        if self._writer is not None:
            self._writer.flush(flush_s)
            self._writer.close(CANCEL_WAIT_S)
        self._promoter.close()
        for tier in (self._shared, self.host, self.device):
            if tier is not None:
                tier.close()

    def _make_writer(self, shared: SharedTier, queue_bytes: int) -> WriteBehind:
        blocks = max(1, queue_bytes // self.layout.block_nbytes)
        if self.host is None:
            return WriteBehind(shared, max_blocks=blocks, end_lease=_no_lease)
        blocks = min(blocks, max(1, self.host.num_slots // 2))
        return WriteBehind(shared, max_blocks=blocks, end_lease=self.host.end_lease)

    def _with_ttl(self, meta: BlockMeta) -> BlockMeta:
        return meta if meta.ttl_s is not None else replace(meta, ttl_s=self._default_ttl_s)

    def _spill(self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview]) -> None:
        """Copy to host, and queue for the shared tier what it is not known to hold."""
        if self.host is not None:
            self.host.write(metas, payloads)
        for meta, payload in zip(metas, payloads, strict=True):
            if short(meta.hash) in self._directory:
                self._schedule.used(meta.hash, meta.ttl_s)
            elif not self._queue(meta, payload):
                return  # what follows a block that is not there cannot be found

    def _queue(self, meta: BlockMeta, payload: memoryview) -> bool:
        if self._writer is None:
            return False
        leases = self.host.lease([meta.hash]) if self.host is not None else []
        write = (
            QueuedWrite(meta, leases[0].payload, leases[0]) if leases else QueuedWrite(meta, memoryview(bytes(payload)))
        )
        queued = self._writer.put(write)
        if queued:
            self._schedule.renewed(meta.hash, meta.ttl_s)
        return queued

    def _used(self, names: Sequence[BlockHash]) -> None:
        """Blocks of one chain were hit in the device: lower tiers shall know."""
        if self.host is not None and names:
            self.host.touch(names)
        metas = [meta for name in names if (meta := self.device.find(name)) is not None]
        for meta in reversed(metas if self.host is not None else []):
            self._prolong_in_host(meta)
        for meta in metas if self._writer is not None else []:
            self._schedule.used(meta.hash, meta.ttl_s)

    def _prolong_in_host(self, meta: BlockMeta) -> None:
        if self.host is not None:
            self.host.prolong([meta.hash], meta.ttl_s)

    def _refresh(self, writer: WriteBehind) -> None:
        """Ask for what is due, and take in what became of what was asked for."""
        if due := [meta for name in self._schedule.pop_due() if (meta := self._find(name)) is not None]:
            writer.refresh(due)
        self._take_refreshed(writer)
        for name in writer.take_unwritten():
            self._schedule.lost(name)

    def _take_refreshed(self, writer: WriteBehind) -> None:
        for refreshed in writer.take_refreshed():
            if refreshed.missing is not None:
                self._settle_refresh(refreshed.metas, refreshed.missing)
                continue
            for meta in refreshed.metas:
                self._schedule.unanswered(meta.hash, meta.ttl_s)

    def _settle_refresh(self, metas: list[BlockMeta], missing: list[BlockHash]) -> None:
        """The shared tier was asked to refresh blocks: tell what it holds, write again what it lost."""
        self._learn([meta for meta in metas if meta.hash not in missing and self._find(meta.hash) is not None])
        self._forget(missing)
        for name in missing:
            self._schedule.lost(name)
            self._spill_again(name)

    def _spill_again(self, name: BlockHash) -> None:
        meta = self._find(name)
        if meta is None:
            return
        if self.device.holds(name):
            block_id = self.device.reference(name)
            self._queue(meta, self.device.payloads([block_id])[0])
            self.device.release([block_id])
        elif self.host is not None and (leases := self.host.lease([name])):
            self._queue(meta, leases[0].payload)
            self.host.end_lease(leases[0])

    def _find(self, name: BlockHash) -> BlockMeta | None:
        meta = self.device.find(name)
        return self.host.find(name) if meta is None and self.host is not None else meta

    def _on_shared_read(self, metas: list[BlockMeta], count: int) -> None:
        """A read of the shared tier ended: its TTLs began again there, or it does not hold what we thought."""
        arrived = metas[:count]
        if self._shared is not None:
            arrived = [self._shared.find(meta.hash) or meta for meta in arrived]
        self._learn(arrived)
        for meta in arrived:
            self._schedule.renewed(meta.hash, meta.ttl_s)
        self._forget([meta.hash for meta in metas[count : count + 1]])

    def _hear_shared(self) -> None:
        """Take the shared tier's events before anything is added to them, so that they stay in order."""
        if self._shared is not None:
            events = self._shared.drain_events()
            for event in events:
                self._directory.apply(event)
                if isinstance(event, AllBlocksCleared):
                    self._schedule.retain(set())
            self._events += events

    def _learn(self, metas: Sequence[BlockMeta]) -> None:
        if self._shared is None:
            return
        self._hear_shared()
        for run in consecutive_runs(meta.link for meta in metas):
            ttl_s = next(meta.ttl_s for meta in metas if meta.hash == run[1][0])
            for event in stored_events(self._shared.name, [run], ttl_s):
                self._directory.apply(event)
                self._events.append(event)

    def _forget(self, names: Sequence[BlockHash]) -> None:
        """The shared tier does not hold these; of those that were thought there, tell."""
        self._hear_shared()
        gone = tuple(short(name) for name in names if short(name) in self._directory)
        if gone and self._shared is not None:
            self._directory.remove(gone)
            self._events.append(BlockRemoved(self._shared.name, gone, RemovalCause.ABSENT))

    def _forget_scope(
        self, shared: SharedTier, names: Sequence[BlockHash], root: BlockHash | None, prefix: BlockHash | None
    ) -> None:
        """Know nothing any more of a cleared scope in the shared tier, nor of blocks whose root is not known."""
        self._hear_shared()
        kept = {meta.hash for meta in shared.forget(root=root, prefix=prefix)} - set(names)
        self._directory.retain({short(name) for name in kept})
        self._schedule.retain(kept)

    def _select(self, root: BlockHash | None, prefix: BlockHash | None) -> list[BlockHash]:
        """What `clear` drops of all that lies or moves in this process; an unknown root counts as any."""
        metas = self.device.metas() + self._promoter.metas()
        if self.host is not None:
            metas += self.host.metas()
        if self._writer is not None:
            metas += self._writer.metas()
        if root is not None:
            metas = [meta if meta.root else replace(meta, root=root) for meta in metas]
        return list(dict.fromkeys(select(metas, root, prefix)))


def _no_lease(lease: object) -> None:
    raise InvariantError("a lease ended, and there is no host tier that could have given it")
