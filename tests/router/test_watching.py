"""Watching requests over real gRPC, before real worker servers: what is told, to whom, what a slow reader loses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import pytest

from router import watching
from router.core import Router
from router.protocol import Caller, Role
from router.server import RouterServer
from tests.router.edge import serving
from tests.router.fake_worker import FakeWorker, stays_quiet
from tests.router.rig import ADMIN, ALICE, BLOCK, all_ready, context, eventually, generate, request, rig, tokens
from tests.router.test_fleet import fakes
from warmkv.client import AsyncClient, WarmkvError
from warmkv.errors import InvalidRequest, Overloaded, PermissionDenied
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2

SALT = b"12345678"


@asynccontextmanager
async def watched(
    workers: int = 1, options: Sequence[tuple[str, int]] = (), **settings: object
) -> AsyncIterator[tuple[Router, AsyncClient]]:
    """A router with real workers, and an operator's client."""
    async with rig(workers) as fleet:
        router = await fleet.start_router(**settings)
        await all_ready(router, workers)
        async with serving(cast("Any", router)) as server, client_of(server, options) as client:
            yield router, client


def client_of(server: RouterServer, options: Sequence[tuple[str, int]] = ()) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{server.grpc_port}", channel_options=options)


async def told(
    stream: AsyncIterator[admin_pb2.WatchRequestsResponse], count: int
) -> tuple[list[admin_pb2.RequestRecord], int]:
    """So many records, or as many as came with those that were missed; and how many were missed."""
    records: list[admin_pb2.RequestRecord] = []
    missed = 0
    async with asyncio.timeout(20):
        while len(records) + missed < count:
            message = await anext(stream)
            records += message.requests
            missed = message.missed
    return records, missed


def names(record: admin_pb2.RequestRecord) -> list[bytes]:
    packed = record.block_names
    return [packed[at : at + watching.NAME_BYTES] for at in range(0, len(packed), watching.NAME_BYTES)]


@pytest.mark.asyncio
async def test_a_request_is_told_with_what_became_of_it() -> None:
    async with watched() as (router, client):
        stream = client.watch_requests(salt=SALT)
        first = await anext(stream)
        assert (list(first.requests), first.block_size) == ([], BLOCK)
        cache = common_pb2.CacheDirectives(affinity_key="the user's secret name", ttl_seconds=77)
        body = request(tokens(1, 3 * BLOCK + 5), 4, priority=3, cache=cache)
        cold, warm = await generate(router, body), await generate(router, body)
        records, missed = await told(stream, 2)
        assert missed == 0
        for record, answer in zip(records, (cold, warm), strict=True):
            assert (record.prompt_tokens, record.generated_tokens) == (3 * BLOCK + 5, 4)
            assert record.fates == answer.usage.prompt_tokens_by_fate
            assert record.worker == answer.route.worker == "w0"
            assert record.ttft_ms == pytest.approx(answer.route.ttft_ms)
            assert 0 < record.ttft_ms <= record.duration_ms < 60_000
            assert (record.code, record.finish_reason) == ("OK", common_pb2.FINISH_REASON_LENGTH)
            assert (record.priority, record.ttl_seconds, record.turn) == (3, 77, 0)
        assert records[1].fates.device == 3 * BLOCK
        assert first.time_us <= records[0].arrived_us < records[1].arrived_us
        assert names(records[0]) == names(records[1])
        assert len(set(names(records[0]))) == 3
        raw = b"".join(record.SerializeToString() for record in records)
        assert not any(word in raw for word in (b"secret", b"alice", b"user"))
        await cast("Any", stream).aclose()


@pytest.mark.asyncio
async def test_names_are_shared_as_far_as_prompts_are_alike_and_not_between_trust_groups() -> None:
    async with watched(2) as (router, client):
        stream = client.watch_requests()
        await anext(stream)
        trunk = tokens(1, 2 * BLOCK)
        for tail, caller in ((2, ALICE), (3, ALICE), (2, Caller("bob", Role.USER, "bob"))):
            await generate(router, request(trunk + tokens(tail, BLOCK)), caller=caller)
        one, other, of_bob = (await told(stream, 3))[0]
        assert names(one)[:2] == names(other)[:2]
        assert names(one)[2] != names(other)[2]
        assert not set(names(one)) & set(names(of_bob))
        assert one.tenant == other.tenant != of_bob.tenant
        assert one.session == b""


@pytest.mark.asyncio
async def test_references_are_alike_on_all_routers_for_one_salt_only() -> None:
    async with rig(1) as fleet:
        references = []
        for name, salt in (("r0", SALT), ("r1", SALT), ("r2", b"another one")):
            router = await fleet.start_router(name)
            await all_ready(router, 1)
            async with aclosing(router.watch_requests(_asked(salt=salt), caller=ADMIN)) as stream:
                await anext(stream)
                keyed = common_pb2.CacheDirectives(affinity_key="u7")
                await generate(router, request(tokens(1, 20), cache=keyed))
                record = (await told(stream, 1))[0][0]
                references.append((record.tenant, record.session))
                assert names(record)  # blocks have the same names everywhere
    assert references[0] == references[1]
    assert not set(references[0]) & set(references[2])
    assert references[0][0] != references[0][1]


