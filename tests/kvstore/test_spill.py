"""The queue to the shared tier and the schedule of refreshes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockHash
from kvstore.host.tier import BlockView, HostTier
from kvstore.lifetime import Lifetime
from kvstore.refresh import REFRESH_WITHOUT_TTL_S, RefreshSchedule
from kvstore.spill import QueuedWrite, Refreshed, WriteBehind
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, chain, names, payload, payloads
from tests.kvstore.fake_tier import FakeSharedTier

NAME = chain(1)[0].hash


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def shared(clock: ManualClock) -> FakeSharedTier:
    return FakeSharedTier(clock)


@pytest.fixture
def host(clock: ManualClock) -> HostTier:
    return HostTier(LAYOUT, 16 * LAYOUT.block_nbytes, clock=clock)


@pytest.fixture
def writer(shared: FakeSharedTier, host: HostTier) -> Iterator[WriteBehind]:
    made = WriteBehind(shared, max_blocks=4, end_view=host.end_view)
    yield made
    shared.writes_open.set()
    made.close(30)


def put(writer: WriteBehind, host: HostTier, metas: list[BlockMeta]) -> list[bool]:
    host.write(metas, payloads(metas))
    views: list[BlockView] = host.view(names(metas))
    return [writer.put(QueuedWrite(view.meta, view.payload, view)) for view in views]


def pinned(host: HostTier) -> int:
    return host.pins


def test_queued_blocks_reach_the_shared_tier_and_their_views_end(
    writer: WriteBehind, host: HostTier, shared: FakeSharedTier
) -> None:
    metas = chain(3)
    assert put(writer, host, metas) == [True] * 3
    assert writer.flush(30)
    assert shared.held() == {name: bytes(payload(name)) for name in names(metas)}
    assert pinned(host) == 0


def test_a_full_queue_drops_and_counts_and_never_waits(
    writer: WriteBehind, host: HostTier, shared: FakeSharedTier
) -> None:
    shared.writes_open.clear()
    assert put(writer, host, chain(6)) == [True] * 4 + [False] * 2
    assert writer.queue_full == 2
    assert pinned(host) == 4
    writer.check()
    shared.writes_open.set()
    assert writer.flush(30)
    assert len(shared.held()) == 4


def test_a_queued_block_is_not_queued_again(writer: WriteBehind, host: HostTier, shared: FakeSharedTier) -> None:
    shared.writes_open.clear()
    put(writer, host, chain(1, first_token=1))  # the thread is busy with this one
    while not writer._writing:
        pass
    assert put(writer, host, chain(2)) == [True, True]
    assert put(writer, host, chain(2)) == [True, True]
    assert len(writer.metas()) == 3
    assert pinned(host) == 3


def test_dropped_blocks_are_not_written(writer: WriteBehind, host: HostTier, shared: FakeSharedTier) -> None:
    shared.writes_open.clear()
    put(writer, host, chain(1, first_token=1))
    while not writer._writing:
        pass
    metas = chain(3)
    put(writer, host, metas)
    writer.drop(set(names(metas[1:])))
    shared.writes_open.set()
    assert writer.flush(30)
    assert set(shared.held()) == {chain(1, first_token=1)[0].hash, metas[0].hash}
    assert pinned(host) == 0


def test_a_write_that_is_running_when_it_is_cancelled_is_undone(
    writer: WriteBehind, host: HostTier, shared: FakeSharedTier
) -> None:
    shared.writes_open.clear()
    metas = chain(1)
    put(writer, host, metas)
    while not writer._writing:
        pass
    writer.drop(set(names(metas)))
    assert not writer.settle_cancelled(0.0)
    shared.writes_open.set()
    assert writer.settle_cancelled(30)
    assert shared.held() == {}


def test_a_write_that_is_over_cannot_be_cancelled_though_the_thread_is_still_at_a_refresh(
    writer: WriteBehind, host: HostTier, shared: FakeSharedTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, stale = chain(1), chain(1, first_token=1)
    refreshing, go_on = threading.Event(), threading.Event()

    def refresh(metas: list[BlockMeta]) -> list[BlockHash]:
        refreshing.set()
        assert go_on.wait(30)
        return []

    monkeypatch.setattr(shared, "refresh", refresh)
    shared.writes_open.clear()
    put(writer, host, chain(1, first_token=2))
    while not writer._writing:
        pass
    put(writer, host, written)  # both of these are for the thread's next turn
    writer.refresh(stale)
    shared.writes_open.set()
    assert refreshing.wait(30)
    assert set(shared.held()) >= set(names(written))
    assert (writer.metas(), writer.is_coming(written[0].hash)) == ([], False)
    writer.drop(set(names(written)))
    assert writer.settle_cancelled(0.0)  # whoever clears finds it in the tier
    assert not writer.flush(0.0)
    go_on.set()
    assert writer.flush(30)


def test_a_cancelled_write_is_taken_back_though_the_tier_raised(
    writer: WriteBehind, host: HostTier, shared: FakeSharedTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    metas, store = chain(1), shared.write

    def write(metas: list[BlockMeta], payloads: list[memoryview]) -> int:
        store(metas, payloads)
        raise RuntimeError("the answer was lost")

    monkeypatch.setattr(writer._tier, "write", write)
    shared.writes_open.clear()
    put(writer, host, metas)
    while not writer._writing:
        pass
    writer.drop(set(names(metas)))
    shared.writes_open.set()
    assert writer.settle_cancelled(30)
    assert shared.held() == {}


def test_it_says_what_is_coming_and_whether_there_is_room(
    writer: WriteBehind, host: HostTier, shared: FakeSharedTier
) -> None:
    shared.writes_open.clear()
    metas = chain(5)
    put(writer, host, metas[:3])
    assert ([writer.is_coming(name) for name in names(metas)], writer.is_full) == ([True] * 3 + [False] * 2, False)
    put(writer, host, metas[3:4])
    assert writer.is_full
    writer.drop(set(names(metas)))
    assert not any(writer.is_coming(name) for name in names(metas))


def test_a_tier_that_raises_does_not_end_the_thread(
    writer: WriteBehind, host: HostTier, shared: FakeSharedTier, caplog: pytest.LogCaptureFixture
) -> None:
    shared.raises = RuntimeError("broken")
    put(writer, host, chain(1))
    assert writer.flush(30)
    assert "write-behind failed" in caplog.text
    assert writer.take_unwritten() == names(chain(1))
    shared.raises = None
    put(writer, host, chain(2))
    assert writer.flush(30)
    assert len(shared.held()) == 2
    assert pinned(host) == 0


def test_a_refresh_touches_what_is_held_and_reports_what_is_lost(writer: WriteBehind, shared: FakeSharedTier) -> None:
    metas = chain(5)
    shared.write(metas, payloads(metas))
    shared.lose([metas[1].hash, metas[4].hash])
    writer.refresh(metas)
    assert writer.flush(30)
    held = [metas[0].hash, metas[2].hash, metas[3].hash]
    assert writer.take_refreshed() == [Refreshed(metas, [metas[1].hash, metas[4].hash])]
    assert shared.touched == [held]
    assert writer.take_refreshed() == []


def test_an_unhealthy_tier_is_not_said_to_have_lost_anything(writer: WriteBehind, shared: FakeSharedTier) -> None:
    metas = chain(2)
    shared.healthy = False
    writer.refresh(metas)
    assert writer.flush(30)
    assert writer.take_refreshed() == [Refreshed(metas, None)]


def test_a_first_use_is_due_at_once_and_the_next_after_a_quarter_of_the_ttl(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    schedule.used(NAME, Lifetime(40.0))
    assert schedule.pop_due() == [NAME]
    schedule.used(NAME, Lifetime(40.0))
    clock.now += 9.0
    schedule.used(NAME, Lifetime(40.0))
    assert schedule.pop_due() == []
    clock.now += 1.0
    assert schedule.pop_due() == [NAME]
    clock.now += 100.0
    assert schedule.pop_due() == []


def test_a_use_that_came_too_early_is_made_up_for(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    schedule.renewed(NAME, Lifetime(40.0))
    clock.now += 1.0
    schedule.used(NAME, Lifetime(40.0))
    clock.now += 500.0
    assert schedule.pop_due() == [NAME]


def test_a_write_makes_a_refresh_needless(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    schedule.used(NAME, Lifetime(40.0))
    schedule.renewed(NAME, Lifetime(40.0))
    assert schedule.pop_due() == []


def test_blocks_without_ttl_are_refreshed_for_recency(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    schedule.renewed(NAME, Lifetime(None))
    schedule.used(NAME, Lifetime(None))
    clock.now += REFRESH_WITHOUT_TTL_S - 1
    assert schedule.pop_due() == []
    clock.now += 1
    assert schedule.pop_due() == [NAME]


def test_what_ends_at_a_fixed_time_is_refreshed_for_recency_and_when_it_grows(clock: ManualClock) -> None:
    schedule, fixed = RefreshSchedule(10, clock=clock, wall_clock=ManualClock(0.0)), Lifetime(0.0, 5000.0)
    schedule.renewed(NAME, fixed)
    schedule.used(NAME, fixed)
    clock.now += REFRESH_WITHOUT_TTL_S - 1
    assert schedule.pop_due() == []
    schedule.used(NAME, Lifetime(0.0, 4000.0))
    assert schedule.pop_due() == []
    schedule.used(NAME, Lifetime(0.0, 7000.0))
    assert schedule.pop_due() == [NAME]


def test_a_fixed_end_that_each_use_puts_later_costs_no_more_than_one_that_stays(clock: ManualClock) -> None:
    wall = ManualClock(1e9)
    schedule = RefreshSchedule(10, clock=clock, wall_clock=wall)
    schedule.renewed(NAME, Lifetime(0.0, wall.now + 3600.0))
    due = []
    for second in range(1, 3601):
        clock.now += 1.0
        wall.now += 1.0
        schedule.used(NAME, Lifetime(0.0, wall.now + 3600.0))
        due += [second for _ in schedule.pop_due()]
    assert due == list(range(300, 3601, 300))


def test_a_lifetime_that_grows_a_little_is_told_in_time(clock: ManualClock) -> None:
    wall = ManualClock(1e9)
    schedule = RefreshSchedule(10, clock=clock, wall_clock=wall)
    schedule.renewed(NAME, Lifetime(0.0, wall.now + 60.0))
    clock.now += 10.0
    wall.now += 10.0
    schedule.used(NAME, Lifetime(0.0, wall.now + 60.0))
    assert schedule.pop_due() == []
    clock.now += 5.0  # it would end in 45 s there
    assert schedule.pop_due() == [NAME]


@given(
    steps=st.lists(
        st.tuples(st.floats(0.1, 400.0), st.sampled_from([0.0, 50.0, 300.0]), st.none() | st.floats(1.0, 2000.0)),
        min_size=1,
        max_size=40,
    )
)
def test_the_lower_tier_ends_at_most_a_quarter_too_early_and_hears_seldom(
    steps: list[tuple[float, float, float | None]],
) -> None:
    clock, wall = ManualClock(0.0), ManualClock(1e9)
    schedule = RefreshSchedule(10, clock=clock, wall_clock=wall)
    near = there = Lifetime(100.0)
    told = 0.0
    schedule.renewed(NAME, near)
    for pause_s, ttl_s, for_s in steps:
        clock.now += pause_s
        wall.now += pause_s
        near = near.joined(Lifetime(ttl_s, None if for_s is None else wall.now + for_s))
        schedule.used(NAME, near)
        if schedule.pop_due():
            there, told = near, clock.now
        left_s = near.left_s(wall.now)
        assert left_s is not None
        assert there.ttl_s is not None
        ends_s = max(told + there.ttl_s - clock.now, (there.until or 0.0) - wall.now)
        assert left_s - ends_s <= left_s / 4 + 1e-3


def test_the_schedule_is_bounded(clock: ManualClock) -> None:
    schedule = RefreshSchedule(3, clock=clock)
    for name in names(chain(8)):
        schedule.used(name, Lifetime(40.0))
    assert schedule.pop_due() == names(chain(8))[5:]


def test_the_schedule_keeps_no_more_than_it_remembers(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    for number in range(5000):
        name = BlockHash(number.to_bytes(32, "big"))
        schedule.renewed(name, Lifetime(86400.0))
        schedule.used(name, Lifetime(86400.0))
        schedule.renewed(NAME, Lifetime(86400.0))
        schedule.used(NAME, Lifetime(86400.0))
        schedule.doubted(NAME, Lifetime(86400.0))
        assert schedule.pop_due() == [NAME]
    assert len(schedule._due._heap) < 200
    assert len(schedule._uses) == 10


def test_a_name_whose_time_moves_to_and_fro_leaves_nothing_behind(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    sooner = BlockHash(b"s" * 32)  # what lies behind it in the heap does not surface
    schedule.renewed(sooner, Lifetime(40.0))
    schedule.used(sooner, Lifetime(40.0))
    schedule.renewed(NAME, Lifetime(86400.0))
    for _ in range(2000):
        schedule.used(NAME, Lifetime(86400.0))
        schedule.doubted(NAME, Lifetime(86400.0))
        assert schedule.pop_due() == [NAME]
    assert len(schedule._due._heap) < 200


def test_a_block_that_had_to_be_computed_is_asked_for_at_once(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    schedule.renewed(NAME, Lifetime(40.0))
    schedule.used(NAME, Lifetime(40.0))
    assert schedule.pop_due() == []
    schedule.doubted(NAME, Lifetime(40.0))
    assert schedule.pop_due() == [NAME]
    schedule.used(NAME, Lifetime(40.0))
    assert schedule.pop_due() == []
    clock.now += 10.0
    assert schedule.pop_due() == [NAME]


def test_a_longer_ttl_is_told_at_once_and_a_shorter_one_changes_nothing(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    schedule.renewed(NAME, Lifetime(40.0))
    schedule.used(NAME, Lifetime(20.0))
    assert schedule.pop_due() == []
    schedule.used(NAME, Lifetime(400.0))
    assert schedule.pop_due() == [NAME]
    schedule.used(NAME, Lifetime(40.0))
    assert schedule.pop_due() == []


def test_a_refresh_without_an_answer_is_due_again_long_before_a_quarter_of_the_ttl(clock: ManualClock) -> None:
    schedule = RefreshSchedule(10, clock=clock)
    schedule.used(NAME, Lifetime(4000.0))
    assert schedule.pop_due() == [NAME]
    schedule.unanswered(NAME, Lifetime(4000.0))
    clock.now += 5.0
    assert schedule.pop_due() == [NAME]
