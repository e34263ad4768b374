"""A lane down to one slow tier: what is written there, kept fresh there and known of it.

Covers: the write-behind queue, the schedule of refreshes, writing again what the tier lost. Does not cover:
reads (`promotion`), admission (`store`). Owned by the engine's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from kvstore.admission import Moment
from kvstore.blocks import BlockHash
from kvstore.device import DeviceTier
from kvstore.events import TierName
from kvstore.host.tier import BlockView, HostTier
from kvstore.known import Known
from kvstore.refresh import RefreshSchedule
from kvstore.spill import QueuedWrite, Writable, WriteBehind
from kvstore.tier import BlockMeta, Clock, LocalTier

VIEW_S = 3600.0  # a block that has waited so long to be written down is reported
CANCEL_WAIT_S = 5.0  # how long `clear` waits for a write that it overtook


def nobody(name: BlockHash) -> None:
    """Nobody needs to know of queued blocks."""


class NearTiers:
    """Device and host, as lanes see them: the places that bytes are taken from."""

    def __init__(self, device: DeviceTier, host: HostTier | None) -> None:
        self.device = device
        self.host = host

    def find(self, name: BlockHash) -> BlockMeta | None:
        """The metadata under which a block is held; None when it is not."""
        meta = self.device.find(name)
        return self.host.find(name) if meta is None and self.host is not None else meta

    def write_of(self, meta: BlockMeta, payload: memoryview | bytes | None = None) -> QueuedWrite | None:
        """A block's bytes to be queued: its host slot, or a copy of `payload`, or of its device block; None: gone."""
        views = [] if self.host is None else self.host.view([meta.hash], owner="write-behind", for_s=VIEW_S)
        if views:
            return QueuedWrite(meta, views[0].payload, views[0])
        copy = self._copy_of(meta.hash) if payload is None else bytes(payload)
        return None if copy is None else QueuedWrite(meta, memoryview(copy))

    def end_view(self, view: BlockView) -> None:
        """A queued block has been written."""
        if self.host is not None:
            self.host.end_view(view)

    def _copy_of(self, name: BlockHash) -> bytes | None:
        if not self.device.holds(name):
            return None
        block_ids = [self.device.reference(name)]
        payload = bytes(self.device.payloads(block_ids)[0])
        self.device.release(block_ids)
        return payload


class Refreshing:
    """A local tier as write-behind sees it: its refresh is a question to its own books."""

    def __init__(self, tier: LocalTier) -> None:
        self._tier = tier
        self.name: TierName = tier.name
        self.write = tier.write
        self.remove = tier.remove
        self.sweep = tier.sweep
        self.stats = tier.stats

    def refresh(self, metas: Sequence[BlockMeta]) -> list[BlockHash] | None:
        """As `SharedTier.refresh`."""
        for meta in reversed(metas):
            self._tier.prolong([meta.hash], meta.lifetime)
        return [meta.hash for meta in metas if self._tier.find(meta.hash) is None]


