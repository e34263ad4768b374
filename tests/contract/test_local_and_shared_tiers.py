"""What local tiers and shared tiers promise beyond `Tier`, held against all of them."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.blocks import short
from kvstore.events import BlockRemoved, BlockStored, RemovalCause
from kvstore.lifetime import Lifetime
from tests.contract.conftest import Harness
from tests.kvstore.blocks_for_tests import OTHER_ROOT, buffers, chain, names, payloads


@pytest.fixture
def local(harness: Harness) -> Any:
    if not hasattr(harness.tier, "prolong"):
        pytest.skip("no local tier")
    return harness.tier


@pytest.fixture
def shared(harness: Harness) -> Any:
    if not hasattr(harness.tier, "refresh"):
        pytest.skip("no shared tier")
    return harness.tier


def test_a_local_tier_finds_what_it_holds_and_nothing_else(local: Any) -> None:
    metas = chain(3)
    local.write(metas, payloads(metas))
    local.remove([metas[1].hash], RemovalCause.EVICTED)
    assert [local.find(name) for name in names(metas)] == [metas[0], None, metas[2]]
    assert {meta.hash for meta in local.metas()} == {metas[0].hash, metas[2].hash}


def test_a_local_tier_finds_nothing_that_has_expired(harness: Harness, local: Any) -> None:
    metas = chain(1, ttl_s=harness.ttl_s)
    local.write(metas, payloads(metas))
    harness.wait(harness.ttl_s * 1.1)
    assert local.find(metas[0].hash) is None


@pytest.mark.parametrize(("first", "then", "lives"), [(1.0, 3.0, True), (1.0, None, True), (3.0, 1.0, True)])
def test_prolonging_gives_the_longer_of_two_ttls(
    harness: Harness, local: Any, first: float, then: float | None, lives: bool
) -> None:
    metas = chain(2, ttl_s=first * harness.ttl_s)
    local.write(metas, payloads(metas))
    local.prolong(names(metas), Lifetime(None if then is None else then * harness.ttl_s))
    harness.wait(harness.ttl_s * 2)
    assert (local.match(names(metas)) == 2) is lives


def test_a_snapshot_replays_to_what_is_held(local: Any) -> None:
    mine, other = chain(4), chain(2, root=OTHER_ROOT)
    for metas in (mine, other):
        local.write(metas, payloads(metas))
    local.remove(names(mine[2:3]), RemovalCause.EVICTED)
    events = local.snapshot()
    assert all(isinstance(event, BlockStored) and event.tier == local.name for event in events)
    held = [name for event in events for name in event.hashes]
    assert sorted(held) == sorted(short(name) for name in names([*mine[:2], mine[3], *other]))
    parents = {event.hashes[0]: event.parent for event in events}
    assert parents[short(mine[0].hash)] is None
    assert parents[short(mine[3].hash)] == short(mine[2].hash)


def test_a_shared_tier_remembers_what_it_has_seen(shared: Any) -> None:
    metas = chain(2, ttl_s=50.0)
    assert shared.find(metas[0].hash) is None
    shared.write(metas, payloads(metas))
    assert shared.find(metas[0].hash) == metas[0]


def test_a_refresh_tells_what_the_tier_does_not_hold_and_lengthens_the_rest(harness: Harness, shared: Any) -> None:
    metas = chain(3, ttl_s=harness.ttl_s)
    shared.write(metas[:2], payloads(metas[:2]))
    longer = chain(3, ttl_s=harness.ttl_s * 3)
    assert shared.refresh(longer) == [metas[2].hash]
    harness.wait(harness.ttl_s * 2)
    assert shared.match(names(metas)) == 2


def test_a_refresh_never_shortens_a_ttl(harness: Harness, shared: Any) -> None:
    metas = chain(1, ttl_s=harness.ttl_s * 3)
    shared.write(metas, payloads(metas))
    assert shared.refresh(chain(1, ttl_s=harness.ttl_s)) == []
    harness.wait(harness.ttl_s * 2)
    assert shared.match(names(metas)) == 1


def test_a_refresh_without_a_ttl_makes_a_block_stay(harness: Harness, shared: Any) -> None:
    metas = chain(1, ttl_s=harness.ttl_s)
    shared.write(metas, payloads(metas))
    assert shared.refresh(chain(1)) == []
    harness.wait(harness.ttl_s * 2)
    assert shared.match(names(metas)) == 1


def test_forgetting_a_scope_changes_nothing_on_the_server_and_tells_no_events(shared: Any) -> None:
    mine, other = chain(2), chain(2, root=OTHER_ROOT)
    for metas in (mine, other):
        shared.write(metas, payloads(metas))
    shared.drain_events()
    kept = shared.forget(root=OTHER_ROOT)
    assert {meta.hash for meta in kept} == set(names(mine))
    assert shared.find(other[0].hash) is None
    assert shared.drain_events() == []
    assert shared.match(names(other)) == 2


def test_a_block_that_vanished_is_told_as_removed(shared: Any) -> None:
    metas = chain(2)
    shared.write(metas, payloads(metas))
    shared.remove(names(metas), RemovalCause.EVICTED)
    shared.write(metas, payloads(metas))
    shared.drain_events()
    assert shared.read(names(metas), buffers(2)).count == 2
    shared.remove([metas[1].hash], RemovalCause.CLEARED)
    removed = [event for event in shared.drain_events() if isinstance(event, BlockRemoved)]
    assert [event.hashes for event in removed] == [(short(metas[1].hash),)]
