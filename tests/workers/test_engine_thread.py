"""When the engine's thread steps, sleeps and waits, and in which order it tells what came of it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest

from kvstore.blocks import BlockHash
from kvstore.errors import StoreError
from kvstore.events import AllBlocksCleared, BlockStored, KvEvent, TierName
from tests.workers.serving import INFO
from tests.workers.stream_client import PATIENCE_S
from workers.engine_thread import Cleared, ClearRequest, EngineThread, Failed, Published, Snapped, Stepped
from workers.protocol import EngineInfo, Job, JobId, Load, Output, StepReport


class ScriptedEngine:
    """Does as told: `work` steps have something to do, `reports` are what they make."""

    def __init__(self) -> None:
        self.info: EngineInfo = INFO
        self.work = 0
        self.steps = 0
        self.waits = 0
        self.makes_tokens = False
        self.error: Exception | None = None
        self.clear_error: StoreError | None = None
        self.pending: list[KvEvent] = []
        self.closed: float | None = None
        self.threads: set[int] = set()

    def submit(self, job: Job) -> None: ...

    def cancel(self, job_id: JobId) -> None: ...

    def has_work(self) -> bool:
        return self.work > 0

    def step(self) -> StepReport:
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        self.steps += 1
        self.work = max(0, self.work - 1)
        events, self.pending = self.pending, []
        return StepReport([Output(1, token_ids=[self.steps])] if self.makes_tokens else [], events)

    def wait(self, timeout_s: float) -> None:
        self.waits += 1

    def load(self) -> Load:
        return Load(steps=self.steps)

    def snapshot(self) -> list[BlockStored]:
        assert not self.pending, "a snapshot was taken while events were not drained"
        return [BlockStored(TierName.DEVICE, (b"h" * 16,))]

    def clear(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None, shared: bool = False
    ) -> dict[TierName, int]:
        if self.clear_error is not None:
            raise self.clear_error
        self.pending.append(AllBlocksCleared(TierName.DEVICE))
        return {TierName.DEVICE: 3}

    def set_shared_reads(self, *, enabled: bool) -> None: ...

    def close(self, *, flush_s: float) -> None:
        self.threads.add(threading.get_ident())
        self.closed = flush_s


class Rig:
    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.published: queue.Queue[Published] = queue.Queue()
        self.thread = EngineThread(self.engine, self.published.put, clock=time.monotonic, name="w0")

    def next(self, kind: type[Published]) -> Published:
        """The next of that kind; others before it are skipped."""
        while not isinstance(item := self.published.get(timeout=PATIENCE_S), kind):
            pass
        return item


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.thread.start()
    yield rig
    rig.thread.stop(flush_s=0.0)


def test_a_command_is_applied_before_the_step_that_follows(rig: Rig) -> None:
    seen: queue.Queue[int] = queue.Queue()
    rig.thread.post(lambda engine: seen.put(rig.engine.steps))
    steps = seen.get(timeout=PATIENCE_S)
    while rig.engine.steps == steps:
        time.sleep(0.001)


def test_all_calls_come_from_one_thread_and_close_is_the_last(rig: Rig) -> None:
    rig.next(Stepped)
    rig.thread.stop(flush_s=2.5)
    assert rig.engine.closed == 2.5
    assert len(rig.engine.threads) == 1
    assert threading.get_ident() not in rig.engine.threads


def test_an_idle_engine_is_stepped_now_and_then_so_that_blocks_expire_and_late_events_come_out(rig: Rig) -> None:
    rig.next(Stepped)
    rig.engine.pending.append(AllBlocksCleared(TierName.HOST))
    while not (item := rig.next(Stepped)).report.events:  # type: ignore[union-attr]
        pass
    assert item.report.events == [AllBlocksCleared(TierName.HOST)]  # type: ignore[union-attr]


def test_a_snapshot_is_taken_only_after_events_were_drained(rig: Rig) -> None:
    rig.thread.ask_clear(ClearRequest("a", 1))
    rig.thread.ask_snapshot("b")
    snapped = rig.next(Snapped)
    assert snapped == Snapped("b", [BlockStored(TierName.DEVICE, (b"h" * 16,))])


def test_a_clear_is_answered_behind_its_events(rig: Rig) -> None:
    rig.thread.ask_clear(ClearRequest("a", 9))
    order: list[Published] = []
    while not isinstance(item := rig.published.get(timeout=PATIENCE_S), Cleared):
        order.append(item)
    assert item == Cleared("a", 9, {TierName.DEVICE: 3})
    assert any(isinstance(each, Stepped) and each.report.events for each in order)


def test_a_clear_that_fails_is_answered_with_its_error_and_the_engine_goes_on(rig: Rig) -> None:
    rig.engine.clear_error = StoreError("the shared tier is down; try again")
    rig.thread.ask_clear(ClearRequest("a", 9))
    assert rig.next(Cleared) == Cleared("a", 9, {}, "the shared tier is down; try again")
    rig.thread.ask_snapshot("b")
    rig.next(Snapped)


def test_it_waits_for_blocks_only_when_a_step_made_no_tokens() -> None:
    rig = Rig()
    rig.engine.work, rig.engine.makes_tokens = 5, True
    rig.thread.start()
    while rig.engine.work:
        rig.next(Stepped)
    assert rig.engine.waits == 0
    rig.engine.makes_tokens = False
    rig.thread.post(lambda engine: setattr(engine, "work", 5))
    while rig.engine.waits < 4:
        time.sleep(0.001)
    rig.thread.stop(flush_s=0.0)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError()])
def test_an_engine_that_raises_is_told_once_and_closed(rig: Rig, error: Exception) -> None:
    rig.engine.error = error
    assert rig.next(Failed) == Failed(error)
    rig.thread.stop(flush_s=1.0)
    assert rig.engine.closed is not None
    assert rig.published.empty()


def test_stop_before_start_returns() -> None:
    rig = Rig()
    rig.thread.stop(flush_s=0.0)
    assert rig.engine.closed is None
