"""Blocks on their way to the device beside the steps: from host, or from where a load of a slow tier left them.

Who wants a block that is already coming waits for it. A block is named, and handed over, when its bytes are there:
before that nobody but this module references it, and no step reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kvstore.acquisition import Acquisition
from kvstore.blocks import BlockHash
from kvstore.copier import Bytes, Copier, Copy
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.loading import Load
from kvstore.tier import BlockMeta

POLL_S = 0.0001  # an event of the device cannot be waited for with a limit


@dataclass(slots=True, eq=False)
class Coming:
    """Blocks that are being copied for an acquisition.

    Attributes:
        acquisition: whose; None: of a load that has no owner. block_ids: private ones. metas, fates: of each.
        tier: that they come from. let_go: of the bytes, once they were copied. started: on the clock.
        load, readers: which load has brought them, and who waited for it; None: they come from host.
        waiters: others that want some of them. discarded: cleared meanwhile: they must not be named.
    """

    acquisition: Acquisition | None
    block_ids: list[int]
    metas: list[BlockMeta]
    fates: list[TierName]
    tier: TierName
    copy: Copy
    let_go: Callable[[], None]
    started: float
    load: Load | None = None
    readers: Sequence[Acquisition] = ()
    waiters: list[Acquisition] = field(default_factory=list)
    discarded: bool = False

    @property
    def interested(self) -> list[Acquisition]:
        """Who waits for them."""
        everybody = [*([] if self.acquisition is None else [self.acquisition]), *self.waiters]
        return [acquisition for acquisition in everybody if not acquisition.cancelled]


class Landings:
    """The copies that run, in their order. For the engine's thread."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._coming: list[Coming] = []
        self._by_name: dict[BlockHash, Coming] = {}

    def __len__(self) -> int:
        """How many copies run."""
        return len(self._coming)

    def start_from_host(
        self,
        host: HostTier,
        acquisition: Acquisition,
        metas: Sequence[BlockMeta],
        block_ids: Sequence[int],
        origin: Callable[[BlockHash], TierName],
        now: float,
    ) -> int:
        """Begin to copy what host still holds of these into private blocks; how many, the others stay the caller's."""
        reading = host.begin_read([meta.hash for meta in metas])
        count = len(reading.rows)
        taken, wanted = list(block_ids[:count]), list(metas[:count])
        fates = [origin(meta.hash) for meta in wanted]
        copy = self._copier.copy_in(reading.rows, taken)
        done = partial(host.end_read, reading, count)
        self._add(Coming(acquisition, taken, wanted, fates, TierName.HOST, copy, done, now))
        return count

    def start_from_load(self, load: Load, block_ids: Sequence[int], let_go: Callable[[], None], now: float) -> None:
        """Begin to copy the leading blocks of a load that has ended into private blocks, for all who wait for it."""
        count, tier, readers = len(block_ids), load.source.name, load.interested
        owner = load.owner if load.owner in readers else None
        rows: list[Bytes] = [np.frombuffer(buffer, np.uint8) for buffer in load.buffers[:count]]
        copy, metas = self._copier.copy_in(rows, block_ids), load.arrived[:count]
        coming = Coming(owner, list(block_ids), metas, [tier] * count, tier, copy, let_go, now, load, readers)
        coming.waiters += [reader for reader in readers if reader is not owner]
        self._add(coming)

    def join(self, name: BlockHash, acquisition: Acquisition) -> bool:
        """Wait for a block that is coming, if it may read from there; False: it is not, or it must not."""
        coming = self._by_name.get(name)
        if coming is None or coming.discarded or not acquisition.wish.reads.allows(coming.tier):
            return False
        if acquisition not in coming.interested:
            coming.waiters.append(acquisition)
        return True

    def _add(self, coming: Coming) -> None:
        self._coming.append(coming)
        for meta in coming.metas:
            self._by_name.setdefault(meta.hash, coming)

    def any_landed(self) -> bool:
        """Whether `take_landed` would find some."""
        return bool(self._coming) and self._coming[0].copy.is_done()

    def take_landed(self) -> list[Coming]:
        """The copies that have ended since the last call."""
        landed = []
        while self._coming and self._coming[0].copy.is_done():
            landed.append(self._take_first())
        return landed

    def take_all(self) -> list[Coming]:
        """Wait for all copies."""
        landed = []
        while self._coming:
            self._coming[0].copy.wait()
            landed.append(self._take_first())
        return landed

    def discard(self, names: set[BlockHash]) -> None:
        """These are cleared: what brings one of them is named nowhere."""
        for coming in self._coming:
            coming.discarded |= any(meta.hash in names for meta in coming.metas)

    def metas(self) -> list[BlockMeta]:
        """Blocks that are coming."""
        return [meta for coming in self._coming for meta in coming.metas]

    def _take_first(self) -> Coming:
        coming = self._coming.pop(0)
        coming.let_go()
        for meta in coming.metas:
            if self._by_name.get(meta.hash) is coming:
                del self._by_name[meta.hash]
        return coming
