"""A mock worker's KV events over ZMQ, as vLLM publishes them. Runs in the environment of the peer that reads them."""

from __future__ import annotations

import struct
import time
from itertools import count

import msgpack
import zmq

from bench.peers.mock_worker import token_ids
from bench.peers.service import CHARS_PER_TOKEN, Served

_UNSIGNED = (1 << 64) - 1


class Publisher:
    """Numbered batches on a PUB socket of the loopback interface."""

    def __init__(self, port: int, block_tokens: int) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.bind(f"tcp://127.0.0.1:{port}")
        self._numbers, self._block_tokens = count(), block_tokens

    def served(self, prompt: bytes, served: Served) -> None:
        """What a prompt changed in the cache."""
        events: list[list[object]] = []
        if served.evicted:
            events.append(["BlockRemoved", [name & _UNSIGNED for name in served.evicted], "GPU"])
        if served.stored:
            events.append(self._stored(prompt, served))
        if events:
            batch = msgpack.packb([time.time(), events, 0])
            self._socket.send_multipart([b"", struct.pack(">Q", next(self._numbers)), batch])

    def _stored(self, prompt: bytes, served: Served) -> list[object]:
        chain = [name & _UNSIGNED for name in served.chain]
        first, size = len(chain) - served.stored, self._block_tokens * CHARS_PER_TOKEN
        ids = token_ids(prompt[first * size : len(chain) * size])
        parent = chain[first - 1] if first else None
        return ["BlockStored", chain[first:], parent, ids, self._block_tokens, None, "GPU"]
