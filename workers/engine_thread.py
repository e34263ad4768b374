"""The one thread that owns an engine: takes commands from other threads, steps, and tells what came of it.

Covers: when to step, sleep or wait for I/O; at which point snapshots are taken and clears are answered. Does not cover:
who is told (`streams`). The thread never waits for anybody who listens: `publish` must only put its argument somewhere.

A turn: commands, one step, publish, then snapshots and probes. These are therefore taken when the step has just drained
the store's events, and what is published later follows them. The answer to a clear is published behind its events.

The shared tier is cleared in a thread of its own, since walking a server's keys takes seconds: blocks of this worker go
at once, and the answer follows when the server's are gone. A turn carries out one order of operators at most: a fleet's
questions wait for one another, not its tokens for them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kvstore.blocks import BlockHash
from kvstore.errors import StoreError
from kvstore.events import BlockStored, TierName
from kvstore.tier import Clock
from workers.cache_commands import CacheAnswer, CacheCommand, carry_out
from workers.protocol import Engine, Job, JobId, Load, StepReport

logger = logging.getLogger(__name__)

Command = Callable[[Engine], None]

# An idle engine steps this often, to expire blocks and to hear of writes that finished behind it.
IDLE_STEP_S = 0.1
# The longest that a new command may lie while every sequence waits for blocks on their way.
IO_WAIT_S = 0.005
LOAD_INTERVAL_S = 0.020
# Peers are read again after this, should the router that clears the fleet die before it says so.
HOLD_PEERS_S = 120.0


@dataclass(frozen=True, slots=True)
class Stepped:
    """A step's report, and the load where it is due.

    `taken_in`: jobs that the load knows of and no load before it did, in the order in which they came.
    """

    report: StepReport
    load: Load | None
    taken_in: Sequence[JobId] = ()


@dataclass(frozen=True, slots=True)
class Snapped:
    """All that the store holds, for whoever asked."""

    asker: Hashable
    blocks: list[BlockStored]


@dataclass(frozen=True, slots=True)
class Cleared:
    """What a clear dropped, or what failed."""

    asker: Hashable
    clear_id: int
    dropped: dict[TierName, int]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of an operator's order, or what failed."""

    asker: Hashable
    command_id: int
    answer: CacheAnswer
    error: str = ""


@dataclass(frozen=True, slots=True)
class Located:
    """Where the blocks of a probe lie, when all that was published before it has happened and nothing else."""

    asker: Hashable
    probe_id: int
    tiers: list[tuple[TierName, ...]]


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine raised; nothing comes after this."""

    error: BaseException


Published = Stepped | Snapped | Cleared | Answered | Located | Failed


@dataclass(frozen=True, slots=True)
class ClearRequest:
    """What to drop; as `kvstore.store.TieredStore.clear`. `hold`: key of `Engine.hold_peers`; None: peers are read."""

    asker: Hashable
    clear_id: int
    root: BlockHash | None = None
    prefix: BlockHash | None = None
    shared: bool = False
    hold: Hashable | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """An operator's order."""

    asker: Hashable
    command_id: int
    command: CacheCommand


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """Which blocks a router wants to know the whereabouts of."""

    asker: Hashable
    probe_id: int
    hashes: Sequence[BlockHash]


