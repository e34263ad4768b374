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
    """Why a block that was looked for in a tier was not delivered. Metrics count by these words."""

    ABSENT = "absent"
    EXPIRED = "expired"
    CORRUPT = "corrupt"
    TRUNCATED = "truncated"
    FOREIGN = "foreign"
    DEADLINE = "deadline"
    BREAKER = "breaker"
    ERROR = "error"


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
