"""A whole decision beside that of Dynamo's router, in one process and in turns.

Wants `ai-dynamo-runtime` and `pyzmq`, which nothing else here needs: without them there is no row. Its selection
service is fed as its workers would feed it, by K/V events over ZeroMQ, and is asked with tokens; so are we. Eight
workers hold ever deeper beginnings of each prompt.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import msgpack

from bench.report import Report, ratios

_BLOCK = 16
_WORKERS = 8
_EVENT_TOKENS = 1024
_MODEL = "bench"

Ask = Callable[[Sequence[int]], None]


def add_peer_rows(report: Report, sessions: Sequence[list[int]], asks: Mapping[str, Ask], rounds: int) -> None:
    """`<name>_vs_dynamo_ratio` for each of `asks`, ways to decide for a session on our side; else a line on stderr."""
    missing = [name for name in ("dynamo", "zmq") if importlib.util.find_spec(name) is None]
    if missing:
        left_out = f"decision_vs_dynamo_ratio left out: no {' and no '.join(missing)}"
        print(f"{left_out}; install ai-dynamo-runtime and pyzmq to have it", file=sys.stderr)
        return
    theirs, ours = asyncio.run(_in_turns(sessions, asks, rounds))
    report.add("decision_dynamo_32k_us", [s * 1e6 for s in theirs], "us")
    for name, samples in ours.items():
        report.add(f"{name}_vs_dynamo_ratio", ratios(samples, theirs), "ratio", bar="< 1")


async def _in_turns(
    sessions: Sequence[list[int]], asks: Mapping[str, Ask], rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of each decision on the wall, theirs and ours: theirs is made in threads of its own."""
    os.environ.setdefault("DYN_LOG", "error")  # it tells of each decision on standard output
    service = importlib.import_module("dynamo._core").SelectionService(indexer_threads=2)
    theirs, ours = list[float](), {name: list[float]() for name in asks}
    try:
        await _feed(service, sessions)
        for n in range(rounds):
            session = sessions[n % len(sessions)]
            started = time.perf_counter()
            await service.select({"model_name": _MODEL, "token_ids": session})
            theirs.append(time.perf_counter() - started)
            for name, ask in asks.items():
                started = time.perf_counter()
                ask(session)
                ours[name].append(time.perf_counter() - started)
    finally:
        service.shutdown()
    return theirs, ours


async def _feed(service: Any, sessions: Sequence[list[int]]) -> None:
    """Eight workers that hold 1/8, 2/8 ... of every session."""
    zmq = importlib.import_module("zmq")
    context, ids = zmq.Context(), count(1)
    try:
        for worker in range(1, _WORKERS + 1):
            publisher = context.socket(zmq.PUB)
            publisher.set_hwm(0)
            port = publisher.bind_to_random_port("tcp://127.0.0.1")
            await service.upsert_worker(_worker(worker, port))
            await asyncio.sleep(0.3)  # a subscriber misses what was published before it came
            number = count()
            for session in sessions:
                for event in _stored(session[: len(session) * worker // _WORKERS], ids):
                    batch = msgpack.packb([time.time(), [event], 0])
                    publisher.send_multipart([b"", struct.pack(">Q", next(number)), batch])
        await _until_held(service, sessions)
    finally:
        context.destroy(linger=0)


async def _until_held(service: Any, sessions: Sequence[list[int]]) -> None:
    """Until the service knows the last event of the last worker. Raises TimeoutError."""
    async with asyncio.timeout(30):
        for session in sessions:
            whole = len(session) // _BLOCK
            asked = {"model_name": _MODEL, "token_ids": session}
            while str(whole) not in str(await service.overlap_scores(asked)):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.05)


def _worker(number: int, port: int) -> dict[str, Any]:
    return {
        "worker_id": number,
        "model_name": _MODEL,
        "endpoint": f"http://127.0.0.1:{port}",
        "block_size": _BLOCK,
        "data_parallel_start_rank": 0,
        "data_parallel_size": 1,
        "kv_events_endpoints": {0: f"tcp://127.0.0.1:{port}"},
        "max_num_batched_tokens": 8192,
        "total_kv_blocks": 20_000,
    }


def _stored(tokens: list[int], ids: Iterator[int]) -> Iterator[list[Any]]:
    """In the form of vLLM's events: hashes, the parent's, tokens, block size, adapter, medium."""
    parent = None
    for at in range(0, len(tokens) - _BLOCK + 1, _EVENT_TOKENS):
        piece = tokens[at : at + _EVENT_TOKENS]
        hashes = list(islice(ids, len(piece) // _BLOCK))
        yield ["BlockStored", hashes, parent, piece, _BLOCK, None, "GPU"]
        parent = hashes[-1]
