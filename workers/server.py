"""A worker's server: WorkerService on a socket, an event loop in a thread of its own, an engine in another.

Covers: listening, TLS, the life of the threads, ending in good order and in bad. Does not cover: what is said
(`streams`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import grpc
import grpc.aio

from kvstore.tier import Clock
from warmkv.v1 import worker_pb2_grpc
from workers.addresses import advertised_host, authority
from workers.config import WorkerConfig
from workers.engine_thread import EngineThread, Failed, Published
from workers.outbox import OutboxLimits
from workers.protocol import Engine
from workers.roles import parse_roles
from workers.router_stream import Status
from workers.streams import WorkerStreams
from workers.watchdog import EngineStuckError, Watchdog

logger = logging.getLogger(__name__)

# How long ending streams may take to send what is in their outboxes.
END_GRACE_S = 1.0
# How long an engine's thread that was found stuck may take to end after all, and one that failed to close its engine.
STUCK_GRACE_S = 1.0
FAILED_GRACE_S = 5.0
# After a failure the process ends within this though it can do nothing of its own any more.
LAST_RESORT_S = 30.0
LOOK_S = 0.1

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # Jobs carry up to a million token ids and their hashes; snapshots and steps stay far below this.
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A router whose machine vanished is noticed within 15 s; a router may ping us every 5 s, even when all is quiet.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # With it two workers on one port would share it silently.
    ("grpc.so_reuseport", 0),
)


class WorkerServer:
    """Serves an engine to any number of routers.

    Args:
        config: name, secret, address, TLS. engine: owned by this server once `start` has returned, and closed by it.
        incarnation: grows with every restart; by default the wall clock in nanoseconds.
        clock: seconds; the same as the engine's, for deadlines count on it.
        on_fatal: called once, after the routers were told, when the engine raised or is stuck; the process should end
        and be restarted.
        owns_process: whether the process is this worker's own, and may be ended where not even `on_fatal` can be.

    Raises:
        ValueError: settings that contradict one another, or no secret on an address that others can reach.
    """

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        *,
        incarnation: int | None = None,
        clock: Clock = time.monotonic,
        on_fatal: Callable[[BaseException], None] | None = None,
        limits: OutboxLimits | None = None,
        owns_process: bool = False,
    ) -> None:
        _check(config)
        self.failure: BaseException | None = None
        self.incarnation = time.time_ns() if incarnation is None else incarnation
        self._config = config
        self._engine = engine
        self._clock = clock
        self._on_fatal = on_fatal
        self._limits = limits
        self._address: Future[str] = Future()
        self._closed = threading.Event()
        self._flush_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"{config.name}-server", daemon=True)
        self._inbox: deque[Published] = deque()
        self._delivery_is_scheduled = False
        self._engine_thread = EngineThread(engine, self._publish, clock=clock, name=config.name)
        self._watchdog = Watchdog(
            self._engine_thread,
            config.watchdog_s,
            lambda stuck: self._publish(Failed(stuck)),
            last_resort=owns_process,
        )

    def start(self) -> str:
        """Listen and run; the address that routers dial, `host:port`.

        Raises:
            OSError: the port is in use, or the host is not of this machine, or a PEM file cannot be read.
        """
        self._thread.start()
        return self._address.result()

    @property
    def routers(self) -> list[str]:
        """Names of the connected routers."""
        return self._streams.routers

    def drain(self, timeout_s: float) -> bool:
        """Refuse new jobs and wait for the running ones; whether all ended in time. Not from the server's threads.

        Those that did not are handed back to their routers, which takes up to `leaving.SHARE_S + leaving.LINGER_S`.
        """
        return asyncio.run_coroutine_threadsafe(self._streams.drain(timeout_s), self._loop).result()

    def close(self, *, flush_s: float = 0.0) -> None:
        """End the streams, then the engine, which may write out queued blocks for `flush_s`. Idempotent."""
        if self._thread.ident is None or self._closed.is_set():
            return
        self._flush_s = flush_s
        with suppress(RuntimeError):  # its loop has just ended by itself
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def wait_closed(self, timeout_s: float | None = None) -> bool:
        """Sleep until the server has ended, by `close` or because the engine failed (`failure` tells)."""
        return self._closed.wait(timeout_s)

    def _publish(self, item: Published) -> None:
        """Called by the engine's thread: leave it for the loop, which is woken once for all that lies there."""
        self._inbox.append(item)
        if not self._delivery_is_scheduled:
            self._delivery_is_scheduled = True
            with suppress(RuntimeError):  # the loop has ended, and nobody listens any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._delivery_is_scheduled = False  # before the first look, so that nothing is left lying
        while self._inbox:
            item = self._inbox.popleft()
            self._streams.deliver(item)
            if isinstance(item, Failed):
                self.failure = self.failure or item.error
                self._watching.cancel()
                self._watchdog.arm(LAST_RESORT_S)
                self._closing.set()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            logger.exception("worker server failed")
            self.failure = self.failure or error
            if not self._address.done():
                self._address.set_exception(error)
        finally:
            self._closed.set()
        if self.failure is not None and self._on_fatal is not None:
            self._on_fatal(self.failure)
        self._watchdog.disarm()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._streams = WorkerStreams(
            lambda: self._engine.info,
            self._engine_thread,
            worker=self._config.name,
            incarnation=self.incarnation,
            secret=self._config.fleet_secret,
            clock=self._clock,
            limits=self._limits,
            kv_events_off=self._config.kv_events == "off",
            role=self._config.role,
        )
        server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._streams, server)
        port = _bind(server, self._config)
        await server.start()
        self._engine_thread.start()
        self._address.set_result(authority(advertised_host(self._config), port))
        logger.info("worker serves", extra={"worker": self._config.name, "port": port})
        self._watching = asyncio.create_task(self._watch(), name="watchdog")
        try:
            await self._closing.wait()
        finally:
            await self._end(server)
            self._watching.cancel()

    async def _watch(self) -> None:
        if self._config.watchdog_s:
            await self._watchdog.watch()

    async def _end(self, server: grpc.aio.Server) -> None:
        self._streams.close(Status(grpc.StatusCode.UNAVAILABLE, "the worker was stopped; use another"))
        await server.stop(END_GRACE_S)
        await self._end_engine()
        logger.info("worker ended", extra={"worker": self._config.name})

    async def _end_engine(self) -> None:
        """Until it is closed. After a failure it is left behind before long: nothing but the process's end ends it."""
        give_up = math.inf
        while not await asyncio.to_thread(self._engine_thread.stop, flush_s=self._flush_s, within_s=LOOK_S):
            if time.monotonic() > give_up:
                logger.error("the engine does not close, and is left behind", extra={"worker": self._config.name})
                return
            if self.failure is not None and give_up == math.inf:
                grace_s = STUCK_GRACE_S if isinstance(self.failure, EngineStuckError) else FAILED_GRACE_S
                give_up = time.monotonic() + grace_s


