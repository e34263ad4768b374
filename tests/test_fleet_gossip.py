"""What routers and the workers between them make of two fleet records is the same: each has its own form of it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given

from router.fleet_record import FleetRecord, from_wire
from router.policy_history import Order, PolicySetting
from tests.router.test_fleet_record import records
from workers.fleet_gossip import is_news, joined


@given(records, records)
def test_workers_join_records_as_routers_do(one: FleetRecord, other: FleetRecord) -> None:
    assume((one.version, one.author) != (other.version, other.author))
    carried = joined(one.to_wire(), other.to_wire())
    assert from_wire(carried) == one.joined(other)
    for record in (one, other):
        assert is_news(carried, record.to_wire()) == (not record.knows(from_wire(carried)))


def test_an_overruled_change_is_news_to_its_worker() -> None:
    first = FleetRecord(1, "r1", "sticky")
    ours = first.with_setting("r1", Order.SET, PolicySetting("round_robin"), by="ann", time_ms=5)
    theirs = first.with_setting("r2", Order.SET, PolicySetting("lowest_ttft"), by="bob", time_ms=6)
    whole = joined(ours.to_wire(), theirs.to_wire())
    assert is_news(whole, theirs.to_wire())  # the version in force is the same, and the history longer
    assert not is_news(joined(whole, replace(theirs).to_wire()), whole)
