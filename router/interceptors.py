"""The edge of every call of ours: ids, credentials, deadline, drain, and errors as rich statuses.

One interceptor does all of it, in one order that can be read: ids first (so that every later line can carry them), then
the request's bytes, credentials, the deadline, the call itself, and last the error. Methods of other packages (health,
reflection) pass untouched: probes have no keys.

Streams are written by `context.write` in the handler's own task, with the servicer's generator closed on every way out.
(gRPC would leave the generator of a cancelled call to the garbage collector, and its request would run on.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from router.auth import bearer_token
from router.errors import DeadlineExceeded, Draining, InternalError, InvalidRequest, RouterError
from router.protocol import Caller, RequestContext
from router.status import to_grpc_status
from router.tracing import CURRENT_IDS, REQUEST_ID, TRACEPARENT, RequestIds, take_ids

log = logging.getLogger(__name__)

OUR_METHODS = "/warmkv.v1."
NEW_WORK = "/warmkv.v1.InferenceService/"
Context = grpc.aio.ServicerContext[Any, Any]
_CALL: ContextVar[tuple[Caller, RequestContext]] = ContextVar("warmkv_call")


def current_call() -> tuple[Caller, RequestContext]:
    """Who calls, and what came besides the body. For servicers behind an `EdgeInterceptor`."""
    return _CALL.get()


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a request whose bytes are not the message they should be."""

    problem: str


class InFlight:
    """The calls that run. Refuses new inference once it drains, and can end what is left."""

    def __init__(self) -> None:
        self._inference: set[asyncio.Task[Any]] = set()
        self._other: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._ending = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether new work is refused."""
        return self._draining

    @contextmanager
    def running(self, method: str) -> Iterator[None]:
        """Count the current task's call for as long as the block runs.

        Raises:
            Draining: on the way in, new inference once it drains; on the way out, a call that `end_all` ended.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("calls are counted by their task, and there is none")
        if self._draining and method.startswith(NEW_WORK):
            raise _gone()
        running = self._inference if method.startswith(NEW_WORK) else self._other
        running.add(task)
        if self._inference:
            self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if not self._ending:
                raise
            task.uncancel()
            raise _gone() from None
        finally:
            running.discard(task)
            if not self._inference:
                self._idle.set()

    def refuse_new(self) -> None:
        """Refuse new inference from now on."""
        self._draining = True

    async def drained(self) -> None:
        """Return when no inference runs."""
        await self._idle.wait()

    async def end_all(self) -> None:
        """End every call with Draining; return when they have ended."""
        self._draining = self._ending = True
        tasks = self._inference | self._other
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of the package `warmkv.v1`."""

    def __init__(
        self,
        authenticate: Callable[[str | None], Caller],
        in_flight: InFlight,
        *,
        default_deadline_s: float | None,
        take: Callable[[str | None, str | None], RequestIds] = take_ids,
    ) -> None:
        """Wire it.

        Args:
            authenticate: bearer token (None: none sent) to caller, raises Unauthenticated.
            in_flight: counts and refuses inference calls.
            default_deadline_s: for inference calls that set none; None: unlimited.
            take: makes a request's ids from those that were sent.
        """
        self._authenticate = authenticate
        self._in_flight = in_flight
        self._default_deadline_s = default_deadline_s
        self._take = take

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler, wrapped if it is ours; None for a method that nobody serves."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(OUR_METHODS):
            return handler
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        return wrap(method, handler)

    def _wrap_unary(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        async def unary(request: object, context: Context) -> object:
            return await self._run(method, request, context, lambda: handler.unary_unary(request, context))

        return grpc.unary_unary_rpc_method_handler(unary, _keeping(handler), handler.response_serializer)

    def _wrap_stream(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        async def stream(request: object, context: Context) -> None:
            async def write_all() -> None:
                generator: AsyncGenerator[object, None] = handler.unary_stream(request, context)
                async with aclosing(generator):
                    async for response in generator:
                        await context.write(response)

            await self._run(method, request, context, write_all)

        return grpc.unary_stream_rpc_method_handler(stream, _keeping(handler), handler.response_serializer)

    async def _run(
        self, method: str, request: object, context: Context, body: Callable[[], Awaitable[object]]
    ) -> object:
        started = time.monotonic()
        sent = _sent(context)
        ids = self._take(sent.get(REQUEST_ID), sent.get(TRACEPARENT))
        CURRENT_IDS.set(ids)
        await context.send_initial_metadata(((REQUEST_ID, ids.request_id), (TRACEPARENT, ids.traceparent)))
        code = "OK"
        try:
            return await self._call(method, request, sent, ids, context, body)
        except RouterError as error:
            code = error.code.name
            _log_refusal(method, error)
            await context.abort_with_status(to_grpc_status(error, ids.request_id))
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:
            code = "INTERNAL"
            log.exception("a call failed by a defect", extra={"method": method})
            await context.abort_with_status(to_grpc_status(_defect(), ids.request_id))
        finally:
            if log.isEnabledFor(logging.DEBUG):
                ms = round((time.monotonic() - started) * 1000, 3)
                log.debug("a call ended", extra={"method": method, "code": code, "ms": ms, "peer": context.peer()})
        return None

    async def _call(
        self,
        method: str,
        request: object,
        sent: dict[str, str],
        ids: RequestIds,
        context: Context,
        body: Callable[[], Awaitable[object]],
    ) -> object:
        if isinstance(request, _Undecodable):
            raise InvalidRequest(
                f"the request's bytes are not the message of {method} ({request.problem}). "
                "Send valid UTF-8 in text fields, and use the stubs of warmkv.v1."
            )
        caller = self._authenticate(bearer_token(sent.get("authorization")))
        deadline = self._deadline(method, context)
        _CALL.set((caller, RequestContext(ids.request_id, ids.traceparent, deadline)))
        with self._in_flight.running(method):
            return await _until(deadline, body)

    def _deadline(self, method: str, context: Context) -> float | None:
        """On the loop's clock. Watchers of statistics stay as long as they like."""
        left = context.time_remaining()
        if left is None and method.startswith(NEW_WORK):
            left = self._default_deadline_s
        return None if left is None else asyncio.get_running_loop().time() + left


async def _until(deadline: float | None, body: Callable[[], Awaitable[object]]) -> object:
    try:
        async with asyncio.timeout_at(deadline) as limit:
            return await body()
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded("the deadline passed before the answer was complete. Allow more time.") from error


def _keeping(handler: Any) -> Callable[[bytes], object]:
    """A deserializer that hands over what it cannot read, since gRPC would answer UNKNOWN by itself."""

    def deserialize(data: bytes) -> object:
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            return _Undecodable(str(error))

    return deserialize


def _sent(context: Context) -> dict[str, str]:
    """The metadata that is text; the first value where a key is repeated."""
    sent: dict[str, str] = {}
    pairs: Any = context.invocation_metadata() or ()
    for key, value in pairs:
        if isinstance(value, str):
            sent.setdefault(key, value)
    return sent


def _gone() -> Draining:
    return Draining("this router is shutting down. Send the request to another router, or again.")


def _defect() -> InternalError:
    return InternalError(
        "the router failed by a defect of its own. Report it with the request_id, which is in its log."
    )


def _log_refusal(method: str, error: RouterError) -> None:
    """Our failures and refused credentials are the operator's business; a caller's other mistakes are the caller's."""
    level = logging.WARNING if error.http_status >= 500 or error.http_status in (401, 403) else logging.DEBUG
    log.log(level, "a call was refused", extra={"method": method, "reason": error.reason, "problem": error.message})
