"""The simulator against the real thing: the same requests through real routers and workers, and through `replay`.

A fleet of plain processes on loopback (workers of one engine, a router, gRPC between them) serves the same small
workload once under each policy, its caches emptied before each; arrivals are those of the workload, so that queues
grow. Then the simulator replays it with the profile that the workers report of themselves (`Load`, as routers read it).
The pools are far smaller than what the sessions hold, so blocks are evicted all the time.

Rows `<engine>_<policy>_hit_real`, `_hit_simulated` and `_hit_difference`; `_ttft_real_s` and `_ttft_simulated_s` (mean,
from the router's door) and their `_ttft_ratio`; `<engine>_ranking_equal`: 1 when both put the policies into the same
order of mean TTFT. Engines: `simulated` (a timing model that sleeps; real scheduling, events and load) and `torch` (a
random tiny model on the CPU; its times depend on what else the machine does). The median of the rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from bench.report import Report, arguments
from deploy.local_fleet import free_port
from kvstore.blocks import HashScheme
from replay.batched_profile import BatchedProfile
from replay.profiles import Measured, measured_profile
from replay.simulated_router import RouterSettings
from replay.simulation import Setup, simulate
from replay.traces import Request, Trace
from replay.workload import Workload, workload
from warmkv.client import AsyncClient, WarmkvError
from warmkv.v1 import admin_pb2, worker_pb2, worker_pb2_grpc
from workers.config import WorkerConfig
from workers.simulated_info import info_for
from workers.tiny import ModelShape, make_model_folder

SECRET = "bench"
POLICIES = ("cache_aware", "least_loaded", "round_robin")
BLOCK = 16
VOCAB = 2048
POOL_BLOCKS = 240
TAIL_TOKENS = 5  # of every prompt behind its last full block
START_TIMEOUT_S = 90.0
TIMING = {"prefill_fixed_ms": 4.0, "prefill_token_ms": 0.4, "prefill_pair_ms": 0.00002, "decode_step_ms": 8.0}


@dataclass(frozen=True, slots=True)
class Engine:
    """What kind of worker, how many, and how busy the workload makes them.

    Attributes:
        load: share of their time that computing every prompt from nothing would take.
    """

    name: str
    workers: int
    load: float
    timing: dict[str, float] | None = None


ENGINES = (Engine("simulated", 4, 0.9, TIMING), Engine("torch", 2, 0.7))


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as the real fleet served it."""

    cached: int
    prompt: int
    ttft_s: float


def made_trace(*, sessions: int, turns: int, seed: int) -> Trace:
    """Chats over three system prompts, and documents that are asked about once; one arrival a second, at random."""
    rng = random.Random(seed)
    numbers: dict[tuple[object, ...], int] = {}
    prompts: list[tuple[list[object], str]] = []
    for session in range(sessions):
        said: list[object] = [("system", session % 3, n) for n in range(12)]
        for turn in range(turns):
            said += [(session, turn, n) for n in range(rng.randint(3, 9))]
            prompts.append((list(said), f"s{session}"))
    # Turns of a session stay in order, and others' come in between.
    order = sorted(range(len(prompts)), key=lambda n: n % turns + rng.random() * 1.5)
    chosen = _in_turn([prompts[n] for n in order], prompts)
    for document in range(len(prompts) // 8):
        chosen.insert(rng.randrange(len(chosen)), ([("doc", document, n) for n in range(rng.randint(30, 70))], ""))
    requests, at = [], 0.0
    for contents, name in chosen:
        at += rng.expovariate(1.0)
        ids = [numbers.setdefault(tuple(contents[: end + 1]), len(numbers)) for end in range(len(contents))]
        length = len(contents) * BLOCK + TAIL_TOKENS
        runs = tuple((first, 1) for first in ids)
        requests.append(Request(at, length, rng.randint(4, 24), runs, name or None, None, None, None, None))
    return Trace("validate", BLOCK, tuple(requests))


def _in_turn(
    mixed: Sequence[tuple[list[object], str]], straight: Sequence[tuple[list[object], str]]
) -> list[tuple[list[object], str]]:
    """Sessions in the order of `mixed`, the turns of each in the order of `straight`."""
    waiting: dict[str, list[tuple[list[object], str]]] = {}
    for prompt in straight:
        waiting.setdefault(prompt[1], []).append(prompt)
    return [waiting[name].pop(0) for _, name in mixed]


def token_ids(work: Workload, number: int, salt: int) -> list[int]:
    """A prompt whose blocks are equal where the workload's are, and no others; `salt`: of the round."""
    found: list[int] = []
    for block in work.chains[number]:
        rng = random.Random(block + salt.to_bytes(4, "little"))
        found += [rng.randrange(16, VOCAB) for _ in range(BLOCK)]
    rng = random.Random(number * 1000 + salt)
    return found + [rng.randrange(16, VOCAB) for _ in range(TAIL_TOKENS)]


@contextlib.contextmanager
def worker_processes(engine: Engine, model_dir: Path) -> Iterator[tuple[dict[str, str], int]]:
    """Workers of that kind; (addresses by name, bytes a block)."""
    fields = {"model_dir": str(model_dir), "model_name": "bench", "engine": engine.name, "fleet_secret": SECRET}
    fields |= {"device": "cpu", "block_size": BLOCK, "host_bytes": 0}
    nbytes = info_for(WorkerConfig(**{**fields, "name": "w0"})).block_nbytes
    processes: list[subprocess.Popen[str]] = []
    try:
        addresses = {}
        for number in range(engine.workers):
            config = json.dumps({**fields, "name": f"w{number}", "device_bytes": POOL_BLOCKS * nbytes})
            command = [sys.executable, "-m", "workers.main", "--config", config]
            command += ["--timing", json.dumps(engine.timing)] if engine.timing else []
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            )
        for number, process in enumerate(processes):
            line = process.stdout.readline() if process.stdout else ""
            addresses[f"w{number}"] = json.loads(line)["address"]
        yield addresses, nbytes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


