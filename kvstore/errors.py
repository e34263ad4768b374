"""Errors of the store.

    StoreError                    anything that the store itself raises
    ├── LayoutError               a model's K/V shape cannot be stored
    ├── CodecError                a stored value is not the block that was asked for
    ├── KeyringError              the secrets for stored blocks cannot be used
    ├── TierError                 a tier cannot be opened or used; carries the remedy
    │   └── FolderTakenError      a living process has the disk tier's folder
    └── InvariantError            `check()` found the store's books wrong: a defect of ours

A cache failure is a miss, never a failed request: of these only `InvariantError` can reach a caller of `acquire`.
"""

from __future__ import annotations

from enum import StrEnum


class MissReason(StrEnum):
    """Why a block that was looked for in a tier was not delivered. Metrics count by these words.

    ABSENT and EXPIRED: it is not there. CORRUPT, TRUNCATED, FOREIGN: what was there was not the block, and is dropped.
    UNREADABLE: the device gives its bytes no more, though it gives others, and it is dropped. DEADLINE, BREAKER, BUSY,
    ERROR: the tier did not say; it may well hold it.
    """

    ABSENT = "absent"
    EXPIRED = "expired"
    CORRUPT = "corrupt"
    TRUNCATED = "truncated"
    FOREIGN = "foreign"
    UNREADABLE = "unreadable"
    DEADLINE = "deadline"
    BREAKER = "breaker"
    BUSY = "busy"
    ERROR = "error"

    @property
    def is_gone(self) -> bool:
        """Whether the tier does not hold the block, at the latest from now on; else nothing is known of it."""
        return self in _GONE


_GONE = frozenset(
    {
        MissReason.ABSENT,
        MissReason.EXPIRED,
        MissReason.CORRUPT,
        MissReason.TRUNCATED,
        MissReason.FOREIGN,
        MissReason.UNREADABLE,
    }
)


class StoreError(Exception):
    """Anything that the store raises."""


class LayoutError(StoreError):
    """A model's K/V shape cannot be stored."""


class CodecError(StoreError):
    """A stored value is not the block that was asked for.

    Attributes:
        reason: CORRUPT, TRUNCATED or FOREIGN.
    """

    def __init__(self, reason: MissReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class KeyringError(StoreError):
    """The secrets for stored blocks cannot be used. The message ends with what to do, and holds nothing of a secret."""


class TierError(StoreError):
    """A tier cannot be opened or used. The message ends with what to do."""


class FolderTakenError(TierError):
    """A living process has the disk tier's folder."""


class InvariantError(StoreError):
    """The store's books are wrong: a defect of ours."""
