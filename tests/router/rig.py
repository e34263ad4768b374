"""A fleet in one process: routers over real gRPC against real worker servers with simulated engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from kvstore.events import BlockStored
from kvstore.layout import KVLayout
from router.config import RouterConfig
from router.core import Router
from router.discovery import StaticDiscovery
from router.misses import said_digests
from router.protocol import Caller, EarlierAnswer, Prompt, RequestContext, Role, WorkerAddress
from warmkv.v1 import inference_pb2
from workers.config import WorkerConfig
from workers.server import WorkerServer
from workers.simulated import SimulatedEngine
from workers.simulated_info import simulated_info
from workers.simulated_sequence import Timing

SECRET = "fleet secret"
BLOCK = 16
LAYOUT = KVLayout(1, 1, 4, 4, "float32", BLOCK)
FAST = Timing(prefill_fixed_ms=0.5, prefill_token_ms=0.01, prefill_pair_ms=0.0, decode_step_ms=1.0)
ALICE = Caller("alice", Role.USER, "alice")
ADMIN = Caller("ops", Role.ADMIN, "ops")


class CharEncoder:
    """One token a character; a chat is its contents between marks, and answers may come back as other ids."""

    tokenizer_sha256 = b""
    vocab_size = None

    async def encode(self, input: inference_pb2.Input, *, group: str = "") -> Prompt:
        match input.WhichOneof("kind"):
            case "token_ids":
                return Prompt(list(input.token_ids.ids))
            case "chat":
                return self._chat(input.chat)
        return Prompt([ord(c) % 1000 for c in input.text], input.text)

    def said(self, input: inference_pb2.Input, answer: str) -> bytes:
        said = [(message.role, message.content) for message in input.chat.messages]
        return list(said_digests([*said, ("assistant", answer)]))[-1]

    async def earlier_answers(self, input: inference_pb2.Input, prompt: Prompt) -> tuple[EarlierAnswer, ...]:
        messages, answers, end = input.chat.messages, [], 0
        for message, said in zip(messages, said_digests((m.role, m.content) for m in messages), strict=True):
            end += len(f"<{message.role}>{message.content}")
            if message.role == "assistant":
                answers.append(EarlierAnswer(said, end, spliced=bool(message.token_ids)))
        return tuple(answers)

    def _chat(self, chat: inference_pb2.Chat) -> Prompt:
        text, ids = "", []
        for message in chat.messages:
            piece = f"<{message.role}>"
            ids += [ord(c) % 1000 for c in piece]
            text += piece + message.content
            ids += message.token_ids or [ord(c) % 1000 for c in message.content]
        ids += [ord(c) for c in "<assistant>"]
        return Prompt(ids, text + "<assistant>")


def worker_server(
    name: str,
    *,
    timing: Timing = FAST,
    device_blocks: int = 512,
    host_blocks: int = 0,
    incarnation: int | None = None,
    port: int = 0,
    fingerprint: bytes = b"f" * 32,
    secret: str = SECRET,
    context_length: int = 8192,
    kv_events: str = "on",
    snapshot_takes_s: float = 0.0,
    sleep: Callable[[float], None] = time.sleep,
) -> WorkerServer:
    info = simulated_info(
        fingerprint=fingerprint, layout=LAYOUT, model="sim", vocab_size=1000, context_length=context_length
    )
    engine = SimulatedEngine(info, device_blocks=device_blocks, host_blocks=host_blocks, timing=timing, sleep=sleep)
    if snapshot_takes_s:
        whole = engine.snapshot

        def slowly() -> list[BlockStored]:
            time.sleep(snapshot_takes_s)
            return whole()

        engine.snapshot = slowly  # type: ignore[method-assign]
    config = WorkerConfig(
        name=name, model_dir="", model_name="sim", fleet_secret=secret, port=port, kv_events=kv_events
    )
    return WorkerServer(config, engine, incarnation=incarnation)


@dataclass
class Rig:
    """Workers by name, their addresses, and routers."""

    workers: dict[str, WorkerServer] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    routers: list[Router] = field(default_factory=list)
    discoveries: list[StaticDiscovery] = field(default_factory=list)

    def start_worker(self, name: str, **options: object) -> None:
        server = worker_server(name, **options)  # type: ignore[arg-type]
        self.addresses[name] = server.start()
        self.workers[name] = server
        self.announce()

    async def kill_worker(self, name: str) -> None:
        await asyncio.to_thread(self.workers.pop(name).close)

    def announce(self) -> None:
        for discovery in self.discoveries:
            discovery.set(self.listed())

    def listed(self) -> list[WorkerAddress]:
        return [WorkerAddress(name, address) for name, address in self.addresses.items()]

    async def start_router(self, name: str = "r0", *, wait_for_worker_s: float = 1.0, **settings: object) -> Router:
        config = RouterConfig(name=name, model_dir="", model_name="sim", fleet_secret=SECRET)
        config = replace(config, **settings)  # type: ignore[arg-type]
        discovery = StaticDiscovery(self.listed())
        router = Router(config, CharEncoder(), discovery, wait_for_worker_s=wait_for_worker_s)
        self.discoveries.append(discovery)
        self.routers.append(router)
        await router.start()
        return router

    async def close(self) -> None:
        for router in self.routers:
            await router.close()
        await asyncio.gather(*(asyncio.to_thread(server.close) for server in self.workers.values()))


@asynccontextmanager
async def rig(workers: int = 0, **options: object) -> AsyncIterator[Rig]:
    fleet = Rig()
    try:
        for n in range(workers):
            fleet.start_worker(f"w{n}", **options)
        yield fleet
    finally:
        await fleet.close()


async def eventually(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for a condition; a timeout is the failure."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


def states(router: Router) -> dict[str, str]:
    names = type(router.list_workers()[0]).DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number
    return {w.name: names[w.state].name.removeprefix("WORKER_STATE_") for w in router.list_workers()}


async def all_ready(router: Router, count: int) -> None:
    def ready() -> bool:
        workers = router.list_workers()
        return len(workers) == count and all(state == "READY" for state in states(router).values())

    await eventually(ready)


def tokens(seed: int, count: int) -> list[int]:
    return [(seed * 7919 + n * 31 + (n * n) % 97) % 1000 for n in range(count)]


def request(ids: list[int], max_tokens: int = 2, **fields: object) -> inference_pb2.GenerateRequest:
    body = inference_pb2.GenerateRequest(input=inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids)), **fields)
    body.sampling.max_tokens = max_tokens
    body.sampling.temperature = 0
    body.sampling.ignore_eos = True
    return body


def context(request_id: str = "req", deadline: float | None = None) -> RequestContext:
    return RequestContext(request_id, "", deadline)


async def generate(
    router: Router, body: inference_pb2.GenerateRequest, *, caller: Caller = ALICE, about: RequestContext | None = None
) -> inference_pb2.GenerateResponse:
    """All of an answer, in one message."""
    whole = inference_pb2.GenerateResponse()
    async for part in router.generate(body, caller=caller, context=about or context()):
        text = whole.text + part.text
        whole.MergeFrom(part)
        whole.text = text
    return whole
