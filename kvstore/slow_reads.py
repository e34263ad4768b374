"""Which blocks only a slow tier can deliver, which one to read them from, how many, and how long that may take.

Covers: the choice of a read, and starting it. Does not cover: the read itself (`loading`), what becomes of the blocks
that come (`promotion`), prefetching (`prefetching`). Owned by the engine's thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.acquisition import Acquisition, Wish
from kvstore.blocks import BlockHash
from kvstore.device import DeviceTier
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.loading import FindMeta, Load, Loader
from kvstore.patience import Limit, limits, pieces, slack_of
from kvstore.source import Source
from kvstore.tier import BlockMeta, chain_metas

MAX_LOAD_NBYTES = 256 << 20  # of one read; what follows is read after it


class SlowReads:
    """Chooses reads of slow tiers and starts them.

    Attributes:
        most: blocks that one read may ask for. closed: set, nothing is read any more.
    """

    def __init__(
        self,
        device: DeviceTier,
        host: HostTier | None,
        slow: Sequence[tuple[Source, FindMeta]],
        loader: Loader,
        *,
        slack_s: float,
    ) -> None:
        """Of these tiers; `slow` with what tells under which metadata a block is stored in each. `slack_s`: see
        `patience`."""
        self._device, self._host, self._loader, self._slack_s = device, host, loader, slack_s
        self._slow = [source for source, _ in slow]
        self._find = {source.name: find for source, find in slow}
        self.most = max(1, MAX_LOAD_NBYTES // device.block_nbytes)
        self.closed = False

    def unheld(self, wish: Wish, names: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """The leading names that only a slow tier can deliver, and that nobody is loading."""
        host = self._host if wish.reads.host else None
        names = until_device(self._device, wish, names)
        for count, name in enumerate(names):
            at_host = host is not None and count > 0 and host.holds(name)
            if at_host or name in self._loader:
                return names[:count]
        return names

    def in_reach(self, wish: Wish) -> int:
        """How many leading blocks are in device or host, or on their way."""
        host = self._host if wish.reads.host else None
        for place, name in enumerate(wish.hashes):
            near = (wish.reads.device and self._device.holds(name)) or (host is not None and host.holds(name))
            if not near and name not in self._loader:
                return place
        return len(wish.hashes)

    def cheapest(
        self, wish: Wish, first: int, names: Sequence[BlockHash], tried: dict[TierName, int]
    ) -> tuple[Source | None, int]:
        """The slow tier to read these leading blocks from, and how many; None: computing them is no slower.

        A tier that is known to hold the block goes before one that only may, then the one that takes less time a block.
        """
        best: tuple[tuple[bool, float], Source, int] | None = None
        for source in self._slow:
            if self.closed or not wish.reads.allows(source.name) or tried.get(source.name) == first:
                continue
            reach = source.reach(names)
            count = source.affordable(reach, wish.price(first, reach)) if reach else 0
            if count:
                ms = source.predict_ms(count) or 0.0  # what was never measured is tried
                rank = (not source.known(names[:1]), ms / count)
                if best is None or rank < best[0]:
                    best = (rank, source, count)
        return (None, 0) if best is None else best[1:]

    def slack_left(self, acquisition: Acquisition, source: Source) -> float:
        """By how much this load may be late, so that all that the request tries cost one slack; see `patience`."""
        tried, position, rest = acquisition.tried, acquisition.position, acquisition.rest[:1]
        others = [other for other in self._slow if other is not source and acquisition.wish.reads.allows(other.name)]
        later = [each for each in others if tried.get(each.name) != position and not each.stuck and each.reach(rest)]
        return slack_of(self._slack_s, acquisition.late_s, len(later))

    def limits(self, source: Source, wish: Wish, first: int, count: int, slack_s: float | None = None) -> list[Limit]:
        """How long each piece of such a read may take; see `patience`. Without a slack of its own: the whole one."""
        return limits(
            pieces(count, self._device.block_nbytes),
            load_ms=source.predict_ms,
            compute_ms=lambda blocks: wish.price(first, blocks),
            slack_s=self._slack_s if slack_s is None else slack_s,
        )

    def metas(self, wish: Wish, first: int, count: int, acquisition: Acquisition | None = None) -> list[BlockMeta]:
        """Metadata to register these blocks under, if the tier does not tell its own."""
        root = self._root_of(wish, acquisition)
        before = wish.hashes[first - 1] if first > 0 else root
        names, (ttl_s, until, _) = wish.hashes[first : first + count], wish.lifetime
        return chain_metas(names, before=before, root=root, ttl_s=ttl_s, until=until)

    def start(self, load: Load) -> None:
        """Hand it to the I/O threads."""
        self._loader.start(load, self._find[load.source.name])

    def find(self, tier: TierName) -> FindMeta:
        """What tells under which metadata a block is stored in a tier."""
        return self._find[tier]

    def _root_of(self, wish: Wish, acquisition: Acquisition | None) -> BlockHash:
        """The chain's root: as given, or as the blocks before it have it, or empty for one that nobody told us."""
        if wish.root is not None:
            return wish.root
        block_ids = [] if acquisition is None else acquisition.block_ids
        known = self._device.meta(block_ids[0]) if block_ids else None
        return BlockHash(b"") if known is None else known.root


def until_device(device: DeviceTier, wish: Wish, names: Sequence[BlockHash]) -> Sequence[BlockHash]:
    """The leading names that the device does not hold (all, for a request that must not read from it)."""
    if not wish.reads.device:
        return names
    return names[: next((i for i, name in enumerate(names) if device.holds(name)), len(names))]
