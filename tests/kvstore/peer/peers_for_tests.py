"""A worker that serves its blocks, and a stranger on the way between two workers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from kvstore.codec import BlockCodec
from kvstore.host.tier import HostTier
from kvstore.layout import KVLayout
from kvstore.peer.server import PeerServer
from kvstore.peer.tier import PeerTier
from tests.kvstore.blocks_for_tests import LAYOUT, ManualClock

NAMESPACE = b"n" * 32
CODEC = BlockCodec(LAYOUT, NAMESPACE)
FLEET = "the fleet's secret"
PATIENT_S = 20.0  # for tests that are not about time
CAPACITY_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Cut:
    """The last bytes before the connection ends."""

    data: bytes


Change = Callable[[int, bytes], bytes | Cut]


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that must come."""
    give_up = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.002)


class Worker:
    """A host tier and its server."""

    def __init__(self, layout: KVLayout = LAYOUT, slots: int = CAPACITY_BLOCKS, **settings: Any) -> None:
        self.clock = ManualClock()
        self.host = HostTier(layout, slots * layout.block_nbytes, clock=self.clock, wall_clock=self.clock)
        patience = {"greeting_s": PATIENT_S, "idle_s": PATIENT_S, "queue_s": PATIENT_S, "send_s": PATIENT_S}
        self.server = PeerServer(self.host, **{"codec": CODEC, "secret": FLEET, **patience, **settings})

    def counts(self, kind: str) -> int:
        return self.server.counts().get(kind, 0)


@contextmanager
def worker(**settings: Any) -> Iterator[Worker]:
    """When it ends no view may be open."""
    running = Worker(**settings)
    try:
        yield running
    finally:
        running.server.close()
        running.host.check()
        assert running.counts("open") == 0
        running.host.clear()
        assert running.host.stats().used_bytes == 0, "a view was not ended"
        running.host.close()


@contextmanager
def reader(address: str, **settings: Any) -> Iterator[PeerTier]:
    tier = PeerTier(address, **{"codec": CODEC, "secret": FLEET, "timeout_s": PATIENT_S, **settings})
    try:
        yield tier
    finally:
        tier.close()


class Stranger:
    """A proxy that may change what the server says.

    Attributes:
        change: gets the number of bytes that the server has said before on this connection, and the next ones; tells
            what to pass on; `Cut`: and then hang up.
        heard: what clients said, by connection.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.change: Change = lambda at, data: data
        self.heard: list[bytearray] = []
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in [self._listener, *self._sockets]:
            sock.close()

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            self.heard.append(bytearray())
            self._start(self._pass, client, server, self._listen_to(len(self.heard) - 1))
            self._start(self._pass, server, client, lambda at, data: self.change(at, data))

    def _listen_to(self, number: int) -> Change:
        def note(at: int, data: bytes) -> bytes:
            self.heard[number] += data
            return data

        return note

    def _pass(self, source: socket.socket, sink: socket.socket, change: Change) -> None:
        at = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                changed = change(at, data)
                at += len(data)
                sink.sendall(changed.data if isinstance(changed, Cut) else changed)
                if isinstance(changed, Cut):
                    break
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def stranger(target: str) -> Iterator[Stranger]:
    running = Stranger(target)
    try:
        yield running
    finally:
        running.close()
