"""How long a request takes in the router from its tokens to the job on a worker's link.

The fleet is real: simulated workers behind their servers, one stream to each. Only `WorkerLink.submit` is replaced, by
a note of the time and an answer, and the encoder by ready tokens.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from bench.ready_ids import ReadyIds
from kvstore.layout import KVLayout
from kvstore.token_ids import u32
from router.config import RouterConfig
from router.core import Router
from router.discovery import StaticDiscovery
from router.flight import Flight, FlightEnd
from router.link import WorkerLink
from router.protocol import Caller, Prompt, RequestContext, Role, WorkerAddress
from warmkv.v1 import common_pb2, inference_pb2, worker_pb2
from workers.config import WorkerConfig
from workers.server import WorkerServer
from workers.simulated import SimulatedEngine
from workers.simulated_info import simulated_info

_SECRET = "bench secret"
_BLOCK = 16
_VOCABULARY = 128_000
_CALLER = Caller("bench", Role.USER, "bench")


class _Ready(ReadyIds):
    """An encoder whose next prompt is set."""

    def __init__(self) -> None:
        self.prompt = Prompt([])

    async def encode(self, input: inference_pb2.Input, *, group: str = "") -> Prompt:
        return self.prompt


async def submits(rounds: int, *, workers: int = 8, tokens: int = 32_768, turn: int = 256) -> list[float]:
    """Microseconds from `generate` to `submit`, of sessions that grow by a turn at a time."""
    servers = [_server(f"w{n}") for n in range(workers)]
    addresses = [WorkerAddress(f"w{n}", server.start()) for n, server in enumerate(servers)]
    encoder, rng = _Ready(), random.Random(1)
    config = RouterConfig(name="bench", model_dir="", model_name="bench", fleet_secret=_SECRET)
    router = Router(config, encoder, StaticDiscovery(addresses))
    await router.start()
    try:
        async with asyncio.timeout(20):
            while sum(map(router.fleet.takes_requests, router.fleet.links())) < workers:
                await router.fleet.wait_for_change(1.0)
        submitted = _intercepted(router.fleet.links())
        sessions = [u32([rng.randrange(_VOCABULARY) for _ in range(tokens)]) for _ in range(8)]
        samples = []
        for n in range(-len(sessions), rounds):
            session = sessions[n % len(sessions)]
            session.extend([rng.randrange(_VOCABULARY) for _ in range(turn)])
            encoder.prompt = Prompt(session[:], largest_id=_VOCABULARY - 1)
            started = time.thread_time()
            await _run(router)
            if n >= 0:  # the first round is what makes them seen
                samples.append((submitted[-1] - started) * 1e6)
        return samples
    finally:
        await router.close()
        await asyncio.gather(*(asyncio.to_thread(server.close) for server in servers))


def _intercepted(links: list[WorkerLink]) -> list[float]:
    """Thread times at which jobs reach a link, from now on; each is answered at once."""
    submitted: list[float] = []

    def replace(link: WorkerLink) -> None:
        def submit(
            job: worker_pb2.Job, on_tokens: Callable[[int], None], on_end: Callable[[FlightEnd], None]
        ) -> Flight:
            submitted.append(time.thread_time())
            flight = Flight(link.name, job, on_tokens=on_tokens, on_end=on_end)
            fates = common_pb2.TokensByFate(computed=len(job.packed_token_ids) // 4)
            flight.deliver(
                worker_pb2.SequenceOutput(
                    token_ids=[1], completion_tokens=1, finish_reason=common_pb2.FINISH_REASON_LENGTH, fates=fates
                )
            )
            return flight

        setattr(link, "submit", submit)  # noqa: B010 - a plain assignment is refused by the type checker

    for link in links:
        replace(link)
    return submitted


async def _run(router: Router) -> None:
    body = inference_pb2.GenerateRequest(input=inference_pb2.Input(text="ready"))
    async for _ in router.generate(body, caller=_CALLER, context=RequestContext("bench", "", None)):
        pass


def _server(name: str) -> WorkerServer:
    info = simulated_info(
        fingerprint=b"f" * 32,
        layout=KVLayout(1, 1, 4, 4, "float32", _BLOCK),
        model="bench",
        vocab_size=_VOCABULARY,
        context_length=1 << 17,
    )
    config = WorkerConfig(name=name, model_dir="", model_name="bench", fleet_secret=_SECRET, port=0)
    return WorkerServer(config, SimulatedEngine(info, device_blocks=8192))
