"""The shell around engine and server: what it says while it starts, when it fails, and how it ends. Without Ray."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from workers.actor import CARD_FILES, WorkerActor, WorkerPhase
from workers.config import WorkerConfig
from workers.main import build_engine
from workers.protocol import Engine, StepReport

DEADLINE_S = 20.0


def _config(**changes: object) -> WorkerConfig:
    base = {"name": "w0", "model_dir": "/nowhere", "model_name": "m", "engine": "simulated", "block_size": 16}
    return WorkerConfig(**{**base, "device_bytes": 1 << 22, "host_bytes": 0, **changes})  # type: ignore[arg-type]


async def _until(actor: WorkerActor, phase: WorkerPhase) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await actor.describe()).state is not phase:  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.01)


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.mark.asyncio
async def test_it_answers_while_the_engine_is_still_being_built() -> None:
    may_build = threading.Event()

    def slow(config: WorkerConfig) -> Engine:
        may_build.wait(DEADLINE_S)
        return build_engine(config)

    actor = WorkerActor(_config(), node="127.0.0.1", build_engine=slow)
    said = await actor.describe()
    assert (said.state, said.address, said.name) == (WorkerPhase.STARTING, "", "w0")
    may_build.set()
    await _until(actor, WorkerPhase.READY)
    ready = await actor.describe()
    assert ready.address.startswith("127.0.0.1:")
    assert ready.incarnation == said.incarnation, "one process has one incarnation"
    assert _listens(ready.address)
    await actor.stop(0.0)
    assert (await actor.describe()).state is WorkerPhase.STOPPED
    assert not _listens(ready.address)


@pytest.mark.asyncio
async def test_stopping_during_the_start_ends_what_it_started() -> None:
    may_build = threading.Event()

    def slow(config: WorkerConfig) -> Engine:
        may_build.wait(DEADLINE_S)
        return build_engine(config)

    actor = WorkerActor(_config(), node="127.0.0.1", build_engine=slow)
    stopping = asyncio.create_task(actor.stop(0.0))
    await asyncio.sleep(0.05)
    may_build.set()
    await stopping
    said = await actor.describe()
    assert said.state is WorkerPhase.STOPPED
    assert not _listens(said.address)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "magic"}, "choose torch or simulated"),
        ({"bind_host": "0.0.0.0"}, "set fleet_secret"),
        ({"bind_host": "203.0.113.7", "fleet_secret": "s"}, "cannot listen"),
        ({"tls_cert": "/no.pem", "tls_key": "/no.key"}, "/no.key"),
    ],
)
async def test_a_start_that_fails_is_a_state_with_the_reason_and_no_crash(
    changes: dict[str, object], said: str
) -> None:
    exits: list[int] = []
    actor = WorkerActor(_config(**changes), node="127.0.0.1", exit_process=exits.append)
    await _until(actor, WorkerPhase.FAILED)
    assert said in (await actor.describe()).problem
    await actor.stop(0.0)
    assert exits == [], "a new process would fail again, and Ray would start it for ever"


@pytest.mark.asyncio
async def test_it_advertises_the_node_where_it_listens_on_every_address() -> None:
    actor = WorkerActor(_config(bind_host="0.0.0.0", fleet_secret="s"), node="127.0.0.9")
    await _until(actor, WorkerPhase.READY)
    said = await actor.describe()
    assert said.address.startswith("127.0.0.9:")
    assert said.node == "127.0.0.9"
    assert (await actor.template()).advertise_host is None, "the template is as it was given, for workers elsewhere"
    await actor.stop(0.0)


class _Breaking:
    """An engine whose first step raises; if it hangs, only when `goes_on` is set."""

    def __init__(self, engine: Engine, goes_on: threading.Event) -> None:
        self._engine, self._goes_on = engine, goes_on
        self.info = engine.info
        self._asked = False

    def has_work(self) -> bool:
        return True

    def step(self) -> StepReport:
        self._goes_on.wait(DEADLINE_S)
        raise MemoryError("the pool is corrupt")

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


@pytest.mark.asyncio
@pytest.mark.parametrize("hangs", [False, True])
async def test_an_engine_that_fails_or_hangs_ends_the_process_with_1_and_the_next_one_is_a_new_incarnation(
    hangs: bool,
) -> None:
    exits: list[int] = []
    died, goes_on = threading.Event(), threading.Event()
    if not hangs:
        goes_on.set()

    def leave(code: int) -> None:
        exits.append(code)
        died.set()

    def breaking(config: WorkerConfig) -> Engine:
        return _Breaking(build_engine(config), goes_on)  # type: ignore[return-value]

    config = _config(watchdog_s=0.5)
    actor = WorkerActor(config, node="127.0.0.1", build_engine=breaking, exit_process=leave)
    assert await asyncio.to_thread(died.wait, DEADLINE_S)
    assert set(exits) == {1}
    again = WorkerActor(config, node="127.0.0.1")  # as Ray starts it
    await _until(again, WorkerPhase.READY)
    assert (await again.describe()).incarnation > (await actor.describe()).incarnation
    goes_on.set()
    await actor.stop(0.0)
    await again.stop(0.0)


@pytest.mark.asyncio
async def test_the_model_card_has_the_small_files_and_never_the_weights(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    actor = WorkerActor(_config(model_dir=str(tmp_path)), node="127.0.0.1", build_engine=_refuse)
    assert await actor.model_card() == {"tokenizer.json": b"tokenizer.json", "config.json": b"config.json"}
    assert "model.safetensors" not in CARD_FILES


@pytest.mark.asyncio
async def test_two_processes_in_a_row_have_growing_incarnations() -> None:
    first = WorkerActor(_config(), node="127.0.0.1", build_engine=_refuse)
    second = WorkerActor(_config(), node="127.0.0.1", build_engine=_refuse)
    assert (await second.describe()).incarnation > (await first.describe()).incarnation


@pytest.mark.asyncio
async def test_draining_refuses_new_work_and_returns_when_idle() -> None:
    actor = WorkerActor(_config(), node="127.0.0.1")
    await _until(actor, WorkerPhase.READY)
    assert await actor.drain(5.0)
    assert (await actor.describe()).state is WorkerPhase.DRAINING
    await actor.stop(0.0)


def _refuse(config: WorkerConfig) -> Engine:
    raise ValueError("not wanted in this test")


_SIGNALLED = """
import asyncio, os, signal
from tests.workers.test_actor import _config, _until
from workers.actor import Farewell, RayWorkerActor, WorkerPhase

made = RayWorkerActor.__new__(RayWorkerActor)  # as Ray does: in the main thread, and the rest in another

async def serve() -> None:
    made.__init__(_config(), node="127.0.0.1", farewell=Farewell(0.1, 0.0))
    await _until(made, WorkerPhase.READY)
    drained = made._server.drain
    made._server.drain = lambda timeout_s: (print("drains", timeout_s, flush=True), drained(timeout_s))[1]
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(30)

asyncio.run(serve())
"""


def test_sigterm_drains_once_and_ends_with_0() -> None:
    done = subprocess.run([sys.executable, "-c", _SIGNALLED], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "drains 0.1\n"), done.stderr[-2000:]