def _check(config: WorkerConfig) -> None:
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ValueError("tls_cert and tls_key belong together; set both, or neither for plaintext")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ValueError("tls_client_ca needs tls_cert and tls_key; set them, or leave it out")
    if config.kv_events not in ("on", "off"):
        raise ValueError(f"kv_events is {config.kv_events!r}; set it to on or off")
    if config.watchdog_s < 0:
        raise ValueError(f"watchdog_s is {config.watchdog_s:g}; give seconds, or zero for none")
    parse_roles(config.roles)
    if not config.fleet_secret and not _is_loopback(config.bind_host):
        raise ValueError(f"{config.bind_host} can be reached by others; set fleet_secret, or bind to 127.0.0.1")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(server: grpc.aio.Server, config: WorkerConfig) -> int:
    wanted = authority(config.bind_host, config.port)
    credentials = _credentials(config)
    try:
        if credentials is None:
            return server.add_insecure_port(wanted)
        return server.add_secure_port(wanted, credentials)
    except RuntimeError as error:
        raise OSError(
            f"worker {config.name} cannot listen on {wanted} ({error}); choose another port, or end what uses it"
        ) from error


def _credentials(config: WorkerConfig) -> grpc.ServerCredentials | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    authority = None if config.tls_client_ca is None else Path(config.tls_client_ca).read_bytes()
    pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
