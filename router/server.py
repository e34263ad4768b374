"""A router's servers: gRPC with health, reflection and TLS, and HTTP beside it; start, drain and end.

Covers: what listens, and readiness. Does not cover: what happens to a request (`interceptors`, `service`, `core`), the
parts that a router is made of, and signals (`app`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import grpc
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from router.config import RouterConfig
from router.interceptors import EdgeInterceptor, InFlight
from router.listen import cannot_listen, check_free, host_port
from router.protocol import Caller, RouterApi
from router.service import AdminService, InferenceService
from router.tls import server_credentials
from warmkv.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

log = logging.getLogger(__name__)

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
# Prompts over the limit must reach us, so that the error is ours and names the remedy.
_TRANSPORT_FACTOR = 4
_HEALTH_PERIOD_S = 0.1
# How long the last statuses get to reach their callers. Health watchers, who never leave, take all of it.
_CLOSE_GRACE_S = 0.2

Authenticate = Callable[[str | None], Caller]


class RouterServer:
    """Serves one router.

    Attributes:
        grpc_port, http_port: where it listens, once started; http_port None: no HTTP.
    """

    def __init__(
        self,
        router: RouterApi,
        config: RouterConfig,
        *,
        authenticate: Authenticate,
        http_app: web.Application | None = None,
        on_drain: Callable[[], None] = lambda: None,
    ) -> None:
        """Wire it; nothing listens yet.

        Args:
            authenticate: bearer token (None: none sent) to caller, raises Unauthenticated.
            http_app: served on the HTTP port where the settings name one. on_drain: called when the drain begins.
        """
        self.grpc_port = config.grpc_port
        self.http_port = config.http_port
        self._router = router
        self._on_drain = on_drain
        self._config = config
        self._in_flight = InFlight()
        self._health = health.aio.HealthServicer()
        edge = EdgeInterceptor(authenticate, self._in_flight, default_deadline_s=config.default_deadline_s)
        self._server = grpc.aio.server(interceptors=[edge], options=server_options(config.max_prompt_bytes))
        self._http = web.AppRunner(http_app, handle_signals=False, access_log=None) if http_app is not None else None
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen and serve; health says NOT_SERVING until the router is ready.

        Raises:
            ListenError: an address is taken or not ours. TlsFilesError: a PEM file is wrong.
        """
        self._add_services()
        self.grpc_port = self._listen()
        await self._report(ready=False)
        await self._server.start()
        self._following = asyncio.create_task(self._follow_readiness())
        if self._http is not None and self._config.http_port is not None:
            self.http_port = await self._start_http(self._http, self._config.http_port)
        where = {"grpc": host_port(self._config.grpc_host, self.grpc_port), "http_port": self.http_port}
        log.info("the router listens", extra={"router": self._config.name, **where})

    async def drain(self, hurry: asyncio.Event | None = None) -> bool:
        """Refuse new work and wait for what runs; whether all of it finished.

        Args:
            hurry: ends the wait when set. It lasts at most the settings' grace in any case.
        """
        self._in_flight.refuse_new()
        self._on_drain()
        await self._health.enter_graceful_shutdown()
        waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._in_flight.drained())]
        if hurry is not None:
            waits.append(asyncio.ensure_future(hurry.wait()))
        await asyncio.wait(waits, timeout=self._config.drain_grace_s, return_when=asyncio.FIRST_COMPLETED)
        finished = waits[0].done()
        for wait in waits:
            wait.cancel()
        if not finished:
            log.warning("requests outlived the drain and will be ended", extra={"router": self._config.name})
        return finished

    async def stop(self) -> None:
        """End what runs, with UNAVAILABLE, and close all ports."""
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self._in_flight.end_all()
        await self._server.stop(_CLOSE_GRACE_S)
        if self._http is not None:
            await self._http.cleanup()

    def _add_services(self) -> None:
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(self._router), self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(self._router), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._config.reflection:
            names = (INFERENCE, ADMIN, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    def _listen(self) -> int:
        host, port, flag = self._config.grpc_host, self._config.grpc_port, "--grpc-port"
        credentials = server_credentials(self._config.tls) if self._config.tls is not None else None
        check_free(host, port, flag)
        address = host_port(host, port)
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise cannot_listen(host, port, flag, OSError(str(error))) from error

    async def _start_http(self, runner: web.AppRunner, port: int) -> int:
        await runner.setup()
        try:
            await web.TCPSite(runner, self._config.http_host, port).start()
        except OSError as error:
            raise cannot_listen(self._config.http_host, port, "--http-port", error) from error
        return int(runner.addresses[0][1])

    async def _follow_readiness(self) -> None:
        """Keep health in step with the router. It is asked, since it has many reasons and no single moment."""
        reported = False
        while True:
            ready = self._router.ready() and not self._in_flight.draining
            if ready != reported:
                await self._report(ready=ready)
                reported = ready
            await asyncio.sleep(_HEALTH_PERIOD_S)

    async def _report(self, *, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for service in ("", INFERENCE, ADMIN):
            await self._health.set(service, status.SERVING if ready else status.NOT_SERVING)


def server_options(max_prompt_bytes: int) -> list[tuple[str, int]]:
    """gRPC's options: sizes, and keepalive that lets clients ping every 10 s where gRPC's default is 5 minutes."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_prompt_bytes * _TRANSPORT_FACTOR),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
