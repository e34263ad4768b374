"""WorkerActor: the Ray actor around an engine and its server. A thin shell.

Covers: building both in the background, so that the actor answers while torch is imported; telling what it is; ending
in good order, also upon SIGTERM; dying where only a new process helps, so that Ray starts one. Does not cover: where
actors are placed (`deploy.placement`), what is said on streams (`server`).

The class is plain and free of Ray: `deploy.placement` turns it into an actor. A start that fails is a state, with the
reason, and not a crash: the same settings would fail again, and Ray would start it for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Self

from workers.config import WorkerConfig
from workers.protocol import Engine
from workers.server import WorkerServer
from workers.start_slots import start_slot

logger = logging.getLogger(__name__)

# What a router needs of a model folder; the weights are the worker's own business.
CARD_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
EXIT_ASKED = 0
EXIT_FATAL = 1


@dataclass(frozen=True, slots=True)
class Farewell:
    """How a worker ends upon SIGTERM: jobs may finish for `drain_s`, then blocks be written for `flush_s`."""

    drain_s: float = 30.0
    flush_s: float = 5.0


class WorkerPhase(StrEnum):
    """Where a worker is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """What a worker says of itself.

    Attributes:
        address: what routers dial; empty until it is ready. incarnation: grows with every process.
        problem: why it failed and what to do; empty otherwise. node: the address of its node.
    """

    name: str
    state: WorkerPhase
    address: str
    incarnation: int
    pid: int
    node: str
    problem: str = ""


BuildEngine = Callable[[WorkerConfig], Engine]
Exit = Callable[[int], None]


class WorkerActor:
    """One worker in a process of its own. Its methods belong to one event loop; the start runs in a thread.

    Args:
        config: as the user wants it; `node` is advertised where it names no address and listens on all of them.
        node: None: `ray.util.get_node_ip_address()`.
        farewell: how it ends upon `sigterm`, whereupon Ray starts it anew.
        build_engine, exit_process: for tests; None: by the settings, and `os._exit`.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        node: str | None = None,
        farewell: Farewell = Farewell(),
        build_engine: BuildEngine | None = None,
        exit_process: Exit | None = None,
    ) -> None:
        self._node = node or _ray_node_address()
        self._config = config
        self._phase = WorkerPhase.STARTING
        self._problem = ""
        self._address = ""
        self._incarnation = time.time_ns()
        self._build_engine = build_engine or _build_engine
        self._exit_process = exit_process or os._exit
        self._server: WorkerServer | None = None
        self._serves = threading.Event()
        self._farewell = farewell
        self._ending = threading.Lock()
        self._started = threading.Thread(target=self._start, name=f"{config.name}-start", daemon=True)
        self._started.start()

    async def describe(self) -> WorkerDescription:
        """Who and where it is, also while it starts."""
        return WorkerDescription(
            name=self._config.name,
            state=self._phase,
            address=self._address,
            incarnation=self._incarnation,
            pid=os.getpid(),
            node=self._node,
            problem=self._problem,
        )

    async def template(self) -> WorkerConfig:
        """The settings that it was placed with: what another worker of the fleet is made from."""
        return self._config

    async def model_card(self) -> dict[str, bytes]:
        """Those of `CARD_FILES` that the model folder has, for routers that cannot read it."""
        return await asyncio.to_thread(_read_card, Path(self._config.model_dir))

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new jobs and wait for the running ones; whether all ended in time. The others are handed back."""
        if self._server is None or self._phase not in (WorkerPhase.READY, WorkerPhase.DRAINING):
            return True
        self._phase = WorkerPhase.DRAINING
        return await asyncio.to_thread(self._server.drain, timeout_s)

    async def stop(self, flush_s: float) -> None:
        """End streams and engine; blocks that wait for the shared tier may be written for `flush_s`."""
        self._phase = WorkerPhase.STOPPED
        await asyncio.to_thread(self._started.join)
        if self._server is not None:
            await asyncio.to_thread(self._server.close, flush_s=flush_s)
        self._phase = WorkerPhase.STOPPED

    def sigterm(self) -> None:
        """Its process is asked to end: returns at once. What cannot finish in time is handed over. Idempotent."""
        if self._ending.acquire(blocking=False):
            threading.Thread(target=self._end, name=f"{self._config.name}-end", daemon=True).start()

    def _end(self) -> None:
        logger.info("worker was told to end", extra={"worker": self._config.name})
        try:
            if self._server is not None and self._serves.is_set():
                self._phase = WorkerPhase.DRAINING
                self._server.drain(self._farewell.drain_s)
                self._server.close(flush_s=self._farewell.flush_s)
        except Exception:
            logger.exception("worker could not end in good order")
        sys.stderr.flush()
        self._exit_process(EXIT_ASKED)

    def _start(self) -> None:
        config = self._config
        if config.advertise_host is None and config.bind_host in ("0.0.0.0", "::"):
            config = replace(config, advertise_host=self._node)
        engine: Engine | None = None
        owns = self._exit_process is os._exit
        try:
            engine = self._build_engine(config)
            self._server = WorkerServer(
                config, engine, incarnation=self._incarnation, on_fatal=self._die, owns_process=owns
            )
            self._address = self._server.start()
        except Exception as error:
            logger.exception("worker could not start", extra={"worker": config.name})
            self._problem = f"{type(error).__name__}: {error}"
            if engine is not None:
                _give_back(engine)
            self._phase = WorkerPhase.FAILED
            return
        if self._phase is WorkerPhase.STARTING:
            self._phase = WorkerPhase.READY
        self._serves.set()
        if self._server.failure is not None:  # it has failed before `_die` was listened to
            self._die(self._server.failure)
        logger.info("worker started", extra={"worker": config.name, "address": self._address})

    def _die(self, error: BaseException) -> None:
        """The engine cannot go on; a new process can. Ray starts it with a new incarnation and a new port.

        A server that never served is a failed start, which a new process would only repeat.
        """
        if not self._serves.is_set():
            return
        logger.critical("worker ends because its engine failed", extra={"worker": self._config.name}, exc_info=error)
        sys.stderr.flush()
        self._exit_process(EXIT_FATAL)


class RayWorkerActor(WorkerActor):
    """What Ray makes an actor of: SIGTERM to its process is an order to end, and no death that its jobs are blamed for.

    Ray's own handler ends the process at once. A handler can be set in the main thread alone, and of an actor with
    coroutines only `__new__` runs there; it runs after Ray has set its own.
    """

    def __new__(cls, *_args: object, **_options: object) -> Self:
        """Take the signal; until the start has begun it ends the process at once."""
        actor = super().__new__(cls)
        if hasattr(cls, "remote"):  # it is Ray's own class around this one, in the process that places workers
            return actor

        def on_signal(number: int, frame: FrameType | None) -> None:
            if not hasattr(actor, "_started"):
                os._exit(EXIT_ASKED)
            actor.sigterm()

        signal.signal(signal.SIGTERM, on_signal)
        return actor


def _give_back(engine: Engine) -> None:
    """Close an engine that will not serve; the reason of the failed start matters more than an error of this."""
    try:
        engine.close(flush_s=0.0)
    except Exception:
        logger.exception("engine could not be closed cleanly")


def _read_card(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CARD_FILES if (folder / name).is_file()}


def _build_engine(config: WorkerConfig) -> Engine:
    from workers.main import build_engine

    if config.engine != "torch":
        return build_engine(config)
    with start_slot():
        return build_engine(config)


def _ray_node_address() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())
