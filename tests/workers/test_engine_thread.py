"""When the engine's thread steps, sleeps and waits, and in which order it tells what came of it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import pytest

from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError, StoreError
from kvstore.events import AllBlocksCleared, BlockStored, KvEvent, TierName
from kvstore.lifetime import Lifetime
from tests.workers.serving import INFO
from tests.workers.stream_client import PATIENCE_S
from workers.cache_commands import CacheAnswer, Check, ListBlocks, Pin, Selection, Unpin, Warm
from workers.engine_thread import (
    Answered,
    Cleared,
    ClearRequest,
    EngineThread,
    Failed,
    Order,
    Published,
    Snapped,
    Stepped,
)
from workers.protocol import CachedBlock, EngineInfo, Job, JobId, Load, Output, SamplingParams, StepReport

ROOT = BlockHash(b"r" * 32)


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
        self.shared_clear: Callable[[], dict[TierName, int]] | None = None
        self.clearing = 0
        self.list_error: Exception | None = None
        self.names: list[BlockHash] = []
        self.leased: set[BlockHash] = set()
        self.wrong = ""
        self.pending: list[KvEvent] = []
        self.closed: float | None = None
        self.threads: set[int] = set()
        self.told: list[str] = []

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

    @property
    def cache(self) -> ScriptedEngine:
        return self

    def clear(self, *, root: BlockHash | None = None, prefix: BlockHash | None = None) -> dict[TierName, int]:
        self.told.append("clear")
        if self.clear_error is not None:
            raise self.clear_error
        self.pending.append(AllBlocksCleared(TierName.DEVICE))
        return {TierName.DEVICE: 3}

    def shared_clearing(
        self, *, root: BlockHash | None = None, prefix: BlockHash | None = None
    ) -> Callable[[], dict[TierName, int]] | None:
        self.clearing += self.shared_clear is not None
        return self.shared_clear

    def hold_peers(self, key: Hashable, for_s: float) -> None:
        self.told.append(f"hold {key} for {for_s:g} s")

    def release_peers(self, key: Hashable) -> None:
        self.told.append(f"release {key}")

    def promise_broken(self, address: str, ticket: BlockHash) -> None:
        self.told.append(f"broken {address} {ticket.hex()}")

    def shared_cleared(self) -> None:
        self.clearing -= 1

    def list_blocks(
        self, *, root: BlockHash | None, prefix: BlockHash | None, after: BlockHash | None, limit: int
    ) -> list[CachedBlock]:
        if self.list_error is not None:
            raise self.list_error
        names = sorted(name for name in self.names if after is None or name > after)
        return [CachedBlock(name, None, ROOT, (TierName.DEVICE,)) for name in names[:limit]]

    def prefetch(self, hashes: Sequence[BlockHash], *, root: BlockHash, lifetime: Lifetime | None) -> int:
        return len(hashes)

    def lease(self, hashes: Sequence[BlockHash], for_s: float | None) -> dict[TierName, int]:
        self.leased |= set(hashes)
        return {TierName.DEVICE: len(hashes)}

    def end_leases(self, hashes: Sequence[BlockHash]) -> dict[TierName, int]:
        self.leased -= set(hashes)
        return {TierName.DEVICE: len(hashes)}

    def check(self) -> None:
        if self.wrong:
            raise InvariantError(self.wrong)

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


def test_a_clear_of_the_fleet_holds_peers_before_it_drops_anything(rig: Rig) -> None:
    rig.thread.ask_clear(ClearRequest("a", 9, hold=("r0", 3)))
    rig.next(Cleared)
    rig.thread.ask_clear(ClearRequest("a", 10))
    rig.next(Cleared)
    assert rig.engine.told == ["hold ('r0', 3) for 120 s", "clear", "clear"]


# The shared tier is cleared beside the engine's thread.


def test_a_shared_clear_does_not_hold_up_the_steps_and_is_answered_when_it_is_done(rig: Rig) -> None:
    threads: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def clear() -> dict[TierName, int]:
        threads.append(threading.get_ident())
        started.set()
        assert go_on.wait(PATIENCE_S)
        rig.engine.pending.append(AllBlocksCleared(TierName.REDIS))
        return {TierName.REDIS: 7}

    rig.engine.shared_clear = clear
    rig.thread.ask_clear(ClearRequest("a", 1, shared=True))
    assert started.wait(PATIENCE_S)
    rig.thread.ask_clear(ClearRequest("a", 2))  # the engine's thread answers others meanwhile
    assert rig.next(Cleared) == Cleared("a", 2, {TierName.DEVICE: 3})
    assert rig.engine.clearing == 1
    go_on.set()
    events: list[KvEvent] = []
    while not isinstance(item := rig.published.get(timeout=PATIENCE_S), Cleared):
        events += item.report.events if isinstance(item, Stepped) else []
    assert item == Cleared("a", 1, {TierName.DEVICE: 3, TierName.REDIS: 7})
    assert AllBlocksCleared(TierName.REDIS) in events, "the answer came before the events"
    assert set(threads).isdisjoint(rig.engine.threads)
    assert rig.engine.clearing == 0


def test_a_shared_clear_that_hangs_does_not_keep_the_worker_from_ending(rig: Rig) -> None:
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def clear() -> dict[TierName, int]:
        started.set()
        assert go_on.wait(PATIENCE_S)
        ended.set()
        return {}

    rig.engine.shared_clear = clear
    rig.thread.ask_clear(ClearRequest("a", 1, shared=True))
    assert started.wait(PATIENCE_S)
    rig.thread.stop(flush_s=0.0)
    assert rig.engine.closed == 0.0
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(PATIENCE_S)


def test_what_a_worker_was_about_to_write_is_dropped_before_the_shared_tier_is_cleared(rig: Rig) -> None:
    order: list[str] = []
    clear_own = rig.engine.cache.clear

    def clear(**scope: BlockHash | None) -> dict[TierName, int]:
        order.append("own")
        return clear_own()

    rig.engine.cache.clear = clear  # type: ignore[method-assign]
    rig.engine.shared_clear = lambda: order.append("shared") or {TierName.REDIS: 1}  # type: ignore[func-returns-value]
    rig.thread.ask_clear(ClearRequest("a", 1, shared=True))
    rig.next(Cleared)
    assert order == ["own", "shared"]


def test_a_clear_that_leaves_the_shared_tier_alone_does_not_touch_it(rig: Rig) -> None:
    rig.engine.shared_clear = lambda: {TierName.REDIS: 1}
    rig.thread.ask_clear(ClearRequest("a", 1))
    assert rig.next(Cleared) == Cleared("a", 1, {TierName.DEVICE: 3})


@pytest.mark.parametrize("error", [StoreError("redis is down; try again"), ValueError("redis is down; try again")])
def test_a_shared_clear_that_fails_says_so_and_what_went_all_the_same(rig: Rig, error: Exception) -> None:
    def clear() -> dict[TierName, int]:
        raise error

    rig.engine.shared_clear = clear
    rig.thread.ask_clear(ClearRequest("a", 1, shared=True))
    assert rig.next(Cleared) == Cleared("a", 1, {TierName.DEVICE: 3}, "redis is down; try again")
    assert rig.engine.clearing == 0


# Orders of operators.


def test_orders_are_answered_in_turn_with_what_the_engine_said(rig: Rig) -> None:
    rig.engine.names = [BlockHash(bytes([n]) * 32) for n in range(3)]
    names = rig.engine.names
    rig.thread.order(Order("a", 1, ListBlocks(None, None, None, None, 2)))
    rig.thread.order(Order("b", 2, Pin(Selection(names, None, None), 60.0)))
    rig.thread.order(Order("a", 3, Unpin(Selection([], ROOT, None))))
    rig.thread.order(Order("a", 4, Warm(names, ROOT, None)))
    listed, pinned, unpinned, warmed = (rig.next(Answered) for _ in range(4))
    blocks = [CachedBlock(name, None, ROOT, (TierName.DEVICE,)) for name in names[:2]]
    assert listed == Answered("a", 1, CacheAnswer(blocks=blocks, next=names[1]))
    assert pinned == Answered("b", 2, CacheAnswer(counts={TierName.DEVICE: 3}))
    assert unpinned == Answered("a", 3, CacheAnswer(counts={TierName.DEVICE: 3}))
    assert warmed == Answered("a", 4, CacheAnswer(started=3))
    assert rig.engine.leased == set()


def test_no_turn_carries_out_two_orders(rig: Rig) -> None:
    """Else a fleet's questions could hold up its tokens for as long as there are questions."""
    steps: list[int] = []
    listing = rig.engine.cache.list_blocks

    def list_blocks(**asked: object) -> list[CachedBlock]:
        steps.append(rig.engine.steps)
        return listing(**asked)  # type: ignore[arg-type]

    rig.engine.cache.list_blocks = list_blocks  # type: ignore[method-assign]
    for number in range(20):
        rig.thread.order(Order("a", number, ListBlocks(None, None, None, None, 2)))
    assert [rig.next(Answered).command_id for _ in range(20)] == list(range(20))  # type: ignore[union-attr]
    assert len(set(steps)) == 20


