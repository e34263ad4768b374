"""An HTTP front of our own before Dynamo's selection service: `python -m bench.peers.dynamo_shim --port PORT ...`.

Runs in the environment of `ai-dynamo-runtime`, whose wheel has the router's library but no front end. For each prompt:
token ids, `select_and_reserve` with its defaults, forward to the worker that it names, `prefill_complete` at the first
token, `free_reservation` at the end. The workers' events reach it over ZMQ. A worker that cannot be reached is left out
for the same prompt and asked no more until it answers `/health` again: that part is ours, not Dynamo's.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from dynamo.llm import SelectionService

from bench.peers.mock_worker import EARLY_HEADERS, MODEL, token_ids

_PING_S = 0.5
_HEADERS = {EARLY_HEADERS.decode(): "1"}


@dataclass(slots=True)
class Front:
    """The service and its workers: (HTTP port, port of the events) by number."""

    service: Any
    session: aiohttp.ClientSession
    workers: dict[int, tuple[int, int]]
    capacity_blocks: int
    block_tokens: int
    lost: set[int] = field(default_factory=set)

    async def join(self, number: int) -> None:
        """Make a worker known to the selection service."""
        port, events = self.workers[number]
        worker = {
            "worker_id": number,
            "model_name": MODEL,
            "endpoint": f"http://127.0.0.1:{port}",
            "block_size": self.block_tokens,
            "data_parallel_start_rank": 0,
            "data_parallel_size": 1,
            "kv_events_endpoints": {0: f"tcp://127.0.0.1:{events}"},
            "max_num_batched_tokens": 8192,
            "total_kv_blocks": self.capacity_blocks,
        }
        await self.service.upsert_worker(worker)

    async def complete(self, request: web.Request) -> web.Response:
        """`/v1/completions`."""
        body = await request.json()
        ids = token_ids(str(body["prompt"]).encode("ascii"))
        for _ in self.workers:
            chosen = await self.service.select_and_reserve({"model_name": MODEL, "token_ids": ids})
            try:
                return await self._forward(chosen, body)
            except aiohttp.ClientError:
                await self._lose(chosen["worker_id"])
        return web.json_response({"error": "no worker can be reached"}, status=503)

    async def _forward(self, chosen: dict[str, Any], body: object) -> web.Response:
        number, selection = chosen["worker_id"], chosen["selection_id"]
        url = f"http://127.0.0.1:{self.workers[number][0]}/v1/completions"
        try:
            async with self.session.post(url, json=body, headers=_HEADERS) as response:
                await self.service.prefill_complete(selection)
                return web.Response(body=await response.read(), content_type="application/json")
        finally:
            if number not in self.lost:
                await self.service.free_reservation(selection)

    async def _lose(self, number: int) -> None:
        if number not in self.lost:
            self.lost.add(number)
            await self.service.delete_worker(number)

    async def watch(self) -> None:
        """Let lost workers join again."""
        while True:
            await asyncio.sleep(_PING_S)
            for number in sorted(self.lost):
                try:
                    async with self.session.get(f"http://127.0.0.1:{self.workers[number][0]}/health"):
                        await self.join(number)
                        self.lost.discard(number)
                except aiohttp.ClientError:
                    continue


async def healthy(_request: web.Request) -> web.Response:
    """`/health`."""
    return web.json_response({"status": "ok"})


async def serve(options: argparse.Namespace) -> None:
    """Until cancelled."""
    workers = {number: (int(a), int(b)) for number, (a, b) in enumerate(w.split(":") for w in options.worker)}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        service = SelectionService(indexer_threads=2)
        front = Front(service, session, workers, options.capacity_blocks, options.block_tokens)
        for number in workers:
            await front.join(number)
        app = web.Application(client_max_size=64 << 20)
        app.add_routes([web.post("/v1/completions", front.complete), web.get("/health", healthy)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", options.port).start()
        await front.watch()


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--worker", action="append", required=True, metavar="HTTP:EVENTS")
    parser.add_argument("--capacity-blocks", type=int, default=6000)
    parser.add_argument("--block-tokens", type=int, default=16)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
