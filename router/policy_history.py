"""How a fleet is routed, and how that came to be: settings of the policy and their changes.

Covers: one setting, one change, finding what a rollback returns to, the wire form. Does not cover: the record that they
travel in (`fleet_record`) or who may change it (`operators`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from router.errors import InvalidRequest
from warmkv.v1 import common_pb2


class Order(StrEnum):
    """What was ordered."""

    SET = "set"
    ROLLBACK = "rollback"
    SHADOW = "shadow"
    UNSHADOW = "unshadow"
    SETTINGS = "settings"


# Those that change what is in force.
_IN_FORCE = frozenset({Order.SET, Order.ROLLBACK, Order.SETTINGS})


@dataclass(frozen=True, slots=True)
class PolicySetting:
    """A policy with the weights that were set; others are at their defaults. `name` empty: none."""

    name: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    shared_tier_reads: bool = True

    def to_wire(self) -> common_pb2.PolicySetting:
        """As records carry it."""
        return common_pb2.PolicySetting(
            name=self.name, weights=dict(self.weights), shared_tier_reads=self.shared_tier_reads
        )


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """See common.proto."""

    version: int
    time_ms: int
    by: str
    router: str
    order: Order
    before: PolicySetting
    after: PolicySetting

    @property
    def key(self) -> tuple[int, str]:
        """What tells it from every other change; a greater one is younger, or won where two had one version."""
        return (self.version, self.router)

    def to_wire(self) -> common_pb2.PolicyChange:
        """As records carry it."""
        change = common_pb2.PolicyChange(
            version=self.version,
            time_ms=self.time_ms,
            by=self.by,
            router=self.router,
            order=str(self.order),
            to=self.after.to_wire(),
        )
        getattr(change, "from").CopyFrom(self.before.to_wire())  # a word of Python's
        return change


def setting_from_wire(setting: common_pb2.PolicySetting) -> PolicySetting:
    """As routers hold it."""
    return PolicySetting(setting.name, dict(setting.weights), setting.shared_tier_reads)


def changes_from_wire(changes: Iterable[common_pb2.PolicyChange]) -> tuple[PolicyChange, ...]:
    """As routers hold them. Orders of a later version are left out."""
    return tuple(
        PolicyChange(
            each.version,
            each.time_ms,
            each.by,
            each.router,
            Order(each.order),
            setting_from_wire(getattr(each, "from")),
            setting_from_wire(each.to),
        )
        for each in changes
        if each.order in Order.__members__.values()
    )


def rollback_target(changes: Iterable[PolicyChange], to_version: int) -> PolicySetting:
    """What a rollback puts in force: the setting before the last change, or the one that a version put in force.

    As with `kubectl rollout undo`, a second rollback without a version returns to where the first one came from.

    Raises:
        InvalidRequest: there is none, or that version is not remembered; names those that are.
    """
    known = [change for change in changes if change.order in _IN_FORCE]
    if not known:
        raise InvalidRequest("The policy was not changed yet, so there is nothing to return to; set one instead.")
    if not to_version:
        return known[-1].before
    found = next((change.after for change in reversed(known) if change.version == to_version), None)
    if found is None:
        versions = ", ".join(str(change.version) for change in known)
        raise InvalidRequest(f"Version {to_version} set no policy that is remembered; choose one of {versions}.")
    return found
