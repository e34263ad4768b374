"""What all routers of a fleet agree on: policy, weights, its shadow and history, drained workers, past clears.

Covers: which of two records wins, changing one, and the wire form. Does not cover: carrying it (`fleet`). The greatest
(version, author) wins, so routers that change it at the same moment end with the same record whatever the order of
messages; the other change is overruled, and its author sees that in the policy that it reads back and in the history,
which has the changes of both. Clears must not be lost: of two records the clears of both hold, and a new one leaves the
version as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from kvstore.past_changes import MAX_CHANGES, merged_changes
from kvstore.past_clears import PastClear, merged
from router.policy_history import (
    Order,
    PolicyChange,
    PolicySetting,
    changes_from_wire,
    setting_from_wire,
)
from warmkv.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class FleetRecord:
    """See worker.proto. Weights are those that were set; others are at their defaults. `changes`: the oldest first."""

    version: int
    author: str
    policy: str
    weights: Mapping[str, float] = field(default_factory=dict)
    drained: frozenset[str] = frozenset()
    shared_tier_reads: bool = True
    clears: tuple[PastClear, ...] = ()
    shadow: PolicySetting | None = None
    changes: tuple[PolicyChange, ...] = ()

    @property
    def setting(self) -> PolicySetting:
        """What is in force."""
        return PolicySetting(self.policy, self.weights, self.shared_tier_reads)

    def beats(self, other: FleetRecord) -> bool:
        """Whether this one is in force and the other one is history."""
        return (self.version, self.author) > (other.version, other.author)

    def joined(self, other: FleetRecord) -> FleetRecord:
        """The one of both that is in force, with the clears and the history of both."""
        won, lost = (other, self) if other.beats(self) else (self, other)
        changes = merged_changes(won.changes, lost.changes, version=won.version, key=lambda change: change.key)
        return replace(won, changes=tuple(changes), clears=merged(self.clears, other.clears))

    def knows(self, other: FleetRecord) -> bool:
        """Whether the other one has nothing to tell."""
        return not other.beats(self) and self.joined(other) == self

    def with_clears(self, clears: Iterable[PastClear]) -> FleetRecord:
        """The same version, with these clears in place of its own."""
        return replace(self, clears=tuple(clears))

    def with_setting(self, author: str, order: Order, after: PolicySetting, *, by: str, time_ms: int) -> FleetRecord:
        """The next version, with another policy in force; `order` is SET or ROLLBACK."""
        changed = self._noted(author, order, self.setting, after, by=by, time_ms=time_ms)
        return replace(
            changed, policy=after.name, weights=dict(after.weights), shared_tier_reads=after.shared_tier_reads
        )

    def with_shadow(self, author: str, after: PolicySetting | None, *, by: str, time_ms: int) -> FleetRecord:
        """The next version, with a policy that scores without acting; None: without one."""
        order = Order.SHADOW if after else Order.UNSHADOW
        none = PolicySetting()
        changed = self._noted(author, order, self.shadow or none, after or none, by=by, time_ms=time_ms)
        return replace(changed, shadow=after)

    def restarted_with(self, configured: FleetRecord, *, time_ms: int) -> FleetRecord:
        """What begins when a fleet whose settings were edited starts anew: their policy, with this one's past.

        It keeps the version of the settings, so what living workers carry still wins.
        """
        changes = self.changes
        if self.setting != configured.setting:
            order, after = Order.SETTINGS, configured.setting
            changes = self._noted(configured.author, order, self.setting, after, by="", time_ms=time_ms).changes
        return replace(configured, clears=self.clears, shadow=self.shadow, changes=changes)

    def _noted(
        self, author: str, order: Order, before: PolicySetting, after: PolicySetting, *, by: str, time_ms: int
    ) -> FleetRecord:
        # After a restart with other settings the history is ahead of the record.
        version = max(self.version, self.changes[-1].version if self.changes else 0) + 1
        change = PolicyChange(version, time_ms, by, author, order, before, after)
        kept = (*self.changes, change)[-MAX_CHANGES:]
        return replace(self, version=version, author=author, changes=kept)

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
            shadow=self.shadow.to_wire() if self.shadow else None,
            changes=[change.to_wire() for change in self.changes],
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
        shadow=setting_from_wire(record.shadow) if record.shadow.name else None,
        changes=changes_from_wire(record.changes),
    )


def _clear_to_wire(clear: PastClear) -> worker_pb2.PastClear:
    return worker_pb2.PastClear(
        number=clear.number,
        author=clear.author,
        chain_root=clear.root,
        prefix_hash=clear.prefix,
        confirmed=sorted(clear.confirmed),
    )
