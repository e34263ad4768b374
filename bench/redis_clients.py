"""Ways to move values to and from a Redis server, for `bench.store_redis`: ours, others', and the least there can be.

`raw` is the ceiling: plain SET and GET of one string, four under way, no header, no checksum, no deadline, no TTL.
`raw_hset` stores what ours does, a hash of two fields, and nothing else: a server copies a hash's values once more than
a string's, so what `raw_hset` loses against `raw` is the server's share, and what ours loses against it is ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import select
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.machinery import PathFinder
from typing import Any, Protocol, cast

import redis
from redis._parsers import Encoder, _RESP2Parser
from redis.connection import PythonRespSerializer, parse_url

from kvstore.blocks import BlockHash
from kvstore.codec import HEADER_NBYTES, BlockCodec
from kvstore.events import RemovalCause
from kvstore.layout import KVLayout
from kvstore.redis.resp import argument, pack
from kvstore.redis.tier import RedisTier
from kvstore.redis.values import TAIL_NBYTES
from kvstore.tier import chain_metas

LAYER_NBYTES = 64 << 10
ROOT = BlockHash(b"b" * 32)
NAMESPACE = b"n" * 32
PATIENCE_S = 30.0
WINDOW = 4
LMCACHE_THREADS = 2
ABSENT = {
    "hiredis": "redis-py with hiredis: left out; pip install hiredis to see it",
    "lmcache": "lmcache: left out; pip install --no-deps lmcache to see it (its native client needs torch alone)",
}

Views = Sequence[memoryview]


class Client(Protocol):
    """One way to move values."""

    def drop(self) -> None:
        """Remove its keys."""
        ...

    def write(self, values: Views) -> None:
        """Store them all."""
        ...

    def read(self, slots: Views) -> None:
        """Fetch them all."""
        ...


class Raw:
    """The ceiling: blocking sockets, strings, a window of four."""

    prefix = b"raw:"

    def __init__(self, sock: socket.socket, names: Sequence[BlockHash]) -> None:
        self._sock = sock
        self._keys = [self.prefix + name.hex().encode() for name in names]
        self._bytes = bytearray(64)
        self._buffer = memoryview(self._bytes)
        self._low = self._high = 0

    def drop(self) -> None:
        """Remove its keys."""
        for key in self._keys:
            self._sock.sendall(pack(b"UNLINK", key))
            self._line()

    def write(self, values: Views) -> None:
        """SET each."""
        for number, (key, value) in enumerate(zip(self._keys, values, strict=True)):
            self._send(self._command(key, value))
            if number >= WINDOW:
                self._line()
        for _ in range(min(WINDOW, len(self._keys))):
            self._line()

    def read(self, slots: Views) -> None:
        """GET each into its slot."""
        questions = [self._question(key) for key in self._keys]
        self._sock.sendall(b"".join(questions[:WINDOW]))
        for number, slot in enumerate(slots):
            self._take(slot)
            if number + WINDOW < len(questions):
                self._sock.sendall(questions[number + WINDOW])

    def _command(self, key: bytes, value: memoryview) -> list[memoryview]:
        front = b"*3\r\n$3\r\nSET\r\n%b$%d\r\n" % (argument(key), len(value))
        return [memoryview(front), value, memoryview(b"\r\n")]

    def _question(self, key: bytes) -> bytes:
        return pack(b"GET", key)

    def _take(self, slot: memoryview) -> None:
        self._value(slot)

    def _send(self, rest: list[memoryview]) -> None:
        while rest:
            sent = self._sock.sendmsg(rest)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if sent:
                rest[0] = rest[0][sent:]

    def _value(self, slot: memoryview) -> None:
        length = int(self._line()[1:])
        done = min(length, self._high - self._low)
        slot[:done] = self._buffer[self._low : self._low + done]
        self._low += done
        while done < length:
            done += self._sock.recv_into(slot[done:length])
        self._line()

    def _line(self) -> bytes:
        while (end := self._bytes.find(b"\r\n", self._low, self._high)) < 0:
            left = self._bytes[self._low : self._high]
            self._bytes[: len(left)] = left
            self._low, self._high = 0, len(left)
            self._high += self._sock.recv_into(self._buffer[self._high :])
        line = self._bytes[self._low : end]
        self._low = end + 2
        return bytes(line)


class RawHset(Raw):
    """The same with our form of a value: HSET and HMGET of a small field and the rest, and nothing besides."""

    prefix = b"hset:"

    def __init__(self, sock: socket.socket, names: Sequence[BlockHash]) -> None:
        super().__init__(sock, names)
        self._head = memoryview(bytearray(HEADER_NBYTES + TAIL_NBYTES))

    def _command(self, key: bytes, value: memoryview) -> list[memoryview]:
        rest = value[:-TAIL_NBYTES]
        self._head[HEADER_NBYTES:] = value[-TAIL_NBYTES:]
        front = b"*6\r\n$4\r\nHSET\r\n%b$1\r\nh\r\n%b$1\r\nd\r\n$%d\r\n" % (
            *(argument(key), argument(bytes(self._head)), len(rest)),
        )
        return [memoryview(front), rest, memoryview(b"\r\n")]

    def _question(self, key: bytes) -> bytes:
        return pack(b"HMGET", key, b"h", b"d")

    def _take(self, slot: memoryview) -> None:
        self._line()
        self._value(self._head)
        self._value(slot[:-TAIL_NBYTES])
        slot[-TAIL_NBYTES:] = self._head[HEADER_NBYTES:]


class RedisPy:
    """redis-py as its documentation shows it, one value at a time."""

    def __init__(self, client: redis.Redis, names: Sequence[BlockHash]) -> None:
        self._client = client
        self._keys = [b"py:" + name.hex().encode() for name in names]

    def drop(self) -> None:
        """Remove its keys."""
        for key in self._keys:
            self._client.unlink(key)

    def write(self, values: Views) -> None:
        """SET each."""
        for key, value in zip(self._keys, values, strict=True):
            self._client.set(key, value)

    def read(self, slots: Views) -> None:
        """GET each and copy it into its slot."""
        for key, slot in zip(self._keys, slots, strict=True):
            slot[:] = cast("bytes", self._client.get(key))


class LmCache:
    """The native client behind LMCache's `resp://`, its fastest way to Redis: C++ threads, whole batches, TCP only."""

    def __init__(self, native: Any, names: Sequence[BlockHash]) -> None:
        self._native = native
        self._keys = ["lmcache:" + name.hex() for name in names]

    def drop(self) -> None:
        """Remove its keys."""
        self._finish(self._native.submit_batch_delete(self._keys))

    def write(self, values: Views) -> None:
        """Store the batch."""
        self._finish(self._native.submit_batch_set(self._keys, list(values)))

    def read(self, slots: Views) -> None:
        """Fetch the batch into the slots."""
        self._finish(self._native.submit_batch_get(self._keys, list(slots)))

    def _finish(self, ticket: int) -> None:
        while True:
            if not select.select([self._native.event_fd()], [], [], PATIENCE_S)[0]:
                raise TimeoutError(f"lmcache's client did not end a batch within {PATIENCE_S:g} s")
            for done, ok, error, _ in self._native.drain_completions():
                if not ok:
                    raise RuntimeError(f"lmcache's client failed: {error}")
                if done == ticket:
                    return


