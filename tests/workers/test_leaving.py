"""A worker that hands its jobs back: once, not after it was called off, and not gone before others have read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.workers.test_actor import _config, _until
from warmkv.v1 import worker_pb2
from workers import leaving
from workers.actor import WorkerActor, WorkerPhase
from workers.streams import WorkerStreams

LONG_S = 60.0


class Engine:
    """Answers at once: all is shared, and nothing is owed."""

    def __init__(self) -> None:
        self.shared = 0

    def post(self, change: Callable[[object], None]) -> None:
        cache = SimpleNamespace(share_running=self._share, owes_peers=lambda: False, set_shared_reads=_ignore)
        change(SimpleNamespace(cancel=_ignore, cache=cache))

    def _share(self) -> bool:
        self.shared += 1
        return True


def _ignore(*_: object, **__: object) -> None:
    """Nothing."""


def _streams(engine: Engine) -> WorkerStreams:
    """With one job that runs, of a router that hears nothing."""
    streams = WorkerStreams(lambda: None, engine, worker="w0", incarnation=1, secret="", clock=lambda: 0.0)  # type: ignore[arg-type, return-value]
    outbox = SimpleNamespace(add_outputs=_ignore, set_fleet=_ignore)
    streams._streams[1] = SimpleNamespace(number=1, jobs={7}, outbox=outbox, wake=_ignore)  # type: ignore[assignment]
    streams._running = SimpleNamespace(ended=_ignore)  # type: ignore[assignment]
    streams._quiet.clear()
    return streams


def _record(version: int, *drained: str) -> worker_pb2.FleetRecord:
    return worker_pb2.FleetRecord(version=version, drained=drained)


@pytest.mark.asyncio
async def test_a_hand_over_that_was_called_off_does_not_come_with_a_later_drain() -> None:
    engine = Engine()
    streams = _streams(engine)
    (stream,) = streams._streams.values()
    streams._offer_fleet(stream, _record(1, "w0"))
    streams._handle(stream, worker_pb2.ConnectRequest(hand_over=worker_pb2.HandOver(after_ms=50)))
    (called,) = streams._handovers
    await asyncio.sleep(0)
    streams._offer_fleet(stream, _record(2))
    streams._offer_fleet(stream, _record(3, "w0"))
    await asyncio.wait([called], timeout=LONG_S)
    assert called.cancelled()
    assert (stream.jobs, engine.shared) == ({7}, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["hand_over", "drain"])
async def test_who_ends_behind_a_hand_over_waits_until_others_have_read(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = asyncio.Event()
    lingered: list[float] = []

    async def sleep(seconds: float) -> None:
        lingered.append(seconds)
        await read.wait()

    engine = Engine()
    streams = _streams(engine)
    streams._fleet = _record(1, "w0")
    monkeypatch.setattr(leaving, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
    first = asyncio.create_task(streams._hand_over(0.0) if how == "hand_over" else streams.drain(0.0))
    await asyncio.wait_for(streams._quiet.wait(), LONG_S)  # the jobs are handed back, and it lingers
    second = asyncio.create_task(streams.drain(LONG_S))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not second.done(), "its blocks would be gone before they were read"
    read.set()
    assert await asyncio.wait_for(second, LONG_S)
    await first
    assert (lingered, engine.shared) == ([leaving.LINGER_S], 1)


@pytest.mark.asyncio
async def test_draining_while_sigterm_drains_waits_for_the_same_end() -> None:
    actor = WorkerActor(_config(), node="127.0.0.1", exit_process=_ignore)
    await _until(actor, WorkerPhase.READY)
    server = actor._server
    assert server is not None
    calls: list[str] = []
    begun, end = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def drain(timeout_s: float) -> bool:
        calls.append("drain")
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(end.wait(), loop).result(LONG_S)
        return True

    drained, server.drain = server.drain, drain  # type: ignore[method-assign]
    actor.sigterm()
    await asyncio.wait_for(begun.wait(), LONG_S)
    asked = asyncio.create_task(actor.drain(LONG_S))
    while len(calls) < 2:
        assert not asked.done(), "its answers are still running"
        await asyncio.sleep(0.02)
    end.set()
    assert await asked
    server.drain = drained  # type: ignore[method-assign]
    await actor.stop(0.0)
