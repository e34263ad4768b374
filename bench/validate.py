"""The simulator against the real thing: the same requests through real routers and workers, and through `replay`.

A fleet of plain processes on loopback (workers of one engine, a router, gRPC between them) serves the same small
workload under each policy. Two ways of arriving: `alone`, each request a moment after the last answer has ended, so
that only caches and decisions count; and `crowd`, at the workload's own times, so that queues grow and prompts meet in
batches. Then the simulator replays it with the profile that the workers report of themselves (`Load`, as routers read
it). The pools are far smaller than what the sessions hold, so blocks are evicted all the time.

Both begin alike: every run has a router of its own, which remembers nothing of the run before (ties go to the worker
that was given least work in the last half minute), and workers with empty caches. The simulator is given the times at
which the client really sent. In a crowd a choice depends on what is in flight at that moment, so a millisecond more or
less changes later choices: every round has a workload of its own, and the simulated figures of a round are means over
replays whose arrivals are shifted by some milliseconds at random.

Rows `<engine>_<way>_<policy>_hit_real` and `_hit_simulated`; `_ttft_real_s` and `_ttft_simulated_s` (mean, from the
router's door); of means over all rounds `_hit_difference`, `_ttft_ratio`. For each two policies
`<engine>_<way>_<one>_less_<other>_real_s` and `_simulated_s`: how much later the first token is with the one, and
`_noise_s`: what of the real difference may be chance, two standard errors over the rounds. Two that differ by less are
level. `<engine>_<way>_ranking_equal`: 1 when the simulator puts no two the other way round that really differ.
Engines: `simulated` (a timing model that sleeps; real scheduling, events and load) and `torch` (a random tiny model on
the CPU; its times depend on what else the machine does); `--engines` chooses.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from bench.report import Report
from deploy.local_fleet import free_port
from kvstore.blocks import HashScheme
from replay.batched_profile import BatchedProfile
from replay.profiles import Measured, measured_profile
from replay.simulated_router import RouterSettings
from replay.simulation import Setup, simulate
from replay.traces import Request, Trace
from replay.workload import Workload, workload
from warmkv import versions
from warmkv.client import AsyncClient, WarmkvError
from warmkv.v1 import admin_pb2, worker_pb2, worker_pb2_grpc
from workers.config import WorkerConfig
from workers.simulated_info import info_for
from workers.tiny import ModelShape, make_model_folder

SECRET = "bench"
POLICIES = ("cache_aware", "least_loaded", "round_robin")
BLOCK = 16
VOCAB = 2048
POOL_BLOCKS = 160
TAIL_TOKENS = 5  # of every prompt behind its last full block
START_TIMEOUT_S = 90.0
# Slow, so that what else the machine does is small beside it.
TIMING = {"prefill_fixed_ms": 12.0, "prefill_token_ms": 1.2, "prefill_pair_ms": 0.00006, "decode_step_ms": 24.0}


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


ENGINES = {"simulated": Engine("simulated", 4, 0.6, TIMING), "torch": Engine("torch", 2, 0.5)}
REPLAYS = 5
SHIFT_S = 0.005
THINK_S = 0.06  # until a worker has told its load
DELAY_S = 0.002  # from a worker's word to the router, and its decision


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as the real fleet served it."""

    cached: int
    prompt: int
    ttft_s: float
    sent_s: float = 0.0


class Size(NamedTuple):
    """Of a workload, and how often there is one."""

    sessions: int
    rounds: int


class Figure(NamedTuple):
    """Share of prompt tokens that were cached, and mean time to the first token."""

    hit: float
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
    fields: dict[str, Any] = {
        "model_dir": str(model_dir),
        "model_name": "bench",
        "engine": engine.name,
        "fleet_secret": SECRET,
    }
    fields |= {"device": "cpu", "block_size": BLOCK, "host_bytes": 0}
    nbytes = info_for(WorkerConfig(**{**fields, "name": "w0"})).block_nbytes
    processes: list[subprocess.Popen[str]] = []
    try:
        addresses = {}
        for number in range(engine.workers):
            config = json.dumps({**fields, "name": f"w{number}", "device_bytes": POOL_BLOCKS * nbytes})
            command = [sys.executable, "-m", "workers.main", "--config", config]
            command += ["--timing", json.dumps(engine.timing)] if engine.timing else []
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
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


