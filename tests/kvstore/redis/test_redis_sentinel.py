"""Redis behind Sentinel: the tier finds the primary, and the next one when it dies."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kvstore.errors import TierError
from kvstore.events import AllBlocksCleared
from kvstore.redis.address import mask_url, parse_address, server_urls
from kvstore.redis.books import RedisBooks
from kvstore.redis.sentinel import PrimaryOf
from kvstore.redis.tier import RedisTier
from kvstore.redis.watch import RedisWatch
from tests.kvstore.blocks_for_tests import ManualClock, chain, names, payloads, read_verified
from tests.kvstore.redis.redis_fleets_for_tests import Guarded, free_ports, guarded, until
from tests.kvstore.redis.redis_for_tests import PREFIX, key, make_tier


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Guarded]:
    with guarded(tmp_path) as made:
        yield made


def read_back(tier: RedisTier, count: int) -> int:
    return read_verified(tier, names(chain(count)))


def test_blocks_are_written_to_the_primary_and_after_a_failover_to_the_new_one(fleet: Guarded) -> None:
    metas, more = chain(3), chain(5)[3:]
    tier = make_tier(fleet.url)
    assert tier.write(metas, payloads(metas)) == 3
    with fleet.servers[0].client() as primary:
        assert primary.exists(key(metas[0].hash))
        primary.execute_command("WAIT", 1, 60_000)
    first = tier.run_id()
    fleet.fail_over()
    with fleet.servers[1].client() as primary:  # what the old one takes before it is told is lost with it
        until(
            lambda: tier.write(more, payloads(more)) == 2 and primary.exists(*map(key, names(more))) == 2,
            "writes go to the new primary",
        )
    assert read_back(tier, 5) == 5  # the replica had them all
    assert tier.run_id() not in ("", first)
    assert not any(isinstance(event, AllBlocksCleared) for event in tier.drain_events())  # so they keep their credit
    assert tier.stats().problem == ""
    tier.close()


def test_a_primary_that_dies_is_replaced_by_itself(tmp_path: Path) -> None:
    metas = chain(3)
    with guarded(tmp_path, sentinels=3) as fleet:
        tier = make_tier(fleet.url)
        assert tier.write(metas, payloads(metas)) == 3
        with fleet.servers[0].client() as primary:
            primary.execute_command("WAIT", 1, 60_000)
        fleet.servers[0].kill()
        fleet.sentinels[0].kill()  # with the one that was asked first
        until(lambda: read_back(tier, 3) == 3, "reads come from the new primary")
        assert tier.stats().healthy
        tier.close()


def test_passwords_of_the_servers_are_in_the_url(tmp_path: Path) -> None:
    metas = chain(2)
    with guarded(tmp_path, password="s3cret") as fleet:
        tier = make_tier(fleet.url.replace("://", "://:s3cret@"))
        assert tier.write(metas, payloads(metas)) == 2
        tier.close()
        tier = make_tier(fleet.url)
        assert tier.write(metas, payloads(metas)) == 0
        tier.close()


def test_the_watch_follows_the_primary(fleet: Guarded) -> None:
    metas = chain(4)
    books = RedisBooks()
    watch = RedisWatch(fleet.url, prefix=PREFIX.encode(), books=books)
    until(lambda: watch.hearing is not None, "the watch hears")
    with fleet.servers[0].client() as primary:
        for meta in metas:
            primary.set(key(meta.hash), b"block")
        primary.execute_command("WAIT", 1, 60_000)
    books.stored(metas, written=4, nbytes=1)
    fleet.fail_over()
    until(lambda: _told_by(fleet.servers[1].port, watch), "the watch is on the new primary")
    assert set(books.names()) == set(names(metas))  # the replica had them all
    with fleet.servers[1].client() as primary:
        primary.delete(key(metas[2].hash))
    until(lambda: metas[2].hash not in books.names(), "the removal is told")
    watch.close()


def test_an_unknown_service_is_a_problem_that_says_where_to_look(fleet: Guarded) -> None:
    tier = make_tier(fleet.url.replace("/blocks", "/other"))
    assert tier.match(names(chain(1))) == 0
    assert "'other'" in tier.stats().problem
    assert "SENTINEL MASTERS" in tier.stats().problem
    tier.close()


def test_a_silent_sentinel_leaves_time_for_the_next_one(fleet: Guarded) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = fleet.url.replace("://", f"://127.0.0.1:{silent.getsockname()[1]},")
        tier = make_tier(url, timeout_s=12.0, write_timeout_s=12.0)
        assert tier.write(chain(1), payloads(chain(1))) == 1
        tier.close()


def test_when_all_sentinels_are_silent_a_question_costs_its_time_and_not_that_of_each(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        hosts = [("127.0.0.1", listener.getsockname()[1]) for listener in (one, other)]
        asked = PrimaryOf("blocks", hosts, kind=redis.Connection, login={})
        with pytest.raises(redis.TimeoutError):
            asked(socket_connect_timeout=0.2, socket_timeout=0.2)


def test_each_sentinel_has_its_share_of_the_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shares = ManualClock(), []

    def ask(asked: PrimaryOf, host: tuple[str, int], share: float, settings: object) -> tuple[str, int]:
        shares.append(share)
        if host == ("quick", 1):
            raise redis.ConnectionError("refused at once")
        clock.now += share
        raise redis.TimeoutError("silent")

    monkeypatch.setattr(PrimaryOf, "_ask", ask)
    hosts = [("silent", 1), ("quick", 1), ("silent", 2), ("silent", 3)]
    asked = PrimaryOf("blocks", hosts, kind=redis.Connection, login={}, clock=clock)
    with pytest.raises(redis.ConnectionError, match=r"no sentinel of silent:1, quick:1, silent:2, silent:3 knows"):
        asked(socket_connect_timeout=8.0, socket_timeout=8.0)
    assert shares == pytest.approx([2.0, 2.0, 3.0, 3.0])  # what one leaves is for those after it


def test_a_sentinel_that_stalls_is_given_up(fleet: Guarded) -> None:
    assert fleet.sentinels[0].process is not None
    fleet.sentinels[0].process.send_signal(signal.SIGSTOP)
    tier = make_tier(fleet.url, timeout_s=0.2, write_timeout_s=0.2)
    assert tier.match(names(chain(1))) == 0
    assert "does not answer in time" in tier.stats().problem
    tier.close()


def test_sentinels_that_are_down_are_a_problem_with_a_remedy() -> None:
    ports = free_ports(2)
    tier = make_tier(f"redis+sentinel://127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/blocks")
    assert "correct the Redis URL" in tier.stats().problem
    assert not tier.stats().healthy
    tier.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://",
        "redis+sentinel://host",
        "redis+sentinel://host/",
        "redis+sentinel://host/service/x",
        "redis+sentinel://host/service/0/1",
        "redis+sentinel://host:port/service",
        "redis+sentinel://,host/service",
        "redis+sentinel://u:s3cret@host/service?no_such_option=1",
    ],
)
def test_an_unusable_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(TierError, match=r"redis\+sentinel://\[user:password@\]sentinel") as caught:
        parse_address(url)
    assert "s3cret" not in str(caught.value)


def test_what_a_url_says() -> None:
    address = parse_address(
        "rediss+sentinel://us%40er:pass%2Fword@one:1,[::1],three:3/my-blocks/5?sentinel_password=guard&ssl_cert_reqs=none"
    )
    assert isinstance(address.kind, PrimaryOf)
    assert address.database == 5
    assert address.settings == {
        "username": "us@er",
        "password": "pass/word",
        "db": 5,
        "ssl_cert_reqs": "none",
    }
    assert address.kind._sentinels == [("one", 1), ("::1", 26379), ("three", 3)]
    assert address.kind._login == {"username": None, "password": "guard"}
    assert "pass%2Fword" not in mask_url("redis+sentinel://us%40er:pass%2Fword@one:1/x")
    assert "guard" not in mask_url("redis+sentinel://one:1/x?sentinel_password=guard&a=b")


def test_the_servers_that_a_url_stands_for(fleet: Guarded) -> None:
    primary = fleet.servers[0].port
    url = fleet.url.replace("://", "://user:pass@") + "/3?sentinel_password=guard&socket_keepalive=1"
    assert server_urls(fleet.url, 20.0) == [f"redis://127.0.0.1:{primary}/"]
    with pytest.raises(redis.ConnectionError, match="logins of the sentinels"):
        server_urls(url, 20.0)  # these sentinels have no password
    url = url.replace("sentinel_password=guard&", "")
    assert server_urls(url, 20.0) == [f"redis://user:pass@127.0.0.1:{primary}/3?socket_keepalive=1"]
    assert server_urls("redis+cluster://one,two:5", 1.0) == ["redis://one:6379", "redis://two:5"]
    assert server_urls("unix:///x", 1.0) == ["unix:///x"]


def _told_by(port: int, watch: RedisWatch) -> bool:
    connection = watch._connection
    return watch.hearing is not None and connection is not None and connection._connection.port == port