def test_an_audit_tells_what_is_wrong(rig: Rig) -> None:
    rig.thread.order(Order("a", 1, Check()))
    assert rig.next(Answered) == Answered("a", 1, CacheAnswer())
    rig.engine.wrong = "slot 3 is held twice"
    rig.thread.order(Order("a", 2, Check()))
    assert rig.next(Answered) == Answered("a", 2, CacheAnswer(wrong="slot 3 is held twice"))


@pytest.mark.parametrize("error", [StoreError("the store is closed"), KeyError("gone")])
def test_an_order_that_fails_is_answered_with_its_error_and_the_engine_goes_on(rig: Rig, error: Exception) -> None:
    rig.engine.list_error = error
    rig.thread.order(Order("a", 1, ListBlocks(None, None, None, None, 2)))
    answered = rig.next(Answered)
    assert isinstance(answered, Answered)
    assert "closed" in answered.error or "KeyError: 'gone'" in answered.error
    rig.thread.order(Order("a", 2, Check()))
    assert rig.next(Answered) == Answered("a", 2, CacheAnswer())


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


def test_a_load_names_the_jobs_that_it_knows_of_and_not_those_that_came_during_the_step() -> None:
    rig, entered, go_on = Rig(), threading.Event(), threading.Event()
    step = rig.engine.step

    def long_step() -> StepReport:
        entered.set()
        assert go_on.wait(PATIENCE_S)
        return step()

    rig.engine.step = long_step  # type: ignore[method-assign]
    jobs = [Job(name, [1], ROOT, [], SamplingParams(max_tokens=1)) for name in "ab"]
    rig.thread.submit(jobs[0])
    rig.thread.start()
    assert entered.wait(PATIENCE_S)
    rig.thread.submit(jobs[1])
    go_on.set()
    told: list[Sequence[JobId]] = []
    while sum(map(len, told)) < 2:
        stepped = rig.next(Stepped)
        assert isinstance(stepped, Stepped)
        assert stepped.load is not None or not stepped.taken_in
        told += [stepped.taken_in] if stepped.taken_in else []
    rig.thread.stop(flush_s=0.0)
    assert told == [["a"], ["b"]]
