from __future__ import annotations

from dataclasses import replace
from functools import reduce

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.past_changes import MAX_CHANGES
from kvstore.past_clears import PastClear, merged
from router.errors import InvalidRequest
from router.fleet_record import FleetRecord, from_wire
from router.policy_history import Order, PolicyChange, PolicySetting, rollback_target

SETTINGS = (PolicySetting("sticky", {"spill_factor": 2.0}), PolicySetting("", {}, False), PolicySetting("round_robin"))


def change(version: int, router: str) -> PolicyChange:
    """The one that this router made of this version: two memories that have it have the same."""
    kinds, n = list(Order), version + len(router)
    return PolicyChange(version, 1 << 40, "é", router, kinds[n % len(kinds)], SETTINGS[n % 3], SETTINGS[(n + 1) % 3])


def possible(record: FleetRecord) -> FleetRecord:
    """No record that was ever changed has changes younger than itself."""
    known = {each.key: each for each in record.changes if not record.version or each.version <= record.version}
    return replace(record, changes=tuple(known[key] for key in sorted(known)))


records = st.builds(
    FleetRecord,
    version=st.integers(0, 3),
    author=st.sampled_from(["r1", "r2", "r3"]),
    policy=st.sampled_from(["round_robin", "cache_aware"]),
    weights=st.dictionaries(st.sampled_from(["queue", "load"]), st.floats(0, 1)),
    drained=st.frozensets(st.sampled_from(["w0", "w1"])),
    shared_tier_reads=st.booleans(),
    clears=st.lists(
        st.builds(
            PastClear,
            number=st.integers(1, 4),
            author=st.sampled_from(["r1", "r2"]),
            confirmed=st.frozensets(st.sampled_from(["w0", "w1"])),
        ),
        max_size=2,
    ).map(lambda clears: merged(clears, ())),
    shadow=st.none() | st.builds(PolicySetting, name=st.just("sticky"), weights=st.just({"spill_factor": 2.0})),
    changes=st.lists(st.builds(change, st.integers(1, 5), st.sampled_from(["r1", "router2"])), max_size=3).map(tuple),
).map(possible)


@given(records)
def test_the_wire_keeps_everything(record: FleetRecord) -> None:
    assert from_wire(record.to_wire()) == record


@given(st.lists(records, min_size=1, unique_by=lambda r: (r.version, r.author)), st.randoms())
def test_routers_agree_whatever_the_order_of_messages(given_records: list[FleetRecord], random: object) -> None:
    def newest(order: list[FleetRecord]) -> FleetRecord:
        return reduce(lambda ours, theirs: theirs if theirs.beats(ours) else ours, order)

    shuffled = list(given_records)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert newest(given_records) == newest(shuffled)


@given(records, records)
def test_two_routers_that_heard_of_one_another_have_nothing_more_to_tell(one: FleetRecord, other: FleetRecord) -> None:
    ours, theirs = one.joined(other), other.joined(one)
    assert all(ours.knows(heard) for heard in (one, other, theirs))
    assert theirs.knows(ours)
    assert ours.clears == theirs.clears
    if (one.version, one.author) != (other.version, other.author):
        assert ours.changes == theirs.changes
    assert not ours.knows(ours.with_drained("r9", "w1"))
    assert not ours.knows(one.with_clears([PastClear(9, "r9")]))


def test_every_change_beats_what_it_changes_and_leaves_the_rest() -> None:
    first = FleetRecord(4, "r9", "cache_aware", {"queue": 2.0}, frozenset({"w1"}), True)
    for changed in (
        first.with_setting("r1", Order.SET, PolicySetting("round_robin"), by="ops", time_ms=7),
        first.with_shadow("r1", PolicySetting("sticky"), by="ops", time_ms=7),
        first.with_drained("r1", "w0"),
        first.with_undrained("r1", "w1"),
    ):
        assert changed.beats(first)
        assert not first.beats(changed)
        assert (changed.version, changed.author) == (5, "r1")
    assert first.with_drained("r1", "w0").drained == {"w0", "w1"}
    assert first.with_drained("r1", "w0").weights == {"queue": 2.0}
    assert first.with_undrained("r1", "w1").drained == frozenset()


