"""TieredStore: blocks over device, host RAM, disk, a shared tier and other workers.

This file ties the parts together: `promotion` brings blocks up, a `lane` for each slow tier takes them down and keeps
them fresh there, the tiers hold them, `clearing` takes them out everywhere; `wiring` connects the parts. Write-through
to host; to disk and the shared tier write-behind, or `write_back` when host evicts a block. Every method is for the
engine's thread, except `wait`, `stats` and `clear_shared`, which any thread may call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

from kvstore.acquisition import Acquisition, ComputeMs, PlannedRun, Promise, ReadTiers, Wish
from kvstore.admission import Admission, Moment
from kvstore.blocks import BlockHash
from kvstore.clearing import Clearing
from kvstore.device import DeviceTier
from kvstore.events import BlockStored, KvEvent, TierName
from kvstore.host.tier import HostTier
from kvstore.inventory import HeldBlock, Inventory, ttl_left_s
from kvstore.lane import Lane, NearTiers
from kvstore.layout import KVLayout
from kvstore.leases import Leases
from kvstore.lifetime import Lifetime
from kvstore.patience import DEFAULT_SLACK_S
from kvstore.promotion import HOST_STEP_NBYTES, Promoter
from kvstore.source import Source
from kvstore.spilling import Spilling
from kvstore.tier import BlockMeta, Clock, HintedTier, LocalTier, SharedTier, Tier, TierStats
from kvstore.wiring import lanes_of, rules_of, slow_tiers, sources_of
from kvstore.write_back import WriteBack

__all__ = ["Acquisition", "ComputeMs", "HeldBlock", "PlannedRun", "ReadTiers", "TieredStore"]

ALL_TIERS = ReadTiers()
DEFAULT_QUEUE_BYTES = 256 << 20
DEFAULT_DIRECTORY_ENTRIES = 1 << 18


class TieredStore:
    """Blocks over device, host RAM, disk, a shared tier and other workers.

    Attributes:
        layout: what a block holds. device: the paged pool; the engine takes `device.kv(layer)` from it.
        host: the tier below it; None: without. disk: the tier of this worker that outlives it; None: without.
    """

    def __init__(
        self,
        layout: KVLayout,
        device: DeviceTier,
        host: HostTier | None,
        shared: SharedTier | None,
        *,
        disk: LocalTier | None = None,
        peers: HintedTier | None = None,
        clock: Clock,
        default_ttl_s: float | None,
        wall_clock: Clock = time.time,
        admission: Admission | None = None,
        shared_admission: Admission | None = None,
        io_threads: int = 2,
        queue_bytes: int = DEFAULT_QUEUE_BYTES,
        directory_entries: int = DEFAULT_DIRECTORY_ENTRIES,
        load_slack_s: float = DEFAULT_SLACK_S,
        host_step_bytes: int = HOST_STEP_NBYTES,
    ) -> None:
        """Take over the tiers; `close` closes them.

        Args:
            layout: what a block holds.
            device, host, shared, disk: the tiers; None: without.
            peers: what other workers hold; read, and never written to. None: without.
            clock: what TTLs and measured times go by, the same as the tiers'.
            default_ttl_s: for blocks that come without one; None: they live until they are evicted.
            wall_clock: seconds since the epoch; what fixed ends of lifetimes go by.
            admission: which blocks are written to disk and the shared tier, asked once for both: when they have just
                been computed (one that is not admitted is written when it is first used again), or when host evicts
                them. None: every block is, as soon as it is computed.
            shared_admission: another rule for the shared tier; None: the same one.
            io_threads: reads of each slow tier at once. Writes have one thread more each.
            queue_bytes: blocks that wait for each slow tier; beyond it they are dropped. At most half of the host
                tier's slots are kept from eviction by them. Of evicted blocks as many copies more wait in host.
            directory_entries: blocks of the shared tier, and last refreshes of each slow one, to remember.
            load_slack_s: by how much a load may be late before the blocks are computed; see `patience`.
            host_step_bytes: what is copied from host between two calls of `pump`; the rest of a longer prefix follows
            in the next ones, so that other sequences decode meanwhile.

        Raises:
            ValueError: a rule is to be asked when host evicts a block, and there is no host tier.
        """
        self._rules = rules_of(host, disk, shared, admission, shared_admission)
        self.layout, self.device, self.host, self.disk = layout, device, host, disk
        self._shared, self._peers = shared, peers
        self._default_ttl_s = default_ttl_s
        local: list[LocalTier] = [tier for tier in (host, disk) if tier is not None]
        self._inventory = Inventory(self._local(), clock)
        self._leases = Leases(local, clock, send=self._send_to_disk)
        slow = slow_tiers(
            disk,
            shared,
            entries=directory_entries,
            on_queued=self._leases.queued,
            clock=clock,
            wall_clock=wall_clock,
        )
        kept = max(1, queue_bytes // layout.block_nbytes)
        self._near = NearTiers(device, host)
        self._lanes = lanes_of(
            slow,
            self._rules,
            self._near,
            kept=kept,
            entries=directory_entries,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._write_back = self._written_back(kept)
        self._promoter = Promoter(
            device,
            host,
            sources_of(slow, peers, layout.block_nbytes, clock),
            clock=clock,
            io_threads=io_threads,
            on_read=self._on_read,
            slack_s=load_slack_s,
            host_step_nbytes=host_step_bytes,
            wall_clock=wall_clock,
            peers=peers,
        )
        copier = device.copier
        self._spilling = None if copier is None else Spilling(device, host, copier, self._spilled)
        self._clearing = Clearing(
            device,
            host,
            disk,
            shared,
            peers,
            lanes=self._lanes,
            promoter=self._promoter,
            leases=self._leases,
            spilling=self._spilling,
        )

    # --- for requests ---

    def match(self, hashes: Sequence[BlockHash], reads: ReadTiers = ALL_TIERS) -> list[TierName]:
        """The fastest near tier (device, host) of each leading block. A question; slow tiers are not asked."""
        tiers: list[TierName] = []
        for name in hashes:
            if reads.device and self.device.holds(name):
                tiers.append(self.device.name)
            elif reads.host and self.host is not None and self.host.holds(name):
                tiers.append(self.host.name)
            else:
                break
        return tiers

    def plan(self, hashes: Sequence[BlockHash], *, reads: ReadTiers, compute_ms: ComputeMs) -> list[PlannedRun]:
        """For each run of the prefix: the tier, its predicted time and that of computing, and the choice. A question.

        Of the shared tier only what is known counts; `acquire` may find more there.
        """
        return self._promoter.plan(Wish(hashes, reads, compute_ms))

    def acquire(
        self,
        hashes: Sequence[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> Acquisition:
        """Start to bring the longest prefix that is worth loading to the device. Never blocks on I/O of a slow tier.

        Device blocks are referenced at once. A lower tier is read only for runs where its predicted time is below
        `compute_ms` for the same blocks. Needs free device blocks for what it loads: with too few it loads fewer.

        Give the chain's `root` and the request's `lifetime`: blocks that come from a slow tier are registered under
        them, and every block lives that long at least. None: the store's default, for blocks without a fixed end.
        Without a root they count as any root's in `clear`.
        """
        return self._acquire(self._wish(hashes, reads, compute_ms, root, lifetime))

    def acquire_from_both_ends(
        self,
        hashes: Sequence[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> Acquisition:
        """As `acquire`, for who can compute the front of a prefix while its back is loaded.

        Where that is sooner than to load all or to compute all, the acquisition ends with what is near, and its `tail`
        brings blocks of the rest from the last one on; see `meeting` and `tail`. The caller owns both.
        """
        wish = self._wish(hashes, reads, compute_ms, root, lifetime)
        return self._acquire(replace(wish, from_both_ends=True))

    def prefetch(
        self,
        hashes: Sequence[BlockHash],
        *,
        reads: ReadTiers = ALL_TIERS,
        compute_ms: ComputeMs | None = None,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> int:
        """Start to bring to host what only slow tiers hold of a prefix, as far as that is sooner than computing it.

        How many blocks are on their way because of it. Without `compute_ms`: whatever it costs. Without a host tier:
        nothing. An `acquire` that comes meanwhile waits for what is on its way, and tells the tier that it came from.

        At most a quarter of host is filled; what follows stays where it is. A `lifetime` that is named is promised to
        what is near, and to what comes, in every tier that holds it.
        """
        price = compute_ms if compute_ms is not None else _no_price
        wish = self._wish(hashes, reads, price, root, lifetime)
        started = self._promoter.prefetch(wish)
        if not wish.lifetime.is_default:
            near = self._near_metas(hashes[: len(self.match(hashes, reads))])
            for lane in self._lanes.values():
                lane.used(near)
        return started

    def expect(self, promise: Promise) -> None:
        """Another worker is making these blocks: an `acquire` of them waits while that is sooner; see `promised`."""
        self._promoter.expect(promise)

    def promise_broken(self, address: str, ticket: BlockHash) -> None:
        """Who was making these blocks there has failed: whoever waits for them computes them."""
        self._promoter.promise_broken(address, ticket)

    def allocate(self, count: int) -> list[int] | None:
        """That many empty device blocks, referenced for the caller, evicting unreferenced cached ones; None: no room.

        All or nothing. Unreferenced cached blocks are evicted least recently used first, a suffix before its prefix.
        """
        return self.device.allocate(count)

    def commit(self, block_ids: Sequence[int], metas: Sequence[BlockMeta]) -> None:
        """These device blocks are full: make them findable, copy them to host, queue them for the slow tiers.

        If a name is already held by another device block, the caller's copy stays private to it.
        """
        metas = [self._with_ttl(meta) for meta in metas]
        named = self.device.commit(block_ids, metas)
        fresh_names = {meta.hash for _, meta in named}
        self._used([meta.hash for meta in metas if meta.hash not in fresh_names])
        if not named or not (self._lanes or self.host is not None):
            return
        fresh = [meta for _, meta in named]
        self._promoter.used(meta.hash for meta in fresh)
        block_ids = [block_id for block_id, _ in named]
        admitted = self._admitted([meta.hash for meta in fresh])
        if self._spilling is not None:
            self._spilling.start(block_ids, fresh, admitted)
            return
        payloads = self.device.payloads(block_ids)
        if self.host is not None:
            self.host.write(fresh, payloads)
        self._spilled(fresh, payloads, admitted)

    def settled(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of these, which were committed, are where they are going to be: not on their way from
        the device to host.
        """
        return len(hashes) if self._spilling is None else self._spilling.settled(hashes)

    def share(self, hashes: Sequence[BlockHash]) -> bool:
        """Queue blocks of one chain for the shared tier, whatever admission says, as far as its queue has room.

        Returns whether it holds all of them that this worker has in reach; if not, call again. Without a shared tier,
        or while it does not answer: True. Blocks of directive `no_store` are in no tier and so are never sent.
        """
        if self._shared is None or not self._shared.stats().healthy:
            return True
        lane, is_done = self._lanes[self._shared.name], True
        for name in hashes:
            if lane.known.holds(name):
                continue
            if self._near.find(name) is None:
                break  # what follows would not be found without it
            is_done = False
            if not lane.offer(name):
                break
        return is_done

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each. Committed ones stay cached until evicted; the others are free at once."""
        metas = [meta for block_id in block_ids if (meta := self.device.meta(block_id)) is not None]
        self.device.release(block_ids)
        self._used([meta.hash for meta in metas], is_hit=False)

    # --- the store's own work ---

    @property
    def copies(self) -> int:
        """Batches of blocks that are being copied between device and host now, beside the steps."""
        return self._promoter.copies + (0 if self._spilling is None else len(self._spilling))

    def pump(self) -> None:
        """Take in what I/O threads finished, expire what is due, refresh lower tiers. Called once an engine step.

        Slow tiers expire their blocks in their own threads.
        """
        if self._spilling is not None:
            self._spilling.pump()
        if self._write_back is not None:
            self._write_back.pump()
        for name, lane in self._lanes.items():
            lane.pump()
            self._promoter.sources[name].absent.barred.difference_update(lane.take_removed())
        self._promoter.pump()
        if self._peers is not None:
            self._peers.sweep()
        self.device.sweep()
        if self.host is not None:
            self.host.sweep()
        self._inventory.sweep()
        self._leases.settle()

    def wait(self, timeout_s: float) -> None:
        """Sleep until an I/O thread finished something, or the timeout. `pump` takes it in."""
        self._promoter.wait(timeout_s)

    def drain_events(self) -> list[KvEvent]:
        """Events of all tiers since the last call; each tier's are in order."""
        events = self.device.drain_events()
        if self.host is not None:
            events += self.host.drain_events()
        for lane in self._lanes.values():
            events += lane.known.drain_events()
        return events

    def snapshot(self) -> list[BlockStored]:
        """All that device, host and disk hold and what is known of the shared tier, as events.

        Drops no events: those not drained yet may follow it though it includes them. Replayed in order after it they
        lead to the same state.
        """
        held = self.device.snapshot()
        if self.host is not None:
            held += self.host.snapshot()
        for lane in self._lanes.values():
            held += lane.known.snapshot()
        return held

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that is queued for slow tiers has been tried; False: the time was up."""
        until = time.monotonic() + timeout_s
        self._settle_copies()
        if self._write_back is not None:
            self._write_back.pump()
        tried = [lane.flush(max(0.0, until - time.monotonic())) for lane in self._lanes.values()]
        return all(tried)

    # --- for operators ---

    def clear(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None, shared: bool = False
    ) -> dict[TierName, int]:
        """Drop blocks in device, host and disk, and with `shared` in the shared tier too; blocks dropped, by tier.

        Without `shared` another worker may clear the shared tier, so what is known of it there is forgotten, too, and
        writes that run are taken back: blocks that are computed afterwards are written there again.

        Running sequences keep their blocks but nobody finds them any more. Queued writes of those blocks are dropped.

        Raises:
            TierError: the disk could not be told, or the shared tier did not drop all of them; clear again.
        """
        return self._clearing.clear(root=root, prefix=prefix, shared=shared)

    def disown(self, hashes: Sequence[BlockHash]) -> None:
        """These blocks of one chain may be wrong: drop them and what was built on them. Waits for no slow tier.

        Nobody finds them from now on: what lies in a slow tier is removed there in the background, again until it
        answers, and not read from there before. Other workers may have read them from here: nothing is read of them
        there for a while. Of followers those are known that lie or move in this process.
        """
        self._clearing.disown(hashes)

    def clear_shared(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> int:
        """Drop blocks in the shared tier alone; how many. Any thread may call it; it may take long.

        Raises:
            TierError: the tier did not drop all of them.
        """
        return self._clearing.clear_shared(root=root, prefix=prefix)

    def list_blocks(
        self,
        *,
        root: BlockHash | None = None,
        prefix: BlockHash | None = None,
        after: BlockHash | None = None,
        limit: int = 1000,
    ) -> list[HeldBlock]:
        """What device, host and disk hold, in the order of names, at most `limit` from the first one after `after`.

        Whether a block lies in the shared tier, too, is told as far as it is known. See `Inventory`
        for what a page costs.
        """
        blocks = self._inventory.page(self._leases.names(), root=root, prefix=prefix, after=after, limit=limit)
        names = [block.meta.hash for block in blocks]
        left = ttl_left_s([tier.ttl_left_s(names) for tier in self._local()])
        lane = None if self._shared is None else self._lanes[self._shared.name]
        below = () if lane is None else (lane.name,)
        return [
            replace(
                block,
                tiers=block.tiers + (below if lane is not None and lane.known.holds(block.meta.hash) else ()),
                ttl_left_s=left.get(block.meta.hash),
            )
            for block in blocks
        ]

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> dict[TierName, int]:
        """Forbid to drop these blocks for so long (None: until `end_leases`); how many each tier promised to keep.

        The lowest local tier that holds a block promises; the promise moves down when the block does, and to another
        tier if that one loses it. A block that only the device holds is sent to disk, and promised when it is there,
        which is not counted. One that lies nowhere in reach is not promised: warm it first.
        """
        return self._leases.lease(hashes, for_s)

    def end_leases(self, hashes: Sequence[BlockHash]) -> dict[TierName, int]:
        """End the leases of these; how many had one, by tier."""
        return self._leases.end(hashes)

    def stats(self) -> dict[TierName, TierStats]:
        """Counters of every tier. Any thread may ask."""
        stats = {tier.name: tier.stats() for tier in self._tiers()}
        for name, source in self._promoter.sources.items():
            score = source.score
            stats[name].loads, stats[name].bad_hits = score.loads, score.bad_hits
            stats[name].load_ms, stats[name].compute_ms = score.load_ms, score.compute_ms
        for name, lane in self._lanes.items():
            _add_queue_full(stats[name], lane.queue_full)
        if self.host is not None:  # its copies wait for all lanes: counted there, and once
            _add_queue_full(stats[self.host.name], self.host.lost_evicted)
        return stats

    def read_ms(self) -> dict[TierName, tuple[float, float]]:
        """For each tier below device: measured (latency of a read, time a block), milliseconds; zeros: not measured."""
        nbytes = self.layout.block_nbytes
        fits = {name: source.estimate for name, source in self._promoter.sources.items()}
        return {name: (fit.latency_ms, fit.ms_per(nbytes)) for name, fit in fits.items()}

    def check(self) -> None:
        """Audit every tier and the store's own books.

        Raises:
            InvariantError: they disagree.
        """
        for tier in self._tiers():
            tier.check()
        self._promoter.check()
        for lane in self._lanes.values():
            lane.check()

    def close(self, *, flush_s: float = 0.0) -> None:
        """Write out what is queued for slow tiers for at most `flush_s` seconds, then give everything back.

        Where blocks are written at eviction only, what host still holds is written too, the chains used last first.
        """
        until = time.monotonic() + flush_s
        with ExitStack() as last:  # whatever fails, every tier is closed
            for tier in self._tiers():
                last.callback(tier.close)
            self._settle_copies()
            if self._write_back is not None:
                self._write_back.finish(until)
            self.flush(max(0.0, until - time.monotonic()))
            for lane in self._lanes.values():
                lane.close()
            self._promoter.close()

    # --- inside ---

    def _settle_copies(self) -> None:
        """Wait for blocks on their way to host: milliseconds."""
        if self._spilling is not None:
            self._spilling.settle()

    def _local(self) -> list[DeviceTier | LocalTier]:
        return [tier for tier in (self.device, self.host, self.disk) if tier is not None]

    def _tiers(self) -> list[Tier]:
        return [*self._local(), *(tier for tier in (self._shared, self._peers) if tier is not None)]

    def _written_back(self, max_kept: int) -> WriteBack | None:
        lanes = [(lane, self._rules[lane.name]) for lane in self._lanes.values() if self._is_written_back(lane)]
        return WriteBack(self.host, lanes, max_kept=max_kept) if self.host is not None and lanes else None

    def _spilled(
        self,
        metas: Sequence[BlockMeta],
        payloads: Sequence[memoryview | None],
        admitted: Mapping[TierName, Sequence[bool]],
    ) -> None:
        """Blocks that were computed are in host, if there is one: queue them for the slow tiers."""
        for lane in self._lanes.values():
            lane.spill(metas, payloads, admitted[lane.name])

    def _is_written_back(self, lane: Lane) -> bool:
        return self._rules[lane.name].moment is Moment.EVICTION

    def _admitted(self, names: Sequence[BlockHash]) -> dict[TierName, list[bool]]:
        """What the rule of each tier says of blocks that were computed.

        Asking counts as seeing the block, so a rule that tiers share is asked once.
        """
        asked: dict[int, list[bool]] = {}
        for rule in self._rules.values():
            if id(rule) not in asked:
                asked[id(rule)] = [rule.moment is Moment.USE and rule.admits(name) for name in names]
        return {tier: asked[id(rule)] for tier, rule in self._rules.items()}

    def _acquire(self, wish: Wish) -> Acquisition:
        acquisition = self._promoter.start(wish)
        self._used(wish.hashes[: len(acquisition.block_ids)])
        return acquisition

    def _wish(
        self,
        hashes: Sequence[BlockHash],
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None,
        lifetime: Lifetime | None,
    ) -> Wish:
        default = Lifetime(self._default_ttl_s, is_default=True)
        return Wish(hashes, reads, compute_ms, root, default if lifetime is None else lifetime)

    def _with_ttl(self, meta: BlockMeta) -> BlockMeta:
        return meta if meta.ttl_s is not None else replace(meta, ttl_s=self._default_ttl_s)

    def _used(self, names: Sequence[BlockHash], *, is_hit: bool = True) -> None:
        """Blocks of one chain were in use in the device: lower tiers shall know.

        A hit brings a block that a slow tier lacks there; the end of a sequence that computed it does not.
        """
        metas = [meta for name in names if (meta := self.device.find(name)) is not None]
        if self.host is not None:  # last first, as tiers do within a call: a chain's tail is to be evicted first
            for lifetime, run in groupby(reversed(metas), key=lambda meta: meta.lifetime):
                self.host.prolong([meta.hash for meta in run][::-1], lifetime)
        for lane in self._lanes.values():
            lane.used(metas if is_hit else [meta for meta in metas if lane.known.holds(meta.hash)])

    def _send_to_disk(self, name: BlockHash) -> bool:
        return self.disk is not None and self._lanes[self.disk.name].offer(name)

    def _on_read(self, source: Source, metas: list[BlockMeta], count: int, is_next_gone: bool) -> None:
        for meta in metas[:count]:
            source.absent.discard(meta.hash)
        if is_next_gone:
            source.absent.add(metas[count].hash)
        near = self._near_metas([meta.hash for meta in metas[:count]])
        for name, lane in self._lanes.items():
            if name == source.name:
                lane.read(metas, count, is_next_gone=is_next_gone)
            else:
                lane.used([meta for meta in near if lane.known.holds(meta.hash)])

    def _near_metas(self, names: Sequence[BlockHash]) -> list[BlockMeta]:
        return [meta for name in names if (meta := self._near.find(name)) is not None]


def _add_queue_full(stats: TierStats, lost: int) -> None:
    if lost:
        stats.store_failures["queue_full"] = stats.store_failures.get("queue_full", 0) + lost


def _no_price(first: int, count: int) -> float:
    return 0.0  # nothing is known of computing, so loading is always tried
