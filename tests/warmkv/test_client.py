"""Both clients against a real server: streams, chats, retries, errors, operators' calls."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from router.errors import (
    InternalError,
    InvalidRequest,
    NotSupported,
    NoWorkerAvailable,
    Overloaded,
    PermissionDenied,
    PoisonRequest,
    RouterError,
    Unauthenticated,
    WorkerLost,
)
from router.protocol import Caller, Role
from router.server import RouterServer
from tests.router.edge import WordRouter, raised_by, serving
from warmkv import errors
from warmkv.channel import Retry
from warmkv.client import AsyncClient, ChatMessage, Client, WarmkvError
from warmkv.requests import GenerateOptions, generate_request, warm_request
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2

ROOT = Path(__file__).resolve().parents[2]
FAST = Retry(first_s=0.01, most_s=0.02)
LOST = NoWorkerAvailable("none. Wait.")


@asynccontextmanager
async def connected(router: WordRouter, **options: Any) -> AsyncIterator[AsyncClient]:
    async with serving(router) as server, AsyncClient(address(server), **({"retry": FAST} | options)) as client:
        yield client


@contextmanager
def served_from_a_thread(router: WordRouter, **changes: object) -> Iterator[str]:
    """The router on a loop of its own, for tests of the client without asyncio."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    found: list[str] = []
    stop = asyncio.Event()

    async def serve() -> None:
        async with serving(router, **changes) as server:
            found.append(address(server))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def address(server: RouterServer) -> str:
    return f"127.0.0.1:{server.grpc_port}"


# Streams


@pytest.mark.asyncio
async def test_pieces_come_one_by_one_and_add_up() -> None:
    async with connected(WordRouter()) as client:
        stream = client.generate("hi", max_tokens=4, request_id="my-id")
        pieces = [piece.text async for piece in stream]
    assert pieces == ["0 ", "1 ", "2 ", "3 "]
    assert (stream.text, stream.token_ids, stream.finish_reason, stream.done) == (
        "0 1 2 3 ",
        [0, 1, 2, 3],
        "length",
        True,
    )
    fates = stream.usage.prompt_tokens_by_fate
    assert stream.usage.prompt_tokens == fates.computed + fates.device == 7
    assert (stream.route.worker, stream.route.request_id) == ("w0", "my-id")


def test_pieces_come_one_by_one_without_asyncio() -> None:
    with served_from_a_thread(WordRouter()) as target, Client(target) as client:
        stream = client.generate("hi", max_tokens=4)
        assert stream.finish_reason is None
        with pytest.raises(RuntimeError, match="last piece"):
            _ = stream.usage
        assert [piece.text for piece in stream] == ["0 ", "1 ", "2 ", "3 "]
        assert (stream.text, stream.finish_reason, stream.usage.completion_tokens) == ("0 1 2 3 ", "length", 4)
        assert list(stream) == []


