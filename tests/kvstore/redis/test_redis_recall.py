"""What a Redis server held before we came is learnt at the start: real servers, one alone and a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.redis_server import PrivateRedis
from kvstore.codec import BlockCodec
from kvstore.directory import Directory
from kvstore.events import AllBlocksCleared, BlockStored, RemovalCause, TierName
from kvstore.known import KnownShared
from kvstore.redis.books import RedisBooks
from kvstore.redis.cluster import RedisClusterTier
from kvstore.redis.recall import Recalling
from kvstore.redis.tier import RedisTier
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, chain, payload
from tests.kvstore.redis.redis_fleets_for_tests import clustered
from tests.kvstore.redis.redis_for_tests import NAMESPACE, PATIENT_S, client_of, key, make_tier


@pytest.fixture
def server() -> Iterator[PrivateRedis]:
    with PrivateRedis(maxmemory_bytes=64 << 20) as running:
        yield running


def write(tier: RedisTier, metas: list[BlockMeta]) -> None:
    assert tier.write(metas, [payload(meta.hash) for meta in metas]) == len(metas)


def told(tier: RedisTier) -> list[BlockStored]:
    events = tier.drain_events()
    assert all(isinstance(event, BlockStored) for event in events), events
    return [event for event in events if isinstance(event, BlockStored)]


def test_another_worker_learns_what_lies_there_in_chains_and_with_the_time_left(server: PrivateRedis) -> None:
    before, after = make_tier(server.url), make_tier(server.url)
    long, short, endless = chain(5, ttl_s=1000.0), chain(3, first_token=1, ttl_s=50.0), chain(2, first_token=2)
    write(before, [*long, *short, *endless])
    before.close()
    assert after.drain_events() == []
    assert after.recall() == 10
    events = {event.hashes: event for event in told(after)}
    assert set(events) == {tuple(meta.hash[:16] for meta in metas) for metas in (long, short, endless)}
    left = {len(hashes): event.ttl_s for hashes, event in events.items()}
    assert left[2] is None
    assert 40 < (left[3] or 0) <= 50
    assert 980 < (left[5] or 0) <= 1000
    assert all(event.parent is None for event in events.values())
    assert after.find(long[3].hash) == long[3]
    assert after.recall() == 0  # nothing that is known already
    after.check()
    after.close()


def test_a_directory_over_the_tier_tells_it_in_its_snapshot(server: PrivateRedis) -> None:
    before, after = make_tier(server.url), make_tier(server.url)
    metas = chain(6, ttl_s=100.0)
    write(before, metas)
    known = KnownShared(after, 100, clock=time.monotonic)
    assert Recalling(after).wait(10.0)
    (run,) = known.snapshot()
    assert run.hashes == tuple(meta.hash[:16] for meta in metas)
    directory = Directory(TierName.REDIS, 100, clock=time.monotonic)
    directory.apply(run)
    assert directory.match(run.hashes) == 6
    before.close()
    after.close()


def test_keys_of_others_and_values_that_are_none_of_ours_are_left_out(server: PrivateRedis) -> None:
    mine, other = make_tier(server.url), make_tier(server.url, namespace=b"x" * 32)
    write(other, chain(3))
    write(mine, chain(2, first_token=1))
    with client_of(server) as client:
        client.set(key(b"a" * 32), "no hash")
        client.hset(key(b"b" * 32), "h", "no header")
        client.rename(key(chain(2, first_token=1)[1].hash), key(b"c" * 32))  # its header names another block
        client.set("warmkv:0001020304050607:short", "x")
    fresh = make_tier(server.url)
    assert fresh.recall() == 1
    for tier in (mine, other, fresh):
        tier.close()


def test_of_a_cluster_every_node_is_asked(tmp_path: Path) -> None:
    with clustered(tmp_path) as cluster:
        codec = BlockCodec(LAYOUT, NAMESPACE)
        before, after = (
            RedisClusterTier(cluster.url, codec=codec, timeout_s=PATIENT_S, write_timeout_s=PATIENT_S) for _ in range(2)
        )
        metas = chain(24)
        assert before.write(metas, [payload(meta.hash) for meta in metas]) == 24
        assert after.recall() == 24
        assert [len(event.hashes) for event in after.drain_events() if isinstance(event, BlockStored)] == [24]
        before.close()
        after.close()


def test_without_a_server_nothing_is_learnt_and_nothing_raised(tmp_path: Path) -> None:
    tier = make_tier(f"unix://{tmp_path / 'none.sock'}", timeout_s=0.2)
    assert tier.recall() == 0
    assert Recalling(tier).wait(10.0)
    tier.close()


def test_what_was_removed_between_question_and_answer_is_not_believed() -> None:
    books, metas = RedisBooks(), chain(3)
    with books.recalling() as recalled:
        books.removed([metas[1].hash], RemovalCause.CLEARED)
        books.drain_events()
        assert recalled([(meta, 9.0) for meta in metas]) == 2
    assert set(books.names()) == {metas[0].hash, metas[2].hash}
    books.check()


@pytest.mark.parametrize("scope", ["all", "root", "prefix"])
def test_what_another_worker_cleared_between_question_and_answer_is_not_believed(scope: str) -> None:
    """A clear of the fleet is carried out there by one worker; the others only forget what they believed."""
    cleared, kept = chain(4, root=b"a" * 32), chain(2, first_token=1, root=b"b" * 32)
    books = RedisBooks()
    root = None if scope == "all" else cleared[0].root
    prefix = cleared[2].hash if scope == "prefix" else None
    with books.recalling() as recalled:
        books.forget(root=root, prefix=prefix)
        recalled([(meta, 9.0) for meta in (*cleared, *kept)])
    left = {"all": [], "root": kept, "prefix": [*cleared[:2], *kept]}[scope]
    assert set(books.names()) == {meta.hash for meta in left}
    books.check()


@pytest.mark.parametrize("emptied", [RedisBooks.flushed, RedisBooks.emptied])
def test_of_a_server_that_was_emptied_meanwhile_nothing_is_believed(emptied: object) -> None:
    books = RedisBooks()
    with books.recalling() as recalled:
        emptied(books)  # type: ignore[operator]
        assert recalled([(meta, None) for meta in chain(3)]) == 0
    assert books.drain_events() == [AllBlocksCleared(TierName.REDIS)]


def test_what_was_seen_by_use_stays_longer_than_what_was_recalled() -> None:
    books, used, old = RedisBooks(max_beliefs=4), chain(2), chain(5, first_token=1)
    books.stored(used, written=2, nbytes=1)
    with books.recalling() as recalled:
        assert recalled([(meta, None) for meta in old]) == 2
    books.stored(chain(2, first_token=2), written=2, nbytes=1)
    assert [meta.hash for meta in used] == [name for name in books.names() if name in {m.hash for m in used}]
    books.check()
