"""K/V events: what changed in a store, in the field's words. No torch; the router imports this.

Hashes are short ones (`blocks.short`, 16 bytes). Events of one worker are ordered; a tier's removal says nothing about
the same block in other tiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TierName(StrEnum):
    """Where a block lies, from fast to slow."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REDIS = "redis"
    PEER = "peer"


class RemovalCause(StrEnum):
    """Why a block left a tier."""

    EVICTED = "evicted"
    EXPIRED = "expired"
    CLEARED = "cleared"
    INVALID = "invalid"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Consecutive blocks of one chain became readable in a tier.

    Attributes:
        tier: where.
        hashes: 16 bytes each, in chain order.
        parent: the block before the first one; None when it starts a chain.
        ttl_s: shared tiers only: seconds until they expire unless used; None: never, or not the reader's business.
    """

    tier: TierName
    hashes: tuple[bytes, ...]
    parent: bytes | None = None
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks left a tier."""

    tier: TierName
    hashes: tuple[bytes, ...]
    cause: RemovalCause


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """A tier was emptied."""

    tier: TierName


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared
