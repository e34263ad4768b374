"""What every tier promises (`kvstore.tier.Tier`), held against all of them."""

from __future__ import annotations

import threading

import pytest

from kvstore.blocks import BlockHash, short
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause
from kvstore.tier import Tier
from tests.contract.conftest import CAPACITY_BLOCKS, Harness
from tests.kvstore.blocks_for_tests import LAYOUT, OTHER_ROOT, buffers, chain, names, payload, payloads, read_verified


def read_back(tier: Tier, hashes: list[BlockHash]) -> int:
    """How many leading blocks arrive; each that does must be the right one."""
    return read_verified(tier, hashes)


def replay(events: list[KvEvent], known: set[bytes]) -> set[bytes]:
    for event in events:
        if isinstance(event, BlockStored):
            known |= set(event.hashes)
        elif isinstance(event, BlockRemoved):
            known -= set(event.hashes)
        elif isinstance(event, AllBlocksCleared):
            known = set()
    return known


def test_written_blocks_are_found_and_read_back_byte_for_byte(tier: Tier) -> None:
    metas = chain(5)
    assert tier.write(metas, payloads(metas)) == 5
    assert tier.match(names(metas)) == 5
    assert read_back(tier, names(metas)) == 5


def test_nothing_is_found_in_a_new_tier(tier: Tier) -> None:
    assert tier.match(names(chain(3))) == 0
    assert read_back(tier, names(chain(3))) == 0


def test_empty_requests_do_nothing(tier: Tier) -> None:
    assert (tier.match([]), tier.read([], []).count, tier.write([], []), tier.remove([], RemovalCause.CLEARED)) == (
        0,
    ) * 4


def test_match_ends_at_the_first_missing_block(tier: Tier) -> None:
    metas = chain(5)
    present = metas[:2] + metas[3:]
    tier.write(present, payloads(present))
    assert tier.match(names(metas)) == 2
    assert tier.match(names(metas)[3:]) == 2


def test_a_read_ends_at_the_first_missing_block_and_counts_it_once(tier: Tier) -> None:
    metas = chain(5)
    tier.write(metas[:2], payloads(metas[:2]))
    assert read_back(tier, names(metas)) == 2
    assert tier.stats().misses == {"absent": 1}


@pytest.mark.usefixtures("books")
def test_a_block_that_is_already_held_counts_but_is_not_stored_again(tier: Tier) -> None:
    metas = chain(4)
    tier.write(metas[:2], payloads(metas[:2]))
    assert tier.write(metas, payloads(metas)) == 4
    assert tier.stats().stores == 4
    assert tier.stats().written_bytes == 4 * LAYOUT.block_nbytes


@pytest.mark.usefixtures("books")
def test_counters_tell_hits_bytes_and_blocks(tier: Tier) -> None:
    metas = chain(3)
    tier.write(metas, payloads(metas))
    read_back(tier, names(metas))
    stats = tier.stats()
    assert (stats.blocks, stats.hits, stats.stores) == (3, 3, 3)
    assert stats.read_bytes == stats.written_bytes == 3 * LAYOUT.block_nbytes
    assert stats.healthy
    assert stats.problem == ""


def test_stats_are_a_copy(tier: Tier) -> None:
    before = tier.stats()
    read_back(tier, names(chain(1)))
    assert before.misses == {}


def test_a_question_changes_no_counter(tier: Tier) -> None:
    metas = chain(3)
    tier.write(metas[:2], payloads(metas[:2]))
    before = tier.stats()
    tier.match(names(metas))
    after = tier.stats()
    assert (after.hits, after.misses, after.stores) == (before.hits, before.misses, before.stores)


def test_a_block_is_gone_once_its_ttl_has_passed(harness: Harness) -> None:
    metas = chain(2, ttl_s=harness.ttl_s)
    harness.tier.write(metas, payloads(metas))
    harness.wait(harness.ttl_s * 1.1)
    assert harness.tier.match(names(metas)) == 0
    assert read_back(harness.tier, names(metas)) == 0
    assert sum(harness.tier.stats().misses.values()) == 1


def test_a_block_without_a_ttl_stays(harness: Harness) -> None:
    metas = chain(2)
    harness.tier.write(metas, payloads(metas))
    harness.wait(harness.ttl_s * 1.5)
    harness.tier.sweep()
    assert harness.tier.match(names(metas)) == 2


@pytest.mark.parametrize("use", ["read", "touch", "write"])
def test_a_use_starts_the_ttl_again(harness: Harness, use: str) -> None:
    metas = chain(3, ttl_s=harness.ttl_s)
    harness.tier.write(metas, payloads(metas))
    harness.wait(harness.ttl_s * 0.6)
    match use:
        case "read":
            assert read_back(harness.tier, names(metas)[:2]) == 2
        case "touch":
            harness.tier.touch(names(metas)[:2])
        case "write":
            harness.tier.write(metas[:2], payloads(metas[:2]))
    harness.wait(harness.ttl_s * 0.6)
    assert harness.tier.match(names(metas)) == 2


def test_a_question_does_not_start_the_ttl_again(harness: Harness) -> None:
    metas = chain(2, ttl_s=harness.ttl_s)
    harness.tier.write(metas, payloads(metas))
    harness.wait(harness.ttl_s * 0.6)
    assert harness.tier.match(names(metas)) == 2
    harness.wait(harness.ttl_s * 0.6)
    assert harness.tier.match(names(metas)) == 0


def test_an_expired_block_can_be_written_again(harness: Harness) -> None:
    metas = chain(2, ttl_s=harness.ttl_s)
    harness.tier.write(metas, payloads(metas))
    harness.wait(harness.ttl_s * 1.1)
    assert harness.tier.write(metas, payloads(metas)) == 2
    assert read_back(harness.tier, names(metas)) == 2


def test_a_touch_of_unknown_blocks_does_nothing(tier: Tier) -> None:
    tier.touch(names(chain(3)))
    assert tier.match(names(chain(3))) == 0


@pytest.mark.usefixtures("books")
def test_remove_drops_what_it_holds_and_tells_how_many(tier: Tier) -> None:
    metas = chain(3)
    tier.write(metas[:2], payloads(metas[:2]))
    tier.drain_events()
    assert tier.remove(names(metas)[1:], RemovalCause.INVALID) == 1
    assert tier.match(names(metas)) == 1
    assert tier.drain_events() == [BlockRemoved(tier.name, (short(metas[1].hash),), RemovalCause.INVALID)]
    assert tier.stats().removals == {"invalid": 1}


@pytest.mark.usefixtures("books")
def test_clear_drops_everything(tier: Tier) -> None:
    metas = chain(3) + chain(2, root=OTHER_ROOT)
    tier.write(metas, payloads(metas))
    tier.drain_events()
    assert tier.clear() == 5
    assert tier.match(names(metas)[:1]) == tier.match(names(metas)[3:]) == 0
    assert tier.drain_events() == [AllBlocksCleared(tier.name)]
    assert tier.stats().blocks == 0


def test_clear_of_a_root_spares_the_others(tier: Tier) -> None:
    mine, others = chain(3), chain(2, root=OTHER_ROOT)
    tier.write(mine + others, payloads(mine + others))
    assert tier.clear(root=OTHER_ROOT) == 2
    assert tier.match(names(mine)) == 3
    assert tier.match(names(others)) == 0


def test_clear_of_a_prefix_drops_it_and_what_follows_it(tier: Tier) -> None:
    trunk, other = chain(4), chain(2, first_token=9)
    tier.write(trunk + other, payloads(trunk + other))
    assert tier.clear(prefix=trunk[2].hash) == 2
    assert tier.match(names(trunk)) == 2
    assert tier.match(names(other)) == 2


def test_clear_of_an_unknown_prefix_drops_nothing(tier: Tier) -> None:
    metas = chain(2)
    tier.write(metas, payloads(metas))
    assert tier.clear(prefix=chain(1, first_token=9)[0].hash) == 0
    assert tier.match(names(metas)) == 2


@pytest.mark.usefixtures("books")
def test_stored_events_name_runs_in_chain_order_with_their_parent(tier: Tier) -> None:
    metas = chain(4)
    tier.write(metas[:2], payloads(metas[:2]))
    tier.write(metas[2:], payloads(metas[2:]))
    events = [event for event in tier.drain_events() if isinstance(event, BlockStored)]
    assert [event.hashes for event in events] == [
        tuple(short(name) for name in names(metas[:2])),
        tuple(short(name) for name in names(metas[2:])),
    ]
    assert [event.parent for event in events] == [None, short(metas[1].hash)]
    assert tier.drain_events() == []


@pytest.mark.usefixtures("books")
def test_whoever_follows_the_events_knows_what_the_tier_holds(harness: Harness) -> None:
    tier, known = harness.tier, set[bytes]()
    everything = [block for token in range(4) for block in chain(3, first_token=token)]
    for token in range(4):
        metas = chain(3, first_token=token)
        tier.write(metas, payloads(metas))
        tier.remove(names(metas)[2:], RemovalCause.INVALID)
        known = replay(tier.drain_events(), known)
    assert known == {short(name) for name in names(everything) if tier.match([name])}
    tier.clear()
    assert replay(tier.drain_events(), known) == set()


def test_the_least_recently_used_chain_is_evicted_and_its_tail_first(harness: Harness) -> None:
    tier = harness.tier
    if not (tier.honours.capacity and tier.honours.named_eviction):
        pytest.skip("evicts by the server's policy")
    old, kept, new = chain(4), chain(4, first_token=1), chain(2, first_token=2)
    for metas in (kept, old):
        tier.write(metas, payloads(metas))
    read_back(tier, names(kept))
    assert tier.write(new, payloads(new)) == 2
    assert (tier.match(names(old)), tier.match(names(kept)), tier.match(names(new))) == (2, 4, 2)
    assert tier.stats().removals == {"evicted": 2}


def test_capacity_is_never_exceeded_and_a_longer_chain_keeps_its_prefix(harness: Harness) -> None:
    tier = harness.tier
    if not tier.honours.capacity:
        pytest.skip("the server bounds itself")
    metas = chain(CAPACITY_BLOCKS + 3)
    assert tier.write(metas, payloads(metas)) == CAPACITY_BLOCKS
    assert tier.match(names(metas)) == CAPACITY_BLOCKS
    stats = tier.stats()
    assert stats.used_bytes == stats.capacity_bytes == CAPACITY_BLOCKS * harness.slot_nbytes
    assert stats.store_failures == {"full": 1}


def test_sweep_drops_what_is_due_and_says_when_to_come_again(harness: Harness) -> None:
    tier = harness.tier
    if not tier.honours.injected_clock:
        pytest.skip("expires by the server's clock")
    soon, later, never = (
        chain(1, ttl_s=5.0),
        chain(1, ttl_s=8.0, first_token=1),
        chain(1, first_token=2),
    )
    tier.write(soon + later + never, payloads(soon + later + never))
    assert tier.sweep() == 5.0
    harness.wait(6.0)
    tier.drain_events()
    assert tier.sweep() == 2.0
    assert tier.drain_events() == [BlockRemoved(tier.name, (short(soon[0].hash),), RemovalCause.EXPIRED)]
    harness.wait(6.0)
    assert tier.sweep() is None
    assert tier.stats().blocks == 1


def honours_leases(harness: Harness) -> Tier:
    if not harness.tier.honours.lease:
        assert harness.tier.lease(names(chain(1)), None) == 0
        pytest.skip("promises nothing")
    return harness.tier


def test_a_tier_without_leases_promises_none(harness: Harness) -> None:
    if harness.tier.honours.lease:
        pytest.skip("honours leases")
    metas = chain(2)
    harness.tier.write(metas, payloads(metas))
    assert harness.tier.lease(names(metas), None) == harness.tier.end_leases(names(metas)) == 0
    assert harness.tier.stats().leased == 0


def test_a_lease_is_given_for_what_is_held_and_ended_once(harness: Harness) -> None:
    tier, metas = honours_leases(harness), chain(3)
    tier.write(metas[:2], payloads(metas[:2]))
    assert tier.lease(names(metas), 5.0) == 2
    assert tier.stats().leased == 2
    assert tier.end_leases(names(metas)) == 2
    assert tier.end_leases(names(metas)) == tier.stats().leased == 0


def test_leased_blocks_are_not_evicted_and_others_are(harness: Harness) -> None:
    tier = honours_leases(harness)
    leased, other = chain(CAPACITY_BLOCKS - 2), chain(2, first_token=1)
    new = chain(4, first_token=2)
    tier.write(leased + other, payloads(leased + other))
    assert tier.lease(names(leased), None) == len(leased)
    assert tier.write(new, payloads(new)) == 2
    assert (tier.match(names(leased)), tier.match(names(other)), tier.match(names(new))) == (len(leased), 0, 2)
    assert tier.stats().store_failures == {"full": 1}


def test_when_all_is_leased_a_write_comes_short_until_the_leases_end(harness: Harness) -> None:
    tier = honours_leases(harness)
    leased, new = chain(CAPACITY_BLOCKS), chain(2, first_token=1)
    tier.write(leased, payloads(leased))
    tier.lease(names(leased), 5.0)
    assert tier.write(new, payloads(new)) == 0
    assert tier.match(names(leased)) == CAPACITY_BLOCKS
    harness.wait(6.0)
    assert tier.stats().leased == 0
    assert tier.write(new, payloads(new)) == 2
    assert tier.match(names(leased)) == CAPACITY_BLOCKS - 2


def test_the_ttl_drops_no_leased_block_before_the_longest_lease_ends(harness: Harness) -> None:
    tier = honours_leases(harness)
    metas = chain(2, ttl_s=harness.ttl_s)
    tier.write(metas, payloads(metas))
    tier.lease(names(metas)[:1], harness.ttl_s * 3)
    tier.lease(names(metas)[:1], harness.ttl_s * 2)
    harness.wait(harness.ttl_s * 2.5)
    tier.sweep()
    assert tier.match(names(metas)) == 1
    assert read_back(tier, names(metas)[:1]) == 1
    harness.wait(harness.ttl_s * 1.1)
    tier.sweep()
    assert tier.match(names(metas)) == tier.stats().blocks == 0


def test_when_a_lease_is_ended_the_ttl_counts_from_the_last_use(harness: Harness) -> None:
    tier = honours_leases(harness)
    metas = chain(1, ttl_s=harness.ttl_s)
    tier.write(metas, payloads(metas))
    tier.lease(names(metas), None)
    harness.wait(harness.ttl_s * 50)
    assert tier.match(names(metas)) == 1
    assert tier.end_leases(names(metas)) == 1
    tier.sweep()
    assert tier.match(names(metas)) == 0


def test_remove_and_clear_drop_leased_blocks(harness: Harness) -> None:
    tier, metas = honours_leases(harness), chain(3)
    tier.write(metas, payloads(metas))
    tier.lease(names(metas), None)
    assert tier.remove(names(metas)[2:], RemovalCause.CLEARED) == 1
    assert tier.clear() == 2
    assert tier.stats().leased == tier.match(names(metas)) == 0


def test_bytes_stay_whole_while_threads_write_read_and_remove(harness: Harness) -> None:
    if not harness.thread_safe:
        pytest.skip("one thread owns it")
    tier, wrong, done = harness.tier, [], threading.Event()
    chains = [chain(4, first_token=token) for token in range(5)]

    def write() -> None:
        for turn in range(60):
            metas = chains[turn % 5]
            tier.write(metas, payloads(metas))
            tier.remove(names(chains[(turn + 2) % 5])[1:], RemovalCause.INVALID)
        done.set()

    def read() -> None:
        while not done.is_set():
            for metas in chains:
                into = buffers(4)
                count = tier.read(names(metas), into).count
                for name, buffer in zip(names(metas)[:count], into, strict=False):
                    if bytes(buffer) != bytes(payload(name)):
                        wrong.append(name)

    threads = [threading.Thread(target=target) for target in (write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    tier.check()
