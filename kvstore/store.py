"""TieredStore: blocks over device, host RAM and a shared tier. (Interface first; see the docstrings.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.blocks import BlockHash
from kvstore.events import BlockStored, KvEvent, TierName
from kvstore.tier import BlockMeta, TierStats

ComputeMs = Callable[[int, int], float]  # (first block, number of blocks) -> predicted milliseconds to compute them


@dataclass(frozen=True, slots=True)
class ReadTiers:
    """Which tiers a request may read from (directive no_read: none; the fleet record may forbid the shared one)."""

    device: bool = True
    host: bool = True
    shared: bool = True


class Acquisition(Protocol):
    """Blocks of a prompt's prefix on their way to the device. Owned by the engine's thread.

    Until `done`, the sequence waits while others run. Then `block_ids` and `fates` hold the contiguous prefix that
    arrived whole: one device block, referenced for the caller, and the tier it came from, for each block. A load that
    failed only makes it shorter.
    """

    @property
    def done(self) -> bool:
        """Whether the engine can go on."""
        ...

    @property
    def block_ids(self) -> list[int]:
        """Device blocks of the prefix, referenced for the caller."""
        ...

    @property
    def fates(self) -> list[TierName]:
        """The tier that each came from."""
        ...

    @property
    def load_ms(self) -> float:
        """Time from acquire to done."""
        ...

    def cancel(self) -> None:
        """Give all blocks back; bytes still on their way are thrown away when they arrive."""
        ...


class Store(Protocol):
    """What the engine may ask. All methods are called from the engine's thread, except `stats`, `snapshot` excluded."""

    def match(self, hashes: Sequence[BlockHash], reads: ReadTiers = ...) -> list[TierName]:
        """The fastest local tier (device, host) of each leading block. A question; the shared tier is not asked."""
        ...

    def acquire(self, hashes: Sequence[BlockHash], *, reads: ReadTiers, compute_ms: ComputeMs) -> Acquisition:
        """Start to bring the longest prefix that is worth loading to the device. Never blocks on I/O of a server.

        Device blocks are referenced at once. A lower tier is read only for runs where its predicted time is below
        `compute_ms` for the same blocks. Needs free device blocks for what it loads: with too few it loads fewer.
        """
        ...

    def allocate(self, count: int) -> list[int] | None:
        """That many empty device blocks, referenced for the caller, evicting unreferenced cached ones; None: no room.

        All or nothing. Unreferenced cached blocks are evicted least recently used first, a suffix before its prefix.
        """
        ...

    def commit(self, block_ids: Sequence[int], metas: Sequence[BlockMeta]) -> None:
        """These device blocks are full: make them findable, copy them to host, queue them for the shared tier.

        If a name is already held by another device block, the caller's copy stays private to it.
        """
        ...

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference of each. Committed ones stay cached until evicted; the others are free at once."""
        ...

    def pump(self) -> None:
        """Take in what I/O threads finished, expire what is due, refresh lower tiers. Called once an engine step."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Sleep until an I/O thread finished something, or the timeout."""
        ...

    def drain_events(self) -> list[KvEvent]:
        """Events of all tiers since the last call, in order."""
        ...

    def snapshot(self) -> list[BlockStored]:
        """All that device and host hold and what is known of the shared tier, as events; it includes drained ones."""
        ...

    def clear(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None, shared: bool = False
    ) -> dict[TierName, int]:
        """Drop blocks in device and host, and with `shared` in the shared tier too; blocks dropped, by tier.

        Running sequences keep their blocks but nobody finds them any more. Queued writes of those blocks are dropped.
        """
        ...

    def stats(self) -> dict[TierName, TierStats]:
        """Counters of every tier."""
        ...

    def read_ms(self) -> dict[TierName, tuple[float, float]]:
        """For each tier below device: measured (latency of a read, time a block), milliseconds."""
        ...

    def check(self) -> None:
        """Audit every tier and the store's own books.

        Raises:
            InvariantError: they disagree.
        """
        ...

    def close(self, *, flush_s: float = 0.0) -> None:
        """Write out what is queued for the shared tier for at most `flush_s` seconds, then give everything back."""
        ...
