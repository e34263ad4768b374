"""An engine that is stuck is noticed: its routers are told, its worker ends, and says where it was."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time

import grpc
import pytest

from tests.workers.serving import INFO, Gate, config, routers, simulated
from tests.workers.stream_client import PATIENCE_S, job
from warmkv.v1 import common_pb2
from workers.protocol import StepReport
from workers.server import WorkerServer
from workers.watchdog import EngineGoneError, EngineStuckError, Watchdog

PROMPT = list(range(40))
LIMIT_S = 600.0  # of the watchdog, where only an injected clock passes it


class Turns:
    ident = None
    has_died = False

    def __init__(self, *takes: float) -> None:
        self.takes = list(takes)

    def turn_takes_s(self) -> float:
        return self.takes.pop(0)


@pytest.mark.asyncio
async def test_it_bites_once_at_the_first_turn_that_takes_too_long() -> None:
    bites: list[BaseException] = []
    turns = Turns(0.0, 0.1, 0.2, 0.21, 9.0)
    await Watchdog(turns, 0.2, bites.append).watch()
    assert [type(bite) for bite in bites] == [EngineStuckError]
    assert "0 s, and workers.watchdog allows 0.2 s" in str(bites[0])
    assert turns.takes == [9.0]


class Clock:
    """The machine's, and as far ahead as the test says: what is descheduled for some seconds is not stuck."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.watchdog.LOOKS", LIMIT_S / 0.02)


@pytest.mark.usefixtures("_looks_often")
def test_a_stuck_engine_ends_its_streams_and_its_server_and_says_where_it_is() -> None:
    gate, failures = Gate(), []
    clock = Clock()
    server = WorkerServer(config(watchdog_s=LIMIT_S), simulated(sleep=gate), on_fatal=failures.append, clock=clock)
    address = server.start()
    with routers(address) as (client,):
        client.send(submit=job(INFO.scheme, 1, PROMPT, max_tokens=1000))
        gate.wait_arrived()
        clock.ahead_s = 2 * LIMIT_S
        error = client.wait_ended()
        assert error is not None
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert client.outputs[1][-1].finish_reason == common_pb2.FINISH_REASON_ERROR
        assert client.outputs[1][-1].error.reason == "ENGINE_FAILED"
    assert server.wait_closed(PATIENCE_S)
    (failure,) = failures
    assert isinstance(failure, EngineStuckError)
    assert "in step" in str(failure)
    assert "serving.py" in str(failure), "the stack names the call that does not return"
    gate.open()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_without_a_word_ends_its_streams_and_its_server() -> None:
    failures: list[BaseException] = []
    server = WorkerServer(config(watchdog_s=2.0), simulated(), on_fatal=failures.append)
    address = server.start()
    with routers(address) as (client,):
        client.wait_handled()
        server._engine_thread._publish = _mute
        server._engine_thread._engine.step = _mute
        client.send(submit=job(INFO.scheme, 1, PROMPT, max_tokens=1000))
        error = client.wait_ended()
        assert error is not None
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert client.outputs[1][-1].error.reason == "ENGINE_FAILED"
    assert server.wait_closed(PATIENCE_S)
    assert [type(failure) for failure in failures] == [EngineGoneError]


def _mute(*_: object) -> None:
    raise RuntimeError("nothing can be said")


@pytest.mark.usefixtures("_looks_often")
def test_long_steps_within_the_limit_and_an_idle_engine_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine_thread.IDLE_STEP_S", 0.05)
    clock, turned = Clock(), threading.Event()

    def long_step(seconds: float) -> None:
        clock.ahead_s += 0.4 * LIMIT_S
        time.sleep(0.05)  # it is looked at meanwhile

    engine = simulated(sleep=long_step)
    step = engine.step
    engine.step = lambda: (turned.set(), step())[1]
    server = WorkerServer(config(watchdog_s=LIMIT_S), engine, clock=clock)
    address = server.start()
    with routers(address) as (client,):
        for number in range(3):
            client.send(submit=job(INFO.scheme, number, PROMPT, max_tokens=20))
            client.wait_finished(number)
        client.wait_for(lambda: client.loads()[-1].running == 0)
        for _ in range(5):  # idle for longer than a turn may take, in turns that are shorter
            turned.clear()
            clock.ahead_s += 0.4 * LIMIT_S
            assert turned.wait(PATIENCE_S)
        client.send(submit=job(INFO.scheme, 9, PROMPT, max_tokens=2))
        client.wait_finished(9)
    server.close()
    assert server.failure is None


def test_zero_is_no_watchdog() -> None:
    gate = Gate()
    server = WorkerServer(config(watchdog_s=0.0), simulated(sleep=gate))
    with routers(server.start()) as (client,):
        client.send(submit=job(INFO.scheme, 1, PROMPT, max_tokens=2))
        gate.wait_arrived()
        assert not [thread for thread in threading.enumerate() if "watchdog" in thread.name]
        gate.open()
        client.wait_finished(1)
    server.close()


