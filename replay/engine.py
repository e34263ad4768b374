"""What a simulation asks of an engine, and what an engine tells it.

Covers: the shared types. Does not cover: timing models (`serial_engine`, `batched_engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from kvstore.events import TierName
from router.cost import WorkerLoad

NO_TIERS: Mapping[TierName, int] = MappingProxyType({})


class Reuse(NamedTuple):
    """The fate of a prompt's tokens, and when its first token came.

    `tiers`: cached tokens by the tier that they came from, where there is more than one tier.
    """

    cached: int
    computed: int
    first_token_s: float
    tiers: Mapping[TierName, int] = NO_TIERS


class CacheChange(NamedTuple):
    """What happened to a tier's contents.

    Attributes:
        stored: segments that became whole. removed: those that are so no more.
        partial: leading blocks of each segment that is held in part since; 0: it was, and is so no more.
    """

    tier: TierName
    stored: Sequence[int]
    removed: Sequence[int]
    partial: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Told:
    """Whom an engine tells: of a first token, of an answer's end, of changes in its tiers, of what it cannot serve.

    `made`: of a prompt that it has prefilled for another worker, with the leading blocks that it had before, and when
    it began.
    """

    first_token: Callable[[int, Reuse], None]
    ended: Callable[[int], None]
    cache_changed: Callable[[Sequence[CacheChange]], None]
    refused: Callable[[int], None]
    made: Callable[[int, int, float], None] = lambda _number, _found, _started: None


class Engine(Protocol):
    """One worker's engine. All times are those of the timeline.

    Attributes:
        busy_s: time spent in prefill.
    """

    busy_s: float

    def submit(self, number: int) -> None:
        """Queue a request."""

    def cancel(self, number: int) -> None:
        """Forget a request; what of it is cached stays so."""

    def fail(self) -> tuple[list[int], list[int]]:
        """Lose everything: (requests that had no token yet, requests that were being answered)."""

    def catch_up(self) -> None:
        """Tell of all that has happened by now."""

    def holding(self) -> list[CacheChange]:
        """All that it holds, as changes from nothing: a snapshot."""

    def report_time(self, by: float) -> float:
        """When the last report was sent that was sent by that time."""

    def reported(self, sent: float) -> WorkerLoad:
        """The load that was told at that time."""

    def known_until(self, sent: float) -> float:
        """The moment up to which the requests submitted are in the report of that time."""
