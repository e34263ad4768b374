"""TieredStore over a real Redis: what is kept fresh there, and what is said of a server that is gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import redis
import torch

from deploy.redis_server import PrivateRedis
from kvstore.blocks import BlockHash, short
from kvstore.device import DeviceTier
from kvstore.events import BlockRemoved, BlockStored, TierName
from kvstore.host.tier import HostTier
from kvstore.lifetime import Lifetime
from kvstore.store import ReadTiers, TieredStore
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, ROOT, ManualClock, chain, names, payloads
from tests.kvstore.redis.redis_for_tests import SERVERS, binary, client_of, key, make_tier

torch.set_num_threads(1)
TTL = 1000.0


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    with PrivateRedis(binary=binary(request.param), maxmemory_bytes=64 << 20) as running:
        yield running


def open_store(server: PrivateRedis, clock: ManualClock, wall: Callable[[], float] = time.time) -> TieredStore:
    nbytes = 8 * LAYOUT.block_nbytes
    device = DeviceTier(LAYOUT, nbytes, clock=clock, wall_clock=wall)
    host = HostTier(LAYOUT, nbytes, clock=clock, wall_clock=wall)
    return TieredStore(
        LAYOUT,
        device,
        host,
        make_tier(server.url, clock=clock, wall_clock=wall),
        clock=clock,
        wall_clock=wall,
        default_ttl_s=TTL,
        load_slack_s=2.0,
    )


def get(store: TieredStore, metas: list[BlockMeta], ttl_s: float | None = None) -> list[TierName]:
    acquisition = store.acquire(
        names(metas),
        reads=ReadTiers(),
        compute_ms=lambda first, count: 1e9,
        root=ROOT,
        lifetime=ttl_s and Lifetime(ttl_s),
    )
    while not acquisition.done:
        store.wait(30)
        store.pump()
    store.release(acquisition.block_ids)
    return acquisition.fates


def cache(store: TieredStore, metas: list[BlockMeta]) -> None:
    block_ids = store.allocate(len(metas))
    assert block_ids is not None
    store.device.inject(block_ids, payloads(metas))
    store.commit(block_ids, metas)
    store.release(block_ids)
    assert store.flush(30)


def age(client: redis.Redis, hashes: list[BlockHash], seconds: float) -> None:
    """Let the server's keys grow older, as far as their TTLs say."""
    for name in hashes:
        client.pexpire(key(name), client.pttl(key(name)) - round(1000 * seconds))


def test_a_block_hit_only_in_the_device_for_three_ttls_outlives_its_worker(server: PrivateRedis) -> None:
    clock, metas = ManualClock(), chain(3)
    store = open_store(server, clock)
    cache(store, metas)
    with client_of(server) as client:
        for _ in range(10):
            clock.now += 0.3 * TTL
            age(client, names(metas), 0.3 * TTL)
            assert get(store, metas) == [TierName.DEVICE] * 3
            store.pump()
            assert store.flush(30)
        store.close(flush_s=0.0)
        assert all(client.pttl(key(name)) > 500 * TTL for name in names(metas))
    successor = open_store(server, clock)
    assert get(successor, metas) == [TierName.REDIS] * 3
    successor.close()


def test_a_longer_ttl_of_a_hit_reaches_the_server_and_a_reader_takes_it_from_the_block(server: PrivateRedis) -> None:
    clock, metas = ManualClock(), chain(2)
    store = open_store(server, clock)
    cache(store, metas)
    get(store, metas, ttl_s=10 * TTL)
    store.pump()
    assert store.flush(30)
    with client_of(server) as client:
        assert all(client.pttl(key(name)) > 9000 * TTL for name in names(metas))
    store.close()
    successor = open_store(server, clock)
    assert get(successor, metas, ttl_s=1.0) == [TierName.REDIS] * 2
    assert [meta.ttl_s for meta in successor.device.metas()] == [TTL] * 2
    successor.close()


def test_a_fixed_end_that_was_prolonged_counts_no_more_where_the_block_is_read_after_it(server: PrivateRedis) -> None:
    clock, metas = ManualClock(), chain(3, ttl_s=0.0, until=time.time() + 3600.0)
    store = open_store(server, clock)
    cache(store, metas)
    with client_of(server) as client:
        for name in names(metas):
            client.pexpire(key(name), 10_000_000)  # somebody was promised more
    store.close()
    reader = open_store(server, clock, ManualClock(time.time() + 7200.0))
    assert get(reader, metas) == [TierName.REDIS] * 3
    assert get(reader, metas) == [TierName.DEVICE] * 3
    reader.device.clear()
    assert get(reader, metas) == [TierName.HOST] * 3
    reader.pump()
    assert reader.flush(30)
    reader.pump()
    told = [event for event in reader.drain_events() if isinstance(event, BlockStored)]
    assert {event.ttl_s for event in told if event.tier is TierName.REDIS} == {None, TTL}
    with client_of(server) as client:
        assert all(client.pttl(key(name)) > 9_000_000 for name in names(metas))
    reader.close()


def test_what_is_written_after_its_end_is_not_told(server: PrivateRedis) -> None:
    wall = ManualClock(time.time())
    tier, metas = make_tier(server.url, wall_clock=wall), chain(2, ttl_s=0.0, until=wall.now - 1.0)
    tier.write(metas, payloads(metas))
    assert tier.drain_events() == []
    tier.close()


def test_a_server_that_is_gone_is_not_said_to_have_lost_a_block(server: PrivateRedis) -> None:
    tier, metas = make_tier(server.url), chain(2, ttl_s=TTL)
    tier.write(metas, payloads(metas))
    assert tier.refresh(metas) == []
    with client_of(server) as client:
        client.delete(key(metas[1].hash))
    assert tier.refresh(metas) == [metas[1].hash]
    tier.drain_events()
    server.stop()
    assert tier.refresh(metas) is None
    assert tier.drain_events() == []
    tier.close()


def test_a_read_that_timed_out_takes_no_credit_from_the_server(server: PrivateRedis) -> None:
    metas = chain(3)
    first = open_store(server, ManualClock())
    cache(first, metas)
    first.close()
    store = open_store(server, ManualClock())
    store._lanes[TierName.REDIS].known.learn(metas)  # as a router's directory would have it
    store.drain_events()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        assert get(store, metas) == []
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert store.stats()[TierName.REDIS].misses == {"deadline": 1}
    assert store.drain_events() == []
    assert all(store._lanes[TierName.REDIS].known.holds(name) for name in names(metas))
    assert get(store, metas) == [TierName.REDIS] * 3
    with client_of(server) as client:
        client.delete(key(metas[1].hash))
    store.clear()
    store._lanes[TierName.REDIS].known.learn(metas)
    store.drain_events()
    assert get(store, metas) == [TierName.REDIS]
    gone = [event for event in store.drain_events() if isinstance(event, BlockRemoved)]
    assert [event.hashes for event in gone] == [(short(metas[1].hash),)]
    store.close()
