"""An OpenAI worker with nothing behind it but `SimulatedService`: what the peers' routers stand before.

`python -m bench.peers.mock_worker --port PORT`: prints one line when it serves. Standard library only, so that any
Python can run it; with `--kv-events PORT` it also publishes its cache's changes over ZMQ as vLLM does
(`kv_events`, needs pyzmq and msgpack). Answers `/v1/completions` (prompts of text), what routers ask of a worker before
they trust it, `/v1/completions/render` (token ids of a prompt), and `/books`, `/forget` for whoever measures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from bench.peers.service import Constants, Served, SimulatedService, WorkerBooks

MODEL = "mock"
EARLY_HEADERS = b"x-early-headers"  # asks for the answer's head at the first token and the rest at its end
OnServed = Callable[[bytes, Served], None]

_FACTS = {"model_path": MODEL, "served_model_name": MODEL, "tp_size": 1, "dp_size": 1}
_FIXED: dict[str, object] = {
    "/get_server_info": _FACTS,
    "/server_info": _FACTS,
    "/get_model_info": _FACTS,
    "/model_info": _FACTS,
    "/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "mock"}]},
}


def token_ids(prompt: bytes) -> list[int]:
    """One token for every four characters: their bytes as a number."""
    padded = prompt + b" " * (-len(prompt) % 4)
    return array("I", padded).tolist()


class MockWorker:
    """The worker's state, shared by its connections."""

    def __init__(self, constants: Constants, number: int, on_served: OnServed | None = None) -> None:
        self.constants, self.number, self.books = constants, number, WorkerBooks()
        self._service, self._on_served = SimulatedService(constants), on_served

    def complete(self, body: dict[str, Any]) -> tuple[float, dict[str, object]]:
        """(seconds to the first token, the answer)."""
        prompt = str(body["prompt"]).encode("ascii")
        served = self._service.arrive(time.monotonic(), prompt)
        self.books.count(served.ttft_s, served.prompt_tokens, served.cached_tokens)
        if self._on_served is not None:
            asyncio.get_running_loop().call_later(served.ttft_s, self._on_served, prompt, served)
        return served.ttft_s, self._answer(served)

    def other(self, path: str, body: bytes) -> object:
        """What all paths but completions answer."""
        if path == "/books":
            return asdict(self.books)
        if path == "/forget":
            self.books = WorkerBooks()
        if path.endswith("/render"):
            ids = token_ids(str(json.loads(body)["prompt"]).encode("ascii"))
            return [{"request_id": "r", "token_ids": ids, "model": MODEL, "sampling_params": {}}]
        return _FIXED.get(path, {"status": "ok"})

    def _answer(self, served: Served) -> dict[str, object]:
        usage = {
            "prompt_tokens": served.prompt_tokens,
            "completion_tokens": 1,
            "total_tokens": served.prompt_tokens + 1,
            "prompt_tokens_details": {"cached_tokens": served.cached_tokens},
        }
        choice = {"index": 0, "text": "ok", "finish_reason": "stop", "logprobs": None}
        head = {"id": "c", "object": "text_completion", "created": 0, "model": MODEL, "worker": self.number}
        return {**head, "choices": [choice], "usage": usage}


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection."""

    def __init__(self, worker: MockWorker) -> None:
        self._worker, self._buffer = worker, bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            length = _content_length(head)
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        path = head.split(b" ", 2)[1].split(b"?")[0].decode("ascii")
        if path != "/v1/completions":
            self._write(b"".join(_encoded(self._worker.other(path, body))))
            return
        ttft_s, answer = self._worker.complete(json.loads(body))
        response_head, response_body = _encoded(answer)
        loop, done = asyncio.get_running_loop(), ttft_s + self._worker.constants.decode_s
        if EARLY_HEADERS in head:
            loop.call_later(ttft_s, self._write, response_head)
            loop.call_later(done, self._write, response_body)
        else:
            loop.call_later(done, self._write, response_head + response_body)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return 0


def _encoded(answer: object) -> tuple[bytes, bytes]:
    body = json.dumps(answer).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body), body


async def serve(worker: MockWorker, port: int) -> None:
    """Until cancelled; prints a line when it listens."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(worker), "127.0.0.1", port)
    print(json.dumps({"serves": port, "at": time.time()}), flush=True)
    await server.serve_forever()


def constants_from(options: argparse.Namespace) -> Constants:
    """The worker's constants from the command line."""
    return Constants(**{each.name: getattr(options, each.name) for each in fields(Constants)})


def constants_parser() -> argparse.ArgumentParser:
    """Flags of every simulated worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--number", type=int, default=0)
    for each in fields(Constants):
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default)
    return parser


def main() -> None:
    """Serve."""
    parser = constants_parser()
    parser.add_argument("--kv-events", type=int, default=0, help="port of the ZMQ publisher; 0: none")
    options = parser.parse_args()
    publish: OnServed | None = None
    if options.kv_events:
        from bench.peers.kv_events import Publisher

        publish = Publisher(options.kv_events, options.block_tokens).served
    asyncio.run(serve(MockWorker(constants_from(options), options.number, publish), options.port))


if __name__ == "__main__":
    main()
