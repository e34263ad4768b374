"""What all routers of a fleet agree on: policy, weights, drained workers, shared-tier reads, past clears.

Covers: which of two records wins, changing one, and the wire form. Does not cover: carrying it (`fleet`). The greatest
(version, author) wins, so routers that change it at the same moment end with the same record whatever the order of
messages; the other change is lost, and its author sees that in the policy that it reads back. Clears must not be lost:
of two records the clears of both hold, and a new one leaves the version as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from kvstore.past_clears import PastClear, merged
from warmkv.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class FleetRecord:
    """See worker.proto. Weights are those that were set; others are at their defaults."""

    version: int
    author: str
    policy: str
    weights: Mapping[str, float] = field(default_factory=dict)
    drained: frozenset[str] = frozenset()
    shared_tier_reads: bool = True
    clears: tuple[PastClear, ...] = ()

    def beats(self, other: FleetRecord) -> bool:
        """Whether this one is in force and the other one is history."""
        return (self.version, self.author) > (other.version, other.author)

    def joined(self, other: FleetRecord) -> FleetRecord:
        """The one of both that is in force, with the clears of both."""
        return (other if other.beats(self) else self).with_clears(merged(self.clears, other.clears))

    def knows(self, other: FleetRecord) -> bool:
        """Whether the other one has nothing to tell."""
        return not other.beats(self) and merged(self.clears, other.clears) == self.clears

    def with_clears(self, clears: Iterable[PastClear]) -> FleetRecord:
        """The same version, with these clears in place of its own."""
        return replace(self, clears=tuple(clears))

    def with_policy(self, author: str, policy: str, weights: Mapping[str, float]) -> FleetRecord:
        """The next version, with that policy."""
        return replace(self, version=self.version + 1, author=author, policy=policy, weights=dict(weights))

    def with_shared_tier_reads(self, author: str, *, enabled: bool) -> FleetRecord:
        """The next version, with reads from the shared tier on or off."""
        return replace(self, version=self.version + 1, author=author, shared_tier_reads=enabled)

    def with_drained(self, author: str, worker: str) -> FleetRecord:
        """The next version, in which the worker gets nothing new."""
        return replace(self, version=self.version + 1, author=author, drained=self.drained | {worker})

    def with_undrained(self, author: str, *workers: str) -> FleetRecord:
        """The next version, in which the workers get requests."""
        return replace(self, version=self.version + 1, author=author, drained=self.drained - set(workers))

    def to_wire(self) -> worker_pb2.FleetRecord:
        """As workers carry it."""
        return worker_pb2.FleetRecord(
            version=self.version,
            author=self.author,
            policy=self.policy,
            weights=dict(self.weights),
            drained=sorted(self.drained),
            shared_tier_reads=self.shared_tier_reads,
            clears=[_clear_to_wire(clear) for clear in self.clears],
        )


def from_wire(record: worker_pb2.FleetRecord) -> FleetRecord:
    """As routers hold it."""
    return FleetRecord(
        version=record.version,
        author=record.author,
        policy=record.policy,
        weights=dict(record.weights),
        drained=frozenset(record.drained),
        shared_tier_reads=record.shared_tier_reads,
        clears=tuple(
            PastClear(each.number, each.author, each.chain_root, each.prefix_hash, frozenset(each.confirmed))
            for each in record.clears
        ),
    )


def _clear_to_wire(clear: PastClear) -> worker_pb2.PastClear:
    return worker_pb2.PastClear(
        number=clear.number,
        author=clear.author,
        chain_root=clear.root,
        prefix_hash=clear.prefix,
        confirmed=sorted(clear.confirmed),
    )
