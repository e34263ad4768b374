"""What stands between a request and its model: the router's own share, and the engine's share of a step.

Router: the same prompt is sent alternately straight down a worker's stream and through a router to the same worker
(both in processes of their own, a simulated engine whose prefill costs nothing), and the times to the first token are
compared. Its CPU time is the router process's own, over the requests of the run. Engine: a decode step of a small real
model, less the time inside the model's forward.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil

from bench.report import Report, arguments
from deploy.local_fleet import free_port
from deploy.summary import percentile
from kvstore.blocks import HashScheme, block_hashes, short
from kvstore.token_ids import packed
from warmkv import versions
from warmkv.client import AsyncClient, WarmkvError
from warmkv.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.models import ModelRunner
from workers.protocol import Job, SamplingParams
from workers.tiny import ModelShape, make_model_folder

SECRET = "bench"
PROMPT_TOKENS = 1024
SALT = b"bench"
VOCAB = 2048
INSTANT = {"prefill_fixed_ms": 0.0, "prefill_token_ms": 0.0, "prefill_pair_ms": 0.0, "decode_step_ms": 0.0}
START_TIMEOUT_S = 60.0


class DirectCaller:
    """A caller that speaks a worker's stream itself, one request at a time."""

    def __init__(self, call: grpc.aio.StreamStreamCall[worker_pb2.ConnectRequest, worker_pb2.ConnectResponse]) -> None:
        self._call, self._messages, self._next_id = call, aiter(call), 0
        self._scheme: HashScheme | None = None

    @property
    def scheme(self) -> HashScheme:
        """What the worker stated."""
        if self._scheme is None:
            raise RuntimeError("handshake first")
        return self._scheme

    async def handshake(self) -> None:
        """Say hello and read everything up to the end of the snapshot."""
        hello = worker_pb2.RouterHello(protocol_version=versions.NEWEST, package_version="0", router="bench")
        await self._call.write(worker_pb2.ConnectRequest(hello=hello))
        async for message in self._messages:
            if message.HasField("hello"):
                self._scheme = read_scheme(message.hello.scheme)
            if message.snapshot.last:
                return

    async def time_to_first_token(self, job: worker_pb2.Job) -> float:
        """Seconds from writing the job to its first token."""
        self._next_id += 1
        job.job_id = self._next_id
        started = time.perf_counter()
        await self._call.write(worker_pb2.ConnectRequest(submit=job))
        async for message in self._messages:
            for output in message.step.outputs:
                if output.job_id == job.job_id and output.finish_reason:
                    if output.HasField("error"):
                        raise RuntimeError(output.error.message)
                    return time.perf_counter() - started
        raise RuntimeError("the worker ended the stream")


def read_scheme(wire: worker_pb2.HashScheme) -> HashScheme:
    """The scheme that a worker stated."""
    return HashScheme(
        wire.model_fingerprint, wire.layout, wire.block_size, wire.adapter, wire.canonical, wire.tp_size, wire.tp_rank
    )


def make_job(token_ids: list[int], scheme: HashScheme) -> worker_pb2.Job:
    """What a router would send for these tokens."""
    root = scheme.root(SALT)
    return worker_pb2.Job(
        packed_token_ids=packed(token_ids),
        tenant_salt=SALT,
        chain_root=root,
        block_hashes=b"".join(map(short, block_hashes(token_ids, root, scheme.block_size))),
        sampling=common_pb2.SamplingParams(max_tokens=1, temperature=0.0, top_p=1.0, seed=0, ignore_eos=True),
    )


