"""All workers that this router knows, and what the fleet agrees on.

Covers: following discovery, one link a worker, liveness, the fleet record and its gossip, clearing everywhere. Does not
cover: choosing a worker (`policy`) or a stream (`link`). Owned by the event loop.

The record travels through the workers: a router sends a newer one down every link, a worker hands the newest that it
knows to every router. So any router hears of a change from any worker, and there is no other server to run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from kvstore.past_clears import PastClear, merged
from router import fleet_record
from router.beliefs import Beliefs
from router.catching_up import CatchingUp
from router.errors import NoWorkerAvailable, RouterError, WorkerLost, WorkerNotFound
from router.fleet_record import FleetRecord
from router.handshake import Expected, FleetIdentity, identity_of, misfit
from router.index import PrefixIndex
from router.link import Refused, WorkerLink
from router.metrics import Metrics
from router.other_routers import OtherRouters
from router.owed_clears import OwedClears
from router.policy import checked_weights, find_policy
from router.protocol import Discovery, WorkerAddress
from router.worker_stream import LinkSettings
from warmkv.v1 import admin_pb2, worker_pb2

_TICK_S = 0.25
_LATE_S = 1.0  # a tick that comes later than this says more about this process than about any worker
_SWEEP_BLOCKS = 20_000
_FORGET_AFTER_S = 60.0
_CLEAR_TIMEOUT_S = 30.0

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
        wall_clock: Callable[[], float] = time.time,
        keep_record: Callable[[FleetRecord], None] = lambda _record: None,
    ) -> None:
        """`keep_record`: called with each record that is put in force, to be known after a restart."""
        self._keep_record = keep_record
        self.record = record
        self.identity: FleetIdentity | None = None
        self._context_length = 0
        self._vocab_size = 0
        self._holds = count(1)
        self._owed = OwedClears(self._confirmed_late)
        self._shared_debts: list[worker_pb2.Clear] = []
        self._wall_clock = wall_clock
        self._discovery = discovery
        self._index = index
        self._metrics = metrics
        self._settings = settings
        self._expected = expected
        self._clock = clock
        self._jitter = jitter
        self._others = others
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
        """Whether something new may go to it."""
        return self.state(link) == admin_pb2.WORKER_STATE_READY

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
        self._tell(record)

    async def clear(self, request: worker_pb2.Clear, *, shared_tier: bool) -> dict[str, worker_pb2.ClearDone]:
        """Drop blocks on every worker, and on one of them those of the shared tier; what each dropped.

        The fleet remembers it: a worker that did not confirm, or that no router knows yet, is cleared before its first
        job when it is heard of, whichever router that is; the shared tier by the first worker that can.

        Raises:
            NoWorkerAvailable: none is connected. WorkerLost: some did not confirm; names them. Clearing again is safe.
        """
        up = [link for link in self.links() if link.connected]
        away = [member for member in self._members.values() if member.link.was_up and not member.link.connected]
        clear = self._remember(request)
        self._owed.leave(clear, [link.name for link in up])
        self._ask(link for link in self.links() if not link.connected)
        if shared_tier:
            self._owe_shared(request)
        if not up:
            raise NoWorkerAvailable(
                "No worker is connected, so nothing was cleared yet; clear again when one is.", retry_after_s=1.0
            )
        # Until the last worker is cleared its blocks could be read by those that were cleared before it.
        hold = next(self._holds) if any(link.hello and link.hello.peer_address for link in up) else 0
        if hold:
            self._owed.hold(hold, clear)
        answers: dict[str, worker_pb2.ClearDone] = {}
        try:
            answers = await self._clear_all(up, request, shared_tier=shared_tier, hold=hold)
        finally:
            self._owed.take(clear, [link.name for link in up])
            self._confirmed(clear, [name for name, answer in answers.items() if not answer.error])
        # One that discovery no longer names was stopped: nobody can say when it is back.
        problems = {member.link.name: "it is lost" for member in away if member.missing_since is None}
        problems |= {name: answer.error for name, answer in answers.items() if answer.error}
        if problems:
            raise _not_confirmed(problems)
        return answers

    async def _clear_all(
        self, up: Sequence[WorkerLink], request: worker_pb2.Clear, *, shared_tier: bool, hold: int
    ) -> dict[str, worker_pb2.ClearDone]:
        """The rounds of a clear; what each worker dropped, with `error` where it did not confirm."""
        # First everybody drops what it was about to write there; only then can the shared tier be emptied for good.
        local = _clear_request(request, shared=False)
        local.peers_hold = hold
        done = await asyncio.gather(*(self._clear_one(link, local) for link in up))
        answers = {link.name: answer for link, answer in zip(up, done, strict=True)}
        shared_by = next((link for link in up if shared_tier and _has_shared_tier(link)), None)
        if shared_by is not None:
            answer = answers[shared_by.name]
            answer.MergeFrom(_shared_part(await self._clear_one(shared_by, _clear_request(request, shared=True))))
            # What somebody read from there between the two has gone up again.
            again = await asyncio.gather(*(self._clear_one(link, local) for link in up))
            for link, more in zip(up, again, strict=True):
                _add_dropped(answers[link.name], more)
        return answers

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
        self._others.greeted(link.name, hello)

    def heard_record(self, link: WorkerLink, record: worker_pb2.FleetRecord) -> None:
        """Apply a newer record and pass it on, with the clears of both; answer an older one with ours."""
        theirs = fleet_record.from_wire(record)
        if not self.record.knows(theirs):
            self._adopt(self.record.joined(theirs))
        elif not theirs.knows(self.record):
            link.send_record(self.record.to_wire())

    def changed(self, link: WorkerLink) -> None:
        """Wake those who wait for a worker; a worker that has just connected is told the record and what is owed."""
        if hellos := self._hellos():
            self._context_length = min(hello.context_length for hello in hellos)
            self._vocab_size = min(hello.vocab_size for hello in hellos)
        self._catching_up.note(self.links())
        if link.connected and not link.synced:
            link.send_record(self.record.to_wire())
            self._owed.ask(link, self.record.clears)
            if _has_shared_tier(link):
                for debt in self._shared_debts:
                    self._pay(link, debt)
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
            self._ask(self.links())

    def _tell(self, record: FleetRecord) -> None:
        """Put it in force, tell every worker, and ask each for the clears that it owes."""
        self.record = record
        self._keep_record(record)
        for link in self.links():
            link.send_record(record.to_wire())
        self._ask(self.links())
        self._release_peers()
        self._changed.set()

    def _ask(self, links: Iterable[WorkerLink]) -> None:
        for link in links:
            self._owed.ask(link, self.record.clears)

    def _remember(self, request: worker_pb2.Clear) -> PastClear:
        """Note a clear that begins; the others hear of it when this router knows who has carried it out."""
        last = max((clear.number for clear in self.record.clears), default=0)
        number = max(last + 1, int(self._wall_clock() * 1000))
        clear = PastClear(number, self._settings.router, request.chain_root, request.prefix_hash)
        self.record = self.record.with_clears(merged(self.record.clears, [clear]))
        return clear

    def _confirmed_late(self, clear: PastClear, worker: str) -> None:
        log.info("a worker that was away is cleared", extra={"worker": worker, "author": clear.author})
        self._confirmed(clear, [worker])

    def _confirmed(self, clear: PastClear, workers: Iterable[str]) -> None:
        """Tell the fleet who has carried out a clear, unless a younger one has taken its place."""
        clears = [one.confirmed_by(workers) if one.key == clear.key else one for one in self.record.clears]
        self._tell(self.record.with_clears(clears))

    def _release_peers(self) -> None:
        """End the holds of clears that all have confirmed who may be asked for blocks."""
        listed = [m.link.name for m in self._members.values() if m.link.was_up and m.missing_since is None]
        for hold in self._owed.settled_holds(self.record.clears, listed):
            for link in self.links():
                link.release_peers(hold)

    async def _clear_one(self, link: WorkerLink, request: worker_pb2.Clear) -> worker_pb2.ClearDone:
        """Its answer, with `error` set where it gave none in time."""
        try:
            async with asyncio.timeout(_CLEAR_TIMEOUT_S):
                done = await link.clear(request)
        except TimeoutError:
            return worker_pb2.ClearDone(error=f"no answer within {_CLEAR_TIMEOUT_S:.0f} s")
        if request.shared_tier and not done.error:
            self._paid(request)
        return done

    def _owe_shared(self, request: worker_pb2.Clear) -> None:
        """Keep it until a worker confirmed that the shared tier is clear; no fleet without one owes it."""
        debt = _clear_request(request, shared=True)
        known = any(_has_shared_tier(member.link) for member in self._members.values())
        if known and debt not in self._shared_debts:
            self._shared_debts.append(debt)

    def _pay(self, link: WorkerLink, debt: worker_pb2.Clear) -> None:
        def confirmed(done: asyncio.Future[worker_pb2.ClearDone]) -> None:
            if not done.cancelled() and not done.result().error:
                self._paid(debt)

        link.owe_clear(debt).add_done_callback(confirmed)

    def _paid(self, debt: worker_pb2.Clear) -> None:
        if debt in self._shared_debts:
            self._shared_debts.remove(debt)

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
        self._owed.ask(link, self.record.clears)
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
                self._catching_up.note(self.links())
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
                self._owed.forget(name)


def _add_dropped(total: worker_pb2.ClearDone, more: worker_pb2.ClearDone) -> None:
    total.device += more.device
    total.host += more.host
    total.disk += more.disk
    total.error = total.error or more.error


def _shared_part(done: worker_pb2.ClearDone) -> worker_pb2.ClearDone:
    """What a second clear of the same worker adds to the answer of the first."""
    return worker_pb2.ClearDone(redis=done.redis, error=done.error)


def _clear_request(request: worker_pb2.Clear, *, shared: bool) -> worker_pb2.Clear:
    one = worker_pb2.Clear()
    one.CopyFrom(request)
    one.shared_tier = shared
    return one


def _has_shared_tier(link: WorkerLink) -> bool:
    return link.hello is not None and bool(link.hello.shared_tier_id)


def _not_confirmed(problems: Mapping[str, str]) -> WorkerLost:
    """`problems`: by worker, why it did not confirm a clear."""
    told = "; ".join(f"{name}: {why}" for name, why in sorted(problems.items()))
    return WorkerLost(
        f"Not every worker confirmed that it cleared everything ({told}); clear again when they are back.",
        workers=",".join(sorted(problems)),
    )


def report_failure(task: asyncio.Task[None]) -> None:
    """These tasks run until they are cancelled: another end is a defect that must not be silent."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical(
            "the router lost a task; restart it and report this", exc_info=error, extra={"task": task.get_name()}
        )
