"""Blocks on their way from host to the device, beside the steps.

Who wants a block that is already coming waits for it. A block is named, and handed over, when its bytes are there:
before that nobody but this module references it, and no step reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.acquisition import Acquisition
from kvstore.blocks import BlockHash
from kvstore.copier import Copier, Copy
from kvstore.events import TierName
from kvstore.host.tier import HostReading, HostTier
from kvstore.tier import BlockMeta

POLL_S = 0.0001  # an event of the device cannot be waited for with a limit


@dataclass(slots=True, eq=False)
class Coming:
    """Blocks that are being copied for an acquisition.

    Attributes:
        block_ids: private ones. metas, fates: of each. started: on the clock.
        waiters: others that want some of them. discarded: cleared meanwhile: they must not be named.
    """

    acquisition: Acquisition
    block_ids: list[int]
    metas: list[BlockMeta]
    fates: list[TierName]
    reading: HostReading
    copy: Copy
    started: float
    waiters: list[Acquisition] = field(default_factory=list)
    discarded: bool = False

    @property
    def interested(self) -> list[Acquisition]:
        """Who waits for them."""
        return [each for each in (self.acquisition, *self.waiters) if not each.cancelled]


class Landings:
    """The copies that run, in their order. For the engine's thread."""

    def __init__(self, host: HostTier, copier: Copier) -> None:
        self._host, self._copier = host, copier
        self._coming: list[Coming] = []
        self._by_name: dict[BlockHash, Coming] = {}

    def __len__(self) -> int:
        """How many copies run."""
        return len(self._coming)

    def start(
        self,
        acquisition: Acquisition,
        metas: Sequence[BlockMeta],
        block_ids: Sequence[int],
        origin: Callable[[BlockHash], TierName],
        now: float,
    ) -> int:
        """Begin to copy what host still holds of these into private blocks; how many, the others stay the caller's."""
        reading = self._host.begin_read([meta.hash for meta in metas])
        count = len(reading.rows)
        taken, wanted = list(block_ids[:count]), list(metas[:count])
        fates = [origin(meta.hash) for meta in wanted]
        coming = Coming(acquisition, taken, wanted, fates, reading, self._copier.copy_in(reading.rows, taken), now)
        self._coming.append(coming)
        for meta in wanted:
            self._by_name.setdefault(meta.hash, coming)
        return count

    def join(self, name: BlockHash, acquisition: Acquisition) -> bool:
        """Wait for a block that is coming; False: it is not."""
        coming = self._by_name.get(name)
        if coming is None or coming.discarded:
            return False
        coming.waiters.append(acquisition)
        return True

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
        self._host.end_read(coming.reading, len(coming.block_ids))
        for meta in coming.metas:
            if self._by_name.get(meta.hash) is coming:
                del self._by_name[meta.hash]
        return coming
