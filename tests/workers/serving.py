"""A simulated worker behind a real server on loopback, for tests. Its steps can be held at a gate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvstore.layout import KVLayout
from tests.workers.stream_client import PATIENCE_S, SECRET, StreamClient
from workers.config import WorkerConfig
from workers.outbox import OutboxLimits
from workers.protocol import Engine
from workers.server import WorkerServer
from workers.simulated import SimulatedEngine
from workers.simulated_info import simulated_info

INFO = simulated_info(
    fingerprint=b"f" * 32, layout=KVLayout(1, 1, 4, 4, "float32", 16), context_length=100_000, vocab_size=1000
)


class Gate:
    """An engine's `sleep` that lets one step pass for each permit; `open` lets all pass."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, seconds: float) -> None:
        self.arrived.release()
        if not self._open.is_set():
            assert self._permits.acquire(timeout=PATIENCE_S), "no test let the step pass"

    def wait_arrived(self) -> None:
        """Until the engine is inside a step."""
        assert self.arrived.acquire(timeout=PATIENCE_S), "the engine did not step"

    def let_pass(self) -> None:
        self._permits.release()

    def open(self) -> None:
        self._open.set()
        self._permits.release()


def no_sleep(seconds: float) -> None:
    pass


def simulated(**settings: Any) -> SimulatedEngine:
    chosen = {"device_blocks": 1000, "host_blocks": 2000, "sleep": no_sleep, **settings}
    return SimulatedEngine(INFO, **chosen)


def config(**settings: Any) -> WorkerConfig:
    return WorkerConfig(**{"name": "w0", "model_dir": "", "model_name": "m", "fleet_secret": SECRET, **settings})


@contextmanager
def serving(
    engine: Engine | None = None, *, limits: OutboxLimits | None = None, **settings: Any
) -> Iterator[tuple[WorkerServer, str]]:
    server = WorkerServer(config(**settings), engine or simulated(), limits=limits, incarnation=7)
    address = server.start()
    try:
        yield server, address
    finally:
        server.close()


@contextmanager
def routers(address: str, count: int = 1, **settings: Any) -> Iterator[list[StreamClient]]:
    """Connected routers that have their snapshots and a load."""
    clients = [StreamClient(address, name=f"r{number}", **settings) for number in range(count)]
    try:
        for client in clients:
            client.wait_for(lambda client=client: client.mirror.complete and client.loads())
        yield clients
    finally:
        for client in clients:
            client.drop()
