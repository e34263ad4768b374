"""TLS to every kind of Redis, with an authority of our own: blocks arrive, and troubles with certificates are told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import redis

from kvstore.codec import BlockCodec
from kvstore.redis.address import server_urls
from kvstore.redis.cluster import RedisClusterTier
from kvstore.redis.facts import remedy
from kvstore.redis.inspection import inspect
from kvstore.redis.open import open_redis
from kvstore.redis.tier import RedisTier
from kvstore.redis.watch import Watching
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, buffers, chain, names, payload, payloads
from tests.kvstore.redis.redis_fleets_for_tests import (
    Process,
    Tls,
    clustered,
    free_ports,
    guarded,
    running,
    system_redis,
    until,
)
from tests.kvstore.redis.redis_for_tests import NAMESPACE, PATIENT_S, key

COUNT = 20


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls.made_in(tmp_path_factory.mktemp("certificates") / "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls.made_in(tmp_path_factory.mktemp("certificates") / "foreign")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tls: Tls) -> Iterator[Process]:
    lines = ['save ""', "maxmemory 64mb", "maxmemory-policy allkeys-lru"]
    alone = Process(system_redis(), tmp_path_factory.mktemp("tls") / "alone", free_ports(1)[0], lines, tls=tls)
    with running([alone]):
        yield alone


@pytest.fixture(autouse=True)
def _patient_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (RedisTier, RedisClusterTier):
        monkeypatch.setattr(f"kvstore.redis.open.{kind.__name__}", partial(kind, write_timeout_s=PATIENT_S))


def open_tier(url: str, watching: Watching = Watching.OFF) -> RedisTier | RedisClusterTier:
    return open_redis(url, codec=BlockCodec(LAYOUT, NAMESPACE), timeout_s=PATIENT_S, watching=watching)


def assert_keeps(tier: RedisTier | RedisClusterTier, metas: Sequence[BlockMeta]) -> None:
    assert tier.write(metas, payloads(metas)) == len(metas) == tier.match(names(metas)), tier.stats().problem
    into = buffers(len(metas))
    assert tier.read(names(metas), into).count == len(metas)
    assert [bytes(b) for b in into] == [bytes(payload(name)) for name in names(metas)]
    assert tier.stats().problem == ""


def test_blocks_behind_sentinels_that_speak_tls_survive_a_failover(tmp_path: Path, tls: Tls) -> None:
    metas = chain(COUNT, ttl_s=1000.0)
    with guarded(tmp_path, sentinels=2, password="s3cret", tls=tls) as fleet:
        url = fleet.url.replace("://", "://:s3cret@")
        tier = open_tier(url)
        assert_keeps(tier, metas)
        (primary,) = server_urls(url, PATIENT_S)
        assert primary == f"rediss://:s3cret@127.0.0.1:{fleet.primary_port()}/{tls.options}"
        assert inspect(primary, PATIENT_S).facts.run_id == tier.run_id()
        with fleet.servers[0].client() as client:
            assert client.exists(key(metas[0].hash))
            client.execute_command("WAIT", 1, 60_000)
        fleet.fail_over()
        new = fleet.servers[1]

        def arrives_at_the_new_one() -> bool:
            more = chain(1, first_token=len(tried))
            tried.append(more[0])
            with new.client() as client:
                return tier.write(more, payloads(more)) == 1 and bool(client.exists(key(more[0].hash)))

        tried = list(metas)
        until(arrives_at_the_new_one, "writes go to the new primary")
        assert_keeps(tier, metas)
        tier.close()


def test_blocks_in_a_cluster_that_speaks_tls_lie_on_all_nodes_for_a_user_of_its_own(tmp_path: Path, tls: Tls) -> None:
    metas = chain(COUNT, ttl_s=1000.0)
    grants = (
        "+hset +hmget +hget +hstrlen +multi +exec +exists +pexpire +persist +pttl +touch +unlink +scan +info +ping "
        "+eval +evalsha +cluster|slots"
    )
    with clustered(tmp_path, tls=tls) as cluster:
        for node in cluster.nodes:
            with node.client() as client:
                client.execute_command("ACL", "SETUSER", "blocks", "on", ">s3cret", "~warmkv:*", *grants.split())
        tier = open_tier(cluster.url.replace("://", "://blocks:s3cret@"))
        assert_keeps(tier, metas)
        held = []
        for node in cluster.nodes:
            with node.client() as client:
                held.append(client.dbsize())
        assert all(held)
        assert sum(held) == COUNT
        assert tier.clear(root=metas[0].root) == COUNT
        assert tier.stats().problem == ""
        tier.close()
        tier = open_tier(cluster.url.replace("://", "://blocks:wr0ng@"))
        assert "put the right user and password" in tier.stats().problem
        assert "wr0ng" not in tier.stats().problem
        tier.close()


def test_the_watch_of_a_server_that_speaks_tls_hears_of_removals(server: Process, tls: Tls) -> None:
    metas = chain(3, first_token=9)
    tier = open_tier(url_of(server, tls.options), Watching.CONFIGURE)
    assert isinstance(tier, RedisTier)
    watch = tier._server.watch
    assert watch is not None
    until(lambda: watch.hearing is not None, "the watch listens")
    assert tier.write(metas, payloads(metas)) == 3
    with server.client() as client:
        client.delete(key(metas[1].hash))
    until(lambda: tier.find(metas[1].hash) is None, "the removal is heard")
    assert watch.problem == ""
    tier.close()


def url_of(server: Process, options: str, host: str = "127.0.0.1") -> str:
    return f"rediss://{host}:{server.port}/0{options}"


def problem_with(url: str) -> str:
    tier = open_tier(url)
    stats = tier.stats()
    tier.close()
    assert not stats.healthy
    return stats.problem


REFUSED = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed:"
UNKNOWN = "of an authority that is unknown here"
NAME_IT = "name the authority's file with ssl_ca_certs=FILE"
NAME_OURS = "with ssl_certfile=FILE&ssl_keyfile=FILE"


def test_what_is_wrong_with_certificates_is_said_with_the_option_that_mends_it(
    server: Process, tls: Tls, foreign: Tls
) -> None:
    ours = tls.options
    of_another = f"?ssl_ca_certs={foreign.authority.path}"
    assert UNKNOWN in problem_with(url_of(server, of_another))
    assert NAME_IT in problem_with(url_of(server, of_another))
    assert NAME_IT in problem_with(url_of(server, ""))
    certificate, secret = foreign.client
    anonymous = f"?ssl_ca_certs={tls.authority.path}"
    assert NAME_OURS in problem_with(url_of(server, anonymous))
    assert NAME_OURS in problem_with(url_of(server, f"{anonymous}&ssl_certfile={certificate}&ssl_keyfile={secret}"))
    assert "is not on this machine" in problem_with(url_of(server, "?ssl_ca_certs=/nowhere/ca.pem"))
    tier = open_tier(url_of(server, ours))
    assert tier.stats().problem == ""
    tier.close()


def test_sentinels_and_nodes_with_foreign_certificates_are_told_the_same_way(
    tmp_path: Path, server: Process, foreign: Tls
) -> None:
    of_another = f"?ssl_ca_certs={foreign.authority.path}"
    for url in (
        f"rediss+sentinel://127.0.0.1:{server.port}/blocks{of_another}",
        f"rediss+cluster://127.0.0.1:{server.port}{of_another}",
    ):
        problem = problem_with(url)
        assert UNKNOWN in problem
        assert NAME_IT in problem
        assert "start the server" not in problem


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: IP address mismatch, certificate is",
            "another name",
        ),
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired (_ssl.c:1)",
            "out of date",
        ),
        ("Error 1: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed (_ssl.c:1).", UNKNOWN),
        ("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required (_ssl.c:2580)", NAME_OURS),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", "check that it speaks TLS"),
        ("Error 2 connecting to h:1. No such file or directory.", "put the files that the Redis URL names"),
        ("Error 111 connecting to h:1. Connection refused.", "start the server"),
    ],
)
def test_every_trouble_of_tls_has_a_remedy_of_its_own(said: str, words: str) -> None:
    assert words in remedy(redis.ConnectionError(said), "rediss://h:1", said)


def test_a_missing_unix_socket_is_no_trouble_of_tls() -> None:
    assert "start the server" in remedy(OSError(2, "No such file"), "unix:///x", "No such file or directory")
