"""Real worker processes that can be killed, a router before them, and streams whose every token is timed.

Covers: starting and ending workers, asking for many answers at once, comparing them with uninterrupted ones. Does not
cover: who is killed when, the table (`handover`). The scenario tests use the same parts.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bench.ready_ids import ReadyIds
from router.config import RouterConfig
from router.core import Router
from router.discovery import StaticDiscovery
from router.errors import RouterError
from router.link import WorkerLink
from router.protocol import Caller, RequestContext, Role, WorkerAddress
from warmkv.v1 import inference_pb2
from workers.config import WorkerConfig

SECRET = "bench secret"
_READY_S = 120.0
_ROOT = Path(__file__).parents[1]


@dataclass(slots=True)
class Stream:
    """One answer: its tokens and when each came, in seconds; how it ended."""

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    usage: inference_pb2.Usage | None = None
    route: inference_pb2.Route | None = None
    error: RouterError | None = None

    @property
    def is_handed_over(self) -> bool:
        """Whether it went on at another worker."""
        return self.route is not None and self.route.handovers > 0

    @property
    def gaps_ms(self) -> list[float]:
        """Between its tokens."""
        return [(later - earlier) * 1000 for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Asked:
    """What streams are asked for: every other one greedy, the rest with a seed."""

    prompt: Sequence[int]
    tokens: int
    seed: int

    @property
    def body(self) -> inference_pb2.GenerateRequest:
        """The request."""
        body = inference_pb2.GenerateRequest(
            input=inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=self.prompt))
        )
        body.sampling.max_tokens, body.sampling.seed = self.tokens, self.seed
        body.sampling.temperature = 0.9 if self.seed % 2 else 0.0
        body.sampling.ignore_eos = True
        return body


def questions(count: int, *, prompt: int, tokens: int, vocab: int, seed: int = 0) -> list[Asked]:
    """Different ones of so many tokens."""
    draw = random.Random(seed)
    return [Asked([draw.randrange(5, vocab) for _ in range(prompt)], tokens, n) for n in range(count)]


class WorkerProcess:
    """`python -m workers.main` with a real engine. Methods wait; call them in a thread."""

    def __init__(self, config: WorkerConfig, *, drain_s: float) -> None:
        self.name = config.name
        self._config = config
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers.main", "--config", "-", "--drain-s", str(drain_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=_ROOT,
        )

    def wait_ready(self) -> str:
        """Its address.

        Raises:
            RuntimeError: it did not start.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the worker has no pipes; report this")
        with stdin:
            stdin.write(json.dumps(asdict(self._config)))
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.name} did not start; run python -m workers.main by hand to see why")
        return str(json.loads(line)["address"])

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Kill it if it still runs; its exit code."""
        self._process.kill()
        return self.wait()

    def wait(self) -> int:
        """Until it has ended; its exit code."""
        code = self._process.wait(_READY_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code


class Fleet:
    """Workers by name, and a router."""

    def __init__(self, template: WorkerConfig, *, drain_s: float = 30.0, handover: bool = True) -> None:
        """Workers like the template, named w0, w1, ..."""
        self.processes: dict[str, WorkerProcess] = {}
        self._template, self._drain_s = template, drain_s
        self._addresses: dict[str, str] = {}
        self._discovery = StaticDiscovery([])
        config = RouterConfig(
            name="r0", model_dir="", model_name=template.model_name, fleet_secret=SECRET, handover=handover
        )
        self.router = Router(config, ReadyIds(), self._discovery, wait_for_worker_s=5.0)

    async def start(self, *names: str) -> None:
        """Start workers, all at once, and wait until they take requests."""
        for name in names:
            config = replace(self._template, name=name, fleet_secret=SECRET)
            self.processes[name] = WorkerProcess(config, drain_s=self._drain_s)
        ready = await asyncio.gather(*(asyncio.to_thread(self.processes[name].wait_ready) for name in names))
        self._addresses |= dict(zip(names, ready, strict=True))
        self._discovery.set([WorkerAddress(name, address) for name, address in self._addresses.items()])
        async with asyncio.timeout(_READY_S):
            while not set(names) <= {link.name for link in self._able()}:
                await self.router.fleet.wait_for_change(0.5)

    async def kill(self, name: str) -> None:
        """`kill -9`, and forget it."""
        await asyncio.to_thread(self.processes[name].end)
        self._forget(name)

    async def terminate(self, name: str) -> int:
        """SIGTERM, and wait for its end; its exit code."""
        self.processes[name].send(signal.SIGTERM)
        code = await asyncio.to_thread(self.processes[name].wait)
        self._forget(name)
        return code

    def busiest(self) -> str:
        """The worker with the most answers under way."""
        return max(self._able(), key=lambda link: link.jobs).name

    async def ask(self, asked: Sequence[Asked], *, tenant: str, streams: list[Stream] | None = None) -> list[Stream]:
        """All at once; the answers. Blocks of one tenant are no other's. `streams`: to be filled as tokens come."""
        streams = [Stream() for _ in asked] if streams is None else streams
        await asyncio.gather(*(self._play(each, stream, tenant) for each, stream in zip(asked, streams, strict=True)))
        return streams

    def metric(self, name: str, **labels: str) -> float:
        """A value; zero where there is none yet."""
        return self.router.metrics.registry.get_sample_value(f"warmkv_{name}", labels) or 0.0

    async def close(self) -> None:
        """End everything."""
        await self.router.close()
        await asyncio.gather(*(asyncio.to_thread(process.end) for process in self.processes.values()))

    def _able(self) -> list[WorkerLink]:
        fleet = self.router.fleet
        return [link for link in fleet.links() if fleet.takes_requests(link)]

    def _forget(self, name: str) -> None:
        del self.processes[name], self._addresses[name]
        self._discovery.set([WorkerAddress(each, address) for each, address in self._addresses.items()])

    async def _play(self, asked: Asked, stream: Stream, tenant: str) -> None:
        caller, context = Caller(tenant, Role.USER, tenant), RequestContext(f"{tenant}-{asked.seed}", "", None)
        try:
            async for part in self.router.generate(asked.body, caller=caller, context=context):
                now = time.perf_counter()
                stream.token_ids += part.token_ids
                stream.times += [now] * len(part.token_ids)
                stream.text += part.text
                if part.finish_reason:
                    stream.usage, stream.route = part.usage, part.route
        except RouterError as error:
            stream.error = error


@asynccontextmanager
async def fleet_of(count: int, template: WorkerConfig, *, drain_s: float = 30.0) -> AsyncIterator[Fleet]:
    """So many workers, ready."""
    fleet = Fleet(template, drain_s=drain_s)
    await fleet.router.start()
    try:
        await fleet.start(*(f"w{number}" for number in range(count)))
        yield fleet
    finally:
        await fleet.close()


async def told(streams: Sequence[Stream], tokens: int) -> None:
    """Until each has so many tokens."""
    async with asyncio.timeout(_READY_S):
        while any(len(stream.token_ids) < tokens and stream.error is None for stream in streams):  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def lost(stream: Stream, whole: Stream) -> int:
    """Tokens that are missing or too many."""
    return abs(len(whole.token_ids) - len(stream.token_ids))


def changed(stream: Stream, whole: Stream) -> int:
    """Tokens that are not those of the uninterrupted answer."""
    return sum(mine != theirs for mine, theirs in zip(stream.token_ids, whole.token_ids, strict=False))
