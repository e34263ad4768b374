"""How each router under test is started, and before which workers. All with the defaults of their release.

Covers: commands, flags, ports, when a router counts as ready. Does not cover: what is done with it (`fleet`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from bench.peers.callers import Caller, CallFailed, GrpcCaller, HttpCaller
from bench.peers.own_worker import SECRET
from bench.peers.processes import START_TIMEOUT_S, NotStarted
from bench.peers.prompts import prompt_of
from bench.peers.service import Constants
from warmkv.client import AsyncClient, WarmkvError
from warmkv.v1 import admin_pb2

OWN = "warmkv"
_ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.1
# Peers answer as soon as one worker is registered; the others follow with the next check.
_SETTLE_S = 1.5
_PROBE = prompt_of((1, 2))  # less than a block: leaves nothing in a cache


@dataclass(frozen=True, slots=True)
class Ports:
    """Free ports of the loopback interface. `side`: one for each worker's books or events."""

    workers: tuple[int, ...]
    side: tuple[int, ...]
    router: int
    metrics: int

    @classmethod
    def choose(cls, workers: int) -> Ports:
        """Ports that nobody listens on now."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(2 * workers + 2)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            numbers = [int(each.getsockname()[1]) for each in sockets]
        return cls(tuple(numbers[:workers]), tuple(numbers[workers:-2]), *numbers[-2:])


class Contender(Protocol):
    """A router and the workers that it stands before."""

    @property
    def name(self) -> str:
        """In the names of rows."""
        ...

    def worker_command(self, number: int, ports: Ports, constants: Constants) -> list[str]:
        """Starts a worker that prints `"serves"`."""
        ...

    def router_command(self, ports: Ports, constants: Constants) -> list[str]:
        """Starts the router."""
        ...

    def environment(self) -> dict[str, str]:
        """Of both."""
        ...

    def books_port(self, number: int, ports: Ports) -> int:
        """Where a worker answers `/books`."""
        ...

    def caller(self, ports: Ports) -> Caller:
        """A client of the router."""
        ...

    async def until_ready(self, ports: Ports) -> None:
        """Until it sends to all workers.

        Raises:
            NotStarted: it does not within two minutes.
        """
        ...


@dataclass(frozen=True, slots=True)
class Own:
    """This project's router before its own simulated workers, without Ray. `model`: a folder with a tokenizer."""

    model: Path
    name: str = OWN

    def worker_command(self, number: int, ports: Ports, constants: Constants) -> list[str]:
        """See Contender."""
        own = ["--model", str(self.model), "--books-port", str(ports.side[number])]
        return [sys.executable, "-m", "bench.peers.own_worker", *_worker_flags(number, ports, constants), *own]

    def router_command(self, ports: Ports, constants: Constants) -> list[str]:
        """See Contender."""
        command = [sys.executable, "-c", "from deploy.cli import main; main()", "router", "--model", str(self.model)]
        for number, port in enumerate(ports.workers):
            command += ["--worker", f"w{number}=127.0.0.1:{port}"]
        return [*command, "--set", "model.name=mock", "--grpc-port", str(ports.router), "--http-port", "0"]

    def environment(self) -> dict[str, str]:
        """See Contender."""
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "WARMKV_AUTH__FLEET_SECRET": SECRET}

    def books_port(self, number: int, ports: Ports) -> int:
        """See Contender."""
        return ports.side[number]

    def caller(self, ports: Ports) -> Caller:
        """See Contender."""
        return GrpcCaller(f"127.0.0.1:{ports.router}")

    async def until_ready(self, ports: Ports) -> None:
        """See Contender."""
        give_up, ready = time.monotonic() + START_TIMEOUT_S, 0
        async with AsyncClient(f"127.0.0.1:{ports.router}") as client:
            while ready < len(ports.workers):
                if time.monotonic() > give_up:
                    raise NotStarted(f"{ready} of {len(ports.workers)} workers are ready behind the router")
                await asyncio.sleep(_POLL_S)
                try:
                    workers = await client.list_workers()
                except WarmkvError:
                    continue
                ready = sum(worker.state == admin_pb2.WORKER_STATE_READY for worker in workers)