def test_the_ten_lines_of_the_readme_run() -> None:
    with served_from_a_thread(WordRouter()) as target:
        code = f"""
from warmkv.client import Client

with Client("{target}", api_key="wk-any") as client:
    for piece in client.generate("Once upon a time", max_tokens=3):
        print(piece.text, end="")
    chat = client.chat(system="Be brief.")
    print(chat.send("What is a prefix cache?").result().text)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr) == ("0 1 2 0 1 2 \n", "")


@pytest.mark.asyncio
async def test_every_option_reaches_the_router() -> None:
    router = WordRouter()
    async with connected(router) as client:
        await client.generate(
            messages=[ChatMessage("user", "a"), {"role": "assistant", "content": "b", "token_ids": [4, 5]}],
            add_generation_prompt=False, max_tokens=2, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, seed=9,
            stop="x", stop_token_ids=[7], logprobs=2, ignore_eos=True, priority=-3, model="tiny", ttl=60,
            no_store=True, no_read=True, affinity_key="k", repetition_penalty=1.5, presence_penalty=0.5,
            frequency_penalty=-0.5, logit_bias={3: -100.0}, regex="a+", n=2, adapter="lora",
        ).result()  # fmt: skip
    request = router.requests[0]
    assert request.sampling == common_pb2.SamplingParams(
        max_tokens=2, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, seed=9, stop=["x"], stop_token_ids=[7],
        logprobs=2, ignore_eos=True, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5,
        logit_bias={3: -100.0}, constraint=common_pb2.Constraint(regex="a+"),
    )  # fmt: skip
    assert (request.n, request.adapter) == (2, "lora")
    assert request.cache == common_pb2.CacheDirectives(ttl_seconds=60, no_store=True, no_read=True, affinity_key="k")
    assert (request.priority, request.model) == (-3, "tiny")
    assert [(m.role, m.content, list(m.token_ids)) for m in request.input.chat.messages] == [
        ("user", "a", []),
        ("assistant", "b", [4, 5]),
    ]
    assert request.input.chat.HasField("add_generation_prompt")


def test_a_time_may_be_a_datetime_with_a_zone_or_seconds() -> None:
    time = datetime(2027, 1, 15, 8, 0, 0, 1, tzinfo=UTC)
    for given in (time, 1_800_000_001):
        asked = generate_request("hi", {"expires_at": given, "keep_priority": 9})
        assert asked.cache == common_pb2.CacheDirectives(expires_at=1_800_000_001, keep_priority=9)
    assert generate_request("hi", {"ttl": 5, "fixed_ttl": True}).cache.fixed_ttl
    warmed = warm_request({"text": "hi", "expires_at": time, "tenant": "t"}, workers=(), compute=True)
    assert (warmed.expires_at, warmed.prompt.text, warmed.tenant) == (1_800_000_001, "hi", "t")
    with pytest.raises(ValueError, match="no time zone"):
        generate_request("hi", {"expires_at": time.replace(tzinfo=None)})
    with pytest.raises(TypeError, match="ttll"):
        warm_request({"text": "hi", "ttll": 5}, workers=(), compute=True)


def test_what_is_left_out_stays_unset() -> None:
    request = generate_request("hi", {})
    assert request.sampling == common_pb2.SamplingParams()
    assert not request.sampling.HasField("temperature")
    assert not request.cache.HasField("ttl_seconds")
    assert generate_request(None, {"token_ids": [1, 2]}).input.token_ids.ids == [1, 2]
    assert generate_request(None, {"messages": []}).input.WhichOneof("kind") == "chat"


def test_a_constraint_is_one_of_four_and_a_schema_may_be_a_mapping() -> None:
    def constraint(**options: Any) -> common_pb2.Constraint:
        return generate_request("hi", GenerateOptions(**options)).sampling.constraint

    schema = {"type": "object", "title": "größe"}
    assert constraint(json_schema=schema) == constraint(json_schema=json.dumps(schema, ensure_ascii=False))
    assert constraint(grammar="start: /a/").grammar == "start: /a/"
    assert constraint(json_object=True).json_object
    assert not generate_request("hi", {}).sampling.HasField("constraint")
    with pytest.raises(TypeError, match="json_schema and regex"):
        constraint(json_schema="{}", regex="a")


@pytest.mark.asyncio
async def test_several_answers_come_interleaved_and_are_put_together_each_for_itself() -> None:
    async with connected(WordRouter()) as client:
        stream = client.generate("hi", max_tokens=3, n=3)
        assert [sample.finish_reason for sample in stream.samples] == [None] * 3
        pieces = [(piece.index, piece.text) async for piece in stream]
    assert pieces[:4] == [(0, "0 "), (1, "0 "), (2, "0 "), (0, "1 ")]
    assert [(each.index, each.text, each.token_ids) for each in stream.samples] == [
        (place, "0 1 2 ", [0, 1, 2]) for place in range(3)
    ]
    assert [sample.finish_reason for sample in stream.samples] == ["length"] * 3
    assert (stream.text, stream.token_ids, stream.finish_reason) == ("0 1 2 ", [0, 1, 2], "length")
    assert stream.usage.completion_tokens == 9


def test_several_answers_without_asyncio_can_be_left_half_read() -> None:
    with served_from_a_thread(WordRouter()) as target, Client(target) as client:
        with client.generate("hi", max_tokens=3, n=2) as stream:
            for piece in stream:
                if piece.index == 0 and piece.finish_reason:
                    break
        assert [sample.finish_reason for sample in stream.samples] == ["length", "cancelled"]
        with pytest.raises(RuntimeError, match="last piece"):
            _ = stream.usage
        with pytest.raises(TypeError, match="goes on from one answer"):
            client.chat(n=2).send("hi")


@pytest.mark.parametrize(
    "prompt",
    [(None, {}), ("a", {"token_ids": [1]}), (None, {"token_ids": [1], "messages": []}), ("a", {"tempreture": 1})],
)
def test_misuse_is_a_type_error_before_anything_is_sent(prompt: tuple[str | None, Any]) -> None:
    with pytest.raises(TypeError):
        generate_request(*prompt)
    with pytest.raises(TypeError, match="unknown options"):
        Client(api_kee="x")  # type: ignore[call-arg]


# Cancelling


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["cancel", "leave", "task"])
async def test_leaving_a_stream_frees_the_request(how: str) -> None:
    router = WordRouter()
    router.delay_s = 0.02
    async with connected(router) as client:
        stream = client.generate("hi", max_tokens=10_000)
        if how == "task":
            reading = asyncio.create_task(stream.result())
            await router.started.wait()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        else:
            async with stream:
                assert (await anext(stream)).text == "0 "
                if how == "cancel":
                    stream.cancel()
                    assert [piece async for piece in stream] == []
            assert (stream.finish_reason, stream.text) == ("cancelled", "0 ")
        await asyncio.wait_for(router.closed.wait(), 5)


def test_cancelling_without_asyncio_frees_the_request_even_from_another_thread() -> None:
    router = WordRouter()
    router.delay_s = 0.02
    with served_from_a_thread(router) as target, Client(target) as client:
        stream = client.generate("hi", max_tokens=10_000)
        next(stream)
        threading.Timer(0.1, stream.cancel).start()
        assert len(list(stream)) < 1000
        assert (stream.finish_reason, stream.done) == ("cancelled", True)
        while not router.closed.is_set():
            threading.Event().wait(0.01)


# Chats


@pytest.mark.asyncio
async def test_a_chat_sends_its_answers_back_by_their_ids() -> None:
    router = WordRouter()
    async with connected(router) as client:
        chat = client.chat(system="Be brief.", max_tokens=2, affinity_key="s1")
        first = await chat.send("one").result()
        await chat.send("two", max_tokens=3).result()
        await chat.send("three").result()
    said = router.requests[2].input.chat.messages
    assert [(m.role, m.content, list(m.token_ids)) for m in said] == [
        ("system", "Be brief.", []),
        ("user", "one", []),
        ("assistant", "0 1 ", [0, 1]),
        ("user", "two", []),
        ("assistant", "0 1 2 ", [0, 1, 2]),
        ("user", "three", []),
    ]
    assert first.text == "0 1 "
    assert [request.sampling.max_tokens for request in router.requests] == [2, 3, 2]
    assert {request.cache.affinity_key for request in router.requests} == {"s1"}


def test_a_turn_that_failed_or_was_cancelled_leaves_no_trace() -> None:
    router = WordRouter()
    with served_from_a_thread(router) as target, Client(target, retry=FAST) as client:
        chat = client.chat(max_tokens=3)
        chat.send("one").result()
        router.fail_after = (1, WorkerLost("lost. Send it again."))
        with pytest.raises(WarmkvError):
            chat.send("two").result()
        router.fail_after = None
        stream = chat.send("three")
        next(stream)
        stream.cancel()
        assert [message.content for message in chat.messages] == ["one", "0 1 2 "]
        chat.send("four").result()
    assert [m.content for m in router.requests[-1].input.chat.messages] == ["one", "0 1 2 ", "four"]


def test_a_turn_waits_for_the_answer_before_it() -> None:
    with served_from_a_thread(WordRouter()) as target, Client(target) as client:
        chat = client.chat()
        stream = chat.send("one")
        with pytest.raises(RuntimeError, match="Read it, or cancel it"):
            chat.send("two")
        stream.result()
        chat.send("two").result()
        assert len(chat.messages) == 4


# Retries


@pytest.mark.asyncio
async def test_what_is_unavailable_is_asked_for_again_four_times_in_all() -> None:
    router = WordRouter()
    async with connected(router) as client:
        router.failures = [LOST] * 3
        assert (await client.generate("hi").result()).text == "0 1 2 "
        router.failures = [LOST] * 9
        with pytest.raises(errors.Unavailable):
            await client.generate("hi").result()
        assert (len(router.requests), len(router.failures)) == (8, 5)
        router.failures = [LOST] * 2
        assert (await client.tokenize("a")).token_ids == [97]


def test_what_is_unavailable_is_asked_for_again_without_asyncio() -> None:
    router = WordRouter()
    with served_from_a_thread(router) as target, Client(target, retry=FAST) as client:
        router.failures = [LOST] * 3
        assert client.generate("hi").result().text == "0 1 2 "
        router.failures = [LOST] * 3
        assert client.tokenize("a").token_ids == [97]
        router.failures = [LOST] * 4
        with pytest.raises(errors.Unavailable):
            client.tokenize("a")


@pytest.mark.asyncio
async def test_a_stream_that_has_spoken_is_never_sent_again() -> None:
    router = WordRouter()
    router.fail_after = (1, WorkerLost("lost. Send it again.", worker="w1"))
    async with connected(router) as client:
        stream = client.generate("hi")
        with pytest.raises(errors.Unavailable) as caught:
            await stream.result()
    assert (caught.value.reason, caught.value.metadata["worker"]) == ("WORKER_LOST", "w1")
    assert (len(router.requests), stream.text, stream.done) == (1, "0 ", True)


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [Overloaded("full. Wait."), InternalError("ours. Report it.")], ids=raised_by)
async def test_no_other_failure_is_sent_again(error: RouterError) -> None:
    router = WordRouter()
    router.failures = [error] * 2
    async with connected(router) as client:
        with pytest.raises(WarmkvError):
            await client.generate("hi").result()
    assert len(router.failures) == 1


@pytest.mark.asyncio
async def test_a_request_that_lost_a_worker_is_not_sent_again_before_a_person_says_so() -> None:
    router = WordRouter()
    router.failures = [WorkerLost("lost. Look.", lost_workers="w0")] * 2
    async with connected(router) as client:
        with pytest.raises(errors.Unavailable) as caught:
            await client.generate("hi").result()
    assert (caught.value.reason, caught.value.metadata["lost_workers"]) == ("WORKER_LOST", "w0")
    assert len(router.failures) == 1


def test_waits_double_up_to_their_limit_and_stay_within_the_timeout() -> None:
    unavailable = errors.Unavailable("x", code=grpc.StatusCode.UNAVAILABLE)
    now = [0.0]
    full = Retry(attempts=7, jitter=lambda: 1.0).waits(None)
    assert [full.before_retry(unavailable) for _ in range(7)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, None]
    half = Retry(jitter=lambda: 0.0).waits(None)
    assert [half.before_retry(unavailable) for _ in range(4)] == [0.05, 0.1, 0.2, None]
    short = Retry(jitter=lambda: 1.0).waits(0.25, clock=lambda: now[0])
    assert short.before_retry(unavailable) == 0.1
    now[0] = 0.1
    assert short.time_left() == pytest.approx(0.15)
    assert short.before_retry(unavailable) is None


@pytest.mark.asyncio
async def test_a_router_that_is_not_there_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1", retry=FAST, timeout=5) as client:
        with pytest.raises(errors.Unavailable) as caught:
            await client.list_workers()
    assert (caught.value.reason, caught.value.metadata) == ("", {})


# Errors


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("bad. Do better.", field="input"), errors.InvalidRequest),
        (Unauthenticated("who? Send a key."), errors.Unauthenticated),
        (PermissionDenied("no. Ask."), errors.PermissionDenied),
        (Overloaded("full. Wait.", retry_after_s=1.25), errors.Overloaded),
        (PoisonRequest("poison. Change it."), errors.Refused),
        (NotSupported("cannot. Use Ray."), errors.NotSupported),
        (InternalError("ours. Report it."), errors.ServerError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else raised_by(value),
)
async def test_errors_are_typed_and_keep_what_the_router_said(error: RouterError, kind: type[WarmkvError]) -> None:
    router = WordRouter()
    router.failures = [error, error]
    async with connected(router) as client:
        for call in (client.generate("hi", request_id="e-1").result(), client.tokenize("hi")):
            with pytest.raises(kind) as caught:
                await call
            raised = caught.value
            assert (raised.reason, raised.code, raised.message) == (error.reason, error.code, error.message)
            assert raised.retry_after == error.retry_after_s
            assert error.metadata.items() <= raised.metadata.items()
            assert raised.metadata["request_id"]
            assert str(raised) == f"{error.reason}: {error.message}"


@pytest.mark.asyncio
async def test_a_timeout_is_a_deadline_exceeded() -> None:
    router = WordRouter()
    router.delay_s = 60
    async with connected(router, timeout=0.2) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await client.generate("hi").result()
        with pytest.raises(errors.DeadlineExceeded):
            await client.generate("hi", timeout=0.1).result()


def test_a_key_that_is_unknown_is_unauthenticated() -> None:
    def only_a(token: str | None) -> Caller:
        if token != "a":
            raise Unauthenticated("no. Send a key.")
        return Caller("alpha", Role.USER, "alpha")

    with served_from_a_thread(WordRouter(), authenticate=only_a) as target:
        with Client(target, api_key="a") as client:
            assert client.generate("hi").result().text
            with pytest.raises(errors.PermissionDenied):
                client.list_workers()
            with pytest.raises(errors.PermissionDenied):
                next(iter(client.watch_stats()))
        with Client(target) as client, pytest.raises(errors.Unauthenticated):
            client.generate("hi").result()


# Operators


async def _ask(client: AsyncClient) -> list[object]:
    return [
        [worker.name for worker in await client.list_workers()],
        await client.drain("w0"),
        await client.undrain("w0"),
        list((await client.scale(3)).started),
        (await client.set_policy("round_robin", {"load": 2.0})).policy.name,
        (await client.get_policy()).policy.weights["load"],
        (await client.set_shadow_policy("sticky", {"spill_factor": 2.0})).version,
        (await client.rollback_policy(4)).version,
        (await client.clear_cache(admin_pb2.ClearCacheRequest(all=True))).workers[0].worker,
        (await client.list_blocks(text="abc", tenant="t", worker="w0", tier="host", page_size=5, page_token="p"))
        .blocks[0]
        .worker,
        (await client.cache_stats("w0")).workers[0].worker,
        (await client.warm(token_ids=[1, 2], workers=["w0"], compute=True, ttl=60)).blocks,
        (await client.pin(tenant="t", seconds=30)).workers[0].worker,
        (await client.unpin(messages=[{"role": "user", "content": "x"}], add_generation_prompt=False))
        .workers[0]
        .worker,
        (await client.check_store(["w0"])).workers[0].worker,
        (await client.explain("abc", no_read=True)).prompt_tokens,
        list((await client.tokenize("ab")).token_ids),
    ]


def _ask_sync(client: Client) -> list[object]:
    return [
        [worker.name for worker in client.list_workers()],
        client.drain("w0"),
        client.undrain("w0"),
        list(client.scale(3).started),
        client.set_policy("round_robin", {"load": 2.0}).policy.name,
        client.get_policy().policy.weights["load"],
        client.set_shadow_policy("sticky", {"spill_factor": 2.0}).version,
        client.rollback_policy(4).version,
        client.clear_cache(admin_pb2.ClearCacheRequest(all=True)).workers[0].worker,
        client.list_blocks(text="abc", tenant="t", worker="w0", tier="host", page_size=5, page_token="p")
        .blocks[0]
        .worker,
        client.cache_stats("w0").workers[0].worker,
        client.warm(token_ids=[1, 2], workers=["w0"], compute=True, ttl=60).blocks,
        client.pin(tenant="t", seconds=30).workers[0].worker,
        client.unpin(messages=[{"role": "user", "content": "x"}], add_generation_prompt=False).workers[0].worker,
        client.check_store(["w0"]).workers[0].worker,
        client.explain("abc", no_read=True).prompt_tokens,
        list(client.tokenize("ab").token_ids),
    ]


ANSWERS = [["w0", "w1"], 5, None, ["w2"], "round_robin", 2.0, 3, 4, "w0", "w0", "w0", 3, "w0", "w0", "w0", 3, [97, 98]]
CHAT = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="x")], add_generation_prompt=False)
CACHE_REQUESTS = [
    admin_pb2.ListBlocksRequest(
        tenant="t",
        prompt=inference_pb2.Input(text="abc"),
        worker="w0",
        tier=common_pb2.TIER_HOST,
        page_size=5,
        page_token="p",
    ),
    admin_pb2.GetCacheStatsRequest(worker="w0"),
    admin_pb2.WarmRequest(
        prompt=inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=[1, 2])),
        workers=["w0"],
        compute=True,
        ttl_seconds=60,
    ),
    admin_pb2.PinRequest(tenant="t", seconds=30),
    admin_pb2.UnpinRequest(prompt=inference_pb2.Input(chat=CHAT)),
    admin_pb2.CheckStoreRequest(workers=["w0"]),
]


@pytest.mark.asyncio
async def test_operators_calls_answer() -> None:
    router = WordRouter()
    async with connected(router) as client:
        assert await _ask(client) == ANSWERS
        assert router.cache.requests == CACHE_REQUESTS
        seen = [stats.in_flight async for stats in _first(2, client.watch_stats(period_ms=100, show_prompts=True))]
        assert seen == [1, 1]
        with pytest.raises(errors.NotFound):
            await client.drain("w9")


def test_operators_calls_answer_without_asyncio() -> None:
    router = WordRouter()
    with served_from_a_thread(router) as target, Client(target) as client:
        assert _ask_sync(client) == ANSWERS
        assert router.cache.requests == CACHE_REQUESTS
        stats = client.watch_stats(period_ms=100)
        assert [next(stats).in_flight for _ in range(2)] == [0, 0]
        stats.close()  # type: ignore[attr-defined]


def test_what_names_no_blocks_or_too_many_is_refused_before_anything_is_sent() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match="exactly one prompt"):
            client.pin(text="a", token_ids=[1])
        with pytest.raises(ValueError, match="use one of device, host, disk, redis, peer"):
            client.list_blocks(tier="attic")
        with pytest.raises(TypeError, match="tennant"):
            client.unpin(tennant="x")  # type: ignore[call-arg]


def test_both_clients_offer_the_same() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)


def test_the_client_needs_nothing_but_its_stubs() -> None:
    code = """
