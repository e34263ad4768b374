"""Idle connections, URLs, TLS."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from deploy.redis_server import PrivateRedis
from kvstore.errors import TierError
from kvstore.redis.pool import MAX_IDLE, WirePool, mask_url
from kvstore.redis.resp import Wire
from tests.kvstore.blocks_for_tests import LAYOUT, buffers, chain, names, payloads
from tests.kvstore.redis.redis_for_tests import PATIENT_S, ScriptedServer, binary, make_tier


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ScriptedServer]:
    made = ScriptedServer(tmp_path, b"+OK\r\n")
    yield made
    made.close()


@pytest.fixture
def pool(server: ScriptedServer) -> Iterator[WirePool]:
    made = WirePool(server.url, lambda wire: None)
    yield made
    made.close()


def test_a_connection_is_used_again(pool: WirePool, server: ScriptedServer) -> None:
    for _ in range(5):
        with pool.lease(PATIENT_S) as wire:
            assert wire.ask(b"X") == b"OK"
    assert server.connections == 1


def test_a_connection_that_saw_an_exception_is_not_used_again(pool: WirePool, server: ScriptedServer) -> None:
    with pytest.raises(KeyError), pool.lease(PATIENT_S):
        raise KeyError
    with pool.lease(PATIENT_S) as wire:
        wire.ask(b"X")
    assert server.connections == 2


def test_a_connection_with_an_unread_reply_is_not_used_again(pool: WirePool, server: ScriptedServer) -> None:
    server.answer = b"+OK\r\n+one too many\r\n"
    with pool.lease(PATIENT_S) as wire:
        wire.ask(b"X")
    server.answer = b"+right\r\n"
    with pool.lease(PATIENT_S) as wire:
        assert wire.ask(b"X") == b"right"
    assert server.connections == 2


def test_only_so_many_idle_connections_are_kept(pool: WirePool, server: ScriptedServer) -> None:
    def use_many() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(MAX_IDLE + 3):
                stack.enter_context(pool.lease(PATIENT_S)).ask(b"X")

    use_many()
    assert server.connections == MAX_IDLE + 3
    use_many()
    assert server.connections == MAX_IDLE + 3 + 3


def test_a_greeting_that_fails_leaves_no_connection(server: ScriptedServer) -> None:
    def greet(wire: Wire) -> None:
        raise redis.ConnectionError("no")

    pool = WirePool(server.url, greet)
    with pytest.raises(redis.ConnectionError), pool.lease(PATIENT_S):
        pytest.fail("never reached")
    pool.close()


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://user:pw@h:1/0", "redis://***@h:1/0"),
        ("redis://:p@w@h", "redis://***@h"),
        ("redis://:p/w@h", "redis://***@h"),
        ("unix:///s?password=pw&db=1", "unix:///s?password=***&db=1"),
        ("redis://h:1", "redis://h:1"),
    ],
)
def test_logins_are_masked(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@pytest.mark.parametrize(
    "url",
    ["redis://h", "redis://u:p@h:1/2", "rediss://h?ssl_cert_reqs=none", "unix:///s?db=1", "redis://h?socket_timeout=9"],
)
def test_urls_of_all_forms_are_taken(url: str) -> None:
    WirePool(url, lambda wire: None).close()


@pytest.mark.parametrize("url", ["memcached://h", "redis://h:x", "redis://h?frobnicate=1", "redis://h?db=one", ""])
def test_other_urls_are_refused_with_what_to_write(url: str) -> None:
    with pytest.raises(TierError, match=r"write redis://.*rediss://.*unix://"):
        WirePool(url, lambda wire: None)


def run_openssl(folder: Path) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=warmkv -addext subjectAltName=IP:127.0.0.1"
    where = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command.split(), *where], check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    run_openssl(folder)
    return folder


@pytest.fixture
def tls_url(certificate: Path) -> Iterator[Callable[[str], str]]:
    port = free_port()
    settings = {"tls-port": str(port), "tls-auth-clients": "no"}
    settings |= {"tls-cert-file": f"{certificate}/cert.pem", "tls-key-file": f"{certificate}/key.pem"}
    with PrivateRedis(binary=binary("system"), directives=settings):
        yield lambda options: f"rediss://127.0.0.1:{port}/0?{options.format(folder=certificate)}"


def test_over_tls_blocks_go_both_ways_as_they_do_without(tls_url: Callable[[str], str]) -> None:
    tier = make_tier(tls_url("ssl_ca_certs={folder}/cert.pem"))
    metas = chain(20)
    for _ in range(3):
        assert tier.write(metas, payloads(metas)) == tier.match(names(metas)) == 20
        into = [memoryview(bytearray(len(p))) for p in payloads(metas)]
        assert tier.read(names(metas), into).count == 20
        assert [bytes(b) for b in into] == [bytes(p) for p in payloads(metas)]
    assert tier.stats().problem == ""
    tier.close()


def test_over_tls_large_blocks_arrive_whole(tls_url: Callable[[str], str]) -> None:
    layout = replace(LAYOUT, layers=300, kv_heads=64)
    tier = make_tier(tls_url("ssl_ca_certs={folder}/cert.pem"), layout=layout)
    metas = chain(5, ttl_s=1000.0)
    assert tier.write(metas, payloads(metas, layout)) == 5
    into = buffers(5, layout)
    assert tier.read(names(metas), into).count == 5
    assert [bytes(b) for b in into] == [bytes(p) for p in payloads(metas, layout)]
    assert layout.block_nbytes > 900_000
    tier.close()


def test_a_server_that_stalls_behind_tls_is_given_up_in_time(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    done = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        with context.wrap_socket(peer, server_side=True):
            done.wait()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"rediss://127.0.0.1:{listener.getsockname()[1]}?ssl_ca_certs={certificate}/cert.pem"
        pool = WirePool(url, lambda wire: None)
        with pool.lease(PATIENT_S) as wire:
            wire.patience_s = 0.05
            wire.renew()
            with pytest.raises(redis.TimeoutError):
                wire.send([bytes(64 << 20)])
        done.set()
        thread.join()
        pool.close()


def test_messages_of_tls_itself_are_no_reason_to_close_a_connection(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # sends session tickets after the handshake, as most do
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")

    def serve() -> None:
        peer, _ = listener.accept()
        with context.wrap_socket(peer, server_side=True) as wrapped:
            while wrapped.recv(100):
                wrapped.sendall(b"+PONG\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"rediss://127.0.0.1:{listener.getsockname()[1]}?ssl_ca_certs={certificate}/cert.pem"
        pool = WirePool(url, lambda wire: None)
        with pool.lease(PATIENT_S) as first:
            pass
        while not select.select([first._connection._sock], [], [], 0)[0]:
            time.sleep(0.01)
        with pool.lease(PATIENT_S) as again:
            assert again is first
            assert again.ask(b"PING") == b"PONG"
        pool.close()
        thread.join()


def test_a_certificate_that_nobody_vouches_for_is_refused(tls_url: Callable[[str], str]) -> None:
    tier = make_tier(tls_url(""))
    assert not tier.stats().healthy
    assert "CERTIFICATE_VERIFY_FAILED" in tier.stats().problem
    tier.close()
