"""What every call meets at the edge: ids, credentials, deadlines, drain, rich errors, and the closing of generators."""

import asyncio
import json
import logging

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from router.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotSupported,
    NoWorkerAvailable,
    Overloaded,
    PoisonRequest,
    RouterError,
    Unauthenticated,
    WorkerLost,
)
from router.protocol import Caller, Role
from tests.router.edge import WordRouter, channel_to, raised_by, serving
from warmkv.v1 import inference_pb2, inference_pb2_grpc

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
GENERATE = "/warmkv.v1.InferenceService/Generate"
TOKENIZE = "/warmkv.v1.InferenceService/Tokenize"


def asks(max_tokens: int = 3) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest()
    request.input.text = "hi"
    request.sampling.max_tokens = max_tokens
    return request


async def failure(call: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


def details_of(error: grpc.aio.AioRpcError) -> dict[str, object]:
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.message == error.details()
    found: dict[str, object] = {}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, error_details_pb2.BadRequest):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    return found


@pytest.mark.asyncio
async def test_ids_of_the_caller_are_echoed_and_reach_the_router() -> None:
    router = WordRouter()
    async with serving(router) as server, channel_to(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(asks(), metadata=(("x-request-id", "abc-1"), ("traceparent", TRACEPARENT)))
        sent = dict(await call.initial_metadata())
        pieces = [piece async for piece in call]
    assert (sent["x-request-id"], sent["traceparent"]) == ("abc-1", TRACEPARENT)
    assert pieces[-1].route.request_id == "abc-1"
    assert router.calls[0][1].traceparent == TRACEPARENT


@pytest.mark.asyncio
async def test_malformed_ids_are_replaced_by_new_ones_every_time() -> None:
    async with serving(WordRouter()) as server, channel_to(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        seen = []
        for _ in range(2):
            call = stub.Generate(asks(), metadata=(("x-request-id", "a b;c"), ("traceparent", "00-zero-zero-00")))
            seen.append(dict(await call.initial_metadata()))
            await call.read()
            call.cancel()
    assert len({ids["x-request-id"] for ids in seen} | {"a b;c"}) == 3
    assert all(ids["traceparent"].startswith("00-") and ids["traceparent"] != "00-zero-zero-00" for ids in seen)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("bad. Do better.", field="sampling.top_p"),
        Unauthenticated("who? Send a key."),
        Overloaded("full. Wait.", retry_after_s=1.5),
        PoisonRequest("poison. Change it."),
        NoWorkerAvailable("none. Wait.", retry_after_s=0.25),
        WorkerLost("lost. Send it again.", worker="w3"),
        DeadlineExceeded("late. Allow more time."),
        NotSupported("cannot. Use Ray."),
    ],
    ids=raised_by,
)
@pytest.mark.parametrize("after", [0, 2])
async def test_every_error_arrives_with_code_reason_and_details(error: RouterError, after: int) -> None:
    router = WordRouter()
    router.fail_after = (after, error)
    async with serving(router) as server, channel_to(server) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks(), metadata=(("x-request-id", "r-9"),))
        raised = await failure(call)
    assert (raised.code(), raised.details()) == (error.code, error.message)
    found = details_of(raised)
    info = found["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (error.reason, "warmkv")
    assert dict(info.metadata) == {**error.metadata, "request_id": "r-9"}
    retry, bad = found.get("RetryInfo"), found.get("BadRequest")
    assert (retry.retry_delay.ToNanoseconds() / 1e9 if retry else None) == error.retry_after_s
    assert (bad.field_violations[0].field if bad else None) == error.metadata.get("field")


@pytest.mark.asyncio
async def test_a_defect_is_internal_with_an_id_that_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    router = WordRouter()
    router.failures = [ZeroDivisionError("secret detail")]
    async with serving(router) as server, channel_to(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        raised = await failure(stub.Generate(asks(), metadata=(("x-request-id", "d-1"),)))
        after = [piece async for piece in stub.Generate(asks())]
    assert raised.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (raised.details() or "")
    assert details_of(raised)["ErrorInfo"].metadata["request_id"] == "d-1"  # type: ignore[attr-defined]
    assert [record.exc_info for record in caplog.records if record.levelno == logging.ERROR]
    assert len(after) == 3


@pytest.mark.asyncio
async def test_an_error_text_longer_than_trailers_may_be_still_arrives() -> None:
    router = WordRouter()
    router.failures = [InvalidRequest("ü" * 100_000, field="x" * 50_000)]
    async with serving(router) as server, channel_to(server) as channel:
        raised = await failure(inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks()))
    assert raised.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (raised.details() or "").startswith("üüü")


@pytest.mark.asyncio
@pytest.mark.parametrize("data", [b"\x12\x04\x0a\x02\xff\xfe", b"\xff\xff\xff"], ids=["utf8", "garbage"])
@pytest.mark.parametrize("method", [TOKENIZE, GENERATE])
async def test_bytes_that_are_no_message_are_an_invalid_request(method: str, data: bytes) -> None:
    router = WordRouter()
    async with serving(router) as server, channel_to(server) as channel:
        if method == GENERATE:
            raised = await failure(channel.unary_stream(method)(data))
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(method)(data)
            raised = caught.value
    assert raised.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in (raised.details() or "")
    assert details_of(raised)["ErrorInfo"].reason == "INVALID_REQUEST"  # type: ignore[attr-defined]
    assert not router.calls


@pytest.mark.asyncio
async def test_tenant_comes_from_the_key_and_wrong_headers_are_refused() -> None:
    def only_a(token: str | None) -> Caller:
        if token != "a":
            raise Unauthenticated("no. Send a key.")
        return Caller("alpha", Role.USER, "alpha")

    router = WordRouter()
    async with serving(router, only_a) as server, channel_to(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert [piece async for piece in stub.Generate(asks(), metadata=(("authorization", "bearer a"),))]
        for header in ("Bearer b", "Basic a", "Bearer ", "a"):
            raised = await failure(stub.Generate(asks(), metadata=(("authorization", header),)))
            assert raised.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await failure(stub.Generate(asks()))).code() is grpc.StatusCode.UNAUTHENTICATED
    assert [caller.tenant for caller, _ in router.calls] == ["alpha"]


@pytest.mark.asyncio
async def test_cancelling_closes_the_generator_while_it_waits() -> None:
    router = WordRouter()
    router.delay_s = 60
    async with serving(router) as server, channel_to(server) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks())
        await router.started.wait()
        assert not router.closed.is_set()
        call.cancel()
        await asyncio.wait_for(router.closed.wait(), 5)


