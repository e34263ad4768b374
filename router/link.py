"""The stream to one worker: kept open, read in order, fenced by incarnation.

Covers: connecting and reconnecting, the handshake, silence, jobs under way. Does not cover: which workers there are and
what they agree on (`fleet`), what events do to the index (`event_feed`), what else a worker is asked (`asked`). One
asyncio task a link; what it learns goes to the index and to its listener at once, in the order of the stream.

A broken stream loses the worker at once. Silence makes it suspect after `SUSPECT_AFTER_S` (it gets nothing new; the
next word from it ends that) and lost after `LOST_AFTER_S`. Jobs of a lost worker end with `FlightLost`, those that it
was never sent with `FlightGap`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import grpc

from router import kv_wire
from router.asked import Asked
from router.cost import WorkerLoad
from router.event_feed import EventFeed
from router.flight import Flight, FlightEnd
from router.index import PrefixIndex
from router.link_listener import Listener
from router.protocol import WorkerAddress
from router.rest import Rest
from router.traffic import NOTHING_KNOWN, Known
from router.worker_stream import LinkBroken, LinkSettings, WorkerStream
from warmkv.v1 import common_pb2, worker_pb2

SUSPECT_AFTER_S = 2.0
LOST_AFTER_S = 10.0
OUTLIVED_AFTER_S = 30.0
log = logging.getLogger(__name__)


class Refused(Exception):
    """The worker does not fit; the message names the field and the remedy."""


@dataclass(slots=True)
class Report:
    """The last report of a worker: as it came, when it was true (on the link's clock), and which jobs are in it.

    A job waits at its worker for the end of a step, and a report is sent again when a step
    is long: no time that has passed since a job was sent says that a report knows of it. Never changed, only replaced.
    """

    message: worker_pb2.Load
    at: float
    block_nbytes: int = 0
    known: Known = NOTHING_KNOWN
    _load: WorkerLoad | None = field(default=None, repr=False, compare=False)

    @property
    def load(self) -> WorkerLoad:
        """What decisions read of it. Made when first asked for: most reports are replaced before."""
        if self._load is None:
            self._load = kv_wire.worker_load(self.message, self.block_nbytes)
        return self._load


class WorkerLink:
    """The link to one worker. `run` keeps it up until it is cancelled.

    Attributes:
        failures: how many tries in a row did not reach it.
        joined_at: since when this incarnation has been there, as it says, on the link's clock.
        has_shared_tier: whether its incarnation is known to have one, be its server there or not.
    """

    def __init__(
        self,
        address: WorkerAddress,
        index: PrefixIndex,
        listener: Listener,
        settings: LinkSettings,
        *,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self.name = address.name
        self.address = address.address
        self.hello: worker_pb2.WorkerHello | None = None
        self.role: worker_pb2.WorkerRole.ValueType = worker_pb2.WORKER_ROLE_UNSPECIFIED  # by the last hello
        self.report: Report | None = None
        self.joined_at = -math.inf
        self.problem = ""
        self.failures = 0
        self.connected = False
        self.suspect = False
        self.refused = False
        self.was_up = False
        self.has_shared_tier = False
        self._index = index
        self._listener = listener
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._flights: dict[int, Flight] = {}
        self._feed = EventFeed(self.name, index)
        self._older: tuple[int, float] | None = None  # an incarnation that was turned away, and since when
        self._ids = count(1)
        self._asked = Asked(self._ids, self._send)
        self._stream: WorkerStream | None = None
        self._retry_now = asyncio.Event()
        self._heard_at = 0.0

    @property
    def incarnation(self) -> int:
        """Of the worker that was greeted last; zero: none yet."""
        return self.hello.incarnation if self.hello else 0

    @property
    def jobs(self) -> int:
        """Jobs of this router that run or wait there."""
        return len(self._flights)

    @property
    def synced(self) -> bool:
        """Whether it has said all that it holds since it was connected."""
        return self._feed.synced

    @property
    def whole(self) -> bool:
        """Whether what the index has of it is a whole snapshot and all events since."""
        return self._feed.whole

    @property
    def snapshots(self) -> int:
        """How many were complete, ever."""
        return self._feed.snapshots

    @property
    def owes_clear(self) -> bool:
        """Whether it may hold blocks of its own that were cleared."""
        return self._asked.owes_clear

    # What the fleet asks for

    async def run(self) -> None:
        """Keep the stream up until cancelled: connect, read, reconnect."""
        rest = Rest()
        while True:
            try:
                self._stream = WorkerStream(self.address, self._settings)
                await self._stream.run(self._begin, self._hear)
                error: Exception = LinkBroken("it closed the stream")
            except (Refused, LinkBroken, grpc.RpcError, asyncio.InvalidStateError, OSError, TimeoutError) as failure:
                error = failure
            except Exception as failure:
                # A link that ended would leave its worker up for ever.
                log.exception("a link failed by a defect; report this", extra={"worker": self.name})
                error = failure
            self.failures = 0 if self.connected else self.failures + 1
            pause = rest.after_failure(self._clock(), was_there=self.connected)
            self._down(_describe(error, self.address), refused=_is_refusal(error))
            await self._rest(pause * (0.8 + 0.4 * self._jitter()))

    def close(self) -> None:
        """`run` was cancelled: nothing more will come from the worker."""
        self._down("this router is ending", refused=False)

    def submit(
        self, job: worker_pb2.Job, on_tokens: Callable[[int], None], on_end: Callable[[FlightEnd], None]
    ) -> Flight:
        """Send a job; fills in its `job_id`. The link must be connected."""
        job.job_id = next(self._ids)

        def ended(end: FlightEnd) -> None:
            self._flights.pop(job.job_id, None)
            on_end(end)

        flight = self._flights[job.job_id] = Flight(
            self.name, job, on_tokens=on_tokens, on_end=ended, sent_at=self._clock()
        )
        if self._stream is not None:
            self._stream.send(worker_pb2.ConnectRequest(submit=job), flight.leaves)
        return flight

    def cancel(self, flight: Flight) -> None:
        """Stop a job; its last output still comes and is counted."""
        if flight.job.job_id in self._flights:
            self._send(worker_pb2.ConnectRequest(cancel=worker_pb2.Cancel(job_id=flight.job.job_id)))

    async def clear(self, request: worker_pb2.Clear) -> worker_pb2.ClearDone:
        """Drop blocks; returns when the worker confirmed. It stays owed when the caller stops to wait."""
        return await asyncio.shield(self.owe_clear(request))

    def owe_clear(self, request: worker_pb2.Clear) -> asyncio.Future[worker_pb2.ClearDone]:
        """Send a clear now, and to each incarnation that is heard of until one confirms; its confirmation.

        A new incarnation is sent it before any job: its disk tier holds what the one before wrote.
        """
        return self._asked.clear(request, is_connected=self.connected)

    def order(self, command: worker_pb2.CacheCommand) -> asyncio.Future[worker_pb2.CacheDone]:
        """Send an operator's order, whose id this fills in; its answer, with `error` set when the worker is lost.

        It is not owed: a worker that comes back is not asked again.
        """
        if self.connected:
            return self._asked.order(command)
        done: asyncio.Future[worker_pb2.CacheDone] = asyncio.get_running_loop().create_future()
        done.set_result(worker_pb2.CacheDone(error="it is not connected; try again when it is back"))
        return done

    def probe(self, names: Sequence[bytes], answered: Callable[[worker_pb2.Probed], None]) -> None:
        """Ask where blocks lie (names of 32 bytes). `answered` is called at the answer's place in the stream.

        It is not called where a snapshot is under way by then, the answer is lost or the worker is.
        """
        self._asked.probe(names, answered)

    def resync(self) -> None:
        """Believe nothing of what it holds until a new snapshot is complete, and ask for that."""
        self._feed.distrust()
        self._ask_snapshot()

    def release_peers(self, hold: int) -> None:
        """Tell the worker that the clear with this `peers_hold` is over; one that cannot hear it finds out in time."""
        if self.connected:
            self._send(worker_pb2.ConnectRequest(peers_released=worker_pb2.PeersReleased(peers_hold=hold)))

    def break_promise(self, broken: worker_pb2.PromiseBroken) -> None:
        """Tell the worker that nobody makes what its jobs were promised; after the jobs that were sent before."""
        if self.connected:
            self._send(worker_pb2.ConnectRequest(promise_broken=broken))

    def hand_over(self, after_s: float) -> None:
        """Tell the drained worker to hand back what still runs there after so long."""
        self._send(worker_pb2.ConnectRequest(hand_over=worker_pb2.HandOver(after_ms=round(after_s * 1000))))

    def send_record(self, record: worker_pb2.FleetRecord) -> None:
        """Tell the worker, and through it the other routers, the record in force."""
        if self.connected:
            self._send(worker_pb2.ConnectRequest(fleet=record))

    def moved(self, address: str) -> None:
        """Discovery names this address (again): try at once, and leave another one."""
        if address != self.address:
            self.address = address
            self._break(f"it moved to {address}")
        self._retry_now.set()

    def judge_silence(self) -> None:
        """Suspect or lose a worker that says nothing."""
        if not self.connected:
            return
        silent = self._clock() - self._heard_at
        if silent > LOST_AFTER_S:
            self._break(f"it was silent for {silent:.0f} s")
        elif silent > SUSPECT_AFTER_S and not self.suspect:
            self.suspect = True
            log.warning("a worker fell silent", extra={"worker": self.name, "silent_s": round(silent, 1)})
            self._listener.changed(self)

    # The stream

    def _begin(self, first: worker_pb2.ConnectResponse) -> None:
        hello = first.hello
        if hello.worker != self.name:
            raise Refused(
                f"the worker at {self.address} calls itself {hello.worker!r} and not {self.name!r};"
                " correct the address or the name."
            )
        self._listener.greeted(self, hello)
        if not self._joined(hello):
            raise LinkBroken(
                f"an older incarnation answered; it is taken if no newer one does within {OUTLIVED_AFTER_S:.0f} s"
            )
        if self.hello is None or hello.incarnation != self.hello.incarnation:
            self.report, self.has_shared_tier = None, False
            self.joined_at = self._clock() - hello.up_ms / 1000.0
        self.hello, self.role = hello, hello.role
        self._listener.joined(self, hello)
        self._note_shared_tier(known=bool(hello.shared_tier_id))
        self._feed.begin(hello.incarnation, first.seq)
        self._heard_at = self._clock()
        self.connected, self.was_up, self.refused, self.suspect = True, True, False, False
        self.problem = ""
        self._asked.clear_again()
        log.info("a worker joined", extra={"worker": self.name, "incarnation": hello.incarnation})
        self._listener.changed(self)

    def _joined(self, hello: worker_pb2.WorkerHello) -> bool:
        """Whether this incarnation is listened to: no later one was heard of, or not for a while.

        Incarnations are times: a worker that starts again after its clock was set back has an older one for ever.
        """
        if self._index.join(self.name, hello.incarnation, shared_id=hello.shared_tier_id):
            self._older = None
            return True
        now = self._clock()
        if self._older is None or self._older[0] != hello.incarnation:
            self._older = (hello.incarnation, now)
        if now - self._older[1] <= OUTLIVED_AFTER_S:
            return False
        log.warning("a later incarnation did not come back; its clock was set back", extra={"worker": self.name})
        self._index.unfence(self.name)
        return self._joined(hello)

    def _note_shared_tier(self, *, known: bool) -> None:
        """`known`: by the hello; else by what the worker reports of its tiers."""
        told = self.report.message.tiers if self.report is not None else ()
        if known:
            self.has_shared_tier = True
        elif self.has_shared_tier or any(tier.tier == common_pb2.TIER_REDIS for tier in told):
            self.has_shared_tier = True
            self._index.shares(self.name)
            self._listener.found_shared_tier(self)

    def _hear(self, message: worker_pb2.ConnectResponse) -> None:
        self._heard_at = self._clock()
        if self.suspect:
            self.suspect = False
            self._listener.changed(self)
        if missed := self._feed.note_number(message.seq):
            self._resync(missed)
        match message.WhichOneof("kind"):
            case "step":
                self._on_step(message.step)
            case "snapshot":
                if self._feed.snapshot(message.snapshot):
                    self._listener.snapped(self)
                    self._listener.changed(self)
            case "clear_done":
                self._listener.cleared(self)
                self._asked.cleared(message.clear_done)
            case "probed":
                self._asked.probed(message.probed, is_usable=self.whole)
            case "cache_done":
                self._asked.ordered(message.cache_done)
            case "fleet":
                self._listener.heard_record(self, message.fleet)

    def _resync(self, missed: int) -> None:
        """Messages are missing. Their events may be in a new snapshot; tokens would be gone, so no job goes on.

        What was believed before counts on, discounted, until the snapshot begins.
        """
        log.warning("a stream had a gap", extra={"worker": self.name, "missed": missed})
        self._listener.missed(self)
        for flight in list(self._flights.values()):
            self.cancel(flight)
            flight.miss(f"messages from {self.name} were lost")
        self._asked.fail_orders("messages were lost, maybe its answer among them; try again")
        self._ask_snapshot()

    def _ask_snapshot(self) -> None:
        self._send(worker_pb2.ConnectRequest(resync=worker_pb2.Resync()))
        self._listener.resynced(self)

    def _on_step(self, step: worker_pb2.Step) -> None:
        self._feed.events(step.events)
        if step.others:
            self._listener.heard_others(self, step.others)
        if step.HasField("load"):
            self.report = self._report(step.load)
            self._note_lag(step.load.events_behind_ms / 1000.0)
            if not self.has_shared_tier:
                self._note_shared_tier(known=False)
            self._listener.reported(self)
        for output in step.outputs:
            flight = self._flights.get(output.job_id)
            if flight is not None:
                flight.deliver(output)

    def _report(self, load: worker_pb2.Load) -> Report:
        nbytes, at = self.hello.block_nbytes if self.hello else 0, self._heard_at - load.age_ms / 1000.0
        known = (flight.sent_at for job, flight in reversed(self._flights.items()) if job <= load.last_job_id)
        return Report(load, at, nbytes, Known(next(known, -math.inf), load.last_other_number))

    def _note_lag(self, seconds: float) -> None:
        if seconds != self._feed.behind_s:
            self._feed.behind_s = seconds
            self._listener.behind(self, seconds)

    # Endings

    def _down(self, why: str, *, refused: bool) -> None:
        self._stream = None
        was_connected, self.connected, self.suspect = self.connected, False, False
        self.refused, self.problem = refused, why
        self._feed.end()
        for flight in list(self._flights.values()):
            if flight.sent:
                flight.lose(f"worker {self.name} was lost: {why}")
            else:
                flight.miss(f"worker {self.name} was lost before it was sent the job: {why}")
        self._asked.fail_orders(f"it was lost: {why}; try again when it is back")
        self._asked.forget_probes()
        if was_connected:
            log.warning("a worker was lost", extra={"worker": self.name, "why": why})
            self._listener.lost(self, why)
        self._listener.changed(self)

    def _break(self, why: str) -> None:
        if self._stream is not None:
            self._stream.break_off(why)

    def _send(self, request: worker_pb2.ConnectRequest) -> None:
        if self._stream is not None:
            self._stream.send(request)

    async def _rest(self, seconds: float) -> None:
        self._retry_now.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._retry_now.wait()
        except TimeoutError:
            return  # rested


def _describe(error: Exception, address: str) -> str:
    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.aio.AioRpcError):
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return "it refused the fleet's secret; give the router and all workers the same fleet_secret."
        return f"{error.details() or error.code().name} ({address})"
    return str(error)


def _is_refusal(error: Exception) -> bool:
    """Whether trying again is useless until somebody changes a setting (it is tried again all the same)."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION)
    return isinstance(error, Refused)
