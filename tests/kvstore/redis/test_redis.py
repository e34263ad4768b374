"""The Redis tier on servers that work: keys, TTLs, events, sharing. What every tier does is in `tests/contract`."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.redis_server import PrivateRedis
from kvstore.blocks import BlockHash, block_hashes, short
from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.errors import TierError
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause, TierName
from kvstore.redis.resp import Wire
from kvstore.redis.tier import RedisTier
from kvstore.redis.values import ValueForm
from kvstore.tier import chain_metas
from tests.kvstore import blocks_for_tests
from tests.kvstore.blocks_for_tests import OTHER_ROOT, ROOT, ManualClock, chain, names
from tests.kvstore.redis import redis_for_tests
from tests.kvstore.redis.redis_for_tests import NAMESPACE, PREFIX, SERVERS, binary, client_of, fields_of, key
from tests.kvstore.redis.redis_for_tests import WIDE as LAYOUT

make_tier = partial(redis_for_tests.make_tier, layout=LAYOUT)
payload = partial(blocks_for_tests.payload, layout=LAYOUT)
payloads = partial(blocks_for_tests.payloads, layout=LAYOUT)
buffers = partial(blocks_for_tests.buffers, layout=LAYOUT)

DAY_S = 86400.0


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    with PrivateRedis(binary=binary(request.param), maxmemory_bytes=64 << 20) as running:
        yield running


@pytest.fixture
def client(server: PrivateRedis) -> Iterator[redis.Redis]:
    with client_of(server) as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def tier(server: PrivateRedis, client: redis.Redis) -> Iterator[RedisTier]:
    opened = make_tier(server.url)
    yield opened
    opened.check()
    opened.close()


def fresh(server: PrivateRedis) -> RedisTier:
    """A tier that remembers nothing."""
    return make_tier(server.url)


def ttl_s(client: redis.Redis, name: BlockHash) -> float:
    return client.pttl(key(name)) / 1000


def test_a_value_is_two_fields_under_namespace_and_hash(tier: RedisTier, client: redis.Redis) -> None:
    (meta,) = metas = chain(1, ttl_s=DAY_S)
    tier.write(metas, payloads(metas))
    assert client.keys() == [key(meta.hash).encode()]
    assert PREFIX == "warmkv:0001020304050607:"
    value = client.hgetall(key(meta.hash))
    assert set(value) == {b"h", b"d"}
    assert value[b"d"] + value[b"h"][HEADER_NBYTES:] == payload(meta.hash)
    assert len(value[b"h"]) == HEADER_NBYTES + 128
    header = BlockCodec(LAYOUT, NAMESPACE).decode(value[b"h"][:HEADER_NBYTES], payload(meta.hash), expect=meta.hash)
    assert header.meta == meta


def test_the_first_ttl_comes_with_the_value(tier: RedisTier, client: redis.Redis) -> None:
    timed, lasting = chain(2, ttl_s=DAY_S), chain(2, first_token=1)
    tier.write(timed + lasting, payloads(timed + lasting))
    assert all(0.9 * DAY_S < ttl_s(client, name) <= DAY_S for name in names(timed))
    assert [client.pttl(key(name)) for name in names(lasting)] == [-1, -1]


@pytest.mark.parametrize("use", ["read", "touch", "write"])
def test_a_use_only_ever_lengthens_a_ttl(tier: RedisTier, server: PrivateRedis, client: redis.Redis, use: str) -> None:
    metas = chain(3, ttl_s=DAY_S)
    tier.write(metas, payloads(metas))
    client.pexpire(key(metas[0].hash), 100_000)
    client.pexpire(key(metas[1].hash), 10 * int(DAY_S) * 1000)
    client.persist(key(metas[2].hash))
    match use:
        case "read":
            assert tier.read(names(metas), buffers(3)).count == 3
        case "touch":
            tier.touch(names(metas))
        case "write":
            assert tier.write(metas, payloads(metas)) == 3
    assert 0.9 * DAY_S < ttl_s(client, metas[0].hash) <= DAY_S
    assert ttl_s(client, metas[1].hash) > 9 * DAY_S
    assert client.pttl(key(metas[2].hash)) == -1
    assert tier.stats().problem == ""


@pytest.mark.parametrize("use", ["read", "touch", "write", "refresh"])
def test_no_use_moves_a_fixed_end_on_the_server(
    tier: RedisTier, server: PrivateRedis, client: redis.Redis, use: str
) -> None:
    newcomer = fresh(server)
    ends = time.time() + DAY_S
    metas = chain(2, ttl_s=0.0, until=ends)
    tier.write(metas, payloads(metas))
    for each in (tier, newcomer):  # one that has written them, one that learns of them from their headers
        match use:
            case "read":
                assert each.read(names(metas), buffers(2)).count == 2
            case "touch":
                each.touch(names(metas))
            case "write":
                assert each.write(metas, payloads(metas)) == 2
            case "refresh":
                assert each.refresh(metas) == []
        for name in names(metas):
            assert client.pttl(key(name)) / 1000 + time.time() == pytest.approx(ends, abs=30.0)
    assert newcomer.stats().problem == ""
    newcomer.close()


def test_a_longer_lifetime_moves_the_end_on_the_server_and_a_shorter_one_does_not(
    tier: RedisTier, client: redis.Redis
) -> None:
    now = time.time()
    (meta,) = metas = chain(1, ttl_s=100.0, until=now + DAY_S)
    tier.write(metas, payloads(metas))
    assert 0.9 * DAY_S < ttl_s(client, meta.hash) <= DAY_S
    assert tier.refresh(chain(1, ttl_s=0.0, until=now + 3 * DAY_S)) == []
    assert 2.9 * DAY_S < ttl_s(client, meta.hash) <= 3 * DAY_S
    assert tier.refresh(chain(1, ttl_s=DAY_S, until=now + 2 * DAY_S)) == []
    assert 2.9 * DAY_S < ttl_s(client, meta.hash) <= 3 * DAY_S
    assert tier.refresh(chain(1, ttl_s=5 * DAY_S)) == []
    assert 4.9 * DAY_S < ttl_s(client, meta.hash) <= 5 * DAY_S


def test_events_tell_how_long_a_fixed_lifetime_has_left(server: PrivateRedis, client: redis.Redis) -> None:
    wall = ManualClock(time.time())
    tier = make_tier(server.url, wall_clock=wall)
    metas = chain(2, ttl_s=0.0, until=wall.now + 500.0)
    tier.write(metas, payloads(metas))
    (stored,) = tier.drain_events()
    assert isinstance(stored, BlockStored)
    assert stored.ttl_s == pytest.approx(500.0)
    wall.now += 200.0
    tier.refresh(chain(2, ttl_s=0.0, until=wall.now + 400.0))
    (stored,) = tier.drain_events()
    assert isinstance(stored, BlockStored)
    assert stored.ttl_s == pytest.approx(400.0)
    tier.close()


def test_both_ways_to_lengthen_are_tested(server: PrivateRedis, tier: RedisTier, client: redis.Redis) -> None:
    metas = chain(2, ttl_s=DAY_S)
    tier.write(metas, payloads(metas))
    client.config_resetstat()
    tier.touch(names(metas))
    calls = client.info("commandstats")
    if server.binary.origin == "system":
        assert calls["cmdstat_pexpire"]["calls"] == 2
        assert "cmdstat_evalsha" not in calls
    else:
        assert calls["cmdstat_evalsha"]["calls"] == 1


def test_the_script_is_sent_again_when_the_server_forgot_it(
    server: PrivateRedis, tier: RedisTier, client: redis.Redis
) -> None:
    metas = chain(2, ttl_s=DAY_S)
    tier.write(metas, payloads(metas))
    tier.touch(names(metas))
    client.script_flush()
    client.pexpire(key(metas[0].hash), 1000_000)
    tier.touch(names(metas))
    assert ttl_s(client, metas[0].hash) > 0.9 * DAY_S


def test_a_touch_of_blocks_that_somebody_else_wrote_goes_by_their_own_ttl(
    server: PrivateRedis, tier: RedisTier, client: redis.Redis
) -> None:
    metas = chain(2, ttl_s=DAY_S) + chain(1, ttl_s=DAY_S / 2, first_token=1) + chain(1, first_token=2)
    tier.write(metas, payloads(metas))
    for meta in metas[:3]:
        client.pexpire(key(meta.hash), 1000_000)
    other = fresh(server)
    other.touch([*names(metas), chain(1, first_token=3)[0].hash])
    assert [round(ttl_s(client, name) / DAY_S, 1) for name in names(metas[:3])] == [1.0, 1.0, 0.5]
    assert client.pttl(key(metas[3].hash)) == -1
    other.close()


def test_touches_at_less_than_the_ttl_keep_a_block_for_ever(tier: RedisTier, client: redis.Redis) -> None:
    (meta,) = metas = chain(1, ttl_s=100.0)
    tier.write(metas, payloads(metas))
    for _ in range(6):  # three TTLs, in halves: to the server's key it is as if the time had passed
        client.pexpire(key(meta.hash), client.pttl(key(meta.hash)) - 50_000)
        tier.touch(names(metas))
    assert tier.match(names(metas)) == 1


def test_a_touch_makes_a_block_recently_used(tier: RedisTier, client: redis.Redis) -> None:
    metas = chain(1, ttl_s=DAY_S) + chain(1, first_token=1)
    tier.write(metas, payloads(metas))
    client.config_set("maxmemory-policy", "allkeys-lfu")  # counts uses, where LRU would make the test sleep a second
    try:
        before = [client.object("freq", key(name)) for name in names(metas)]
        for _ in range(200):
            tier.touch(names(metas))
        after = [client.object("freq", key(name)) for name in names(metas)]
    finally:
        client.config_set("maxmemory-policy", "allkeys-lru")
    assert all(late > early for early, late in zip(before, after, strict=True))


@pytest.mark.parametrize(("held", "trips"), [(256, 1), (0, 1), (192, 1), (200, 2)])
def test_256_blocks_are_looked_up_in_one_round_trip(
    tier: RedisTier, monkeypatch: pytest.MonkeyPatch, held: int, trips: int
) -> None:
    metas = chain(256)
    tier.write(metas[:held], payloads(metas[:held]))
    sent: list[int] = []
    send = Wire.send

    def counting(wire: Wire, parts: list[bytes]) -> None:
        sent.append(len(parts))
        send(wire, parts)

    monkeypatch.setattr(Wire, "send", counting)
    assert tier.match(names(metas)) == held
    assert sent == [1] * trips  # one more where the chain ends inside a group of 32


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gaps=st.sets(st.integers(0, 99), max_size=60), length=st.integers(0, 100))
def test_holes_do_not_lie(tier: RedisTier, client: redis.Redis, gaps: set[int], length: int) -> None:
    hashes = names(chain(100))
    client.flushall()
    tier.drain_events()
    for i, name in enumerate(hashes):
        if i not in gaps:
            client.hset(key(name), "h", b"x")
    before = next((i for i in range(length) if i in gaps), length)
    assert tier.match(hashes[:length]) == before


@pytest.mark.parametrize("count", [1023, 1024, 1025, 2500])
def test_look_ups_work_across_batches(tier: RedisTier, client: redis.Redis, count: int) -> None:
    hashes = block_hashes(list(range(3000)), ROOT, 1)
    client.mset({key(name): b"" for name in hashes[:count]})
    assert tier.match(hashes) == count
    assert tier.match(hashes[:count]) == count


def test_a_look_up_does_not_make_a_block_recently_used(tier: RedisTier, client: redis.Redis) -> None:
    metas = chain(1)
    tier.write(metas, payloads(metas))
    client.config_set("maxmemory-policy", "allkeys-lfu")
    try:
        client.restore(key(metas[0].hash), 0, client.dump(key(metas[0].hash)), replace=True)
        before = client.object("freq", key(metas[0].hash))
        for _ in range(300):
            tier.match(names(metas))
        assert client.object("freq", key(metas[0].hash)) == before
    finally:
        client.config_set("maxmemory-policy", "allkeys-lru")


def test_blocks_of_one_tier_are_read_by_another_and_no_name_space_sees_the_others(
    server: PrivateRedis, tier: RedisTier
) -> None:
    metas = chain(4)
    tier.write(metas, payloads(metas))
    other, stranger = fresh(server), make_tier(server.url, namespace=b"x" * 32)
    into = buffers(4)
    assert other.read(names(metas), into).count == 4
    assert [bytes(buffer) for buffer in into] == [bytes(p) for p in payloads(metas)]
    assert stranger.match(names(metas)) == stranger.clear() == 0
    assert tier.match(names(metas)) == 4
    assert other.run_id() == tier.run_id() != ""
    other.close()
    stranger.close()


def test_values_read_for_the_first_time_are_told_as_stored_with_their_ttl(
    server: PrivateRedis, tier: RedisTier
) -> None:
    metas = chain(3, ttl_s=DAY_S)
    tier.write(metas, payloads(metas))
    told = BlockStored(TierName.REDIS, tuple(map(short, names(metas))), None, DAY_S)
    assert tier.drain_events() == [told]
    other = fresh(server)
    for _ in range(2):
        other.read(names(metas), buffers(3))
    assert other.drain_events() == [told]
    other.close()


def test_a_block_that_vanished_is_told_by_who_believed_it_there_and_a_gap_by_everybody(
    server: PrivateRedis, tier: RedisTier, client: redis.Redis
) -> None:
    metas = chain(3)
    tier.write(metas, payloads(metas))
    tier.drain_events()
    client.delete(key(metas[1].hash), key(metas[2].hash))
    other = fresh(server)
    for asking in (tier, other):
        assert asking.match(names(metas)) == 1
        assert asking.read(names(metas), buffers(3)).count == 1
    gone = BlockRemoved(TierName.REDIS, (short(metas[1].hash), short(metas[2].hash)), RemovalCause.ABSENT)
    gap = BlockRemoved(TierName.REDIS, (short(metas[1].hash),), RemovalCause.ABSENT)
    assert tier.drain_events() == [gone]
    assert [event for event in other.drain_events() if isinstance(event, BlockRemoved)] == [gap]
    assert other.stats().removals == {}
    assert tier.stats().removals == {"absent": 2}
    other.close()


def test_after_flushall_there_are_plain_misses_and_the_tier_goes_on(tier: RedisTier, client: redis.Redis) -> None:
    metas = chain(3)
    tier.write(metas, payloads(metas))
    client.flushall()
    assert tier.read(names(metas), buffers(3)).count == 0
    assert tier.stats().misses == {"absent": 1}
    assert tier.write(metas, payloads(metas)) == tier.match(names(metas)) == 3
    assert tier.stats().healthy


def test_a_key_that_holds_something_short_is_overwritten_by_a_write(tier: RedisTier, client: redis.Redis) -> None:
    metas = chain(3)
    client.set(key(metas[0].hash), b"half a bl")
    client.lpush(key(metas[1].hash), b"list")
    assert tier.write(metas, payloads(metas)) == 3
    assert tier.read(names(metas), buffers(3)).count == 3


def test_clear_drops_thousands_in_batches_and_spares_other_keys(tier: RedisTier, client: redis.Redis) -> None:
    hashes = block_hashes(list(range(3000)), ROOT, 1)
    client.mset({key(name): b"" for name in hashes})
    client.mset({"warmkv:ffffffffffffffff:00": b"", PREFIX + "zz": b"", PREFIX + "00": b"", "mine": b""})
    assert tier.clear() == 3000
    assert tier.drain_events() == [AllBlocksCleared(TierName.REDIS)]
    assert client.dbsize() == 4


def test_clear_of_a_root_leaves_nothing_of_it_that_cannot_be_read(tier: RedisTier, client: redis.Redis) -> None:
    metas = chain(2)
    tier.write(metas, payloads(metas))
    client.hset(key(metas[1].hash), "h", b"\0" * 64)
    assert tier.clear(root=ROOT) == 2
    assert client.dbsize() == 0


def test_an_infinite_ttl_takes_the_ttl_from_a_key_that_has_one(tier: RedisTier, client: redis.Redis) -> None:
    timed = chain(2, ttl_s=DAY_S)
    tier.write(timed, payloads(timed))
    assert tier.write(chain(2)[:1], payloads(timed[:1])) == 1
    assert [client.pttl(key(name)) > 0 for name in names(timed)] == [False, True]
    assert tier.refresh(chain(2)) == []
    assert [client.pttl(key(name)) for name in names(timed)] == [-1, -1]
    assert tier.refresh(timed) == []  # the shorter one of a latecomer changes nothing
    assert tier.read(names(timed), buffers(2)).count == 2
    assert [client.pttl(key(name)) for name in names(timed)] == [-1, -1]


def test_a_block_costs_the_server_little_more_than_its_bytes(server: PrivateRedis, client: redis.Redis) -> None:
    if client.info("memory")["mem_allocator"] == "libc":
        pytest.skip("libc's allocator has no such size classes")
    layout = replace(LAYOUT, layers=64, kv_heads=32, k_dim=32, v_dim=32)
    assert layout.block_nbytes == 1 << 20
    wide = make_tier(server.url, layout=layout)
    metas = chain(4, ttl_s=DAY_S)
    assert wide.write(metas, blocks_for_tests.payloads(metas, layout)) == 4
    assert all(client.memory_usage(key(name)) <= 1.02 * layout.block_nbytes for name in names(metas))
    wide.close()


def test_a_write_that_is_cut_off_leaves_nothing(server: PrivateRedis, client: redis.Redis) -> None:
    (meta,) = chain(1, ttl_s=DAY_S)
    pieces = ValueForm(BlockCodec(LAYOUT, NAMESPACE)).write(key(meta.hash).encode(), meta, payload(meta.hash), 1.0)
    whole = b"".join(pieces)
    for cut in (*range(0, len(whole), 97), len(whole) - 1):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(client.connection_pool.connection_kwargs["path"])
            sock.sendall(whole[:cut])
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):  # the server has seen the end, too
                pass
        assert client.dbsize() == 0
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(client.connection_pool.connection_kwargs["path"])
        sock.sendall(whole)
        assert sock.recv(5) == b"+OK\r\n"
        tier = make_tier(server.url)
        assert tier.read([meta.hash], buffers(1)).count == 1
        assert ttl_s(client, meta.hash) > 0.9 * DAY_S
        tier.close()


def test_a_write_replaces_whatever_holds_the_key_and_its_ttl(tier: RedisTier, client: redis.Redis) -> None:
    metas = chain(4)
    client.set(key(metas[0].hash), b"text", ex=500)
    client.hset(key(metas[1].hash), mapping={"h": b"half", "other": b"x"})
    client.expire(key(metas[1].hash), 500)
    client.lpush(key(metas[2].hash), b"list")
    client.hset(key(metas[3].hash), mapping={**fields_of(metas[3]), "d": b"short"})
    assert tier.write(metas, payloads(metas)) == 4
    assert [client.pttl(key(name)) for name in names(metas)] == [-1] * 4
    assert client.hlen(key(metas[1].hash)) == 2
    assert tier.read(names(metas), buffers(4)).count == 4


def test_clear_of_a_prefix_takes_followers_behind_a_hole(
    server: PrivateRedis, tier: RedisTier, client: redis.Redis
) -> None:
    metas, other, stranger = chain(6), chain(6, first_token=1), chain(6, root=OTHER_ROOT)
    for blocks in (metas, other, stranger):
        tier.write(blocks, payloads(blocks))
        client.delete(key(blocks[3].hash))
    asking = make_tier(server.url)  # one that remembers nothing
    assert asking.clear(prefix=metas[1].hash) == 2 + 2 + 2  # [1] and [2]; behind the holes [4] and [5] of either chain
    assert tier.match(names(metas)) == 1
    assert [client.exists(key(name)) for name in names(other)] == [1, 1, 1, 0, 0, 0]
    assert [client.exists(key(name)) for name in names(stranger)] == [1, 1, 1, 0, 1, 1]
    asking.close()


def test_who_remembers_the_hole_clears_no_more_than_what_follows(tier: RedisTier, client: redis.Redis) -> None:
    metas, other = chain(6), chain(6, first_token=1)
    for blocks in (metas, other):
        tier.write(blocks, payloads(blocks))
        client.delete(key(blocks[3].hash))
    assert tier.clear(prefix=metas[1].hash) == 4
    assert [client.exists(key(name)) for name in names(other)] == [1, 1, 1, 0, 1, 1]


def test_clear_of_a_prefix_takes_every_branch(tier: RedisTier) -> None:
    trunk = chain(3)
    branches = [block_hashes([token] * 4, trunk[2].hash, 2) for token in (7, 8)]
    metas = trunk + [m for b in branches for m in chain_metas(b, before=trunk[2].hash, root=ROOT, ttl_s=None)]
    tier.write(metas, payloads(metas))
    assert tier.clear(prefix=branches[0][0]) == 2
    assert tier.clear(prefix=trunk[1].hash) == 4
    assert tier.match(names(trunk)) == 1


def test_the_server_evicts_and_what_is_left_is_right(
    server: PrivateRedis, tier: RedisTier, client: redis.Redis
) -> None:
    client.config_set("maxmemory", client.info()["used_memory"] + (1 << 20))
    try:
        chains = [chain(8, first_token=token) for token in range(400)]
        for metas in chains:
            assert tier.write(metas, payloads(metas)) == 8
        arrived = 0
        for metas in chains:
            into = buffers(8)
            count = tier.read(names(metas), into).count
            assert [bytes(b) for b in into[:count]] == [bytes(payload(name)) for name in names(metas)[:count]]
            arrived += count
    finally:
        client.config_set("maxmemory", 64 << 20)
    assert 0 < arrived < 400 * 8
    assert set(tier.stats().misses) == {"absent"}


@pytest.mark.parametrize("login", ["", ":pw@", "bob:pw@", "nopass@"])
def test_every_form_of_login_and_a_database_are_used(server: PrivateRedis, client: redis.Redis, login: str) -> None:
    client.execute_command("ACL", "SETUSER", "default", "on", *([">pw"] if login == ":pw@" else []))
    client.execute_command("ACL", "SETUSER", "bob", "on", ">pw", "~*", "+@all")
    client.execute_command("ACL", "SETUSER", "nopass", "on", "nopass", "~*", "+@all")
    try:
        tier = make_tier(server.url.replace("unix://", f"unix://{login}") + "?db=3")
        metas = chain(2)
        assert tier.write(metas, payloads(metas)) == tier.read(names(metas), buffers(2)).count == 2
        assert tier.stats().problem == ""
        assert client.info("keyspace")["db3"]["keys"] == 2
        tier.close()
    finally:
        client.execute_command("ACL", "SETUSER", "default", "on", "nopass")


def test_a_database_that_is_not_there_is_told(server: PrivateRedis) -> None:
    tier = make_tier(server.url + "?db=99")
    assert "DB index is out of range" in tier.stats().problem
    tier.close()


def test_stats_tell_the_servers_memory(tier: RedisTier, server: PrivateRedis) -> None:
    stats = tier.stats()
    assert stats.capacity_bytes == 64 << 20
    assert 0 < stats.used_bytes < 64 << 20


def test_threads_share_a_tier(tier: RedisTier) -> None:
    chains = [chain(16, first_token=token) for token in range(8)]
    results: list[int] = []

    def work(number: int) -> None:
        metas = chains[number]
        for _ in range(10):
            into = buffers(16)
            tier.write(metas, payloads(metas))
            count = tier.read(names(metas), into).count
            results.append(count if [bytes(b) for b in into] == [bytes(p) for p in payloads(metas)] else -1)
            tier.touch(names(metas))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [16] * 80
    assert tier.stats().hits == 8 * 10 * 16


def test_a_closed_tier_answers_with_misses(server: PrivateRedis) -> None:
    tier = fresh(server)
    metas = chain(1)
    tier.close()
    assert (tier.match(names(metas)), tier.read(names(metas), buffers(1)).count) == (0, 0)
    assert tier.write(metas, payloads(metas)) == 0
    with pytest.raises(TierError, match="open another one"):
        tier.clear()


def test_big_blocks_arrive_whole_over_tcp(server: PrivateRedis) -> None:
    layout = replace(LAYOUT, layers=200, kv_heads=64)
    with PrivateRedis(binary=server.binary, port=0, password="pass word/:@") as over_tcp:
        tier = make_tier(over_tcp.url, layout=layout)
        metas = chain(9, ttl_s=DAY_S)
        assert tier.write(metas, blocks_for_tests.payloads(metas, layout)) == 9
        into = blocks_for_tests.buffers(9, layout)
        assert tier.read(names(metas), into).count == 9
        assert [bytes(b) for b in into] == [bytes(p) for p in blocks_for_tests.payloads(metas, layout)]
        assert layout.block_nbytes > 500_000
        tier.close()
