"""Clears that a fleet remembers, so that a worker which was away drops what they meant when it is back. Pure.

Covers: which clears are worth remembering, and what two memories know together. Does not cover: carrying them, asking
for them (routers), dropping blocks (the store).

A worker that has not confirmed a clear may hold, in its disk tier, blocks from before; one that has, holds none. So who
confirmed is all that must be known: a clear is asked of each worker until it confirms, and of none again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

MAX_CLEARS = 64  # a router sends all of them with each change of the fleet record


@dataclass(frozen=True, slots=True)
class PastClear:
    """A clear of a fleet.

    Attributes:
        number: milliseconds since the epoch, but greater than that of every clear that its author knew.
        author: the router that was asked for it.
        root: of the chains that it drops; empty: of all.
        prefix: the block that it drops with all that follow it; empty: all of the root.
        confirmed: names of the workers that have carried it out.
    """

    number: int
    author: str
    root: bytes = b""
    prefix: bytes = b""
    confirmed: frozenset[str] = frozenset()

    @property
    def key(self) -> tuple[int, str]:
        """What tells it from every other clear; a greater one is younger."""
        return (self.number, self.author)

    def covers(self, other: PastClear) -> bool:
        """Whether it drops all that the other one does."""
        return self.root in (b"", other.root) and self.prefix in (b"", other.prefix)

    def confirmed_by(self, workers: Iterable[str]) -> PastClear:
        """The same, with these workers too."""
        return replace(self, confirmed=self.confirmed.union(workers))


def merged(ours: Iterable[PastClear], theirs: Iterable[PastClear]) -> tuple[PastClear, ...]:
    """What both know together, the oldest first; the same whatever the order in which memories meet.

    A clear that a younger one covers is dropped: whoever owes it owes the younger one as well, or confirmed that and
    holds nothing from before. At most the youngest `MAX_CLEARS` are kept.
    """
    known: dict[tuple[int, str], PastClear] = {}
    for one in (*ours, *theirs):
        known[one.key] = one.confirmed_by(known[one.key].confirmed) if one.key in known else one
    kept: list[PastClear] = []
    for key in sorted(known, reverse=True):
        if len(kept) < MAX_CLEARS and not any(younger.covers(known[key]) for younger in kept):
            kept.append(known[key])
    return tuple(reversed(kept))