@dataclass(slots=True)
class _Mailbox:
    """What other threads leave for the engine's; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    commands: deque[Command] = field(default_factory=deque)
    clears: deque[ClearRequest] = field(default_factory=deque)
    cleared: deque[Cleared] = field(default_factory=deque)  # of the shared tier, in the other thread
    orders: deque[Order] = field(default_factory=deque)
    snapshots: list[Hashable] = field(default_factory=list)
    probes: list[ProbeRequest] = field(default_factory=list)
    flush_s: float | None = None  # set: end, flushing the store for at most so long

    @property
    def empty(self) -> bool:
        waiting = self.commands or self.clears or self.cleared or self.orders or self.snapshots or self.probes
        return not waiting and self.flush_s is None


class EngineThread:
    """Runs an engine until `stop`, or until it raises."""

    def __init__(self, engine: Engine, publish: Callable[[Published], None], *, clock: Clock, name: str) -> None:
        self._engine = engine
        self._publish = publish
        self._clock = clock
        self._mailbox = _Mailbox()
        self._thread = threading.Thread(target=self._run, name=f"{name}-engine", daemon=True)
        # Its thread starts with the first clear. One: two clears of a server would only get in each other's way.
        self._shared_clears = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{name}-clear")
        self._load_taken_at = float("-inf")
        self._load_is_stale = True
        self._stepped_at = float("-inf")
        self._turn_began: float | None = None  # None: no turn is under way
        self._taken_in: list[JobId] = []  # since the last load; the engine thread's own

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def post(self, command: Command) -> None:
        """Run it on the engine's thread before the next step. Any thread."""
        with self._mailbox.changed:
            self._mailbox.commands.append(command)
            self._mailbox.changed.notify()

    def submit(self, job: Job) -> None:
        """Give it to the engine before the next step. Any thread."""

        def take_in(engine: Engine) -> None:
            engine.submit(job)
            self._taken_in.append(job.job_id)

        self.post(take_in)

    def ask_snapshot(self, asker: Hashable) -> None:
        """A `Snapped` follows the step that comes next. Any thread."""
        with self._mailbox.changed:
            self._mailbox.snapshots.append(asker)
            self._mailbox.changed.notify()

    def probe(self, request: ProbeRequest) -> None:
        """A `Located` follows the step that comes next. Any thread."""
        with self._mailbox.changed:
            self._mailbox.probes.append(request)
            self._mailbox.changed.notify()

    def ask_clear(self, request: ClearRequest) -> None:
        """A `Cleared` follows, behind the events of the clear. Any thread."""
        with self._mailbox.changed:
            self._mailbox.clears.append(request)
            self._mailbox.changed.notify()

    def order(self, order: Order) -> None:
        """An `Answered` follows, behind the events of what was ordered. Any thread."""
        with self._mailbox.changed:
            self._mailbox.orders.append(order)
            self._mailbox.changed.notify()

    def stop(self, *, flush_s: float, within_s: float | None = None) -> bool:
        """End after the step that runs, close the engine; whether that is done. Idempotent; any thread but its own.

        `within_s`: return after so long even if the thread has not ended, as one that is stuck never will.
        """
        with self._mailbox.changed:
            self._mailbox.flush_s = flush_s
            self._mailbox.changed.notify()
        if self._thread.ident is not None:
            self._thread.join(within_s)
        return not self._thread.is_alive()

    @property
    def ident(self) -> int | None:
        """Of the thread; None: it has not begun."""
        return self._thread.ident

    @property
    def has_died(self) -> bool:
        """Whether the thread has ended though nobody asked it to. Any thread."""
        return self._thread.ident is not None and not self._thread.is_alive() and self._mailbox.flush_s is None

    def turn_takes_s(self) -> float:
        """For how long the turn under way has run; zero between two. Any thread.

        Closing the engine is the last turn, and may take the time to flush besides.
        """
        began = self._turn_began
        return 0.0 if began is None else max(0.0, self._clock() - began)

    def _run(self) -> None:
        try:
            while self._mailbox.flush_s is None:
                self._turn_began = self._clock()
                self._turn()
                self._turn_began = None
        except BaseException as error:  # whatever it was: a worker without an engine must not look alive
            logger.exception("engine failed")
            self._publish(Failed(error))
        finally:
            self._turn_began = self._clock() + (self._mailbox.flush_s or 0.0)
            self._close()
            self._turn_began = None

    def _turn(self) -> None:
        if self._idle():
            self._sleep()
            return
        with self._mailbox.changed:
            commands, self._mailbox.commands = self._mailbox.commands, deque()
            clears, self._mailbox.clears = self._mailbox.clears, deque()
            snapshots, self._mailbox.snapshots = self._mailbox.snapshots, []
            probes, self._mailbox.probes = self._mailbox.probes, []
            cleared, self._mailbox.cleared = self._mailbox.cleared, deque()
            order = self._mailbox.orders.popleft() if self._mailbox.orders else None
        for command in commands:
            command(self._engine)
        answers: list[Published] = list(cleared)
        for _ in cleared:
            self._engine.cache.shared_cleared()
        answers.extend(done for request in clears if (done := self._clear(request)) is not None)
        if order is not None:
            answers.append(self._carry_out(order))
        made_tokens = self._step()
        for answer in answers:
            self._publish(answer)
        for asker in snapshots:
            self._publish(Snapped(asker, self._engine.snapshot()))
        # As snapshots: the step has drained the store's events, so what is found here is what was told.
        for probe in probes:
            self._publish(Located(probe.asker, probe.probe_id, self._engine.cache.where(probe.hashes)))
        # No tokens: either a prompt is being computed, and wait returns at once, or all wait for blocks.
        if not made_tokens and self._mailbox.empty and self._engine.has_work():
            self._engine.wait(IO_WAIT_S)

    def _step(self) -> bool:
        """One step, published; whether it made tokens."""
        report = self._engine.step()
        self._stepped_at = self._clock()
        self._load_is_stale = True
        load = self._take_load()
        if report.outputs or report.events or load is not None:
            self._publish_step(report, load)
        return bool(report.outputs)

    def _publish_step(self, report: StepReport, load: Load | None) -> None:
        taken_in: list[JobId] = []
        if load is not None:
            taken_in, self._taken_in = self._taken_in, []
        self._publish(Stepped(report, load, taken_in))

    def _take_load(self) -> Load | None:
        now = self._clock()
        if not self._load_is_stale or now < self._load_taken_at + LOAD_INTERVAL_S:
            return None
        self._load_taken_at, self._load_is_stale = now, False
        return self._engine.load()

    def _idle(self) -> bool:
        overdue = self._clock() >= self._stepped_at + IDLE_STEP_S
        return self._mailbox.empty and not overdue and not self._engine.has_work()

    def _sleep(self) -> None:
        """Until a command comes, the load of the last step is due, or it is time for an idle step."""
        wake_at = self._stepped_at + IDLE_STEP_S
        if self._load_is_stale:
            wake_at = min(wake_at, self._load_taken_at + LOAD_INTERVAL_S)
        with self._mailbox.changed:
            if self._mailbox.empty:
                self._mailbox.changed.wait(max(0.0, wake_at - self._clock()))
        load = self._take_load()
        if load is not None:
            self._publish_step(StepReport(), load)

    def _clear(self, request: ClearRequest) -> Cleared | None:
        """Drop this worker's blocks; the answer, or None where it comes when the shared tier is clear too."""
        if request.hold is not None:
            self._engine.cache.hold_peers(request.hold, HOLD_PEERS_S)
        try:
            dropped = self._engine.cache.clear(root=request.root, prefix=request.prefix)
        except StoreError as error:
            return _not_cleared(request, {}, error)
        clearing = (
            self._engine.cache.shared_clearing(root=request.root, prefix=request.prefix) if request.shared else None
        )
        if clearing is None:
            return Cleared(request.asker, request.clear_id, dropped)
        self._shared_clears.submit(self._clear_shared, request, dropped, clearing)
        return None

    def _clear_shared(
        self, request: ClearRequest, dropped: dict[TierName, int], clearing: Callable[[], dict[TierName, int]]
    ) -> None:
        """In the other thread. The answer goes through the engine's thread, which has the events before it."""
        try:
            answer = Cleared(request.asker, request.clear_id, dropped | clearing())
        except Exception as error:  # noqa: BLE001 - nobody looks at the future, and whoever asked waits for an answer
            answer = _not_cleared(request, dropped, error)
        with self._mailbox.changed:
            self._mailbox.cleared.append(answer)
            self._mailbox.changed.notify()

    def _carry_out(self, order: Order) -> Answered:
        try:
            return Answered(order.asker, order.command_id, carry_out(self._engine, order.command))
        except StoreError as error:
            return Answered(order.asker, order.command_id, CacheAnswer(), f"{error}")
        except Exception as error:
            logger.exception("an operator's order failed by a defect; report this")
            message = f"the worker failed at it ({type(error).__name__}: {error}); its log says why, report it"
            return Answered(order.asker, order.command_id, CacheAnswer(), message)

    def _close(self) -> None:
        self._shared_clears.shutdown(wait=False, cancel_futures=True)
        try:
            self._engine.close(flush_s=self._mailbox.flush_s or 0.0)
        except Exception:
            logger.exception("engine could not be closed cleanly")


def _not_cleared(request: ClearRequest, dropped: dict[TierName, int], error: Exception) -> Cleared:
    logger.warning("blocks could not be cleared", exc_info=error)
    return Cleared(request.asker, request.clear_id, dropped, f"{error}")