@contextlib.contextmanager
def worker_process(model_dir: Path) -> Iterator[str]:
    """A simulated worker that answers at once; its address."""
    fields = {"name": "w0", "model_dir": str(model_dir), "model_name": "bench", "engine": "simulated"}
    config = json.dumps({**fields, "fleet_secret": SECRET})
    command = [sys.executable, "-m", "workers.main", "--config", config, "--timing", json.dumps(INSTANT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        yield json.loads(line)["address"]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def router_process(model_dir: Path, worker: str) -> Iterator[tuple[psutil.Process, str]]:
    """A router of its own before that worker; its process and its address."""
    port = free_port()
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "router", "--worker", f"w0={worker}"]
    command += ["--model", str(model_dir), "--set", "model.name=bench", "--grpc-port", str(port), "--http-port", "0"]
    environment = {**os.environ, "WARMKV_AUTH__FLEET_SECRET": SECRET}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        yield psutil.Process(process.pid), f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def until_ready(client: AsyncClient) -> None:
    """Wait for the first answer."""
    give_up = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            await client.generate("Hello", max_tokens=1).result()
        except WarmkvError:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(0.2)
        else:
            return


async def routed(client: AsyncClient, token_ids: list[int]) -> float:
    """Seconds from the call to its first token."""
    started = time.perf_counter()
    await client.generate(token_ids=token_ids, max_tokens=1, temperature=0.0, ignore_eos=True).result()
    return time.perf_counter() - started


async def measure_router(report: Report, model_dir: Path, *, batches: int, pairs: int) -> None:
    """The router's rows: batches of alternating pairs, one percentile a batch."""
    rng = random.Random(2)
    with worker_process(model_dir) as address, router_process(model_dir, address) as (process, router):
        async with AsyncClient(router) as client, grpc.aio.insecure_channel(address) as channel:
            await until_ready(client)
            call = worker_pb2_grpc.WorkerServiceStub(channel).Connect(metadata=(("authorization", f"Bearer {SECRET}"),))
            direct = DirectCaller(call)
            await direct.handshake()
            p50, p99, cpu_ms = [], [], []
            for batch in range(batches + 1):
                times: dict[str, list[float]] = {"direct": [], "routed": []}
                before = sum(process.cpu_times()[:2])
                for _ in range(pairs):
                    token_ids = [rng.randrange(16, VOCAB) for _ in range(PROMPT_TOKENS)]
                    times["direct"].append(await direct.time_to_first_token(make_job(token_ids, direct.scheme)) * 1e3)
                    times["routed"].append(await routed(client, token_ids) * 1e3)
                if batch:  # the first one warms up
                    p50.append(percentile(times["routed"], 0.5) - percentile(times["direct"], 0.5))
                    p99.append(percentile(times["routed"], 0.99) - percentile(times["direct"], 0.99))
                    cpu_ms.append((sum(process.cpu_times()[:2]) - before) * 1e3 / pairs)
            call.cancel()
    report.add("router_added_p50_ms", p50, "ms")
    report.add("router_added_p99_ms", p99, "ms")
    report.add("router_cpu_ms_per_request", cpu_ms, "ms")


def measure_engine(report: Report, model_dir: Path, *, rounds: int, steps: int) -> None:
    """A decode step's time outside the model's forward, with one sequence and with eight."""
    config = WorkerConfig("bench", str(model_dir), "bench", device="cpu", device_bytes=64 << 20, host_bytes=64 << 20)
    engine = build_engine(config)
    root, rng = engine.info.scheme.root(SALT), random.Random(3)
    for batch in (1, 8):
        overheads, models = [], []
        for _ in range(rounds):
            for number in range(batch):
                token_ids = [rng.randrange(16, VOCAB) for _ in range(256)]
                names = block_hashes(token_ids, root, engine.info.scheme.block_size)
                sampling = SamplingParams(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
                engine.submit(Job(number, token_ids, root, names, sampling))
            with stopwatch(engine.runner) as inside:
                while sum(1 for output in engine.step().outputs if output.completion_tokens > 1) < batch:
                    pass
                inside.clear()
                started = time.perf_counter()
                for _ in range(steps):
                    engine.step()
                total = time.perf_counter() - started
            overheads.append((total - sum(inside)) * 1e3 / steps)
            models.append(sum(inside) * 1e3 / steps)
            while engine.has_work():
                engine.step()
        suffix = "" if batch == 1 else f"_batch_{batch}"
        report.add(f"engine_overhead_ms_per_step{suffix}", overheads, "ms")
        report.add(f"model_ms_per_step{suffix}", models, "ms")
    engine.close(flush_s=0.0)


@contextlib.contextmanager
def stopwatch(runner: ModelRunner) -> Iterator[list[float]]:
    """Seconds of each forward inside the block."""
    inside: list[float] = []
    forward = runner.forward

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return forward(*arguments)
        finally:
            inside.append(time.perf_counter() - started)

    with unittest.mock.patch.object(runner, "forward", timed):
        yield inside


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("overhead")
    with tempfile.TemporaryDirectory() as folder:
        model_dir = make_model_folder(folder, ModelShape(layers=8, hidden=512, heads=8, kv_heads=4, vocab=VOCAB))
        measure_engine(report, model_dir, rounds=3 if options.quick else 7, steps=30 if options.quick else 100)
        rounds = (3, 60) if options.quick else (7, 200)
        asyncio.run(measure_router(report, model_dir, batches=rounds[0], pairs=rounds[1]))
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