def test_a_call_that_keeps_the_interpreters_lock_ends_the_process_with_all_stacks() -> None:
    script = textwrap.dedent(
        """
        import asyncio, ctypes, threading, time
        from workers.watchdog import Watchdog

        class Turns:
            ident, has_died = None, False
            def turn_takes_s(self): return 0.0

        def holds_the_lock():
            time.sleep(0.3)
            ctypes.PyDLL(None).sleep(60)  # PyDLL: the lock is kept

        threading.Thread(target=holds_the_lock, daemon=True).start()
        asyncio.run(Watchdog(Turns(), 0.5, print, last_resort=True).watch())
        """
    )
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, env=dict(os.environ), check=False
    )
    assert time.monotonic() - started < 40
    assert ended.returncode == 1
    assert "holds_the_lock" in ended.stderr


class LastResort:
    """In place of faulthandler, which would end this process if the test was late."""

    def __init__(self) -> None:
        self.armed_s: float | None = None  # None: it is not armed
        self.armed = asyncio.Event()

    def dump_traceback_later(self, timeout: float, *, exit: bool, file: int) -> None:
        assert exit
        self.armed_s = timeout
        self.armed.set()

    def cancel_dump_traceback_later(self) -> None:
        self.armed_s = None


@pytest.mark.asyncio
async def test_disarming_takes_the_last_resort_away(monkeypatch: pytest.MonkeyPatch) -> None:
    bites: list[BaseException] = []
    monkeypatch.setattr("workers.watchdog.faulthandler", last_resort := LastResort())
    dog = Watchdog(Turns(*[0.0] * 1000), 0.1, bites.append, last_resort=True)
    watching = asyncio.create_task(dog.watch())
    await last_resort.armed.wait()
    assert last_resort.armed_s == 0.2
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    dog.disarm()
    assert last_resort.armed_s is None
    assert bites == []


class HangsInClose:
    """An engine that cannot be closed. `close` is what it does instead; `raises`: its first step fails."""

    def __init__(self, *, raises: BaseException | None = None) -> None:
        self._engine, self._raises = simulated(), raises
        self.info = self._engine.info
        self.closing, self.may_close = threading.Event(), threading.Event()

    def has_work(self) -> bool:
        return self._raises is not None or self._engine.has_work()

    def step(self) -> StepReport:
        if self._raises is not None:
            raise self._raises
        return self._engine.step()

    def close(self, *, flush_s: float) -> None:
        self.closing.set()
        assert self.may_close.wait(PATIENCE_S), "nobody let it close"
        self._engine.close(flush_s=flush_s)

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


@pytest.mark.parametrize("watchdog_s", [0.0, 300.0])
def test_an_engine_that_raises_and_then_hangs_in_close_does_not_keep_its_worker_alive(
    monkeypatch: pytest.MonkeyPatch, watchdog_s: float
) -> None:
    monkeypatch.setattr("workers.server.FAILED_GRACE_S", 0.3)
    broken, died = RuntimeError("CUDA error: an illegal memory access"), []
    engine = HangsInClose(raises=broken)
    server = WorkerServer(config(watchdog_s=watchdog_s), engine, on_fatal=died.append)  # type: ignore[arg-type]
    server.start()
    assert server.wait_closed(PATIENCE_S / 2), "its end waits for ever"
    server.close()
    assert engine.closing.is_set()
    assert died == [broken]
    engine.may_close.set()


@pytest.mark.usefixtures("_looks_often")
def test_an_engine_that_hangs_in_close_at_a_good_end_is_stuck_too() -> None:
    engine, died, clock = HangsInClose(), [], Clock()
    server = WorkerServer(config(watchdog_s=LIMIT_S), engine, on_fatal=died.append, clock=clock)  # type: ignore[arg-type]
    server.start()
    closing = threading.Thread(target=server.close, kwargs={"flush_s": 0.5})
    closing.start()
    assert engine.closing.wait(PATIENCE_S)
    clock.ahead_s += 2 * LIMIT_S
    closing.join(PATIENCE_S)
    (failure,) = died
    assert isinstance(failure, EngineStuckError)
    assert "in close" in str(failure)
    engine.may_close.set()


@pytest.mark.usefixtures("_looks_often")
def test_flushing_is_no_hanging() -> None:
    engine, clock = HangsInClose(), Clock()
    server = WorkerServer(config(watchdog_s=LIMIT_S), engine, clock=clock)  # type: ignore[arg-type]
    server.start()
    closing = threading.Thread(target=server.close, kwargs={"flush_s": LIMIT_S})
    closing.start()
    assert engine.closing.wait(PATIENCE_S)
    clock.ahead_s += 1.5 * LIMIT_S
    time.sleep(0.3)  # it is looked at meanwhile
    engine.may_close.set()
    closing.join(PATIENCE_S)
    assert server.failure is None


def test_a_close_that_keeps_the_interpreters_lock_after_a_failure_ends_the_process() -> None:
    script = textwrap.dedent(
        """
        import ctypes, time
        import workers.server
        from tests.workers.serving import config
        from tests.workers.test_watchdog import HangsInClose

        workers.server.LAST_RESORT_S = 1.0

        class HoldsTheLock(HangsInClose):
            def close(self, *, flush_s):
                time.sleep(0.3)
                ctypes.PyDLL(None).sleep(60)  # PyDLL: the lock is kept

        engine = HoldsTheLock(raises=RuntimeError("CUDA error"))
        server = workers.server.WorkerServer(config(), engine, on_fatal=print, owns_process=True)
        server.start()
        server.wait_closed()
        """
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, env=dict(os.environ), check=False
    )
    assert ended.returncode == 1, ended.stderr
    assert "in close" in ended.stderr
