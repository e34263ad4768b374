"""Views and leases of host blocks: what they keep, for whom, until when; and that nothing leaks."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable

import pytest

from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError
from kvstore.events import RemovalCause
from kvstore.host.tier import HostTier
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock, buffers, chain, names, payload, payloads

SLOTS = 4


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def tier(clock: ManualClock) -> HostTier:
    return HostTier(LAYOUT, SLOTS * LAYOUT.block_nbytes, clock=clock)


def singles(count: int, ttl_s: float | None = None) -> list[BlockMeta]:
    """Blocks that continue nothing."""
    return [chain(1, first_token=10 + number, ttl_s=ttl_s)[0] for number in range(count)]


def write(tier: HostTier, metas: list[BlockMeta]) -> int:
    return tier.write(metas, payloads(metas))


def held(tier: HostTier, metas: list[BlockMeta]) -> list[int]:
    return [number for number, meta in enumerate(metas) if tier.holds(meta.hash)]


def test_a_view_is_a_context_manager_that_shows_the_bytes(tier: HostTier) -> None:
    metas = singles(1)
    write(tier, metas)
    [view] = tier.view(names(metas), owner="peer")
    with view as shown:
        assert bytes(shown.payload) == bytes(payload(metas[0].hash))
        assert shown.payload.readonly
        assert (shown.owner, tier.pins) == ("peer", 1)
    assert tier.pins == 0


def test_a_view_ends_when_its_reader_fails(tier: HostTier) -> None:
    metas = singles(1)
    write(tier, metas)
    with pytest.raises(ZeroDivisionError), tier.view(names(metas))[0]:
        raise ZeroDivisionError
    assert tier.pins == 0


def test_ending_a_view_twice_does_nothing(tier: HostTier) -> None:
    metas = singles(1)
    write(tier, metas)
    first, second = tier.view(names(metas) * 2)
    tier.end_views([first, first])
    tier.end_view(first)
    assert tier.pins == 1
    tier.end_view(second)
    assert tier.pins == 0
    tier.check()


def test_a_view_tells_whether_its_bytes_are_still_there(tier: HostTier) -> None:
    metas, others = singles(1), singles(SLOTS + 1)[1:]
    write(tier, metas)
    [view] = tier.view(names(metas))
    tier.remove(names(metas), RemovalCause.INVALID)
    write(tier, others)
    assert view.is_valid
    assert bytes(view.payload) == bytes(payload(metas[0].hash))
    tier.end_view(view)
    assert not view.is_valid


def test_an_ended_view_is_valid_until_its_slot_is_reused(tier: HostTier) -> None:
    metas = singles(SLOTS + 1)
    write(tier, metas[:1])
    [view] = tier.view(names(metas[:1]))
    tier.end_view(view)
    assert view.is_valid
    write(tier, metas[1:])
    assert not view.is_valid


def test_viewed_blocks_are_passed_over_and_keep_their_turn(tier: HostTier) -> None:
    metas = singles(SLOTS + 3)
    write(tier, metas[:1])
    write(tier, metas[1:2])
    write(tier, metas[2:SLOTS])
    views = tier.view(names(metas[:2]))
    write(tier, metas[SLOTS : SLOTS + 1])
    assert held(tier, metas)[:2] == [0, 1]
    tier.end_views(views)
    write(tier, metas[SLOTS + 1 : SLOTS + 2])
    assert held(tier, metas)[0] == 1  # the oldest went, although its view has ended only now
    tier.check()


def test_an_eviction_does_not_meet_a_viewed_block_twice(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    metas = singles(10)
    write(tier, metas[:SLOTS])
    tier.view([metas[1].hash, metas[2].hash, metas[3].hash])
    eviction, asked = tier._books._eviction, []
    victim = eviction.victim
    monkeypatch.setattr(eviction, "victim", lambda **root: asked.append(victim(**root)) or asked[-1])
    for meta in metas[SLOTS:]:
        assert write(tier, [meta]) == 1
    assert len(asked) == len(metas) - SLOTS + 3
    tier.check()


def test_when_every_block_is_viewed_there_is_no_room(tier: HostTier) -> None:
    metas = singles(SLOTS + 1)
    write(tier, metas[:SLOTS])
    views = tier.view(names(metas))
    assert write(tier, metas[SLOTS:]) == 0
    assert tier.stats().store_failures == {"full": 1}
    tier.end_views(views)
    assert write(tier, metas[SLOTS:]) == 1


def test_overdue_views_are_reported_by_owner_until_they_end(
    tier: HostTier, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    metas = singles(3)
    write(tier, metas)
    late = tier.view(names(metas[:2]), owner="peer", for_s=5.0)
    punctual = tier.view(names(metas[2:]), owner="write-behind", for_s=50.0)
    clock.now += 5.0
    assert set(tier.overdue_views()) == set(late)
    assert "2 of peer" in tier.stats().problem
    tier.sweep()
    tier.sweep()
    assert [record.owner for record in caplog.records] == ["peer", "peer"]  # type: ignore[attr-defined]
    with pytest.raises(InvariantError, match="2 of peer"):
        tier.check()
    tier.end_views(late)
    assert (tier.overdue_views(), tier.stats().problem) == ([], "")
    tier.check()
    clock.now += 45.0
    assert tier.overdue_views() == punctual


def test_a_leased_block_is_neither_evicted_nor_expired(tier: HostTier, clock: ManualClock) -> None:
    metas = singles(SLOTS + 2, ttl_s=10.0)
    write(tier, metas[:SLOTS])
    assert tier.lease([metas[3].hash, metas[5].hash], 100.0) == 1
    assert tier.stats().leased == 1
    clock.now += 50.0
    tier.sweep()
    assert held(tier, metas) == [3]
    write(tier, singles(10)[6:])
    assert held(tier, metas) == [3]
    clock.now += 50.0
    assert held(tier, metas) == []
    assert tier.stats().leased == 0


def test_of_several_leases_the_longest_holds_and_ending_ends_them(tier: HostTier, clock: ManualClock) -> None:
    metas = singles(2, ttl_s=1.0)
    write(tier, metas)
    tier.lease(names(metas), 10.0)
    tier.lease(names(metas), 5.0)
    tier.lease(names(metas[1:]), None)
    clock.now += 7.0
    assert held(tier, metas) == [0, 1]
    clock.now += 7.0
    assert held(tier, metas) == [1]
    assert tier.end_leases(names(metas)) == 1
    assert held(tier, metas) == []


@pytest.mark.parametrize("how", ["remove", "clear"])
def test_a_lease_does_not_keep_a_block_from_being_removed(tier: HostTier, how: str) -> None:
    metas = singles(1)
    write(tier, metas)
    tier.lease(names(metas), None)
    if how == "remove":
        tier.remove(names(metas), RemovalCause.INVALID)
    else:
        tier.clear()
    assert held(tier, metas) == []
    assert write(tier, metas) == 1
    assert tier.stats().leased == 0


def test_a_lease_given_while_a_viewed_block_is_passed_over_holds_after_the_view(
    tier: HostTier, clock: ManualClock
) -> None:
    metas = singles(12)
    write(tier, metas[:SLOTS])
    views = tier.view(names(metas[:SLOTS]))
    assert write(tier, metas[SLOTS : SLOTS + 1]) == 0  # all are passed over
    assert tier.stats().leased == 0
    assert tier.lease([metas[0].hash, metas[1].hash, metas[2].hash], 100.0) == 3
    assert tier.end_leases([metas[1].hash, metas[3].hash]) == 1
    assert tier.stats().leased == 2
    tier.end_views(views)
    assert tier.stats().leased == 2
    write(tier, metas[SLOTS : SLOTS + 4])
    assert held(tier, metas)[:2] == [0, 2]
    clock.now += 100.0
    tier.check()
    write(tier, metas[SLOTS + 4 :])
    assert held(tier, metas)[:1] == [SLOTS + 4]


def test_a_passed_over_block_that_is_removed_and_written_again_is_like_any_other(tier: HostTier) -> None:
    metas = singles(SLOTS + 2)
    write(tier, metas[:SLOTS])
    views = tier.view(names(metas[:SLOTS]))
    assert write(tier, metas[SLOTS:]) == 0
    tier.remove(names(metas[:SLOTS]), RemovalCause.INVALID)
    tier.end_views(views)
    tier.check()
    write(tier, metas[:SLOTS])
    assert write(tier, metas[SLOTS:]) == 2


class _Cancelled(Exception):
    pass


def _cancelled_view(tier: HostTier, wanted: list[BlockHash], rng: random.Random) -> None:
    """A reader that gives up between its blocks, whose views all end."""
    views = tier.view(wanted, owner="test", for_s=1e9)
    try:
        with contextlib.ExitStack() as stack:
            for view in views:
                stack.enter_context(view)
            for view in views:
                assert bytes(view.payload) == bytes(payload(view.meta.hash))
                assert view.is_valid
                if rng.random() < 0.2:
                    raise _Cancelled
    except _Cancelled:
        pass


def _cancelled_write(tier: HostTier, metas: list[BlockMeta]) -> None:
    """A writer whose bytes end too soon; it raises unless all blocks but the first are held."""
    broken = [*payloads(metas[:1]), *[memoryview(b"short")] * 3]
    with contextlib.suppress(ValueError):
        tier.write(metas, broken)


def _cancelled_read(tier: HostTier, wanted: list[BlockHash]) -> None:
    """A reader whose buffers are too small."""
    with contextlib.suppress(ValueError):
        tier.read(wanted, [memoryview(bytearray(3))] * len(wanted))


def _operate(tier: HostTier, clock: ManualClock, seed: int, operations: int) -> None:
    rng = random.Random(seed)
    chains = [chain(4, first_token=token, ttl_s=ttl_s) for token, ttl_s in enumerate([None, 3.0, None, 9.0])]
    actions: list[Callable[[list[BlockMeta]], object]] = [
        lambda metas: write(tier, metas),
        lambda metas: tier.read(names(metas), buffers(len(metas))),
        lambda metas: _cancelled_view(tier, names(metas), rng),
        lambda metas: _cancelled_write(tier, metas),
        lambda metas: _cancelled_read(tier, names(metas)),
        lambda metas: tier.lease(names(metas), rng.choice([0.5, 5.0, None])),
        lambda metas: tier.end_leases(names(metas)),
        lambda metas: tier.touch(names(metas)),
        lambda metas: tier.remove(names(metas), RemovalCause.INVALID),
        lambda metas: tier.sweep(),
    ]
    for number in range(operations):
        rng.choice(actions)(rng.choice(chains)[rng.randint(0, 2) : rng.randint(1, 4)])
        if number % 1000 == 0:
            tier.clear()
        clock.now += 0.01


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_pinned_after_very_many_operations_and_cancels(clock: ManualClock, threads: int) -> None:
    tier = HostTier(LAYOUT, 6 * LAYOUT.block_nbytes, clock=clock)
    failed: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            _operate(tier, clock, seed, 100_000 // threads)
        except BaseException as error:  # noqa: BLE001 - told below
            failed.append(error)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failed == []
    tier.check()
    stats = tier.stats()
    assert tier.pins == 0
    assert stats.used_bytes == stats.blocks * LAYOUT.block_nbytes
    assert stats.hits > 1000
    assert stats.removals["evicted"] > 100
    tier.clear()
    assert (tier.stats().used_bytes, tier.stats().leased) == (0, 0)