@pytest.mark.asyncio
async def test_a_slow_reader_holds_the_generator_back_and_its_cancel_closes_it() -> None:
    """The generator is then suspended at a yield, where nothing but aclose reaches it."""
    router = WordRouter()
    router.pad = "x" * 10_000
    async with serving(router) as server, channel_to(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(asks(max_tokens=100_000))
        await call.read()
        before = -1
        while before != router.sent:  # until nothing more fits into the windows
            before = router.sent
            await asyncio.sleep(0.2)
        assert router.sent < 5_000
        fast = [piece async for piece in stub.Generate(asks(max_tokens=2))]
        assert len(fast) == 2
        router.closed.clear()
        call.cancel()
        await asyncio.wait_for(router.closed.wait(), 5)


@pytest.mark.asyncio
async def test_a_client_that_disconnects_closes_the_generator() -> None:
    router = WordRouter()
    router.delay_s = 0.01
    async with serving(router) as server:
        async with channel_to(server) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks(max_tokens=100_000))
            await call.read()
        await asyncio.wait_for(router.closed.wait(), 5)


@pytest.mark.asyncio
async def test_the_callers_deadline_reaches_the_router_and_ends_the_call() -> None:
    router = WordRouter()
    router.delay_s = 60
    async with serving(router) as server, channel_to(server) as channel:
        raised = await failure(inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks(), timeout=0.3))
        assert raised.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(router.closed.wait(), 5)
    deadline = router.calls[0][1].deadline
    assert deadline is not None
    assert deadline <= asyncio.get_running_loop().time()


@pytest.mark.asyncio
async def test_a_caller_without_a_deadline_gets_the_default_one() -> None:
    router = WordRouter()
    router.delay_s = 60
    async with serving(router, default_deadline_s=0.2) as server, channel_to(server) as channel:
        raised = await failure(inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks()))
    assert raised.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details_of(raised)["ErrorInfo"].reason == "DEADLINE_EXCEEDED"  # type: ignore[attr-defined]
    assert router.closed.is_set()


@pytest.mark.asyncio
async def test_without_a_default_nobody_gets_a_deadline() -> None:
    router = WordRouter()
    async with serving(router, default_deadline_s=None) as server, channel_to(server) as channel:
        assert [piece async for piece in inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks())]
    assert router.calls[0][1].deadline is None


@pytest.mark.asyncio
async def test_drain_refuses_new_work_by_name_and_lets_the_old_finish() -> None:
    router = WordRouter()
    router.gate.clear()
    async with serving(router) as server, channel_to(server) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        running = asyncio.create_task(_collect(stub.Generate(asks(max_tokens=5))))
        await router.started.wait()
        draining = asyncio.create_task(server.drain())
        await asyncio.sleep(0.05)
        raised = await failure(stub.Generate(asks()))
        assert raised.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(raised)["ErrorInfo"].reason == "DRAINING"  # type: ignore[attr-defined]
        assert not draining.done()
        router.gate.set()
        assert await running == 5
        assert await draining is True


@pytest.mark.asyncio
async def test_drain_gives_up_on_requests_that_outlive_its_grace() -> None:
    router = WordRouter()
    router.delay_s = 60
    async with serving(router, drain_grace_s=0.1) as server, channel_to(server) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks())
        await router.started.wait()
        assert await server.drain() is False
        await server.stop()
        assert router.closed.is_set()
        raised = await failure(call)
    assert raised.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(raised)["ErrorInfo"].reason == "DRAINING"  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_a_method_that_nobody_serves_is_unimplemented() -> None:
    async with serving(WordRouter()) as server, channel_to(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/warmkv.v1.InferenceService/Nope")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.asyncio
async def test_every_log_line_of_a_request_carries_its_ids_and_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    from router.jsonlog import log_as_json

    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    router = WordRouter()
    router.failures = [NoWorkerAvailable("none. Wait.")]
    try:
        log_as_json("DEBUG")
        async with serving(router) as server, channel_to(server) as channel:
            sent = (("x-request-id", "log-1"), ("traceparent", TRACEPARENT), ("authorization", "Bearer hush"))
            await failure(inference_pb2_grpc.InferenceServiceStub(channel).Generate(asks(), metadata=sent))
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    text = capsys.readouterr().err
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    ours = [line for line in lines if line["logger"] == "router.interceptors"]
    assert [line["level"] for line in ours] == ["WARNING", "DEBUG"]
    assert {(line["request_id"], line["traceparent"]) for line in ours} == {("log-1", TRACEPARENT)}
    assert ours[1]["code"] == "UNAVAILABLE"
    assert "hush" not in text


async def _collect(call: grpc.aio.UnaryStreamCall) -> int:
    return len([piece async for piece in call])