class Ours:
    """The tier as the store uses it: header, checksum, TTL, deadline."""

    def __init__(self, tier: RedisTier, names: Sequence[BlockHash]) -> None:
        self._tier = tier
        self._names = names
        self._metas = chain_metas(names, before=ROOT, root=ROOT, ttl_s=86400.0)

    def drop(self) -> None:
        """Remove its keys."""
        self._tier.remove(self._names, RemovalCause.CLEARED)

    def write(self, values: Views) -> None:
        """Store each block."""
        expect(self._tier.write(self._metas, values), len(values))

    def read(self, slots: Views) -> None:
        """Fetch and verify each block."""
        expect(self._tier.read(self._names, slots).count, len(slots))


def open_clients(stack: ExitStack, url: str, names: Sequence[BlockHash], nbytes: int) -> dict[str, Client]:
    """Every client that is installed, on one server; `stack` closes them."""
    clients: dict[str, Client] = {
        "raw": Raw(stack.enter_context(_socket(url)), names),
        "raw_hset": RawHset(stack.enter_context(_socket(url)), names),
        "ours": Ours(open_tier(stack, url, nbytes), names),
    }
    encode = Encoder("utf-8", "strict", decode_responses=False).encode  # type: ignore[no-untyped-call]
    plain: dict[str, Any] = {"parser_class": _RESP2Parser, "command_packer": PythonRespSerializer(6000, encode)}
    kinds: dict[str, dict[str, Any]] = {"redis_py": plain}
    if importlib.util.find_spec("hiredis") is not None:
        kinds["hiredis"] = {}
    for name, options in kinds.items():
        client = redis.Redis.from_url(url, protocol=2, **options)
        stack.callback(client.close)
        clients[name] = RedisPy(client, names)
    settings, native = _settings(url), lmcache_client()
    if native is not None and "port" in settings:
        lmcache = native(settings["host"], settings["port"], LMCACHE_THREADS)
        stack.callback(lmcache.close)
        clients["lmcache"] = LmCache(lmcache, names)
    return clients


def open_tier(stack: ExitStack, url: str, nbytes: int) -> RedisTier:
    """Our tier with blocks of that size."""
    codec = BlockCodec(KVLayout(nbytes // LAYER_NBYTES, 8, 128, 128, "bfloat16"), NAMESPACE)
    tier = RedisTier(url, codec=codec, timeout_s=PATIENCE_S, write_timeout_s=PATIENCE_S)
    stack.callback(tier.close)
    return tier


def lmcache_client() -> Callable[[str, int, int], Any] | None:
    """The class of LMCache's native client; None: it is not installed.

    The extension alone: its package wants some fifty others, most of them for a GPU, and logs at import.
    """
    package = importlib.util.find_spec("lmcache")
    if package is None or package.submodule_search_locations is None:
        return None
    spec = PathFinder.find_spec("lmcache_redis", list(package.submodule_search_locations))
    if spec is None or spec.loader is None:
        return None
    module = sys.modules.get(spec.name)
    if module is None:
        importlib.import_module("torch")  # whose libraries it is linked to
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return cast("Callable[[str, int, int], Any]", module.LMCacheRedisClient)


def absent() -> list[str]:
    """A line for each contender that is not installed: how to see it."""
    found = {"hiredis": importlib.util.find_spec("hiredis") is not None, "lmcache": lmcache_client() is not None}
    return [line for name, line in ABSENT.items() if not found[name]]


def expect(count: int, wanted: int) -> None:
    """Not all blocks of a benchmark arrived: say so.

    Raises:
        RuntimeError: the counts differ.
    """
    if count != wanted:
        raise RuntimeError(f"{count} of {wanted} blocks; is another program using the memory of this machine?")


def _settings(url: str) -> dict[str, Any]:
    return dict(parse_url(url))  # type: ignore[no-untyped-call]


def _socket(url: str) -> socket.socket:
    settings = _settings(url)
    if "path" in settings:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(settings["path"])
    else:
        sock = socket.create_connection((settings["host"], settings["port"]))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
