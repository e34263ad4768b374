"""What prefilling on one worker and answering on another one buys, against two workers that do both.

Real workers in processes of their own with a small model on the CPU, one router in this process, loopback. In each
round every fleet in turn answers `CHATS` short questions at length while `LONG` prompts that nobody has seen come one
after the other. `itl` is the time between two tokens of the chats, which chunks of long prompts hold up; `ttft` that of
the long prompts. Ratios are of one round each: below 1 the pair is the better one. A machine with two cores gives both
workers of a fleet one core each while nothing else runs; the figures say little of accelerators, the replay more
(`warmkv replay --roles`).
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench.report import Report, arguments
from replay.outcome import quantile
from router.config import RouterConfig
from router.core import Router
from router.discovery import StaticDiscovery
from router.protocol import Caller, RequestContext, Role, WorkerAddress
from router.tokenizer import PromptEncoder
from warmkv.v1 import admin_pb2, inference_pb2
from workers.config import WorkerConfig
from workers.tiny import ModelShape, make_model_folder

FLEETS = {"mixed": "", "pair": "prefill=1,decode=1"}
SHAPE = ModelShape(layers=4, hidden=256, heads=4, kv_heads=2, vocab=2048, context_length=4096)
CHATS, CHAT_TOKENS, CHAT_ANSWER = 4, 40, 80
LONG, LONG_TOKENS, LONG_ANSWER = 2, 1200, 4
READY_S, END_S = 120.0, 30.0
_CALLER = Caller("bench", Role.USER, "bench")
_SECRET = "bench"


@dataclass(slots=True)
class Heard:
    """Of one round. Milliseconds; `pairs`: long prompts that another worker prefilled."""

    gaps: list[float] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    pairs: int = 0


class Fleet:
    """Two workers and a router."""

    def __init__(self, router: Router, rng: random.Random) -> None:
        self._router, self._rng = router, rng

    async def round(self) -> Heard:
        """The chats, and while they are answered the long prompts."""
        heard = Heard()
        chats = [asyncio.create_task(self._chat(heard)) for _ in range(CHATS)]
        await asyncio.sleep(0.3)  # they decode by then
        for _ in range(LONG):
            await self._long(heard)
        await asyncio.gather(*chats)
        return heard

    async def _chat(self, heard: Heard) -> None:
        last = 0.0
        async for _ in self._answer(CHAT_TOKENS, CHAT_ANSWER):
            now = time.perf_counter()
            if last:
                heard.gaps.append((now - last) * 1e3)
            last = now

    async def _long(self, heard: Heard) -> None:
        started, first = time.perf_counter(), True
        async for part in self._answer(LONG_TOKENS, LONG_ANSWER):
            if first:
                heard.ttfts.append((time.perf_counter() - started) * 1e3)
                first = False
            heard.pairs += bool(part.route.prefill_worker)

    async def _answer(self, prompt: int, tokens: int) -> AsyncIterator[inference_pb2.GenerateResponse]:
        ids = [self._rng.randrange(16, SHAPE.vocab) for _ in range(prompt)]
        body = inference_pb2.GenerateRequest(input=inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids)))
        body.sampling.max_tokens, body.sampling.temperature, body.sampling.ignore_eos = tokens, 0.0, True
        context = RequestContext("bench", "", None)
        async for part in self._router.generate(body, caller=_CALLER, context=context):
            yield part


@asynccontextmanager
async def started(model: Path, roles: str) -> AsyncIterator[list[subprocess.Popen[str]]]:
    """Two workers, until the block ends; they may not be ready yet."""
    base = WorkerConfig(
        name="w0",
        model_dir=str(model),
        model_name="bench",
        device="cpu",
        device_bytes=64 << 20,
        host_bytes=128 << 20,
        block_size=16,
        max_batch_tokens=256,
        fleet_secret=_SECRET,
        peers=True,
        roles=roles,
    )
    processes = [await _process(replace(base, name=f"w{number}")) for number in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            await asyncio.to_thread(_ended, process)
            if process.stdout is not None:
                process.stdout.close()


@asynccontextmanager
async def fleet(model: Path, workers: Sequence[subprocess.Popen[str]], rng: random.Random) -> AsyncIterator[Fleet]:
    """These workers behind a router, until the block ends."""
    lines = [await asyncio.to_thread(_first_line, process) for process in workers]
    addresses = [WorkerAddress(f"w{number}", json.loads(line)["address"]) for number, line in enumerate(lines)]
    config = RouterConfig(name="bench", model_dir=str(model), model_name="bench", fleet_secret=_SECRET)
    router = Router(config, encoder=PromptEncoder.load(model), discovery=StaticDiscovery(addresses))
    await router.start()
    try:
        await _ready(router)
        yield Fleet(router, rng)
    finally:
        await router.close()


async def _process(config: WorkerConfig) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "workers.main", "--config", json.dumps(asdict(config))]
    return await asyncio.to_thread(_opened, command)


def _opened(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _ended(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _first_line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise RuntimeError("a worker did not start; run `python -m workers.main` by hand to see why")
    return line


async def _ready(router: Router) -> None:
    until = time.monotonic() + READY_S
    while True:
        workers = router.list_workers()
        if sum(worker.state == admin_pb2.WORKER_STATE_READY for worker in workers) == 2:
            return
        if time.monotonic() > until:
            problems = "; ".join(f"{worker.name}: {worker.problem or worker.state}" for worker in workers)
            raise RuntimeError(f"two workers were not ready after {READY_S:g} s ({problems}); try a less busy machine")
        await asyncio.sleep(0.05)


async def measured(rounds: int) -> dict[str, list[Heard]]:
    """Rounds of both fleets in turn, after one of each that is not counted."""
    heard: dict[str, list[Heard]] = {name: [] for name in FLEETS}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model_folder(folder, SHAPE)
        async with AsyncExitStack() as stack:
            starting = [stack.enter_async_context(started(model, roles)) for roles in FLEETS.values()]
            workers = [await each for each in starting]
            both = [await stack.enter_async_context(fleet(model, each, random.Random(1))) for each in workers]
            for number in range(rounds + 1):
                for name, each in zip(FLEETS, both, strict=True):
                    result = await each.round()
                    if number:
                        heard[name].append(result)
    return heard


def _rows(report: Report, heard: dict[str, list[Heard]]) -> None:
    figures: dict[str, Callable[[Heard], float]] = {
        "itl_p50": lambda one: quantile(one.gaps, 0.5),
        "itl_p99": lambda one: quantile(one.gaps, 0.99),
        "ttft_mean": lambda one: statistics.fmean(one.ttfts),
    }
    for figure, of in figures.items():
        samples: dict[str, Sequence[float]] = {name: [of(one) for one in heard[name]] for name in FLEETS}
        for name, values in samples.items():
            report.add(f"{name}_{figure}_ms", values, "ms")
        ratios = [pair / mixed for pair, mixed in zip(samples["pair"], samples["mixed"], strict=True)]
        report.add(f"{figure}_ratio", ratios, "ratio")
    report.add("paired_share", [one.pairs / LONG for one in heard["pair"]], "ratio")


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("disagg")
    _rows(report, asyncio.run(measured(2 if options.quick else 7)))
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