def _asked(**fields: object) -> admin_pb2.WatchRequestsRequest:
    return admin_pb2.WatchRequestsRequest(**fields)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_a_request_that_came_before_the_watch_is_not_told() -> None:
    async with watched() as (router, client):
        other = client.watch_requests()
        await anext(other)  # the first watcher makes the router keep what a record needs
        early = asyncio.create_task(generate(router, request(tokens(1, 30), 200)))
        await eventually(lambda: router.stats(show_prompts=False).recent)
        stream = client.watch_requests()
        await anext(stream)
        await early
        await generate(router, request(tokens(2, 40)))
        records, _ = await told(stream, 1)
        assert [record.prompt_tokens for record in records] == [40]
        assert records[0].generated_tokens == 2


@pytest.mark.asyncio
async def test_what_is_wrong_is_no_traffic_and_what_is_cancelled_is() -> None:
    async with fakes(FakeWorker("w0", stays_quiet)) as (_, router), _serving(router) as client:
        await all_ready(router, 1)
        stream = client.watch_requests()
        await anext(stream)
        with pytest.raises(Exception, match="max_tokens"):
            await generate(router, request(tokens(1, 40), 1 << 20))
        left = asyncio.create_task(generate(router, request(tokens(2, 50))))
        await eventually(lambda: router.stats(show_prompts=False).recent)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        await router.close()  # the worker never says a last word
        records, _ = await told(stream, 1)
        assert [(one.code, one.prompt_tokens) for one in records] == [("CANCELLED", 50)]
        assert not records[0].HasField("fates")
        assert not records[0].HasField("ttft_ms")


@asynccontextmanager
async def _serving(router: Router) -> AsyncIterator[AsyncClient]:
    async with serving(cast("Any", router)) as server, client_of(server) as client:
        yield client


@pytest.mark.asyncio
async def test_a_slow_reader_loses_requests_is_told_how_many_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "_MAX_WAITING_BYTES", 20_000)
    count, long = 150, [n % 1000 for n in range(400 * BLOCK)]
    # Without these the client's own buffers would take it all.
    small = (("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0))
    async with watched(options=small) as (router, client):
        stream = client.watch_requests()
        await anext(stream)
        for number in range(count):  # 3,200 bytes of names each; nobody reads
            await generate(router, request([number, *long], 1))
        records, missed = await told(stream, count)
        assert missed > 0
        assert len(records) + missed == count
        await generate(router, request(tokens(5, 40), 1))
        last = await anext(stream)
        while not last.requests:
            last = await anext(stream)
        assert (len(last.requests), last.missed) == (1, missed)


@pytest.mark.asyncio
async def test_text_is_told_only_where_the_settings_show_prompts_and_only_when_asked() -> None:
    chat = inference_pb2.GenerateRequest()
    chat.input.chat.messages.add(role="user", content="my secret plan is long enough for blocks")
    chat.sampling.max_tokens = 1
    async with watched() as (router, client):
        with pytest.raises(PermissionDenied, match="show_prompts"):
            await anext(client.watch_requests(with_text=True))
    async with watched(show_prompts=True) as (router, client):
        plain, whole = client.watch_requests(), client.watch_requests(with_text=True)
        await anext(plain)
        await anext(whole)
        await generate(router, chat)
        record = (await told(plain, 1))[0][0]
        assert record.text == ""
        assert record.turn == 1
        assert "my secret plan" in (await told(whole, 1))[0][0].text


@pytest.mark.asyncio
async def test_watchers_are_counted_and_leave_nothing_behind() -> None:
    async with watched() as (router, client):
        with pytest.raises(InvalidRequest, match="8 to 64"):
            await anext(client.watch_requests(salt=b"short"))
        streams = [client.watch_requests() for _ in range(watching.MAX_WATCHERS)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Overloaded, match="watchers"):
            await anext(client.watch_requests())
        for stream in streams:
            await cast("Any", stream).aclose()
        await eventually(lambda: not router._watchers._watches)
        await anext(client.watch_requests())


@pytest.mark.asyncio
async def test_while_nobody_watches_nothing_is_kept() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        kept = []
        settle = router._accounts.settle
        router._accounts.settle = lambda work, entry: (kept.append(work.arrival), settle(work, entry))  # type: ignore[assignment,func-returns-value]
        async for _ in router.generate(request(tokens(1, 40)), caller=ALICE, context=context()):
            pass
        assert kept == [None]


@pytest.mark.asyncio
async def test_a_router_that_shuts_down_says_so_to_its_watchers() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 1)
        async with serving(cast("Any", router)) as server, client_of(server) as client:
            stream = client.watch_requests()
            await anext(stream)
            stop = asyncio.create_task(server.stop())
            with pytest.raises(WarmkvError, match="DRAINING"):
                await told(stream, 1)
            await stop
