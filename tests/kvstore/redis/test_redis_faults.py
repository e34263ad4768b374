"""The Redis tier when values are wrong and servers stall, die, fill up or refuse: always a miss with a reason, never
wrong bytes, and it recovers by itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.redis_server import PrivateRedis
from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.errors import TierError
from kvstore.events import AllBlocksCleared, BlockRemoved, RemovalCause, TierName
from kvstore.redis.tier import RedisTier
from kvstore.tier import BlockMeta
from tests.kvstore import blocks_for_tests
from tests.kvstore.blocks_for_tests import ManualClock, chain, names, read_verified
from tests.kvstore.redis import redis_for_tests
from tests.kvstore.redis.redis_fleets_for_tests import until
from tests.kvstore.redis.redis_for_tests import NAMESPACE, SERVERS, ScriptedServer, binary, client_of, fields_of, key
from tests.kvstore.redis.redis_for_tests import WIDE as LAYOUT

make_tier = partial(redis_for_tests.make_tier, layout=LAYOUT)
payload = partial(blocks_for_tests.payload, layout=LAYOUT)
payloads = partial(blocks_for_tests.payloads, layout=LAYOUT)
buffers = partial(blocks_for_tests.buffers, layout=LAYOUT)

Damage = Callable[[redis.Redis, list[BlockMeta]], object]


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    with PrivateRedis(binary=binary(request.param), maxmemory_bytes=64 << 20) as running:
        yield running


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def read_back(tier: RedisTier, metas: list[BlockMeta], deadline_s: float | None = None) -> int:
    return read_verified(tier, names(metas), deadline_s=deadline_s, layout=LAYOUT)


def flip(field: str, at: int) -> Damage:
    def damage(client: redis.Redis, metas: list[BlockMeta]) -> None:
        value = bytearray(client.hget(key(metas[1].hash), field))
        value[at] ^= 0x40
        client.hset(key(metas[1].hash), field, bytes(value))

    return damage


def change(field: str, how: Callable[[bytes], bytes]) -> Damage:
    return lambda client, metas: client.hset(key(metas[1].hash), field, how(client.hget(key(metas[1].hash), field)))


def lose(field: str) -> Damage:
    return lambda client, metas: client.hdel(key(metas[1].hash), field)


def put(fields: Callable[[list[BlockMeta]], dict[bytes, bytes]]) -> Damage:
    return lambda client, metas: client.hset(key(metas[1].hash), mapping=fields(metas))


def old_form(client: redis.Redis, metas: list[BlockMeta]) -> None:
    """Header and payload as one string, as earlier versions of ours wrote them."""
    fields = fields_of(metas[1])
    client.set(key(metas[1].hash), fields[b"h"][:HEADER_NBYTES] + bytes(payload(metas[1].hash)))


def wrong_type(client: redis.Redis, metas: list[BlockMeta]) -> None:
    client.delete(key(metas[1].hash))
    client.lpush(key(metas[1].hash), b"x")


def of_another_version(metas: list[BlockMeta]) -> dict[bytes, bytes]:
    """The record is a msgpack list of 16, whose first element is the version."""
    fields = fields_of(metas[1])
    at = fields[b"h"].index(b"\xdc\x00\x12") + 3
    return {**fields, b"h": fields[b"h"][:at] + b"\x7e" + fields[b"h"][at + 1 :]}


HEAD, REST = HEADER_NBYTES + 128, LAYOUT.block_nbytes - 128

DAMAGES: dict[str, tuple[Damage, str]] = {
    "the first byte of the payload": (flip("d", 0), "corrupt"),
    "the last byte of the rest": (flip("d", REST - 1), "corrupt"),
    "the last byte of all": (flip("h", HEAD - 1), "corrupt"),
    "a byte of the header's padding": (flip("h", 480), "corrupt"),
    "a byte of the checksum": (flip("h", 510), "corrupt"),
    "the magic number": (flip("h", 0), "foreign"),
    "a short rest": (change("d", lambda rest: rest[:-10]), "truncated"),
    "no rest": (change("d", lambda rest: b""), "truncated"),
    "a lost rest": (lose("d"), "truncated"),
    "a lost header": (lose("h"), "truncated"),
    "half a header": (change("h", lambda head: head[:100]), "truncated"),
    "no header": (change("h", lambda head: b""), "truncated"),
    "a header without the tail": (change("h", lambda head: head[:HEADER_NBYTES]), "truncated"),
    "a rest that is 100 bytes too long": (change("d", lambda rest: rest + b"x" * 100), "corrupt"),
    "a rest that is 2 MiB too long": (change("d", lambda rest: rest + b"x" * (2 << 20)), "corrupt"),
    "a head that is 100 bytes too long": (change("h", lambda head: head + b"x" * 100), "corrupt"),
    "a head that is 2 MiB too long": (change("h", lambda head: head + b"x" * (2 << 20)), "corrupt"),
    "a list": (wrong_type, "foreign"),
    "a string as earlier versions wrote it": (old_form, "foreign"),
    "another block": (put(lambda metas: fields_of(metas[2])), "foreign"),
    "another name space": (put(lambda metas: fields_of(metas[1], namespace=b"x" * 32)), "foreign"),
    "another layout": (put(lambda metas: fields_of(metas[1], replace(LAYOUT, layers=9))), "foreign"),
    "another format version": (put(of_another_version), "foreign"),
    "somebody else's text": (put(lambda metas: {b"h": b"t" * HEAD, b"d": b"t" * REST}), "foreign"),
}


@pytest.fixture(scope="module", params=SERVERS)
def lasting_server(request: pytest.FixtureRequest) -> Iterator[PrivateRedis]:
    with PrivateRedis(binary=binary(request.param), maxmemory_bytes=64 << 20) as running:
        yield running


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_value_is_a_miss_that_is_counted_deleted_and_told(lasting_server: PrivateRedis, damage: str) -> None:
    metas = chain(6, ttl_s=1000.0)
    inflict, reason = DAMAGES[damage]
    tier = make_tier(lasting_server.url)
    with client_of(lasting_server) as client:
        client.flushall()
        tier.write(metas, payloads(metas))
        tier.drain_events()
        inflict(client, metas)
        assert read_back(tier, metas) == 1
        assert tier.stats().misses == {reason: 1}
        assert client.exists(key(metas[1].hash)) == 0
        assert client.dbsize() == 5
    gone = BlockRemoved(TierName.REDIS, (metas[1].hash[:16],), RemovalCause.INVALID)
    assert tier.drain_events() == [gone]
    assert tier.stats().healthy
    assert read_back(tier, metas) == 1
    assert tier.stats().misses == {reason: 1, "absent": 1}
    assert tier.write(metas, payloads(metas)) == read_back(tier, metas) == 6
    tier.check()
    tier.close()


def test_a_block_that_goes_between_look_up_and_read_only_shortens_the_prefix(server: PrivateRedis) -> None:
    metas = chain(12)
    tier = make_tier(server.url)
    tier.write(metas, payloads(metas))
    assert tier.match(names(metas)) == 12
    with client_of(server) as client:
        client.delete(key(metas[3].hash))
    for _ in range(3):  # the connection is not out of step afterwards
        assert read_back(tier, metas) == 3
        assert read_back(tier, metas[4:]) == 8
    assert tier.stats().misses == {"absent": 3}
    tier.close()


def test_a_stalled_server_costs_three_deadlines_and_then_the_breaker_answers(
    server: PrivateRedis, clock: ManualClock
) -> None:
    metas = chain(3)
    tier = make_tier(server.url, timeout_s=0.2, clock=clock)
    tier.write(metas, payloads(metas))
    server.pause()
    for _ in range(10):
        assert read_back(tier, metas) == 0
    assert tier.stats().misses == {"deadline": 3, "breaker": 7}
    stats = tier.stats()
    assert not stats.healthy
    assert "does not answer in time" in stats.problem
    server.resume()
    assert read_back(tier, metas) == 0
    recover(tier, clock)
    until(lambda: read_back(tier, metas) == 3, "it is asked again")
    assert (tier.stats().healthy, tier.stats().problem) == (True, "")
    tier.close()


def recover(tier: RedisTier, clock: ManualClock) -> None:
    """Let the breaker's cool-down pass, as often as this machine's load makes the probe late."""
    for _ in range(20):
        clock.now += 5.0
        if tier.probe():
            return
    pytest.fail("the tier did not recover")


def test_while_the_server_stalls_each_cooldown_costs_one_deadline(server: PrivateRedis, clock: ManualClock) -> None:
    tier = make_tier(server.url, timeout_s=0.05, clock=clock)
    server.pause()
    metas = chain(1)
    for _ in range(3):
        tier.match(names(metas))
    waits = (1, 2, 4, 5, 5)
    for wait in waits:
        clock.now += wait - 0.1
        tier.match(names(metas))
        clock.now += 0.1
        tier.match(names(metas))
    assert tier.stats().misses == {"deadline": 3 + len(waits), "breaker": len(waits)}
    server.resume()
    tier.close()


def test_a_caller_in_a_hurry_waits_no_longer_than_its_own_deadline(server: PrivateRedis, clock: ManualClock) -> None:
    metas = chain(3)
    tier = make_tier(server.url, timeout_s=1000.0, clock=clock)  # the suite's own timeout ends this test if it waits
    tier.write(metas, payloads(metas))
    server.pause()
    assert read_back(tier, metas, deadline_s=0.05) == 0
    assert tier.match(names(metas), deadline_s=0.05) == 0
    assert tier.stats().misses == {"deadline": 2}
    server.resume()
    assert read_back(tier, metas) == 3
    tier.close()


def test_a_deadline_that_has_passed_asks_nobody_and_blames_nobody(server: PrivateRedis) -> None:
    metas = chain(3)
    tier = make_tier(server.url)
    tier.write(metas, payloads(metas))
    for _ in range(5):
        assert read_back(tier, metas, deadline_s=-1.0) == 0
    assert tier.stats().misses == {"deadline": 5}
    assert tier.stats().healthy
    assert read_back(tier, metas) == 3
    tier.close()


def test_writes_touches_and_removals_give_up_on_a_stalled_server(server: PrivateRedis, clock: ManualClock) -> None:
    metas = chain(3)
    tier = make_tier(server.url, write_timeout_s=0.05, clock=clock)
    server.pause()
    assert tier.write(metas, payloads(metas)) == 0
    tier.touch(names(metas))
    assert tier.remove(names(metas), RemovalCause.CLEARED) == 0
    assert tier.write(metas, payloads(metas)) == 0
    assert tier.stats().store_failures == {"error": 3, "breaker": 3}
    with pytest.raises(TierError, match="then clear again"):
        tier.clear()
    server.resume()
    tier.close()


def test_a_killed_server_is_an_error_then_the_breaker_and_a_restart_is_found(
    server: PrivateRedis, clock: ManualClock
) -> None:
    metas = chain(3)
    tier = make_tier(server.url, clock=clock)
    tier.write(metas, payloads(metas))
    tier.drain_events()
    before = tier.run_id()
    server.kill()
    for _ in range(5):
        assert read_back(tier, metas) == 0
    assert tier.stats().misses == {"error": 3, "breaker": 2}
    assert "start the server or correct the Redis URL" in tier.stats().problem
    server.restart()
    clock.now += 1.0
    assert read_back(tier, metas) == 0
    assert tier.stats().misses["absent"] == 1
    assert tier.drain_events() == [AllBlocksCleared(TierName.REDIS)]
    assert tier.run_id() not in ("", before)
    assert tier.write(metas, payloads(metas)) == read_back(tier, metas) == 3
    assert (tier.stats().healthy, tier.stats().problem) == (True, "")
    tier.close()


def test_a_server_restarted_between_two_calls_is_no_fault(server: PrivateRedis) -> None:
    metas = chain(3)
    tier = make_tier(server.url)
    tier.write(metas, payloads(metas))
    assert read_back(tier, metas) == 3
    server.restart()
    assert tier.match(names(metas)) == 0
    assert read_back(tier, metas) == 0
    assert tier.write(metas, payloads(metas)) == 3
    assert (tier.stats().misses, tier.stats().store_failures) == ({"absent": 1}, {})
    tier.close()


def test_a_server_that_is_down_at_first_is_used_once_it_is_up(server: PrivateRedis, clock: ManualClock) -> None:
    metas = chain(2)
    server.kill()
    tier = make_tier(server.url, clock=clock)
    assert tier.run_id() == ""
    stats = tier.stats()
    assert (stats.healthy, stats.capacity_bytes) == (False, 0)
    assert "start the server" in stats.problem
    server.restart()
    assert tier.write(metas, payloads(metas)) == read_back(tier, metas) == 2
    assert tier.stats().healthy
    tier.close()


def test_bytes_stay_right_while_the_server_dies_and_comes_back(server: PrivateRedis) -> None:
    chains = [chain(8, first_token=token) for token in range(4)]
    tier = make_tier(server.url)
    wrong: list[str] = []
    done = threading.Event()

    def work(metas: list[BlockMeta]) -> None:
        while not done.is_set():
            tier.write(metas, payloads(metas))
            into = buffers(8)
            count = tier.read(names(metas), into).count
            if [bytes(b) for b in into[:count]] != [bytes(payload(name)) for name in names(metas)[:count]]:
                wrong.append("bytes")
            tier.touch(names(metas))
            tier.probe()

    threads = [threading.Thread(target=work, args=(metas,)) for metas in chains]
    for thread in threads:
        thread.start()
    for _ in range(5):
        done.wait(0.1)
        server.restart()
    done.wait(0.1)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    tier.check()
    tier.close()


@pytest.mark.parametrize("given_password", ["", ":not-this-one@", ":se%3Acret%3F@"])
def test_a_refused_login_is_told_without_the_password_and_mended_without_a_restart(
    server: PrivateRedis, clock: ManualClock, given_password: str, caplog: pytest.LogCaptureFixture
) -> None:
    metas = chain(1)
    with client_of(server) as client, caplog.at_level(logging.DEBUG):
        client.config_set("requirepass", "the-real-one")
        tier = make_tier(server.url.replace("unix://", f"unix://{given_password}"), clock=clock)
        assert read_back(tier, metas) == 0
        stats = tier.stats()
        assert not stats.healthy
        assert "put the right user and password into the Redis URL" in stats.problem
        spoken = stats.problem + caplog.text + repr([record.__dict__ for record in caplog.records])
        assert not any(secret in spoken for secret in ("not-this-one", "se%3Acret", "se:cret", "the-real-one"))
        client.config_set("requirepass", {"": "", ":not-this-one@": "not-this-one"}.get(given_password, "se:cret?"))
    clock.now += 5.0
    assert tier.write(metas, payloads(metas)) == read_back(tier, metas) == 1
    assert (tier.stats().healthy, tier.stats().problem) == (True, "")
    tier.close()


def test_a_forbidden_command_is_told_with_the_grant_that_mends_it(server: PrivateRedis) -> None:
    metas = chain(2)
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "+@all", "-hmget")
        tier = make_tier(server.url.replace("unix://", "unix://w:p@"))
        assert tier.write(metas, payloads(metas)) == 2
        for _ in range(5):
            assert read_back(tier, metas) == 0
        stats = tier.stats()
        assert stats.misses == {"error": 5}  # an answer, so the breaker stays closed
        assert not stats.healthy
        assert "ACL SETUSER name ~warmkv:* +hset +hmget" in stats.problem
        client.execute_command("ACL", "SETUSER", "w", "+hmget")
    assert read_back(tier, metas) == 2
    assert (tier.stats().healthy, tier.stats().problem) == (True, "")
    tier.close()


def test_the_grant_that_we_name_is_enough(server: PrivateRedis) -> None:
    metas = chain(2, ttl_s=100.0)
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", "w", "on", ">p")
        tier = make_tier(server.url.replace("unix://", "unix://w:p@"))
        assert read_back(tier, metas) == 0
        grant = tier.stats().problem.split("ACL SETUSER name ")[1].split(";")[0]
        client.execute_command("ACL", "SETUSER", "w", *grant.split())
    assert tier.write(metas, payloads(metas)) == tier.match(names(metas)) == read_back(tier, metas) == 2
    tier.touch(names(metas + chain(1, first_token=5)))
    assert tier.clear(prefix=metas[1].hash) == 1
    assert tier.clear() == 1
    tier.probe()
    assert tier.stats().problem == ""
    assert tier.run_id() != ""
    tier.close()


def test_a_user_who_may_only_read_reads_on(server: PrivateRedis) -> None:
    metas = chain(2)
    writer = make_tier(server.url)
    writer.write(metas, payloads(metas))
    with client_of(server) as client:
        client.execute_command("ACL", "SETUSER", "r", "on", ">p", "~*", "+@all", "-@write")
    tier = make_tier(server.url.replace("unix://", "unix://r:p@"))
    more = chain(3, first_token=1)
    for _ in range(4):
        assert tier.write(more, payloads(more)) == 0
        assert read_back(tier, metas) == 2
    stats = tier.stats()
    assert (stats.healthy, stats.store_failures) == (True, {"error": 12})
    assert "forbids a command" in stats.problem
    tier.close()
    writer.close()


def test_a_full_server_that_evicts_nothing_refuses_writes_and_reads_go_on(
    server: PrivateRedis, clock: ManualClock
) -> None:
    metas, more = chain(3), chain(40, first_token=1)
    with client_of(server) as client:
        client.config_set("maxmemory-policy", "noeviction")
        tier = make_tier(server.url, clock=clock)
        assert "refuses writes at 64 MiB; set maxmemory-policy allkeys-lru" in tier.stats().problem
        assert tier.stats().healthy
        assert tier.write(metas, payloads(metas)) == 3
        client.config_set("maxmemory", 1 << 10)
        for _ in range(5):
            assert tier.write(more, payloads(more)) == 0
            assert read_back(tier, metas) == 3
        stats = tier.stats()
        assert stats.store_failures == {"full": 200}
        assert stats.healthy
        assert "is full and evicts nothing" in stats.problem
        client.config_set("maxmemory", 64 << 20)
        client.config_set("maxmemory-policy", "allkeys-lru")
    clock.now += 5.0
    assert tier.write(more, payloads(more)) == 40
    assert tier.stats().problem == ""
    tier.close()


def test_a_full_server_still_lengthens_ttls(server: PrivateRedis) -> None:
    metas = chain(2, ttl_s=1000.0)
    with client_of(server) as client:
        tier = make_tier(server.url)
        tier.write(metas, payloads(metas))
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1 << 10)
        client.pexpire(key(metas[0].hash), 5000)
        assert read_back(tier, metas) == 2
        assert client.pttl(key(metas[0].hash)) > 900_000
    tier.close()


def test_a_server_without_a_memory_limit_is_told(server: PrivateRedis) -> None:
    with client_of(server) as client:
        client.config_set("maxmemory", 0)
    tier = make_tier(server.url)
    assert "set maxmemory and maxmemory-policy allkeys-lru" in tier.stats().problem
    assert tier.stats().healthy
    tier.close()


def test_a_server_that_saves_to_disk_is_told_once(server: PrivateRedis, caplog: pytest.LogCaptureFixture) -> None:
    with client_of(server) as client, caplog.at_level(logging.INFO):
        client.config_set("save", "3600 1")
        tier = make_tier(server.url)
        for number in range(3):
            tier.write(chain(1, first_token=number), payloads(chain(1, first_token=number)))
            tier.match(names(chain(1)))
    assert "set save ''" in tier.stats().problem
    assert tier.stats().healthy
    told = [r for r in caplog.records if "set save" in str(getattr(r, "advice", ""))]
    assert len(told) == 1
    tier.close()


def test_a_replica_refuses_writes_and_says_whom_to_name(server: PrivateRedis) -> None:
    metas = chain(1)
    with client_of(server) as client:
        client.replicaof("127.0.0.1", "1")
        client.config_set("replica-serve-stale-data", "yes")
        tier = make_tier(server.url)
        assert tier.write(metas, payloads(metas)) == 0
        assert "name its primary in the Redis URL" in tier.stats().problem
        assert tier.stats().store_failures == {"error": 1}
        client.replicaof("NO", "ONE")
    assert tier.write(metas, payloads(metas)) == 1
    assert tier.stats().problem == ""
    tier.close()


def test_a_password_that_the_server_repeats_is_masked(tmp_path: Path) -> None:
    server = ScriptedServer(tmp_path, b"-ERR unknown command 'AUTH', with args beginning with: 'hunter2'\r\n")
    tier = make_tier(server.url.replace("unix://", "unix://:hunter2@"))
    try:
        assert "beginning with: '***'" in tier.stats().problem
        assert "hunter2" not in tier.stats().problem
    finally:
        tier.close()
        server.close()


@pytest.mark.parametrize("url", ["http://h:1", "h:6379", "redis+cluster://h", "redis://h:port", "unix://?nonsense=1"])
def test_a_url_of_another_form_is_refused_with_the_forms_that_are_not(url: str) -> None:
    with pytest.raises(TierError, match="write redis://"):
        RedisTier(url, codec=BlockCodec(LAYOUT, NAMESPACE))


def test_a_url_that_is_refused_keeps_its_password_to_itself() -> None:
    with pytest.raises(TierError) as caught:
        RedisTier("redis://user:top/secret@host:port/0", codec=BlockCodec(LAYOUT, NAMESPACE))
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "is loading its data"),
        (b"-MOVED 1 127.0.0.1:7001\r\n", "cluster node"),
        (b"-ERR max number of clients reached\r\n", "cannot be reached"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak RESP"),
        (b":5\r\n", "does not speak RESP"),
        (b"$-7\r\n", "does not speak RESP"),
        (b"$5\r\nabcdefg\r\n", "is no block"),
        (b"$99999999999\r\n", "is no block"),
    ],
)
def test_an_odd_answer_is_a_miss_and_closes_the_connection(tmp_path: Path, answer: bytes, problem: str) -> None:
    server = ScriptedServer(tmp_path, answer)
    tier = make_tier(server.url)
    try:
        assert read_back(tier, chain(1)) == 0
        connections = server.connections
        assert sum(tier.stats().misses.values()) == 1
        assert problem == "is no block" or problem in tier.stats().problem
        tier.read(names(chain(1)), buffers(1))
        assert problem == "cluster node" or server.connections > connections
    finally:
        tier.close()
        server.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(answer=st.one_of(st.binary(max_size=900), st.binary(max_size=900).map(lambda b: b"$%d\r\n%b\r\n" % (len(b), b))))
def test_whatever_a_server_says_no_block_is_made_of_it(tmp_path_factory: pytest.TempPathFactory, answer: bytes) -> None:
    server = ScriptedServer(tmp_path_factory.mktemp("s"), answer, hangs_up=True)
    tier = make_tier(server.url)
    metas = chain(3)
    try:
        assert tier.read(names(metas), buffers(3)).count == 0
        assert tier.write(metas, payloads(metas)) == 0
        tier.match(names(metas))
        tier.touch(names(metas))
    finally:
        tier.close()
        server.close()


def test_how_the_server_is_set_up_is_told_once_and_no_more_when_it_is_mended(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    metas = chain(1)
    bad = {"save": "3600 1", "maxmemory-clients": "0"}
    with (
        PrivateRedis(binary=binary("system"), directives=bad, policy="volatile-lru") as server,
        client_of(server) as client,
        caplog.at_level(logging.INFO),
    ):
        tier = make_tier(server.url, clock=clock)
        for _ in range(20):  # so that it is asked more than once
            assert tier.write(metas, payloads(metas)) == 1
            clock.now += 6.0
        assert "set save ''" in tier.stats().problem
        assert "maxmemory-clients" not in tier.stats().problem
        assert "set maxmemory-clients 10%" in tier.advice
        assert "maxmemory-policy allkeys-lru" in tier.advice
        told = [record.__dict__.get("advice", "") for record in caplog.records]
        for remedy in ("save", "maxmemory-clients", "maxmemory-policy"):
            assert sum(f"set {remedy}" in text for text in told) == 1
        for name, value in (("save", ""), ("maxmemory-clients", "10%"), ("maxmemory-policy", "allkeys-lru")):
            client.config_set(name, value)
        clock.now += 60.0
        assert tier.write(metas, payloads(metas)) == 1
        assert (tier.stats().problem, tier.advice) == ("", "")
        tier.close()


def test_a_server_that_refuses_config_is_asked_once_a_run(clock: ManualClock) -> None:
    metas = chain(1)
    with PrivateRedis(binary=binary("system")) as server, client_of(server) as client:
        client.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "+@all", "-config")
        tier = make_tier(server.url.replace("unix://", "unix://w:p@"), clock=clock)
        for _ in range(5):
            assert tier.write(metas, payloads(metas)) == 1
            clock.now += 100.0
        assert sum(int(entry["count"]) for entry in client.acl_log()) == 2  # two settings
        assert (tier.stats().problem, tier.advice) == ("", "")
        tier.close()


def test_a_server_with_room_for_few_blocks_is_no_fault_but_said(clock: ManualClock) -> None:
    with PrivateRedis(binary=binary("system"), maxmemory_bytes=40 * LAYOUT.block_nbytes) as server:
        tier = make_tier(server.url, clock=clock)
        assert "has room for 40 blocks" in tier.advice
        tier.close()