import sys, warmkv.client
ours = {"router", "workers", "kvstore", "deploy", "torch", "ray", "transformers", "aiohttp", "tokenizers"}
sys.exit(str(sorted(ours & {name.partition(".")[0] for name in sys.modules})) if ours & set(sys.modules) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


async def _first(count: int, stream: Any) -> AsyncIterator[Any]:
    for _ in range(count):
        yield await anext(stream)
    await stream.aclose()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n": -1}, "n is -1; give whole numbers from 0 to 4,294,967,295"),
        ({"seed": -1}, "seed is -1; give whole numbers from 0 to 18,446,744,073,709,551,615"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616; give"),
        ({"top_k": -1}, "top_k is -1; give"),
        ({"logprobs": -1}, "logprobs is -1; give"),
        ({"max_tokens": -1}, "max_tokens is -1; give"),
        ({"logit_bias": {-1: 1.0}}, r"logit_bias is \{-1: 1.0\}; give token ids as keys, whole numbers from 0"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids is \[-1\]; give"),
        ({"priority": 1 << 40}, "priority is 1099511627776; give whole numbers from -2,147,483,648 to 2,147,483,647"),
        ({"ttl": -1}, "ttl is -1; give"),
        ({"timeout": 0}, "timeout is 0; give seconds above 0"),
        ({"timeout": -2.0}, "timeout is -2.0; give"),
    ],
)
def test_a_number_that_does_not_fit_is_named_with_what_does(options: GenerateOptions, told: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=told) as caught:
        generate_request("hi", options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.reason == "INVALID_REQUEST"


def test_a_long_value_that_does_not_fit_is_not_repeated_whole() -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        generate_request(None, {"token_ids": [-1] * 5000})
    assert "token_ids is [-1, -1" in str(caught.value)
    assert len(str(caught.value)) < 200
