from __future__ import annotations

from functools import reduce

import hypothesis.strategies as st
from hypothesis import given

from kvstore.past_clears import PastClear, merged
from router.fleet_record import FleetRecord, from_wire

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
)


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
    assert not ours.knows(ours.with_drained("r9", "w1"))
    assert not ours.knows(one.with_clears([PastClear(9, "r9")]))


def test_every_change_beats_what_it_changes_and_leaves_the_rest() -> None:
    first = FleetRecord(4, "r9", "cache_aware", {"queue": 2.0}, frozenset({"w1"}), True)
    for changed in (
        first.with_policy("r1", "round_robin", {}),
        first.with_drained("r1", "w0"),
        first.with_undrained("r1", "w1"),
        first.with_shared_tier_reads("r1", enabled=False),
    ):
        assert changed.beats(first)
        assert not first.beats(changed)
        assert (changed.version, changed.author) == (5, "r1")
    assert first.with_drained("r1", "w0").drained == {"w0", "w1"}
    assert first.with_drained("r1", "w0").weights == {"queue": 2.0}
    assert first.with_undrained("r1", "w1").drained == frozenset()
