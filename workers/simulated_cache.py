"""What operators and routers do with a simulated engine's blocks; no torch.

Covers: `workers.protocol.Cache` on two tiers of names. Does not cover: jobs (`simulated`), the tiers
(`simulated_store`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items

from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from workers.protocol import CachedBlock
from workers.simulated_listing import listed
from workers.simulated_store import SimulatedTier


class SimulatedCache:
    """A simulated engine's blocks.

    Attributes:
        shared_reads: what routers said last.
    """

    def __init__(
        self,
        device: SimulatedTier,
        host: SimulatedTier,
        *,
        default: Lifetime,
        private: Callable[[], int],
    ) -> None:
        """Over both tiers; a host without blocks is none. `private`: unnamed device blocks that sequences hold."""
        self.shared_reads = True
        self._device, self._host, self._default, self._private = device, host, default, private
        self._tiers = [device, host] if host.capacity else [device]

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> dict[TierName, int]:
        """Drop blocks; how many, by tier."""
        return {tier.name: tier.clear(root, prefix) for tier in self._tiers}

    def shared_clearing(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None
    ) -> Callable[[], dict[TierName, int]] | None:
        """None: there is no shared tier to clear."""
        return None

    def shared_cleared(self) -> None:
        """Nothing to do."""

    def hold_peers(self, key: Hashable, for_s: float) -> None:
        """Nothing: it reads from no other worker."""

    def release_peers(self, key: Hashable) -> None:
        """Nothing: it reads from no other worker."""

    def promise_broken(self, address: str, ticket: BlockHash) -> None:
        """Nothing: it waits for no other worker."""

    def list_blocks(
        self, *, root: BlockHash | None, prefix: BlockHash | None, after: BlockHash | None, limit: int
    ) -> list[CachedBlock]:
        """The first `limit` blocks behind `after`, in the order of their hashes. O(blocks held)."""
        return listed(self._tiers, root=root, prefix=prefix, after=after, limit=limit)

    def prefetch(self, hashes: Items[BlockHash], *, root: BlockHash, lifetime: Lifetime | None) -> int:
        """Copy a chain's blocks from host to device, as far as they lie there and fit; how many."""
        on_device = self._device.match(hashes)
        lifetime = lifetime or self._default
        self._device.prolong(hashes[:on_device], lifetime)
        loaded = hashes[on_device : on_device + self._host.match(hashes[on_device:])]
        started = self._device.copy_from(self._host, loaded, lifetime)
        self._host.count_hits(started)
        self._host.prolong(hashes[: on_device + started], lifetime)
        return started

    def lease(self, hashes: Items[BlockHash], for_s: float | None) -> dict[TierName, int]:
        """Forbid to drop them for so long; how many the lowest tier promised. Copies in the device may go."""
        return {self._tiers[-1].name: self._tiers[-1].lease(hashes, for_s)}

    def end_leases(self, hashes: Items[BlockHash]) -> dict[TierName, int]:
        """Allow it again; how many leases ended."""
        return {self._tiers[-1].name: self._tiers[-1].end_leases(hashes)}

    def where(self, hashes: Items[BlockHash]) -> list[tuple[TierName, ...]]:
        """For each block the tiers that hold it now. A question."""
        return [tuple(tier.name for tier in self._tiers if name in tier) for name in hashes]

    def owes_peers(self) -> bool:
        """False: it serves no blocks."""
        return False

    def share_running(self) -> bool:
        """True: there is no shared tier."""
        return True

    def set_shared_reads(self, *, enabled: bool) -> None:
        """Remember it; `shared_reads` tells."""
        self.shared_reads = enabled

    def check(self) -> None:
        """Audit the books: what sequences hold and what the tiers say.

        Raises:
            InvariantError: they disagree.
        """
        self._device.check()
        self._host.check()
        private = self._private()
        if private != self._device.private:
            raise InvariantError(f"sequences hold {private} private blocks, the device counts {self._device.private}")