def changed(record: FleetRecord, name: str, order: Order = Order.SET, **weights: float) -> FleetRecord:
    return record.with_setting("r1", order, PolicySetting(name, weights), by="ops", time_ms=1000 + record.version)


def test_every_change_of_the_policy_is_noted_with_what_it_replaced() -> None:
    first = FleetRecord(0, "r1", "cache_aware")
    second = changed(first, "sticky", spill_factor=2.0)
    third = second.with_shadow("r2", PolicySetting("lowest_ttft"), by="eve", time_ms=5)
    assert [(c.version, c.by, c.router, str(c.order)) for c in third.changes] == [
        (1, "ops", "r1", "set"),
        (2, "eve", "r2", "shadow"),
    ]
    assert third.changes[0].before == PolicySetting("cache_aware")
    assert third.changes[0].after == PolicySetting("sticky", {"spill_factor": 2.0})
    assert (third.policy, third.shadow) == ("sticky", PolicySetting("lowest_ttft"))
    fourth = third.with_shadow("r1", None, by="eve", time_ms=6)
    assert (fourth.shadow, fourth.changes[-1].order, fourth.changes[-1].before.name) == (
        None,
        "unshadow",
        "lowest_ttft",
    )


def test_of_two_changes_of_one_moment_one_is_in_force_and_both_are_told() -> None:
    first = changed(FleetRecord(0, "r1", "cache_aware"), "sticky")
    one = first.with_setting("r1", Order.SET, PolicySetting("round_robin"), by="ann", time_ms=5)
    other = first.with_setting("r2", Order.SET, PolicySetting("lowest_ttft"), by="bob", time_ms=6)
    ours, theirs = one.joined(other), other.joined(one)
    assert ours == theirs
    assert ours.policy == "lowest_ttft"
    assert [(c.version, c.by, c.after.name) for c in ours.changes] == [
        (1, "ops", "sticky"),
        (2, "ann", "round_robin"),
        (2, "bob", "lowest_ttft"),
    ]
    assert rollback_target(ours.changes, 0).name == "sticky"
    assert rollback_target(ours.changes, 2).name == "lowest_ttft"  # that is what version 2 put in force


def test_a_router_that_never_changed_anything_takes_over_the_history_and_edits_that_never_held_are_not_told() -> None:
    kept = changed(FleetRecord(0, "r1", "cache_aware"), "sticky")
    edited = kept.restarted_with(FleetRecord(0, "r1", "round_robin"), time_ms=9)
    newcomer = FleetRecord(0, "r9", "round_robin")  # of the same settings; its name is greater
    assert newcomer.joined(edited).changes == edited.changes == edited.joined(newcomer).changes
    for alive in (kept, changed(kept, "least_loaded")):
        assert edited.joined(alive) == alive  # the settings did not count, as a worker lived that knew better


def test_history_is_bounded_and_its_versions_never_repeat() -> None:
    record = FleetRecord(0, "r1", "cache_aware")
    for n in range(MAX_CHANGES + 5):
        record = changed(record, "sticky" if n % 2 else "cache_aware")
    assert len(record.changes) == MAX_CHANGES
    assert record.changes[-1].version == record.version == MAX_CHANGES + 5
    behind = FleetRecord(0, "r1", "cache_aware", changes=record.changes)  # a router whose settings were changed
    assert changed(behind, "sticky").version == MAX_CHANGES + 6


def test_a_rollback_returns_to_what_was_before_and_again_to_where_it_came_from() -> None:
    with pytest.raises(InvalidRequest, match="not changed yet"):
        rollback_target((), 0)
    one = changed(FleetRecord(0, "r1", "cache_aware"), "sticky")
    two = changed(one, "round_robin").with_shadow("r1", PolicySetting("lowest_ttft"), by="ops", time_ms=1)
    back = rollback_target(two.changes, 0)
    assert back == PolicySetting("sticky")  # the shadow was no change of what is in force
    three = changed(two, back.name, Order.ROLLBACK)
    assert rollback_target(three.changes, 0).name == "round_robin"
    assert rollback_target(three.changes, 1).name == "sticky"
    with pytest.raises(InvalidRequest, match="choose one of 1, 2, 4"):
        rollback_target(three.changes, 3)
