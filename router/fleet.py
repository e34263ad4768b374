"""All workers that this router knows, and what the fleet agrees on.

Covers: following discovery, one link a worker, liveness, the fleet record and its gossip. Does not cover: choosing a
worker (`policy`), a stream (`link`), clearing everywhere (`fleet_clears`). Owned by the event loop.

The record travels through the workers: a router sends a newer one down every link, a worker hands the newest that it
knows to every router. So any router hears of a change from any worker, and there is no other server to run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router import fleet_record
from router.beliefs import Beliefs
from router.catching_up import CatchingUp
from router.errors import RouterError, WorkerNotFound
from router.fleet_clears import FleetClears, confirmed_since
from router.fleet_record import FleetRecord
from router.handshake import Expected, FleetIdentity, identity_of, misfit
from router.index import PrefixIndex
from router.link import Refused, WorkerLink
from router.metrics import Metrics
from router.other_routers import OtherRouters
from router.policy import checked_weights, find_policy
from router.protocol import Discovery, WorkerAddress
from router.worker_stream import LinkSettings
from warmkv.v1 import admin_pb2, worker_pb2

_TICK_S = 0.25
_LATE_S = 1.0  # a tick that comes later than this says more about this process than about any worker
_SWEEP_BLOCKS = 20_000
_FORGET_AFTER_S = 60.0

_WORDS = {
    admin_pb2.WORKER_STATE_JOINING: "is joining",
    admin_pb2.WORKER_STATE_DRAINED: "is drained",
    admin_pb2.WORKER_STATE_SUSPECT: "is silent",
    admin_pb2.WORKER_STATE_LOST: "is lost",
    admin_pb2.WORKER_STATE_REFUSED: "was refused",
}

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    link: WorkerLink
    task: asyncio.Task[None]
    missing_since: float | None = None  # from discovery's list


class Fleet:
    """The links. `start` and `close` belong to the event loop; the rest is synchronous unless it waits for workers."""

    def __init__(
        self,
        discovery: Discovery,
        index: PrefixIndex,
        metrics: Metrics,
        settings: LinkSettings,
        expected: Expected,
        record: FleetRecord,
        *,
        clock: Callable[[], float],
        jitter: Callable[[], float],
        others: OtherRouters,
        beliefs: Beliefs,
        catch_up_s: float = 0.0,
        on_load: Callable[[], None] = lambda: None,
        on_worker_gone: Callable[[str], None] = lambda _worker: None,
        wall_clock: Callable[[], float] = time.time,
        keep_record: Callable[[FleetRecord], None] = lambda _record: None,
    ) -> None:
        """`keep_record`: called with each record that is put in force, to be known after a restart."""
        self._keep_record = keep_record
        self.record = record
        self.identity: FleetIdentity | None = None
        self._context_length = 0
        self._vocab_size = 0
        self._clears = FleetClears(self, settings.router, wall_clock)
        self._discovery = discovery
        self._index = index
        self._metrics = metrics
        self._settings = settings
        self._expected = expected
        self._clock = clock
        self._jitter = jitter
        self._others = others
        self._on_worker_gone = on_worker_gone
        self._beliefs = beliefs
        self._catching_up = CatchingUp(clock, patience_s=catch_up_s)
        self._on_load = on_load
        self._members: dict[str, _Member] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Follow discovery and watch over the links, until `close`."""
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._tick())]
        for task in self._tasks:
            task.add_done_callback(report_failure)

    async def close(self) -> None:
        """End all links; jobs that still run on them are lost."""
        tasks = [*self._tasks, *(member.task for member in self._members.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self._members.values():
            member.link.close()
        await self._discovery.close()

    # Questions

    def links(self) -> list[WorkerLink]:
        """All of them, sorted by name."""
        return [member.link for member in self._members.values()]

    def listed(self) -> list[WorkerLink]:
        """Those that discovery names, sorted by name."""
        return [member.link for member in self._members.values() if member.missing_since is None]

    def link(self, worker: str) -> WorkerLink:
        """Of that worker. Raises WorkerNotFound."""
        member = self._members.get(worker)
        if member is None:
            known = ", ".join(sorted(self._members)) or "none"
            raise WorkerNotFound(f"There is no worker {worker!r}; the workers are: {known}.", worker=worker)
        return member.link

    def state(self, link: WorkerLink) -> admin_pb2.WorkerState.ValueType:
        """Whether requests can go to it."""
        if link.refused:
            return admin_pb2.WORKER_STATE_REFUSED
        if not link.connected:
            return admin_pb2.WORKER_STATE_LOST if link.was_up else admin_pb2.WORKER_STATE_JOINING
        if link.suspect:
            return admin_pb2.WORKER_STATE_SUSPECT
        if not link.synced:
            return admin_pb2.WORKER_STATE_JOINING
        return admin_pb2.WORKER_STATE_DRAINED if link.name in self.record.drained else admin_pb2.WORKER_STATE_READY

    def takes_requests(self, link: WorkerLink) -> bool:
        """Whether something new may go to it: its `state` is ready, asked of every worker at each decision."""
        up = link.connected and link.synced and not (link.suspect or link.refused)
        return up and link.name not in self.record.drained

    def is_alive(self, link: WorkerLink) -> bool:
        """Whether it answers and what it holds is known."""
        return self.state(link) in (admin_pb2.WORKER_STATE_READY, admin_pb2.WORKER_STATE_DRAINED)

    def excluded_because(self, link: WorkerLink) -> str:
        """Why it gets nothing new; empty: it can."""
        words = _WORDS.get(self.state(link), "")
        return f"{words}: {link.problem}" if words and link.problem else words

    @property
    def catching_up(self) -> tuple[str, ...]:
        """Workers whose first snapshots are waited for; empty: decisions know all that can be known."""
        return self._catching_up.waiting

    def context_length(self) -> int:
        """The longest sequence that every connected worker takes; while there is none, as last known; first zero."""
        return self._context_length

    def vocab_size(self) -> int:
        """Likewise of token ids."""
        return self._vocab_size

    def routers(self) -> int:
        """How many routers the workers serve now, this one included; at least 1."""
        reports = (member.link.report for member in self._members.values() if member.link.connected)
        return max([1, *(report.message.routers for report in reports if report is not None)])

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until some worker's state changed, or the time is up."""
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    # Changes

    def change(self, record: FleetRecord) -> None:
        """Put a newer record in force here, and tell the fleet.

        Raises:
            InvalidRequest: its policy, that of its shadow or a weight is not allowed.
        """
        checked_weights(find_policy(record.policy), record.weights)
        if record.shadow is not None:
            checked_weights(find_policy(record.shadow.name), record.shadow.weights)
        self.tell(record)

    def tell(self, record: FleetRecord) -> None:
        """Put a record in force that is known to be allowed, tell every worker, ask each for the clears it owes."""
        self.record = record
        self._keep_record(record)
        for link in self.links():
            link.send_record(record.to_wire())
        self._clears.ask(self.links())
        self._clears.release_peers()
        self._changed.set()

    async def clear(self, request: worker_pb2.Clear, *, shared_tier: bool) -> dict[str, worker_pb2.ClearDone]:
        """See `FleetClears.clear`."""
        return await self._clears.clear(request, shared_tier=shared_tier)

    async def scale(self, workers: int) -> tuple[list[str], list[str]]:
        """See `Discovery.scale`."""
        return await self._discovery.scale(workers)

    # What links tell (router.link.Listener)

    def greeted(self, link: WorkerLink, hello: worker_pb2.WorkerHello) -> None:
        """Raises Refused where the worker does not fit those that are connected."""
        others = any(m.link.connected for m in self._members.values() if m.link is not link)
        if problem := misfit(hello, self._expected, self.identity if others else None):
            raise Refused(problem)
        self.identity = identity_of(hello)

    def joined(self, link: WorkerLink, hello: worker_pb2.WorkerHello) -> None:
        """It tells the work that all routers have given it."""
        self._others.greeted(link.name, hello)

    def heard_record(self, link: WorkerLink, record: worker_pb2.FleetRecord) -> None:
        """Apply a newer record and pass it on, with the clears of both; answer an older one with ours."""
        theirs = fleet_record.from_wire(record)
        if not self.record.knows(theirs):
            before = self.record
            self._adopt(before.joined(theirs))
            # Workers without events tell what a clear dropped to the router that asked for it, and to no other.
            for worker in confirmed_since(before, self.record):
                self._beliefs.approximate.cleared(worker)
        elif not theirs.knows(self.record):
            link.send_record(self.record.to_wire())

    def changed(self, link: WorkerLink) -> None:
        """Wake those who wait for a worker; a worker that has just connected is told the record and what is owed."""
        if hellos := self._hellos():
            self._context_length = min(hello.context_length for hello in hellos)
            self._vocab_size = min(hello.vocab_size for hello in hellos)
        self._catching_up.note(self.listed())
        if link.connected and not link.synced:
            link.send_record(self.record.to_wire())
            self._clears.joined(link)
        self._changed.set()
        self._on_load()

    def reported(self, link: WorkerLink) -> None:
        """Those who wait for a queue to shrink look at it."""
        self._on_load()

    def lost(self, link: WorkerLink, why: str) -> None:
        """Count it."""
        self._metrics.losses.labels(link.name).inc()
        self._beliefs.lost(link.name)
        self._others.lost(link.name)

    def resynced(self, link: WorkerLink) -> None:
        """Count it."""
        self._metrics.resyncs.labels(link.name).inc()

    def missed(self, link: WorkerLink) -> None:
        """Doubt it."""
        self._beliefs.credits.missed_messages(link.name)
        self._others.missed(link.name)

    def heard_others(self, link: WorkerLink, jobs: Sequence[worker_pb2.OtherJob]) -> None:
        """Count them as one's own."""
        self._others.heard(link.name, jobs)

    def behind(self, link: WorkerLink, seconds: float) -> None:
        """Doubt it as far as that goes."""
        self._beliefs.credits.is_behind(link.name, seconds)

    def snapped(self, link: WorkerLink) -> None:
        """Believe it."""
        self._beliefs.synced(link)

    def cleared(self, link: WorkerLink) -> None:
        """One that sends no events has not said what it dropped."""
        self._beliefs.approximate.cleared(link.name)

    def found_shared_tier(self, link: WorkerLink) -> None:
        """It may owe the clear of that tier."""
        self._clears.found_shared_tier(link)

    # Inside

    def _hellos(self) -> list[worker_pb2.WorkerHello]:
        links = [member.link for member in self._members.values()]
        return [link.hello for link in links if link.connected and link.hello is not None]

    def _adopt(self, record: FleetRecord) -> None:
        try:
            self.change(record)
        except RouterError as error:
            log.warning("a fleet record was not applied", extra={"author": record.author, "why": error.message})
            self.record = self.record.with_clears(record.clears)
            self._clears.ask(self.links())

    async def _follow(self) -> None:
        async for workers in self._discovery.watch():
            self._meet(workers)

    def _meet(self, workers: list[WorkerAddress]) -> None:
        now = self._clock()
        listed = {worker.name: worker for worker in workers}
        self._catching_up.met(listed)
        for name, worker in listed.items():
            if name in self._members:
                self._members[name].missing_since = None
                self._members[name].link.moved(worker.address)
            else:
                self._members[name] = self._member(worker)
        self._members = dict(sorted(self._members.items()))  # here and not in `links`, which each decision asks for
        for name, member in self._members.items():
            if name not in listed and member.missing_since is None:
                member.missing_since = now

    def _member(self, worker: WorkerAddress) -> _Member:
        link = WorkerLink(worker, self._index, self, self._settings, clock=self._clock, jitter=self._jitter)
        task = asyncio.create_task(link.run(), name=f"link-{worker.name}")
        task.add_done_callback(report_failure)
        self._clears.ask([link])
        return _Member(link, task)

    async def _tick(self) -> None:
        last = self._clock()
        while True:
            await asyncio.sleep(_TICK_S)
            now = self._clock()
            if now - last < _LATE_S:
                for link in self.links():
                    link.judge_silence()
            last = now
            self._index.sweep(_SWEEP_BLOCKS)
            self._beliefs.tick(self.links())
            if self._catching_up.waiting:
                self._catching_up.note(self.listed())
                self._changed.set()
            self._forget_missing(now)

    def _forget_missing(self, now: float) -> None:
        """Workers that discovery no longer names and that have been down for a while are gone for good."""
        for name, member in list(self._members.items()):
            gone = member.missing_since is not None and now - member.missing_since > _FORGET_AFTER_S
            if gone and not member.link.connected:
                member.task.cancel()
                del self._members[name]
                self._index.drop(name)
                self._beliefs.gone(name)
                self._clears.forget(name)
                self._others.lost(name)
                self._on_worker_gone(name)


def report_failure(task: asyncio.Task[None]) -> None:
    """These tasks run until they are cancelled: another end is a defect that must not be silent."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical(
            "the router lost a task; restart it and report this", exc_info=error, extra={"task": task.get_name()}
        )
