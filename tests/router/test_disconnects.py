"""A caller that leaves, wherever its request is by then: nothing of it stays, and its worker is told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from router.config import OverloadConfig
from router.core import Router
from router.server import RouterServer
from tests.router.fake_worker import FakeWorker, Submitted, says_one_token, stays_quiet
from tests.router.rig import all_ready, eventually, request, rig, tokens
from tests.router.test_fleet import fakes
from tests.router.test_overload import served
from warmkv.v1 import common_pb2, inference_pb2, inference_pb2_grpc, worker_pb2

QUOTA = 600  # ten come back in a second
SETTINGS = OverloadConfig(max_worker_queue_s=1.0, tokens_per_minute={"a": QUOTA})
Call = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class Obedient(FakeWorker):
    """Ends a job when it is told to; `pending` is the backlog that it reports, in tokens."""

    pending = 0

    async def _listen(self, requests: Any) -> None:
        async for heard in requests:
            self.heard.append(heard)
            if heard.HasField("submit"):
                self.submitted(self, heard.submit)
            if heard.HasField("cancel"):
                begun = self.submitted is says_one_token
                output = worker_pb2.SequenceOutput(
                    job_id=heard.cancel.job_id,
                    finish_reason=common_pb2.FINISH_REASON_CANCELLED,
                    completion_tokens=int(begun),
                    fates=common_pb2.TokensByFate(computed=40) if begun else None,
                )
                self.say(step=worker_pb2.Step(outputs=[output]))

    async def _beat(self) -> None:
        while True:
            load = worker_pb2.Load(pending_prefill_tokens=self.pending, prefill_fixed_ms=1.0, prefill_token_ms=1.0)
            self.say(step=worker_pb2.Step(load=load))
            await asyncio.sleep(0.05)


@asynccontextmanager
async def called(server: RouterServer) -> AsyncIterator[tuple[grpc.aio.Channel, Call]]:
    """A call over a channel of its own."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        yield channel, stub.Generate(request(tokens(1, 40), 500), metadata=(("authorization", "Bearer a"),))


async def leave(how: str, channel: grpc.aio.Channel, call: Call) -> None:
    if how == "cancels":
        call.cancel()
    else:
        await channel.close()


def what_is_left(router: Router) -> dict[str, int]:
    """All that would be left of a request."""
    room, traffic = router._room, router._traffic
    return {
        "in flight": router._admission.in_flight,
        "waiting": len(room) + room.tokens + room._queue.work_ms.__ceil__(),
        "unanswered": room._lateness.silent(),
        "sent": len(traffic._flights) + sum(traffic._in_flight.values()),
        "prefilling": sum(map(len, traffic._prefilling.values())),
        "jobs": sum(link.jobs for link in router.fleet.links()),
    }


async def nothing_is_left(router: Router) -> None:
    await eventually(lambda: not any(what_is_left(router).values()))
    assert router._room.check()
    assert router._traffic.check()
    assert dict(router.stats(show_prompts=False).requests) == {"CANCELLED": 1}


def tokens_taken(router: Router) -> float:
    """Of the tenant's quota; some seconds of it have come back meanwhile."""
    return router._room._quotas.wait_s("a", QUOTA) * QUOTA / 60


HOWS = pytest.mark.parametrize("how", ["cancels", "hangs up"])


@HOWS
@pytest.mark.asyncio
async def test_a_caller_that_leaves_while_it_waits_for_its_turn(how: str) -> None:
    worker = Obedient("w0", stays_quiet)
    worker.pending = 1_000_000
    async with fakes(worker, overload=SETTINGS) as (fleet, router), served(fleet, router) as (server, _):
        await all_ready(router, 1)
        await eventually(lambda: (report := router.fleet.link("w0").report) and report.load.pending_tokens)
        async with called(server) as (channel, call):
            await eventually(lambda: len(router._room) == 1)
            await leave(how, channel, call)
            await nothing_is_left(router)
        assert "submit" not in worker.kinds()
        assert tokens_taken(router) == 0


@HOWS
@pytest.mark.parametrize(("submitted", "taken"), [(stays_quiet, 0), (says_one_token, 41)], ids=["sent", "streaming"])
@pytest.mark.asyncio
async def test_a_caller_that_leaves_when_its_request_was_sent(how: str, submitted: Submitted, taken: int) -> None:
    worker = Obedient("w0", submitted)
    async with fakes(worker, overload=SETTINGS) as (fleet, router), served(fleet, router) as (server, _):
        await all_ready(router, 1)
        async with called(server) as (channel, call):
            if submitted is says_one_token:
                part = await call.read()
                assert isinstance(part, inference_pb2.GenerateResponse)
                assert list(part.token_ids) == [7]
            await eventually(lambda: "submit" in worker.kinds())
            assert what_is_left(router)["jobs"] == 1
            await leave(how, channel, call)
            await nothing_is_left(router)
        (job,) = [heard.submit.job_id for heard in worker.heard if heard.HasField("submit")]
        assert [heard.cancel.job_id for heard in worker.heard if heard.HasField("cancel")] == [job]
        assert tokens_taken(router) <= taken


@HOWS
@pytest.mark.asyncio
async def test_a_caller_that_leaves_while_no_worker_is_there(how: str) -> None:
    async with rig() as fleet:
        router = await fleet.start_router(overload=SETTINGS)
        async with served(fleet, router) as (server, _), called(server) as (channel, call):
            await eventually(lambda: router._admission.in_flight == 1)
            await leave(how, channel, call)
            await nothing_is_left(router)
        assert tokens_taken(router) == 0