@contextlib.contextmanager
def router_process(model_dir: Path, workers: dict[str, str]) -> Iterator[str]:
    """A router before these workers; its address."""
    port = free_port()
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "router"]
    for name, address in workers.items():
        command += ["--worker", f"{name}={address}"]
    command += ["--model", str(model_dir), "--set", "model.name=bench", "--grpc-port", str(port), "--http-port", "0"]
    environment = {**os.environ, "WARMKV_AUTH__FLEET_SECRET": SECRET}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def until_ready(client: AsyncClient, workers: int) -> None:
    """Wait until all workers take requests."""
    give_up = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(WarmkvError):
            ready = [w for w in await client.list_workers() if w.state == admin_pb2.WORKER_STATE_READY]
            if len(ready) == workers:
                return
        if time.monotonic() > give_up:
            raise RuntimeError(f"{workers} workers are not ready after {START_TIMEOUT_S:.0f} s")
        await asyncio.sleep(0.2)


async def ask(client: AsyncClient, prompt: list[int], output: int) -> Answer:
    """One request, to its end."""
    stream = client.generate(token_ids=prompt, max_tokens=output, temperature=0.0, ignore_eos=True)
    await stream.result()
    fates = {field.name: tokens for field, tokens in stream.usage.prompt_tokens_by_fate.ListFields()}
    return Answer(stream.usage.prompt_tokens - fates.get("computed", 0), len(prompt), stream.route.ttft_ms / 1e3)


async def play(client: AsyncClient, work: Workload, salt: int) -> list[Answer]:
    """Send every request when it is due."""
    prompts = [token_ids(work, number, salt) for number in range(len(work.requests))]
    started = time.monotonic()

    async def one(number: int) -> Answer:
        await asyncio.sleep(max(0.0, work.arrivals_s[number] - (time.monotonic() - started)))
        return await ask(client, prompts[number], work.requests[number].output_length)

    return list(await asyncio.gather(*(one(number) for number in range(len(prompts)))))


