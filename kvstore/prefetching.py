"""Prefetches: loads without an owner, which end in host, so that who asks for the blocks later finds them there.

Covers: starting one, going on with it run by run, where its blocks came from. Does not cover: the choice of the tier
(`slow_reads`), the reads (`loading`). Owned by the engine's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from kvstore.acquisition import Wish
from kvstore.blocks import BlockHash
from kvstore.device import DeviceTier
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.loading import Load
from kvstore.patience import cap_s
from kvstore.slow_reads import SlowReads

PREFETCH_SHARE = 4  # of the host tier's slots a prefetch may fill one in so many
MAX_PREFETCHED = 1 << 14


class Prefetcher:
    """Brings prefixes to host, and remembers which tier they came from until somebody uses them."""

    def __init__(self, device: DeviceTier, host: HostTier | None, reads: SlowReads) -> None:
        self._device, self._host, self._reads = device, host, reads
        self._prefetched: OrderedDict[BlockHash, TierName] = OrderedDict()  # in host, and where they came from

    def start(self, wish: Wish) -> int:
        """Start to bring what only slow tiers hold to host; blocks that are on their way now because of it.

        One run at a time: when it has come, the next one follows. What is near already gets the lifetime that is named.
        """
        if not wish.lifetime.is_default:
            self._promise(wish)
        if self._host is None or not wish.reads.host:
            return 0
        return self._prefetch(wish, self._reads.in_reach(wish), max(1, self._host.num_slots // PREFETCH_SHARE))

    def go_on(self, load: Load) -> None:
        """The next run of a prefetch, if what came before is still there."""
        first = self._reads.in_reach(load.wish)
        if first >= load.first + len(load.metas):
            self._prefetch(load.wish, first, load.budget)

    def remember(self, load: Load) -> None:
        """What was prefetched counts as coming from its tier when it is used, once."""
        for meta in load.arrived[len(load.landed) :]:
            self._prefetched[meta.hash] = load.source.name
        while len(self._prefetched) > MAX_PREFETCHED:
            self._prefetched.popitem(last=False)

    def origin(self, name: BlockHash, otherwise: TierName) -> TierName:
        """The tier that a block in host counts as coming from, now that it is used; told once."""
        return self._prefetched.pop(name, otherwise)

    def used(self, names: Iterable[BlockHash]) -> None:
        """These are in the device now: where a prefetch brought them from has been told, or does not matter."""
        for name in names if self._prefetched else ():
            self._prefetched.pop(name, None)

    def _prefetch(self, wish: Wish, first: int, budget: int) -> int:
        names = self._reads.unheld(wish, wish.hashes[first : first + min(budget, self._reads.most)])
        source, count = self._reads.cheapest(wish, first, names, {})
        if source is None:
            return 0
        most = cap_s(wish.price(first, count))  # nobody waits for it as yet
        found = [replace(limit, seconds=most) for limit in self._reads.limits(source, wish, first, count)]
        self._reads.start(
            Load(source, self._reads.metas(wish, first, count), wish, first, None, found, budget=budget - count)
        )
        return count

    def _promise(self, wish: Wish) -> None:
        near = wish.hashes[: self._reads.in_reach(wish)]
        if wish.reads.device:
            self._device.prolong(near, wish.lifetime)
        if wish.reads.host and self._host is not None:
            self._host.prolong(near, wish.lifetime)
