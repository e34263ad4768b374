"""The stream to one worker: kept open, read in order, fenced by incarnation.

Covers: connecting and reconnecting, the handshake, gaps, silence, jobs under way, clears, operators' orders. Does not
cover: which workers there are and what they agree on (`fleet`). One asyncio task a link; what it learns goes to the
index and to its listener at once, in the order of the stream.

A broken stream loses the worker at once. Silence makes it suspect after `SUSPECT_AFTER_S` (it gets nothing new; the
next word from it ends that) and lost after `LOST_AFTER_S`. Jobs of a lost worker end with `FlightLost`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Protocol

import grpc

from router import kv_wire
from router.cost import WorkerLoad
from router.flight import Flight, FlightEnd
from router.index import PrefixIndex
from router.protocol import WorkerAddress
from router.worker_stream import LinkBroken, LinkSettings, WorkerStream
from warmkv.v1 import worker_pb2

SUSPECT_AFTER_S = 2.0
LOST_AFTER_S = 10.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 1.0  # a worker that is ready is back within two seconds
log = logging.getLogger(__name__)


class Refused(Exception):
    """The worker does not fit; the message names the field and the remedy."""


class Listener(Protocol):
    """Whom a link tells what it learns. Calls are made from the event loop and must not block."""

    def greeted(self, link: WorkerLink, hello: worker_pb2.WorkerHello) -> None:
        """The worker said hello. Raises Refused."""
        ...

    def heard_record(self, link: WorkerLink, record: worker_pb2.FleetRecord) -> None:
        """The worker carries this fleet record."""
        ...

    def changed(self, link: WorkerLink) -> None:
        """Its state, or what it can take, changed."""
        ...

    def lost(self, link: WorkerLink, why: str) -> None:
        """A stream that had been up is down."""
        ...

    def reported(self, link: WorkerLink) -> None:
        """It has a new report of its load."""
        ...

    def resynced(self, link: WorkerLink) -> None:
        """A snapshot was asked for, because messages were missed or what is believed was found wrong."""
        ...

    def missed(self, link: WorkerLink) -> None:
        """Messages were missed."""
        ...

    def behind(self, link: WorkerLink, seconds: float) -> None:
        """So old is its oldest K/V event that has not come."""
        ...

    def snapped(self, link: WorkerLink) -> None:
        """Its snapshot is complete."""
        ...

    def cleared(self, link: WorkerLink) -> None:
        """It dropped blocks as it was told."""
        ...


@dataclass(frozen=True)
class Report:
    """The last report of a worker: as it came, when it was true, and the moment up to which jobs sent are in it.

    Both on the link's clock. A job waits at its worker for the end of a step, and a report is sent again when a step
    is long: no time that has passed since a job was sent says that a report knows of it.
    """

    message: worker_pb2.Load
    at: float
    block_nbytes: int = 0
    knows_until: float = -math.inf

    @cached_property
    def load(self) -> WorkerLoad:
        """What decisions read of it. Made when first asked for: most reports are replaced before."""
        return kv_wire.worker_load(self.message, self.block_nbytes)


@dataclass(slots=True)
class _Clearing:
    request: worker_pb2.Clear
    done: asyncio.Future[worker_pb2.ClearDone] = field(repr=False)


class WorkerLink:
    """The link to one worker. `run` keeps it up until it is cancelled. `snapshots`: complete ones, ever."""

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
        self.report: Report | None = None
        self.joined_at = -math.inf
        self.problem = ""
        self.connected = False
        self.synced = False
        self.suspect = False
        self.refused = False
        self.was_up = False
        self.snapshots = 0
        self._index = index
        self._listener = listener
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._flights: dict[int, Flight] = {}
        self._clears: dict[int, _Clearing] = {}
        self._orders: dict[int, asyncio.Future[worker_pb2.CacheDone]] = {}
        self._probes: dict[int, Callable[[worker_pb2.Probed], None]] = {}
        self._behind_s = 0.0
        self._ids = count(1)
        self._stream: WorkerStream | None = None
        self._retry_now = asyncio.Event()
        self._heard_at = 0.0
        self._seq = 0
        self._skipping = False
        self._reading_snapshot = False

    @property
    def incarnation(self) -> int:
        """Of the worker that was greeted last; zero: none yet."""
        return self.hello.incarnation if self.hello else 0

    @property
    def jobs(self) -> int:
        """Jobs of this router that run or wait there."""
        return len(self._flights)

    @property
    def whole(self) -> bool:
        """Whether what the index has of it is a whole snapshot and all events since."""
        return self.synced and not self._skipping and not self._reading_snapshot

    @property
    def owes_clear(self) -> bool:
        """Whether it may hold blocks of its own that were cleared."""
        return bool(self._clears) and any(not owed.request.shared_tier for owed in self._clears.values())

    # What the fleet asks for

    async def run(self) -> None:
        """Keep the stream up until cancelled: connect, read, reconnect."""
        pause = _FIRST_PAUSE_S
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
            pause = _FIRST_PAUSE_S if self.connected else min(pause * 2, _LONGEST_PAUSE_S)
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
        self._send(worker_pb2.ConnectRequest(submit=job))
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
        clearing = _Clearing(worker_pb2.Clear(), asyncio.get_running_loop().create_future())
        clearing.request.CopyFrom(request)
        clearing.request.clear_id = next(self._ids)
        self._clears[clearing.request.clear_id] = clearing
        if self.connected:
            self._send(worker_pb2.ConnectRequest(clear=clearing.request))
        return clearing.done

    def order(self, command: worker_pb2.CacheCommand) -> asyncio.Future[worker_pb2.CacheDone]:
        """Send an operator's order, whose id this fills in; its answer, with `error` set when the worker is lost.

        It is not owed: a worker that comes back is not asked again.
        """
        command.command_id = next(self._ids)
        done: asyncio.Future[worker_pb2.CacheDone] = asyncio.get_running_loop().create_future()
        if not self.connected:
            done.set_result(worker_pb2.CacheDone(error="it is not connected; try again when it is back"))
            return done
        self._orders[command.command_id] = done
        done.add_done_callback(lambda _: self._orders.pop(command.command_id, None))
        self._send(worker_pb2.ConnectRequest(cache=command))
        return done

    def probe(self, names: Sequence[bytes], answered: Callable[[worker_pb2.Probed], None]) -> None:
        """Ask where blocks lie (names of 32 bytes). `answered` is called at the answer's place in the stream.

        It is not called where a snapshot is under way by then, the answer is lost or the worker is.
        """
        number = next(self._ids)
        self._probes = {number: answered}  # one at a time: who asks again has given up the one before
        self._send(worker_pb2.ConnectRequest(probe=worker_pb2.Probe(probe_id=number, hashes=b"".join(names))))

    def resync(self) -> None:
        """Believe nothing of what it holds until a new snapshot is complete, and ask for that."""
        self._index.distrust(self.name)
        self._skipping = True
        self._send(worker_pb2.ConnectRequest(resync=worker_pb2.Resync()))
        self._listener.resynced(self)

    def release_peers(self, hold: int) -> None:
        """Tell the worker that the clear with this `peers_hold` is over; one that cannot hear it finds out in time."""
        if self.connected:
            self._send(worker_pb2.ConnectRequest(peers_released=worker_pb2.PeersReleased(peers_hold=hold)))

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
        if not self._index.join(self.name, hello.incarnation, shared_id=hello.shared_tier_id):
            raise LinkBroken("an older incarnation answered; waiting for the newer one")
        if self.hello is not None and hello.incarnation != self.hello.incarnation:
            self.report = None
        if self.hello is None or hello.incarnation != self.hello.incarnation:
            self.joined_at = self._clock()
        self.hello = hello
        self._seq, self._skipping, self._reading_snapshot = first.seq, True, False  # until the snapshot begins
        self._heard_at = self._clock()
        self.connected, self.was_up, self.refused, self.suspect, self.synced = True, True, False, False, False
        self.problem = ""
        for owed in self._clears.values():
            self._send(worker_pb2.ConnectRequest(clear=owed.request))
        log.info("a worker joined", extra={"worker": self.name, "incarnation": hello.incarnation})
        self._listener.changed(self)

    def _hear(self, message: worker_pb2.ConnectResponse) -> None:
        self._heard_at = self._clock()
        if self.suspect:
            self.suspect = False
            self._listener.changed(self)
        if message.seq != self._seq + 1:
            self._resync(message.seq)
        self._seq = message.seq
        match message.WhichOneof("kind"):
            case "step":
                self._on_step(message.step)
            case "snapshot":
                self._on_snapshot(message.snapshot)
            case "clear_done":
                self._on_clear_done(message.clear_done)
            case "probed":
                answered = self._probes.pop(message.probed.probe_id, None)
                if answered is not None and self.whole:
                    answered(message.probed)
            case "cache_done":
                self._answer_order(message.cache_done.command_id, message.cache_done)
            case "fleet":
                self._listener.heard_record(self, message.fleet)

    def _resync(self, seq: int) -> None:
        """Messages are missing. Their events may be in a new snapshot; tokens would be gone, so no job goes on.

        What was believed before counts on, discounted, until the snapshot begins.
        """
        log.warning("a stream had a gap", extra={"worker": self.name, "expected": self._seq + 1, "seq": seq})
        self._listener.missed(self)
        self._skipping = True
        for flight in list(self._flights.values()):
            self.cancel(flight)
            flight.miss(f"messages from {self.name} were lost")
        self._fail_orders("messages were lost, maybe its answer among them; try again")
        self._send(worker_pb2.ConnectRequest(resync=worker_pb2.Resync()))
        self._listener.resynced(self)

    def _on_step(self, step: worker_pb2.Step) -> None:
        if step.events and not self._skipping:
            self._index.apply(self.name, self.incarnation, kv_wire.events(step.events))
        if step.HasField("load"):
            self.report = self._report(step.load)
            self._note_lag(step.load.events_behind_ms / 1000.0)
            self._listener.reported(self)
        for output in step.outputs:
            flight = self._flights.get(output.job_id)
            if flight is not None:
                flight.deliver(output)

    def _report(self, load: worker_pb2.Load) -> Report:
        nbytes, at = self.hello.block_nbytes if self.hello else 0, self._heard_at - load.age_ms / 1000.0
        for job_id, flight in reversed(self._flights.items()):
            if job_id <= load.last_job_id:
                return Report(load, at, nbytes, flight.sent_at)
        return Report(load, at, nbytes)

    def _on_snapshot(self, piece: worker_pb2.Snapshot) -> None:
        if piece.first:
            self._index.begin_snapshot(self.name, self.incarnation)
            self._skipping, self._reading_snapshot = False, True
        if self._skipping:
            return
        self._index.snapshot(self.name, self.incarnation, kv_wire.stored(piece.blocks))
        if piece.last:
            self._index.end_snapshot(self.name, self.incarnation)
            self.synced, self._reading_snapshot, self._behind_s = True, False, 0.0
            self.snapshots += 1
            self._listener.snapped(self)
            self._listener.changed(self)

    def _note_lag(self, seconds: float) -> None:
        if seconds != self._behind_s:
            self._behind_s = seconds
            self._listener.behind(self, seconds)

    def _on_clear_done(self, done: worker_pb2.ClearDone) -> None:
        clearing = self._clears.pop(done.clear_id, None)
        self._listener.cleared(self)
        if clearing is not None and not clearing.done.done():
            clearing.done.set_result(done)

    def _answer_order(self, command_id: int, done: worker_pb2.CacheDone) -> None:
        waiting = self._orders.get(command_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(done)

    def _fail_orders(self, error: str) -> None:
        for command_id in list(self._orders):
            self._answer_order(command_id, worker_pb2.CacheDone(error=error))

    # Endings

    def _down(self, why: str, *, refused: bool) -> None:
        self._stream = None
        was_connected, self.connected, self.synced, self.suspect = self.connected, False, False, False
        self.refused, self.problem = refused, why
        self._index.drop(self.name)
        for flight in list(self._flights.values()):
            flight.lose(f"worker {self.name} was lost: {why}")
        self._fail_orders(f"it was lost: {why}; try again when it is back")
        self._probes.clear()
        self._behind_s = 0.0
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