async def last_load(address: str) -> tuple[HashScheme, worker_pb2.Load]:
    """What a worker says of itself, to a router that only listens: its scheme and its load."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = worker_pb2_grpc.WorkerServiceStub(channel).Connect(metadata=(("authorization", f"Bearer {SECRET}"),))
        hello = worker_pb2.RouterHello(protocol_version=1, package_version="0", router="listener")
        await call.write(worker_pb2.ConnectRequest(hello=hello))
        block_size = 0
        async for message in call:
            block_size = message.hello.scheme.block_size or block_size
            if message.HasField("step") and message.step.HasField("load"):
                call.cancel()
                return HashScheme(b"", "", block_size), message.step.load
    raise RuntimeError(f"the worker at {address} ended the stream")


async def fitted(engine: Engine, addresses: dict[str, str], nbytes: int) -> BatchedProfile:
    """The profile that these workers report."""
    told = [await last_load(address) for address in addresses.values()]
    measured = Measured([load for _, load in told], told[0][0].block_size, nbytes)
    profile, _ = measured_profile(measured)
    if engine.timing is None:
        return profile
    # What a `Load` does not say: this engine charges each chunk and the decodes beside it apart.
    return replace(
        profile,
        prefill=profile.prefill._replace(fixed_ms=0.0),
        chunk_ms=profile.prefill.fixed_ms,
        mixed_ms=profile.decode_ms,
        mixed_sequence_ms=0.0,
        reserves_prompt=True,
    )


@contextlib.asynccontextmanager
async def fleet(engine: Engine, model_dir: Path) -> AsyncIterator[tuple[AsyncClient, dict[str, str], int]]:
    """Workers, a router, a client; (client, workers' addresses, bytes a block)."""
    with worker_processes(engine, model_dir) as (addresses, nbytes), router_process(model_dir, addresses) as router:
        async with AsyncClient(router) as client:
            await until_ready(client, engine.workers)
            yield client, addresses, nbytes


async def warm_up(client: AsyncClient, engine: Engine) -> None:
    """Let every worker measure prefills of several lengths, and decodes."""
    rng = random.Random(5)
    await client.set_policy("round_robin")
    for length in (100, 400, 900, 250) * 2:
        prompts = [[rng.randrange(16, VOCAB) for _ in range(length)] for _ in range(engine.workers)]
        await asyncio.gather(*(ask(client, prompt, 6) for prompt in prompts))


def paced(trace: Trace, engine: Engine, profile: BatchedProfile) -> Workload:
    """The workload at the speed that gives the engines their load."""
    work = workload(trace)
    cold_s = sum(profile.fit.ms(request.input_length) for request in trace.requests) / 1e3
    cold_s += sum(request.output_length for request in trace.requests) * profile.decode_ms / 1e3 / 4  # shared by a few
    return workload(trace, speed=work.arrivals_s[-1] * engine.workers * engine.load / cold_s)


async def compare(report: Report, engine: Engine, model_dir: Path, *, quick: bool) -> None:
    """All rows of one kind of engine."""
    trace = made_trace(sessions=18 if quick else 30, turns=4, seed=7)
    real: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    simulated: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    async with fleet(engine, model_dir) as (client, addresses, nbytes):
        await warm_up(client, engine)
        work = paced(trace, engine, await fitted(engine, addresses, nbytes))
        for salt in range(1 if quick else 3):
            for policy in POLICIES:
                await client.set_policy(policy)
                await client.clear_cache(admin_pb2.ClearCacheRequest(all=True))
                answers = await play(client, work, salt)
                hit = sum(a.cached for a in answers) / sum(a.prompt for a in answers)
                real[policy].append((hit, statistics.fmean(a.ttft_s for a in answers)))
            profile = await fitted(engine, addresses, nbytes)
            for policy in POLICIES:
                setup = Setup(engine.workers, RouterSettings(policy, delay_s=0.002), profile, seed=salt + 1)
                figures = simulate(work, setup).figures(warm_up=0.0)
                simulated[policy].append((figures.hit, figures.ttft_mean_s))
    add_rows(report, engine.name, real, simulated)


def add_rows(
    report: Report,
    name: str,
    real: dict[str, list[tuple[float, float]]],
    simulated: dict[str, list[tuple[float, float]]],
) -> None:
    """Both numbers, and how far they are apart."""
    orders = []
    for policy in POLICIES:
        pairs = list(zip(real[policy], simulated[policy], strict=True))
        report.add(f"{name}_{policy}_hit_real", [r[0] for r, _ in pairs], "share")
        report.add(f"{name}_{policy}_hit_simulated", [s[0] for _, s in pairs], "share")
        report.add(f"{name}_{policy}_hit_difference", [abs(s[0] - r[0]) for r, s in pairs], "share", bar="<= 0.01")
        report.add(f"{name}_{policy}_ttft_real_s", [r[1] for r, _ in pairs], "s")
        report.add(f"{name}_{policy}_ttft_simulated_s", [s[1] for _, s in pairs], "s")
        report.add(f"{name}_{policy}_ttft_ratio", [s[1] / r[1] for r, s in pairs], "ratio")
    for n in range(len(real[POLICIES[0]])):
        ranked = [sorted(POLICIES, key=lambda policy: side[policy][n][1]) for side in (real, simulated)]  # noqa: B023
        orders.append(float(ranked[0] == ranked[1]))
    report.add(f"{name}_ranking_equal", orders, "share", bar=">= 1")


def main() -> None:
    """Print the table."""
    options, report = arguments(__doc__), Report("validate")
    with tempfile.TemporaryDirectory() as folder:
        shape = ModelShape(layers=6, hidden=256, heads=4, kv_heads=2, vocab=VOCAB)
        model_dir = make_model_folder(folder, shape)
        for engine in ENGINES:
            asyncio.run(compare(report, engine, model_dir, quick=options.quick))
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
