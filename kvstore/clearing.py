"""Taking blocks out of a store everywhere at once: what an operator clears, and what was found to be wrong.

Covers: which blocks, and that nothing that is queued, read or leased brings one of them back. Does not cover: dropping
them in a tier (each tier's `clear` and `remove`), eviction and expiry (`eviction`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvstore.blocks import BlockHash
from kvstore.chains import select
from kvstore.device import DeviceTier
from kvstore.events import RemovalCause, TierName
from kvstore.host.tier import HostTier
from kvstore.lane import Lane
from kvstore.leases import Leases
from kvstore.promotion import Promoter
from kvstore.spilling import Spilling
from kvstore.tier import HintedTier, LocalTier, SharedTier


class Clearing:
    """Drops chosen blocks in all tiers of a store, and in all that is on its way between them.

    For the engine's thread, except `clear_shared`, which any thread may call.
    """

    def __init__(
        self,
        device: DeviceTier,
        host: HostTier | None,
        disk: LocalTier | None,
        shared: SharedTier | None,
        peers: HintedTier | None,
        *,
        lanes: Mapping[TierName, Lane],
        promoter: Promoter,
        leases: Leases,
        spilling: Spilling | None = None,
    ) -> None:
        self._device, self._host = device, host
        self._local = [tier for tier in (device, host, disk) if tier is not None]
        self._shared, self._peers = shared, peers
        self._lanes, self._promoter, self._leases, self._spilling = lanes, promoter, leases, spilling

    def clear(self, *, root: BlockHash | None, prefix: BlockHash | None, shared: bool) -> dict[TierName, int]:
        """As `TieredStore.clear`."""
        for lane in self._lanes.values():
            lane.take_refreshed()
        names = self._select(root, prefix)
        if self._peers is not None:
            self._peers.forget()
        self._discard(set(names))
        self._leases.end(names)
        everything = root is None and prefix is None
        for lane in self._lanes.values():
            lane.drop(set(names))
        dropped: dict[TierName, int] = {}
        try:
            for tier in self._local:
                dropped[tier.name] = tier.clear() if everything else tier.remove(names, RemovalCause.CLEARED)
            if shared and self._shared is not None:
                dropped[self._shared.name] = self.clear_shared(root=root, prefix=prefix)
        finally:  # of a server that failed half-way nothing is known either
            for name, lane in self._lanes.items():
                lane.forget(names, root, prefix)
                self._promoter.sources[name].absent.forget()  # it may have been written since
        return dropped

    def disown(self, hashes: Sequence[BlockHash]) -> None:
        """As `TieredStore.disown`."""
        if not hashes:
            return
        names = list(dict.fromkeys([*hashes, *self._select(None, hashes[0])]))
        self._discard(set(names))
        self._leases.end(names)
        for name, lane in self._lanes.items():
            self._promoter.sources[name].absent.barred.update(names)
            lane.disown(names)
        if self._peers is not None:
            self._peers.bar(names)
        for tier in (self._device, self._host):
            if tier is not None:
                tier.remove(names, RemovalCause.INVALID)

    def clear_shared(self, *, root: BlockHash | None, prefix: BlockHash | None) -> int:
        """As `TieredStore.clear_shared`."""
        return 0 if self._shared is None else self._shared.clear(root=root, prefix=prefix)

    def _discard(self, names: set[BlockHash]) -> None:
        """What is on its way up or down arrives nowhere."""
        self._promoter.discard(names)
        if self._spilling is not None:
            self._spilling.discard(names)

    def _select(self, root: BlockHash | None, prefix: BlockHash | None) -> list[BlockHash]:
        """What `clear` drops of all that lies or moves in this process; an unknown root counts as any."""
        metas = self._device.metas() + self._promoter.metas()
        if self._host is not None:
            metas += self._host.metas() + self._host.gone()
        for lane in self._lanes.values():
            metas += lane.metas()
        if root is not None:
            metas = [meta if meta.root else replace(meta, root=root) for meta in metas]
        return list(dict.fromkeys(select(metas, root, prefix)))
