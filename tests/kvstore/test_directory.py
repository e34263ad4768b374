"""What is believed of the shared tier: expiry, bound, events in and out."""

from __future__ import annotations

from kvstore.blocks import short
from kvstore.directory import Directory
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause, TierName
from tests.kvstore.blocks_for_tests import ManualClock, chain, names

A = [short(name) for name in names(chain(4))]
B = [short(name) for name in names(chain(3, first_token=1))]


def make(clock: ManualClock, capacity: int = 100) -> Directory:
    return Directory(TierName.REDIS, capacity, clock=clock)


def test_names_are_known_until_they_expire() -> None:
    clock = ManualClock()
    directory = make(clock)
    directory.add(A, None, 5.0)
    directory.add(B, None, None)
    assert (directory.match(A), directory.match(B)) == (4, 3)
    clock.now += 5.0
    assert (directory.match(A), directory.match(B)) == (0, 3)
    assert A[0] not in directory


def test_adding_again_starts_the_time_again() -> None:
    clock = ManualClock()
    directory = make(clock)
    directory.add(A, None, 5.0)
    clock.now += 4.0
    directory.add(A[:2], None, 5.0)
    clock.now += 4.0
    assert directory.match(A) == 2


def test_beyond_the_bound_the_oldest_chain_loses_its_tail_first() -> None:
    directory = make(ManualClock(), capacity=5)
    directory.add(A, None, None)
    directory.add(B, None, None)
    assert len(directory) == 5
    assert (directory.match(A), directory.match(B)) == (2, 3)


def test_a_name_heard_of_again_is_not_the_next_to_be_forgotten() -> None:
    directory = make(ManualClock(), capacity=5)
    directory.add(A[:2], None, None)
    directory.add(B, None, None)
    directory.add(A[:2], None, None)
    directory.add(A[2:3], A[1], None)
    assert (directory.match(A), directory.match(B)) == (3, 2)


def test_it_learns_from_events_of_its_tier_only() -> None:
    directory = make(ManualClock())
    directory.apply(BlockStored(TierName.REDIS, tuple(A), None, 60.0))
    directory.apply(BlockStored(TierName.HOST, tuple(B), None))
    assert (directory.match(A), directory.match(B)) == (4, 0)
    directory.apply(BlockRemoved(TierName.HOST, tuple(A), RemovalCause.EVICTED))
    directory.apply(BlockRemoved(TierName.REDIS, (A[2], b"unknown"), RemovalCause.ABSENT))
    assert directory.match(A) == 2
    directory.apply(AllBlocksCleared(TierName.HOST))
    assert directory.match(A) == 2
    directory.apply(AllBlocksCleared(TierName.REDIS))
    assert len(directory) == 0


def test_a_snapshot_applied_elsewhere_gives_the_same_knowledge() -> None:
    clock = ManualClock()
    directory, copy = make(clock), make(clock)
    directory.add(A, None, 10.0)
    directory.add([b"x" * 16], A[1], 3.0)  # a branch
    directory.add(B, None, None)
    clock.now += 2.0
    for event in directory.snapshot():
        copy.apply(event)
    assert (copy.match(A), copy.match(B), copy.match([b"x" * 16])) == (4, 3, 1)
    parents = {event.hashes[0]: event.parent for event in directory.snapshot()}
    assert parents[b"x" * 16] == A[1]
    clock.now += 1.0
    assert copy.match([b"x" * 16]) == 0
    assert copy.match(A) == 4


def test_a_snapshot_forgets_what_has_expired() -> None:
    clock = ManualClock()
    directory = make(clock)
    directory.add(A, None, 5.0)
    clock.now += 6.0
    assert directory.snapshot() == []
    assert len(directory) == 0
