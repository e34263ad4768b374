"""The HTTP side of a router: metrics, health, the dashboard and its data.

    GET  /              the dashboard           GET /static/NAME   its parts
    GET  /metrics       Prometheus, OpenMetrics GET /healthz, /readyz
    GET  /api/stats     the numbers, once       GET /events        one frame a second (server-sent events)
    GET  /api/cache     the tiers of all workers
    GET  /api/policy    the policy in force     POST /api/policy   sets it (role admin, same origin, CSRF token)

With API keys configured, /api and /events ask for one (`Authorization: Bearer KEY`). The page itself, metrics and
health hold no prompts and stay open, as scrapers and probes expect. Every answer but those two probes is refused when
the Host header is not ours (see `router.web_guard`). Errors are `{"error": {"reason", "message"}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from google.protobuf.json_format import ParseDict, ParseError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from router.assets import load_assets
from router.auth import bearer_token
from router.config import RouterConfig
from router.errors import (
    Draining,
    InternalError,
    InvalidRequest,
    NoWorkerAvailable,
    PermissionDenied,
    RouterError,
    Unauthenticated,
)
from router.protocol import Caller, Role, RouterApi
from router.stats_feed import StatsFeed
from router.stats_json import stats_to_plain, to_plain
from router.web_guard import SECURITY_HEADERS, HostGuard, check_csrf, check_same_origin
from warmkv.v1 import admin_pb2

log = logging.getLogger(__name__)

Authenticate = Callable[[str | None], Caller]

_MAX_BODY_BYTES = 64 << 10
_PROBES = frozenset({"/healthz", "/readyz"})


def create_app(
    router: RouterApi,
    config: RouterConfig,
    *,
    registry: CollectorRegistry,
    authenticate: Authenticate,
    period_s: float = 1.0,
    max_listeners: int = 64,
    max_queued_frames: int = 8,
    new_token: Callable[[], str] = secrets.token_urlsafe,
) -> web.Application:
    """The application; it samples statistics from its start-up until its clean-up.

    Args:
        registry: what /metrics exports. authenticate: bearer token (None: none sent) to caller, raises RouterError.
        period_s: seconds between frames. max_listeners: open /events streams at once. max_queued_frames: how far a
        listener may fall behind before it is dropped. new_token: makes the CSRF token.
    """
    feed = StatsFeed(
        lambda show_prompts: router.stats(show_prompts=show_prompts),
        period_s=period_s,
        max_listeners=max_listeners,
        max_queued_frames=max_queued_frames,
        about={"router": config.name, "model": config.model_name, "period_ms": round(period_s * 1000)},
    )
    handlers = _Handlers(router, config, registry, authenticate, feed, new_token())
    app = web.Application(middlewares=[_errors_as_json, _guard(HostGuard(config))], client_max_size=_MAX_BODY_BYTES)
    app.add_routes(handlers.routes())
    app.on_response_prepare.append(_add_headers)
    app.cleanup_ctx.append(lambda _: _feeding(feed))
    app.on_shutdown.append(lambda _: _end(feed))
    return app


class _Handlers:
    """One method a route."""

    def __init__(
        self,
        router: RouterApi,
        config: RouterConfig,
        registry: CollectorRegistry,
        authenticate: Authenticate,
        feed: StatsFeed,
        csrf_token: str,
    ) -> None:
        self._router = router
        self._config = config
        self._registry = registry
        self._authenticate = authenticate
        self._feed = feed
        self._csrf_token = csrf_token
        self._assets = load_assets()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self.page),
            web.get("/favicon.ico", self.favicon),
            web.get("/static/{name}", self.static),
            web.get("/metrics", self.metrics),
            web.get("/healthz", self.healthz),
            web.get("/readyz", self.readyz),
            web.get("/api/stats", self.stats),
            web.get("/api/cache", self.cache),
            web.get("/events", self.events),
            web.get("/api/policy", self.get_policy),
            web.post("/api/policy", self.set_policy),
        ]

    async def page(self, request: web.Request) -> web.Response:
        return self._assets["index.html"].response(request)

    async def favicon(self, request: web.Request) -> web.Response:
        return self._assets["favicon.svg"].response(request)

    async def static(self, request: web.Request) -> web.Response:
        asset = self._assets.get(request.match_info["name"])
        if asset is None:
            raise web.HTTPNotFound(text="The dashboard has no such part. Start at /.")
        return asset.response(request)

    async def metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(self, _: web.Request) -> web.Response:
        if not self._router.ready():
            stats = self._router.stats(show_prompts=False)
            raise _not_ready(stats.workers, stats.catching_up)
        return web.json_response({"status": "ready"})

    async def stats(self, request: web.Request) -> web.Response:
        caller = self._caller(request)
        return _json(stats_to_plain(self._router.stats(show_prompts=self._may_see_prompts(request, caller))))

    async def cache(self, request: web.Request) -> web.Response:
        self._caller(request)
        return _json(to_plain(self._router.cache.tiers()))

    async def events(self, request: web.Request) -> web.StreamResponse:
        caller = self._caller(request)
        show_prompts = self._may_see_prompts(request, caller)
        with self._feed.listen(show_prompts=show_prompts, on_drop=lambda: _abort(request)) as listener:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
            await response.prepare(request)
            # The peer may leave at any write; that is how such a stream ends.
            with contextlib.suppress(ConnectionError):
                await response.write(self._feed.history())
                async for frame in listener.frames():
                    await response.write(frame)
        return response

    async def get_policy(self, request: web.Request) -> web.Response:
        caller = self._caller(request)
        body = to_plain(self._router.get_policy())
        return _json({**body, "role": caller.role.value, "csrf_token": self._csrf_token})

    async def set_policy(self, request: web.Request) -> web.Response:
        check_same_origin(request.headers)
        caller = self._caller(request)
        if caller.role is not Role.ADMIN:
            raise PermissionDenied("Setting the policy needs a key of the role admin. Use such a key.")
        check_csrf(request.headers, self._csrf_token)
        response = self._router.set_policy(_set_policy_request(await request.read()), caller=caller)
        await self._router.policy_kept()
        return _json(to_plain(response))

    def _caller(self, request: web.Request) -> Caller:
        header = request.headers.get("Authorization")
        if header is not None and not header.isascii():
            raise Unauthenticated("The authorization header holds bytes that no API key has. Check the key.")
        return self._authenticate(bearer_token(header))

    def _may_see_prompts(self, request: web.Request, caller: Caller) -> bool:
        asked = request.query.get("show_prompts") == "1"
        return asked and self._config.show_prompts and caller.role is Role.ADMIN


def _set_policy_request(body: bytes) -> admin_pb2.SetPolicyRequest:
    try:
        change = json.loads(body)
        if not isinstance(change, dict):
            raise TypeError("it is no JSON object")
        return ParseDict(change, admin_pb2.SetPolicyRequest())
    except (ValueError, TypeError, AttributeError, RecursionError, ParseError) as error:
        raise InvalidRequest(
            f"The body is not a SetPolicyRequest: {error}. Send "
            '{"policy": {"name": NAME, "weights": {NAME: NUMBER}}, "shared_tier_reads": BOOLEAN}, any part of it.'
        ) from error


def _not_ready(workers: Sequence[admin_pb2.WorkerInfo], catching_up: Sequence[str]) -> RouterError:
    if catching_up:
        names = ", ".join(catching_up)
        return NoWorkerAvailable(f"This router has yet to hear what {names} hold. Wait; it does so for seconds only.")
    states = [admin_pb2.WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower() for worker in workers]
    if "ready" in states:
        return Draining("This router is shutting down. Send requests to another one.")
    if not workers:
        return NoWorkerAvailable("No worker has been found yet. Wait, or look at `warmkv status`.")
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return NoWorkerAvailable(f"No worker takes requests: {counts}. `warmkv status` tells why.")


def _json(body: dict[str, Any]) -> web.Response:
    return web.json_response(body, headers={"Cache-Control": "no-store"})


def _guard(hosts: HostGuard) -> Middleware:
    @web.middleware
    async def check_host(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in _PROBES:
            hosts.check(request.headers.get("Host"))
        return await handler(request)

    return check_host


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except RouterError as error:
        return _error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        message = error.text or error.reason
        return _error_json(error.status, error.reason.upper().replace(" ", "_"), message, dict(_allow(error)))
    except Exception:
        error_id = secrets.token_hex(8)
        log.exception("http request failed", extra={"error_id": error_id, "path": request.path})
        return _error_response(InternalError(f"A defect of ours. Report it with the log lines of error_id {error_id}."))


def _error_response(error: RouterError) -> web.Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _error_json(error.http_status, error.reason, error.message, headers)


def _error_json(status: int, reason: str, message: str, headers: dict[str, str]) -> web.Response:
    body = {"error": {"reason": reason, "message": message}}
    return web.json_response(body, status=status, headers={"Cache-Control": "no-store", **headers})


def _allow(error: web.HTTPException) -> list[tuple[str, str]]:
    return [(name, value) for name, value in error.headers.items() if name == "Allow"]


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(SECURITY_HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")


def _abort(request: web.Request) -> None:
    # Closing would wait for the peer to read what is buffered, which is what a slow one does not do.
    if request.transport is not None:
        request.transport.abort()


async def _feeding(feed: StatsFeed) -> AsyncIterator[None]:
    task = asyncio.create_task(feed.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _end(feed: StatsFeed) -> None:
    feed.end()