class _OverHttp:
    """What routers of others have in common: mock workers that keep their own books, and OpenAI's HTTP."""

    __slots__ = ()

    def books_port(self, number: int, ports: Ports) -> int:
        """See Contender."""
        return ports.workers[number]

    def caller(self, ports: Ports) -> Caller:
        """See Contender."""
        return HttpCaller(ports.router)

    async def until_ready(self, ports: Ports) -> None:
        """See Contender."""
        await _until_answers(self.caller(ports))


@dataclass(frozen=True, slots=True)
class Peer(_OverHttp):
    """A router of others before mock workers. `program`: how its own Python starts it; its flags are the same."""

    name: str
    python: Path
    program: tuple[str, ...]
    policy: str
    log_level: str = "warn"

    def worker_command(self, number: int, ports: Ports, constants: Constants) -> list[str]:
        """See Contender."""
        return [sys.executable, "-m", "bench.peers.mock_worker", *_worker_flags(number, ports, constants)]

    def router_command(self, ports: Ports, constants: Constants) -> list[str]:
        """See Contender."""
        host = ["--host", "127.0.0.1", "--port", str(ports.router)]
        metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports.metrics)]
        workers = ["--worker-startup-check-interval", "1", "--worker-urls"]
        workers += [f"http://127.0.0.1:{port}" for port in ports.workers]
        chosen = ["--policy", self.policy, "--log-level", self.log_level]
        return [str(self.python), *self.program, *host, *metrics, *workers, *chosen]

    def environment(self) -> dict[str, str]:
        """See Contender."""
        return _foreign_environment()


@dataclass(frozen=True, slots=True)
class Dynamo(_OverHttp):
    """Dynamo's selection service behind our shim (`dynamo_shim`), before mock workers that publish KV events."""

    python: Path
    name: str = "dynamo"

    def worker_command(self, number: int, ports: Ports, constants: Constants) -> list[str]:
        """See Contender."""
        flags = [*_worker_flags(number, ports, constants), "--kv-events", str(ports.side[number])]
        return [str(self.python), "-m", "bench.peers.mock_worker", *flags]

    def router_command(self, ports: Ports, constants: Constants) -> list[str]:
        """See Contender."""
        command = [str(self.python), "-m", "bench.peers.dynamo_shim", "--port", str(ports.router)]
        for port, events in zip(ports.workers, ports.side, strict=True):
            command += ["--worker", f"{port}:{events}"]
        sizes = {"--capacity-blocks": constants.capacity_blocks, "--block-tokens": constants.block_tokens}
        return [*command, *(f"{flag}={value}" for flag, value in sizes.items())]

    def environment(self) -> dict[str, str]:
        """See Contender. It writes a line for each selection otherwise."""
        return {**_foreign_environment(), "DYN_LOG": "error"}


def peer_contenders(peer: str, python: Path) -> list[Contender]:
    """What is run of an installed peer; SGLang's gateway twice, its round robin being the floor to compare with."""
    sglang = ("-m", "sglang_router.launch_router")
    started: dict[str, list[Contender]] = {
        "sglang": [
            Peer("sglang", python, sglang, "cache_aware"),
            Peer("sglang_round_robin", python, sglang, "round_robin"),
        ],
        "smg": [Peer("smg", python, ("-m", "smg.cli", "launch"), "cache_aware")],
        "vllm": [Peer("vllm", python, ("-m", "vllm_router.launch_router"), "cache_aware", log_level="warning")],
        "dynamo": [Dynamo(python)],
    }
    return started[peer]


def _worker_flags(number: int, ports: Ports, constants: Constants) -> list[str]:
    flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(constants).items()}
    named = {"--port": ports.workers[number], "--number": number, **flags}
    return [f"{flag}={value}" for flag, value in named.items()]


def _foreign_environment() -> dict[str, str]:
    """No Python settings of ours but where this package lies, and no search for models on the network.

    The seed gives a block the same name on every worker; Dynamo's index drops events where names differ.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**clean, "PYTHONPATH": str(_ROOT), "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}


async def _until_answers(caller: Caller) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    try:
        while True:
            try:
                await caller.ask(_PROBE)
                break
            except CallFailed as failure:
                if time.monotonic() > give_up:
                    raise NotStarted(f"the router does not answer: {failure}") from failure
                await asyncio.sleep(_POLL_S)
    finally:
        await caller.close()
    await asyncio.sleep(_SETTLE_S)