class Lane:
    """One slow tier.

    Attributes:
        name: the tier's. known: what is known of its contents.
    """

    def __init__(
        self,
        tier: Writable,
        known: Known,
        near: NearTiers,
        *,
        clock: Clock,
        wall_clock: Clock = time.time,
        max_queued: int,
        entries: int,
        moment: Moment = Moment.USE,
        on_queued: Callable[[BlockHash], None] = nobody,
    ) -> None:
        """Start its thread.

        Args:
            tier: what is written to. known: what is known of it. near: where bytes are taken from.
            clock: seconds. wall_clock: seconds since the epoch, for fixed ends.
            max_queued: blocks that may wait; beyond it they are dropped.
            entries: blocks whose last refresh is remembered.
            moment: when blocks are written that the tier lacks: also when they are used, or only when host evicts them.
            on_queued: called with each block that is to be written.
        """
        self.name = tier.name
        self.known = known
        self._near = near
        self._moment = moment
        self._on_queued = on_queued
        self._dropped = 0
        self._schedule = RefreshSchedule(entries, clock=clock, wall_clock=wall_clock)
        self._writer = WriteBehind(tier, max_blocks=max_queued, end_view=near.end_view)

    @property
    def queue_full(self) -> int:
        """Blocks that were dropped because the queue was full, and those behind them, which nobody would find."""
        return self._dropped

    def spill(
        self, metas: Sequence[BlockMeta], payloads: Sequence[memoryview | None], admitted: Sequence[bool]
    ) -> None:
        """Blocks of some chains were computed, each chain's in order: queue those admitted that the tier lacks.

        What follows a block that is left out is left out, too: it could not be found. A block that had to be computed
        though the tier is thought to hold it is asked for there at once, and written again if it is lost. Without a
        payload its bytes are taken from the fast tiers.
        """
        left_out: set[BlockHash] = set()
        dropped: set[BlockHash] = set()
        for meta, payload, is_admitted in zip(metas, payloads, admitted, strict=True):
            if self.known.holds(meta.hash):
                self._schedule.doubted(meta.hash, meta.lifetime)
            elif not is_admitted or meta.parent in left_out:
                left_out.add(meta.hash)
            elif meta.parent in dropped:
                self._dropped += 1
                dropped.add(meta.hash)
            elif not self._queue(meta, payload):
                dropped.add(meta.hash)

    def used(self, metas: Sequence[BlockMeta]) -> None:
        """These were hit in a faster tier."""
        for meta in metas:
            if self._moment is Moment.EVICTION and not self.known.holds(meta.hash):
                continue
            self._schedule.used(meta.hash, meta.lifetime)

    def read(self, metas: Sequence[BlockMeta], count: int, *, is_next_gone: bool) -> None:
        """A read of the tier ended: the TTLs of what came began again there, and it lacks the next one, perhaps.

        What a near tier has promised to keep for longer, because the reader asked for it, is to be kept here, too.
        """
        arrived = [self.known.find(meta.hash) or meta for meta in metas[:count]]
        self.known.learn(arrived)
        for meta in arrived:
            self._schedule.renewed(meta.hash, meta.lifetime)
            near = self._near.find(meta.hash)
            if near is not None and near.lifetime.outlives(meta.lifetime):
                self._schedule.used(meta.hash, near.lifetime)
        if is_next_gone:
            self.known.lost([meta.hash for meta in metas[count : count + 1]])

    def write(self, name: BlockHash) -> bool:
        """Queue a block that a fast tier holds, whatever admission says; whether it is there or on its way."""
        if self.known.holds(name) or self._writer.is_coming(name):
            return True
        meta = self._near.find(name)
        return meta is not None and self._queue(meta, None)

    def write_evicted(self, meta: BlockMeta, payload: bytes) -> None:
        """Queue a block that left the fast tiers, unless the tier has it."""
        if not self.known.holds(meta.hash):
            self._queue(meta, payload)

    def write_as_room_is(self, metas: deque[BlockMeta]) -> None:
        """Queue leading blocks of these that a fast tier holds and this one lacks, and take them out."""
        while metas and not self._writer.is_full:
            meta = metas.popleft()
            if not self.known.holds(meta.hash):
                self._queue(meta, None)

    def await_room(self, timeout_s: float) -> None:
        """Wait until the queue has room, or the time is up."""
        self._writer.await_room(timeout_s)

    def offer(self, name: BlockHash) -> bool:
        """As `write`, for those who ask again: a full queue drops nothing."""
        if self._writer.is_full:
            return self.known.holds(name) or self._writer.is_coming(name)
        return self.write(name)

    def pump(self) -> None:
        """Ask for what is due, and take in what became of what was asked for."""
        if self.known.take_emptied():
            self._schedule.retain(set())
        if due := [meta for name in self._schedule.pop_due() if (meta := self._near.find(name)) is not None]:
            self._writer.refresh(due)
        self.take_refreshed()
        for name in self._writer.take_unwritten():
            self._schedule.lost(name)

    def take_refreshed(self) -> None:
        """Take in what refreshes found: tell what the tier holds, write again what it lost."""
        for refreshed in self._writer.take_refreshed():
            if refreshed.missing is None:
                for meta in refreshed.metas:
                    self._schedule.unanswered(meta.hash, meta.lifetime)
                continue
            missing = refreshed.missing
            self.known.learn([m for m in refreshed.metas if m.hash not in missing and self._near.find(m.hash)])
            self.known.lost(missing)
            for name in missing:
                self._schedule.lost(name)
                if self._moment is Moment.USE:
                    self.write(name)

    def drop(self, names: set[BlockHash]) -> None:
        """These are cleared: writes of them that wait are dropped, one that runs is taken back."""
        self._writer.drop(names)
        self._writer.settle_cancelled(CANCEL_WAIT_S)
        for name in names:
            self._schedule.lost(name)

    def disown(self, names: Sequence[BlockHash]) -> None:
        """These are wrong: believe in them no more, and take them back in the background; see `take_removed`."""
        self._writer.remove(names)
        self.known.lost(names)
        for name in names:
            self._schedule.lost(name)

    def take_removed(self) -> list[BlockHash]:
        """Disowned blocks that were taken back since the last call."""
        return self._writer.take_removed()

    def forget(self, names: Sequence[BlockHash], root: BlockHash | None, prefix: BlockHash | None) -> None:
        """Know nothing any more of a cleared scope."""
        self._schedule.retain(self.known.forget(names, root, prefix))

    def metas(self) -> list[BlockMeta]:
        """Blocks that lie there alone, or are on their way there."""
        return self._writer.metas() + self.known.metas()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that is queued has been tried; False: the time was up."""
        return self._writer.flush(timeout_s)

    def check(self) -> None:
        """Audit the queue.

        Raises:
            InvariantError: it is wrong.
        """
        self._writer.check()

    def close(self) -> None:
        """Drop what is queued and end the thread."""
        self._writer.close(CANCEL_WAIT_S)

    def _queue(self, meta: BlockMeta, payload: memoryview | bytes | None) -> bool:
        """Copy nothing that the queue does not take: only this thread fills it, so there is room until then."""
        if self._writer.is_coming(meta.hash):
            self._schedule.used(meta.hash, meta.lifetime)
            return True
        if self._writer.is_full:
            self._dropped += 1
            return False
        write = self._near.write_of(meta, payload)
        if write is None:
            return False
        self._writer.put(write)
        self._schedule.renewed(meta.hash, meta.lifetime)
        self._on_queued(meta.hash)
        return True
