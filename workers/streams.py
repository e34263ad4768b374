"""WorkerService.Connect: any number of routers on one engine. Lives on the server's event loop.

Covers: jobs in, what the engine thread publishes out to whom it concerns, the fleet record. Does not cover: who may
come in (`joining`), what is asked of the cache (`cache_requests`), order and bounds of what one router is told
(`outbox`), when the engine steps (`engine_thread`), sockets and threads (`server`).

Every router gets all K/V events and the load, the tokens of its own jobs, and how the jobs of the others stand. A
router that leaves takes its jobs with it: nobody would read their tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import count

import grpc

from kvstore.tier import Clock
from warmkv.v1 import worker_pb2, worker_pb2_grpc
from workers import leaving
from workers.cache_requests import CacheRequests
from workers.cache_wire import done_to_wire, probed_to_wire
from workers.engine_thread import (
    Answered,
    Cleared,
    EngineThread,
    Failed,
    Located,
    Published,
    Snapped,
    Stepped,
)
from workers.fleet_gossip import is_news, joined
from workers.job_wire import JobRefused, Refusal, job_from_wire
from workers.joining import Door
from workers.other_jobs import RunningJobs
from workers.outbox import Outbox, OutboxLimits, WireEvents
from workers.protocol import Engine, EngineInfo, FinishReason, JobError, Output
from workers.roles import Role
from workers.router_stream import Context, ProtocolViolation, RouterStream, Status
from workers.wire import clear_done_to_wire, event_to_wire, hello_to_wire, load_to_wire, output_to_wire

logger = logging.getLogger(__name__)


class WorkerStreams(worker_pb2_grpc.WorkerServiceServicer):
    """The servicer. `deliver` takes what the engine thread published, on the event loop and in order.

    `info` tells what the engine says of itself now. `kv_events_off`: routers are told of no block.
    """

    def __init__(
        self,
        info: Callable[[], EngineInfo],
        engine: EngineThread,
        *,
        worker: str,
        incarnation: int,
        secret: str,
        clock: Clock,
        limits: OutboxLimits | None = None,
        kv_events_off: bool = False,
        role: Role = Role.BOTH,
    ) -> None:
        self._kv_events_off, self._role = kv_events_off, role
        self._info = info
        self._engine = engine
        self._worker, self._incarnation = worker, incarnation
        self._door = Door(worker, secret)
        self._cache = CacheRequests(engine)
        self._clock = clock
        self._limits = limits
        self._numbers = count(1)
        self._streams: dict[int, RouterStream] = {}
        self._running = RunningJobs(clock())
        self._load: worker_pb2.Load | None = None
        self._load_at = 0.0
        self._last_taken_in = 0
        self._fleet: worker_pb2.FleetRecord | None = None
        self._draining = False
        self._handovers: set[asyncio.Task[None]] = set()  # held, or they would be collected as they run
        self._handing_back: asyncio.Task[None] | None = None
        self._closed: Status | None = None
        self._quiet = asyncio.Event()  # set while no job runs
        self._quiet.set()

    # The name is the proto's; the stub knows the generator style only, which would leave a cancelled write unnoticed.
    async def Connect(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[worker_pb2.ConnectRequest], context: Context
    ) -> None:
        """One router's stream, from its hello to its end."""
        await self._door.authenticate(context)
        if self._closed is not None:
            await context.abort(self._closed.code, self._closed.message)
        hello, protocol = await self._door.greeted(request_iterator, context)
        stream = self._open(hello.router, protocol)
        facts = {"router": hello.router, "version": hello.package_version, "protocol": protocol}
        logger.info("router connected", extra=facts)
        try:
            await stream.run(
                request_iterator,
                context,
                handle=partial(self._handle, stream),
                left=partial(self._cancel_all, stream),
                ask_snapshot=partial(self._engine.ask_snapshot, stream.number),
            )
        finally:
            del self._streams[stream.number]
            self._recount_routers()
            logger.info("router disconnected", extra={"router": hello.router})

    def deliver(self, item: Published) -> None:
        """Pass on what the engine thread published."""
        match item:
            case Stepped():
                self._deliver_step(item)
            case Snapped():
                if (stream := self._of(item.asker)) is not None:
                    stream.outbox.set_snapshot([] if self._kv_events_off else item.blocks)
                    stream.wake()
            case Located():
                if (stream := self._of(item.asker)) is not None:
                    stream.outbox.add_probed(probed_to_wire(item.probe_id, item.tiers))
                    stream.wake()
            case Cleared():
                if (stream := self._of(item.asker)) is not None:
                    stream.outbox.add_answer(clear_done_to_wire(item.clear_id, item.dropped, item.error))
                    stream.wake()
            case Answered():
                if (stream := self._of(item.asker)) is not None:
                    stream.outbox.add_answer(done_to_wire(item.command_id, item.answer, item.error))
                    stream.wake()
            case Failed():
                self._fail(item.error)

    @property
    def routers(self) -> list[str]:
        """Names of the connected routers."""
        return [stream.router for stream in self._streams.values()]

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new jobs from now on, and wait for the running ones; whether all ended in time.

        Those that did not are handed back to their routers, whose other workers go on with them (`leaving`). Where all
        did, it stays while other workers are still to read what was made for them.
        """
        self._draining = True
        until = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._quiet.wait()
        except TimeoutError:
            await self._hand_back()
            return False
        if self._handing_back is not None:  # that was asked for before, and others read what it has shared
            await asyncio.shield(self._handing_back)
        await leaving.see_off(self._engine, until)
        return True

    async def _hand_over(self, after_s: float) -> None:
        """Hand back what still runs after so long, unless this worker takes requests again by then."""
        try:
            async with asyncio.timeout(after_s):
                await self._quiet.wait()
        except TimeoutError:
            if self._is_drained(self._fleet):
                await self._hand_back()

    async def _hand_back(self) -> None:
        """As `leaving.hand_back`; once, however many ask meanwhile."""
        if self._handing_back is None or self._handing_back.done():
            self._handing_back = asyncio.create_task(leaving.hand_back(self._engine, self._give_up_jobs), name="back")
        await asyncio.shield(self._handing_back)

    def _is_drained(self, fleet: worker_pb2.FleetRecord | None) -> bool:
        return fleet is not None and self._worker in fleet.drained

    def _give_up_jobs(self, error: JobError) -> int:
        """End every job here with this error, which is not the engine's; how many there were."""
        count = 0
        for stream in self._streams.values():
            for number in list(stream.jobs):
                self._cancel(stream, number)
                self._send_error(stream, number, error)
                self._tell_others(stream.number, self._running.ended(stream.number, number))
            count += len(stream.jobs)
            stream.jobs.clear()
        self._note_ended_jobs()
        return count

    def close(self, status: Status) -> None:
        """End every stream after what is in its outbox, and refuse new ones. The first status stays."""
        self._closed = self._closed or status
        for stream in self._streams.values():
            stream.end(self._closed)

    # Joining.

    def _open(self, router: str, protocol: int) -> RouterStream:
        # Asked anew each time: the shared tier's server may have come, or restarted.
        hello = hello_to_wire(
            self._info(),
            worker=self._worker,
            incarnation=self._incarnation,
            protocol_version=protocol,
            kv_events_off=self._kv_events_off,
            role=self._role,
        )
        now = self._clock()
        hello.recent_work_ms, hello.up_ms = self._running.recent_work_ms(now), self._running.up_ms(now)
        outbox = Outbox(hello, self._limits)
        if self._fleet is not None:
            outbox.set_fleet(self._fleet)
        stream = RouterStream(next(self._numbers), router, outbox, self._clock)
        outbox.others.again(self._running.of_others(stream.number))
        self._streams[stream.number] = stream
        self._recount_routers()
        return stream

    def _recount_routers(self) -> None:
        """A router came or went: all learn how many there are, with the load that they know."""
        if self._load is None:
            return
        load = worker_pb2.Load()
        load.CopyFrom(self._load)
        load.routers = len(set(self.routers))
        self._load = load
        for stream in self._streams.values():
            stream.outbox.set_load(load, self._load_at)

    # What routers say.

    def _handle(self, stream: RouterStream, request: worker_pb2.ConnectRequest) -> None:
        match request.WhichOneof("kind"):
            case "submit":
                self._submit(stream, request.submit)
            case "cancel":
                self._cancel(stream, request.cancel.job_id)
            case "clear" | "cache" | "probe" | "peers_released" | "promise_broken":
                self._cache.handle(stream, request)
            case "fleet":
                self._offer_fleet(stream, request.fleet)
            case "hand_over":
                task = asyncio.create_task(self._hand_over(request.hand_over.after_ms / 1000.0), name="handover")
                self._handovers.add(task)
                task.add_done_callback(self._handovers.discard)
            case "resync":
                stream.outbox.resync()
                stream.outbox.others.again(self._running.of_others(stream.number))
                stream.wake()
            case "hello":
                raise ProtocolViolation("a second RouterHello came on this stream; send it once, first")
            case None:
                logger.warning("message of an unknown kind was ignored", extra={"router": stream.router})

    def _submit(self, stream: RouterStream, message: worker_pb2.Job) -> None:
        if message.job_id in stream.jobs:
            raise ProtocolViolation(f"job {message.job_id} runs already; number the jobs of a stream differently")
        try:
            if self._draining:
                raise JobRefused(Refusal.WORKER_DRAINING, "the worker is about to stop; send the job to another")
            job = job_from_wire(message, job_id=(stream.number, message.job_id), info=self._info(), now=self._clock())
        except JobRefused as refused:
            logger.warning("job was refused: %s", refused, extra={"request_id": message.request_id})
            self._send_error(stream, message.job_id, refused.error)
            return
        stream.jobs.add(message.job_id)
        self._quiet.clear()
        self._tell_others(stream.number, self._running.came(stream.number, message, self._clock()))
        self._engine.submit(job)

    def _cancel(self, stream: RouterStream, number: int) -> None:
        if number in stream.jobs:
            self._engine.post(partial(_cancel_job, job_id=(stream.number, number)))

    def _cancel_all(self, stream: RouterStream) -> None:
        for number in stream.jobs:
            self._cancel(stream, number)
            self._tell_others(stream.number, self._running.ended(stream.number, number))
        stream.jobs.clear()
        self._note_ended_jobs()

    def _offer_fleet(self, stream: RouterStream, record: worker_pb2.FleetRecord) -> None:
        """Keep the greatest record and all clears, and tell those that do not have them."""
        before = self._fleet
        self._fleet = record if before is None else joined(before, record)
        if self._is_drained(before) and not self._is_drained(self._fleet):
            for handover in self._handovers:
                handover.cancel()
        behind = [stream] if is_news(self._fleet, record) else []
        if before is None or is_news(self._fleet, before):
            reads = self._fleet.shared_tier_reads
            self._engine.post(lambda engine: engine.cache.set_shared_reads(enabled=reads))
            behind += [other for other in self._streams.values() if other is not stream]
        for each in behind:
            each.outbox.set_fleet(self._fleet)
            each.wake()

    # What the engine says.

    def _deliver_step(self, item: Stepped) -> None:
        outputs = self._outputs_by_stream(item.report.outputs)
        told = [] if self._kv_events_off else item.report.events
        wire = [event_to_wire(event) for event in told]
        events = WireEvents(wire, sum(event.ByteSize() for event in wire), self._clock())
        for taken in item.taken_in:
            self._note_taken_in(taken)
        if item.load is not None:
            self._load = load_to_wire(item.load)
            self._load.routers = len(set(self.routers))
            self._load.last_other_number = self._last_taken_in
            self._load_at = self._clock()
        for stream in self._streams.values():
            own = outputs.get(stream.number, [])
            stream.outbox.add_outputs(own)
            stream.outbox.add_events(events)
            if item.load is not None and self._load is not None:
                stream.outbox.set_load(self._load, self._load_at)
            if own or wire or item.load is not None:
                stream.wake()

    def _note_taken_in(self, job_id: object) -> None:
        match job_id:
            case (int(asker), int(number)) if asker in self._streams:
                self._streams[asker].outbox.last_job_id = number
                self._last_taken_in = max(self._last_taken_in, self._running.number(asker, number))

    def _outputs_by_stream(self, outputs: list[Output]) -> dict[int, list[worker_pb2.SequenceOutput]]:
        grouped: dict[int, list[worker_pb2.SequenceOutput]] = defaultdict(list)
        for output in outputs:
            match output.job_id:
                case (int(asker), int(number)) if asker in self._streams and number in self._streams[asker].jobs:
                    grouped[asker].append(output_to_wire(output, number))
                    if output.finish is not None:
                        self._streams[asker].jobs.discard(number)
                        self._tell_others(asker, self._running.ended(asker, number))
                    elif output.token_ids:
                        self._tell_others(asker, self._running.has_token(asker, number))
                case _:
                    continue  # its router left
        self._note_ended_jobs()
        return grouped

    def _fail(self, error: BaseException) -> None:
        message = f"the worker's engine failed ({type(error).__name__}: {error}); send the job to another worker"
        for stream in self._streams.values():
            for number in stream.jobs:
                self._send_error(stream, number, JobError(Refusal.ENGINE_FAILED.value, message))
            stream.jobs.clear()
        self._note_ended_jobs()
        self.close(Status(grpc.StatusCode.UNAVAILABLE, message))

    def _tell_others(self, owner: int, news: worker_pb2.OtherJob | None) -> None:
        for stream in self._streams.values():
            if news is not None and stream.number != owner:
                stream.outbox.others.add(news)
                stream.wake()

    def _send_error(self, stream: RouterStream, number: int, error: JobError) -> None:
        output = Output((stream.number, number), finish=FinishReason.ERROR, error=error)
        stream.outbox.add_outputs([output_to_wire(output, number)])
        stream.wake()

    def _note_ended_jobs(self) -> None:
        if not any(stream.jobs for stream in self._streams.values()):
            self._quiet.set()

    def _of(self, asker: object) -> RouterStream | None:
        return self._streams.get(asker) if isinstance(asker, int) else None


def _cancel_job(engine: Engine, *, job_id: tuple[int, int]) -> None:
    engine.cancel(job_id)