async def play_alone(client: AsyncClient, work: Workload, salt: int) -> list[Answer]:
    """Send every request a moment after the last answer."""
    answers = []
    for number, request in enumerate(work.requests):
        await asyncio.sleep(request.think_s or 0.0)
        answers.append(await ask(client, token_ids(work, number, salt), request.output_length))
    return answers


async def play(client: AsyncClient, work: Workload, salt: int) -> list[Answer]:
    """Send every request when it is due, or a little later."""
    prompts = [token_ids(work, number, salt) for number in range(len(work.requests))]
    started = time.monotonic()

    async def one(number: int) -> Answer:
        await asyncio.sleep(max(0.0, work.arrivals_s[number] - (time.monotonic() - started)))
        sent_s = time.monotonic() - started
        return replace(await ask(client, prompts[number], work.requests[number].output_length), sent_s=sent_s)

    return list(await asyncio.gather(*(one(number) for number in range(len(prompts)))))


async def last_load(address: str) -> tuple[HashScheme, worker_pb2.Load]:
    """What a worker says of itself, to a router that only listens: its scheme and its load."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = worker_pb2_grpc.WorkerServiceStub(channel).Connect(metadata=(("authorization", f"Bearer {SECRET}"),))
        hello = worker_pb2.RouterHello(protocol_version=versions.NEWEST, package_version="0", router="listener")
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
async def new_router(engine: Engine, model_dir: Path, addresses: dict[str, str]) -> AsyncIterator[AsyncClient]:
    """A client of a router that has just come to these workers."""
    with router_process(model_dir, addresses) as router:
        async with AsyncClient(router) as client:
            await until_ready(client, engine.workers)
            yield client


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


def alone(trace: Trace) -> Workload:
    """Each request after the one before."""
    requests = tuple(replace(request, session="all", think_s=THINK_S) for request in trace.requests)
    return workload(replace(trace, requests=requests), closed_loop=True)


def replayed(work: Workload, engine: Engine, policy: str, profile: BatchedProfile, *, seed: int) -> Figure:
    """Means over simulations whose arrivals are shifted a little."""
    rng, found = random.Random(seed), []
    for n in range(REPLAYS):
        shifted = replace(work, arrivals_s=[at + rng.uniform(0, SHIFT_S) for at in work.arrivals_s])
        setup = Setup(engine.workers, RouterSettings(policy, delay_s=DELAY_S), profile, seed=seed + n)
        figures = simulate(shifted, setup).figures(warm_up=0.0)
        found.append(Figure(figures.hit, figures.ttft_mean_s))
    return mean(found)


async def served(client: AsyncClient, work: Workload, policy: str, *, salt: int) -> tuple[Figure, Workload]:
    """The real fleet, from empty caches; the workload as it was really sent."""
    await client.set_policy(policy)
    await client.clear_cache(admin_pb2.ClearCacheRequest(all=True))
    answers = await (play_alone if work.waits_for else play)(client, work, salt)
    hit = sum(answer.cached for answer in answers) / sum(answer.prompt for answer in answers)
    sent = work if work.waits_for else replace(work, arrivals_s=[answer.sent_s for answer in answers])
    return Figure(hit, statistics.fmean(answer.ttft_s for answer in answers)), sent


async def compare(report: Report, engine: Engine, model_dir: Path, ways: Mapping[str, Size]) -> None:
    """All rows of one kind of engine."""
    with worker_processes(engine, model_dir) as (addresses, nbytes):
        async with new_router(engine, model_dir, addresses) as client:
            await warm_up(client, engine)
        for way, (sessions, rounds) in ways.items():
            real: dict[str, list[Figure]] = {policy: [] for policy in POLICIES}
            simulated: dict[str, list[Figure]] = {policy: [] for policy in POLICIES}
            for salt in range(rounds):
                trace = made_trace(sessions=sessions, turns=4, seed=7 + salt)
                profile = await fitted(engine, addresses, nbytes)
                work = alone(trace) if way == "alone" else paced(trace, engine, profile)
                for policy in POLICIES:
                    async with new_router(engine, model_dir, addresses) as client:
                        figure, sent = await served(client, work, policy, salt=salt)
                    real[policy].append(figure)
                    profile = await fitted(engine, addresses, nbytes)
                    simulated[policy].append(replayed(sent, engine, policy, profile, seed=salt + 1))
            add_rows(report, f"{engine.name}_{way}", real, simulated)


def mean(figures: Sequence[Figure]) -> Figure:
    """Of each."""
    return Figure(statistics.fmean(f.hit for f in figures), statistics.fmean(f.ttft_s for f in figures))


def add_rows(report: Report, name: str, real: dict[str, list[Figure]], simulated: dict[str, list[Figure]]) -> None:
    """Both numbers, and how far they are apart."""
    for policy in POLICIES:
        theirs, ours = real[policy], simulated[policy]
        report.add(f"{name}_{policy}_hit_real", [f.hit for f in theirs], "share")
        report.add(f"{name}_{policy}_hit_simulated", [f.hit for f in ours], "share")
        apart = abs(mean(ours).hit - mean(theirs).hit)
        report.add(f"{name}_{policy}_hit_difference", [apart], "share", bar="<= 0.01")
        report.add(f"{name}_{policy}_ttft_real_s", [f.ttft_s for f in theirs], "s")
        report.add(f"{name}_{policy}_ttft_simulated_s", [f.ttft_s for f in ours], "s")
        report.add(f"{name}_{policy}_ttft_ratio", [mean(ours).ttft_s / mean(theirs).ttft_s], "ratio")
    pairs = [add_pair(report, name, one, other, real, simulated) for one, other in combinations(POLICIES, 2)]
    report.add(f"{name}_ranking_equal", [float(all(pairs))], "share", bar=">= 1")


def add_pair(
    report: Report, name: str, one: str, other: str, real: dict[str, list[Figure]], simulated: dict[str, list[Figure]]
) -> bool:
    """How two policies differ; False when they really do, and the other way round in the simulator."""
    theirs, ours = (
        [a.ttft_s - b.ttft_s for a, b in zip(side[one], side[other], strict=True)] for side in (real, simulated)
    )
    apart, noise = statistics.fmean(theirs), math.inf
    if len(theirs) > 1:
        noise = 2 * statistics.stdev(theirs) / math.sqrt(len(theirs))
        report.add(f"{name}_{one}_less_{other}_noise_s", [noise], "s")
    report.add(f"{name}_{one}_less_{other}_real_s", [apart], "s")
    report.add(f"{name}_{one}_less_{other}_simulated_s", [statistics.fmean(ours)], "s")
    return abs(apart) <= noise or apart * statistics.fmean(ours) > 0


def options() -> argparse.Namespace:
    """The flags that every benchmark has, and those that choose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--engines", metavar="NAME,...", default=",".join(ENGINES), help="default: all")
    parser.add_argument("--rounds", type=int, default=4, help="of the crowd; default: 4")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    given, report = options(), Report("validate")
    with tempfile.TemporaryDirectory() as folder:
        shape = ModelShape(layers=6, hidden=256, heads=4, kv_heads=2, vocab=VOCAB)
        model_dir = make_model_folder(folder, shape)
        for name in given.engines.split(","):
            ways = {"alone": Size(8, 1), "crowd": Size(16, 2) if given.quick else Size(24, given.rounds)}
            asyncio.run(compare(report, ENGINES[name], model_dir, ways))
    report.print(as_json=given.json)


if __name__ == "__main__":
    main()
