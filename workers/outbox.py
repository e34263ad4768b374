"""What a worker still has to tell one router, and in which order. Pure: the time is an argument.

The engine never waits for a router, so messages gather here while a router reads slowly. What gathers is bounded:

- tokens: outputs of one job merge, so a slow router costs at most the answers of its own jobs;
- K/V events: up to `max_event_bytes`; beyond that they are forgotten and a new snapshot is wanted (resync);
- load: only the newest;
- jobs of other routers: how each stands (`other_jobs`).

A router that keeps up gets one Step for each engine step. One that does not gets several steps merged into one, which
says the same: outputs and events keep their order.

Events follow the snapshot's life: UNSYNCED (forget events: the snapshot to come includes them) -> ASKED (the same; the
engine was asked) -> SENDING (hold events back until the last piece went out) -> LIVE (send them). An overflow or a
Resync leads back to UNSYNCED. A snapshot costs the engine time, so it is wanted at most once in
`snapshot_interval_s`, and should be asked for only when the router is ready to read: a sick router must not slow the
others. How far a router is behind, from the oldest event that it was not sent to the end of the snapshot that makes it
good, goes out with the load. An answer to a probe counts only where all events before it were sent: else it is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from kvstore.events import BlockStored
from warmkv.v1 import kv_events_pb2, worker_pb2
from workers.other_jobs import News
from workers.wire import SNAPSHOT_PIECE_BYTES, snapshot_pieces


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """Bounds of what gathers, and the rhythm of load.

    Attributes:
        max_event_bytes: serialised K/V events that wait; more means a resync. One step's events go out in one message,
        so this bounds a message too: it stays below the 4 MiB that gRPC receives by default.
        message_bytes: of several steps' events in one message. output_weight, message_weight: of one merged output and
        of all outputs in a message; a token weighs 1, its log-probabilities 16 (about 12 bytes each).
        snapshot_bytes: of one piece of a snapshot. snapshot_interval_s: shortest time between two that are asked for.
        load_interval_s: shortest time between two loads. heartbeat_s: longest.
    """

    max_event_bytes: int = 2 << 20
    message_bytes: int = 1 << 20
    output_weight: int = 4096
    message_weight: int = 65_536
    snapshot_bytes: int = SNAPSHOT_PIECE_BYTES
    snapshot_interval_s: float = 1.0
    load_interval_s: float = 0.020
    heartbeat_s: float = 0.450  # the rule is 0.5; timers are late, never early


@dataclass(frozen=True, slots=True)
class WireEvents:
    """A step's K/V events, translated once for all routers; `nbytes` is their serialised size, `at` when they came."""

    events: Sequence[kv_events_pb2.KvEvent]
    nbytes: int
    at: float = 0.0


class _Sync(Enum):
    UNSYNCED = auto()
    ASKED = auto()
    SENDING = auto()
    LIVE = auto()


class Outbox:
    """See the module. Owned by one thread.

    Attributes:
        others: what the router has yet to hear of jobs of others. last_job_id: of this router's jobs the last one that
            the engine had taken in when the load was made.
    """

    def __init__(self, hello: worker_pb2.WorkerHello, limits: OutboxLimits | None = None) -> None:
        self.overflows = 0
        self.others = News()
        self.last_job_id = 0
        self._limits = limits or OutboxLimits()
        self._seq = 0
        self._hello: worker_pb2.WorkerHello | None = hello
        self._fleet: worker_pb2.FleetRecord | None = None
        self._outputs: deque[worker_pb2.SequenceOutput] = deque()
        self._open: dict[int, worker_pb2.SequenceOutput] = {}  # a job's last one of those, while it may grow
        self._events: deque[WireEvents] = deque()
        self._event_bytes = 0
        self._probed: deque[tuple[int, worker_pb2.Probed]] = deque()  # and how many batches of events come before it
        self._batches_added = self._batches_sent = 0
        self._behind_since: float | None = None  # when the oldest event came that a forgetting router must hear again
        self._answers: deque[worker_pb2.ConnectResponse] = deque()
        self._sync = _Sync.UNSYNCED
        self._pieces: Iterator[worker_pb2.Snapshot] = iter(())
        self._piece_is_next = False
        self._asked_at = float("-inf")
        self._load: worker_pb2.Load | None = None
        self._load_at = 0.0
        self._load_is_new = False  # not sent yet
        self._load_is_due = False  # worth a message of its own
        self._load_sent_at = float("-inf")

    # What the engine and other routers bring.

    def add_outputs(self, outputs: Sequence[worker_pb2.SequenceOutput]) -> None:
        """New tokens of this router's jobs. Takes the messages over."""
        for output in outputs:
            waiting = self._open.get(output.job_id)
            if waiting is not None and _weight(waiting) < self._limits.output_weight:
                _merge(waiting, output)
            else:
                self._outputs.append(output)
                self._open[output.job_id] = output

    def add_events(self, events: WireEvents) -> None:
        """A step's K/V events; forgotten where a snapshot to come includes them."""
        if self._sync in (_Sync.UNSYNCED, _Sync.ASKED) or not events.events:
            return
        self._events.append(events)
        self._batches_added += 1
        self._event_bytes += events.nbytes
        if self._event_bytes > self._limits.max_event_bytes:
            self.overflows += 1
            self._behind_since = self._events[0].at if self._behind_since is None else self._behind_since
            self.resync()

    def add_answer(self, answer: worker_pb2.ClearDone | worker_pb2.CacheDone) -> None:
        """Goes out behind the events that came before it."""
        if isinstance(answer, worker_pb2.ClearDone):
            self._answers.append(worker_pb2.ConnectResponse(clear_done=answer))
        else:
            self._answers.append(worker_pb2.ConnectResponse(cache_done=answer))

    def add_probed(self, probed: worker_pb2.Probed) -> None:
        """Goes out between the events that came before it and those that come after, if the former do.

        A router that gets no answer asks again.
        """
        if self._sync not in (_Sync.UNSYNCED, _Sync.ASKED):
            self._probed.append((self._batches_added, probed))

    def set_fleet(self, record: worker_pb2.FleetRecord) -> None:
        """Only the newest is sent."""
        self._fleet = record

    def set_load(self, load: worker_pb2.Load, at: float) -> None:
        """Only the newest is sent. `at`: when it was true."""
        self._load_at = at
        self._load_is_due |= self._load is None or _busy(load) != _busy(self._load)
        self._load_is_new = True
        self._load = load

    # The snapshot's life.

    def wants_snapshot(self, now: float) -> bool:
        """Whether the engine should be asked for one."""
        return self._sync is _Sync.UNSYNCED and self._may_ask_at <= now

    @property
    def _may_ask_at(self) -> float:
        return self._asked_at + self._limits.snapshot_interval_s

    @property
    def synced(self) -> bool:
        """Whether the router has a whole snapshot and everything since."""
        return self._sync is _Sync.LIVE and not self._events

    def snapshot_asked(self, now: float) -> None:
        """The engine was asked."""
        self._asked_at = now
        self._sync = _Sync.ASKED

    def set_snapshot(self, blocks: Sequence[BlockStored]) -> None:
        """The engine's answer; events that come from now on follow it."""
        self._pieces = snapshot_pieces(blocks, piece_bytes=self._limits.snapshot_bytes)
        self._piece_is_next = True
        self._sync = _Sync.SENDING

    def resync(self) -> None:
        """Forget waiting events and want a new snapshot; one that is asked for already will do."""
        if self._sync is not _Sync.ASKED:
            self._sync = _Sync.UNSYNCED
        self._pieces = iter(())
        self._probed.clear()
        self._batches_added = self._batches_sent = 0
        self._events.clear()
        self._event_bytes = 0

    # What goes out.

    def pop(self, now: float) -> worker_pb2.ConnectResponse | None:
        """The next message; None when there is nothing to say yet (`wake_at` tells when there will be)."""
        message = self._next(now)
        if message is not None:
            self._seq += 1
            message.seq = self._seq
        return message

    def wake_at(self) -> float | None:
        """When `pop` or `wants_snapshot` will have something though nothing else happens; None: never."""
        due = [self._may_ask_at] if self._sync is _Sync.UNSYNCED else []
        if (load_at := self._load_due_at()) is not None:
            due.append(load_at)
        return min(due, default=None)

    def _load_due_at(self) -> float | None:
        if self._load is None:
            return None
        pause = self._limits.load_interval_s if self._load_is_due else self._limits.heartbeat_s
        return self._load_sent_at + pause

    def _next(self, now: float) -> worker_pb2.ConnectResponse | None:
        if self._hello is not None:
            hello, self._hello = self._hello, None
            return worker_pb2.ConnectResponse(hello=hello)
        if self._fleet is not None:
            fleet, self._fleet = self._fleet, None
            return worker_pb2.ConnectResponse(fleet=fleet)
        if self._probed and self._batches_sent >= self._probed[0][0]:
            return worker_pb2.ConnectResponse(probed=self._probed.popleft()[1])
        if self._answers and not self._events:
            return self._answers.popleft()
        # Pieces and steps take turns: neither can starve the other.
        if self._sync is _Sync.SENDING and (self._piece_is_next or not self._has_step(now)):
            return worker_pb2.ConnectResponse(snapshot=self._next_piece())
        self._piece_is_next = True
        return worker_pb2.ConnectResponse(step=self._next_step(now)) if self._has_step(now) else None

    def _next_piece(self) -> worker_pb2.Snapshot:
        piece = next(self._pieces)
        self._piece_is_next = False
        if piece.last:
            self._sync = _Sync.LIVE
            self._behind_since = None
        return piece

    def _has_step(self, now: float) -> bool:
        if self._outputs or self.others or (self._events and self._sync is _Sync.LIVE):
            return True
        return self._must_send_load(now)

    def _must_send_load(self, now: float) -> bool:
        load_at = self._load_due_at()
        return load_at is not None and load_at <= now

    def _next_step(self, now: float) -> worker_pb2.Step:
        step = worker_pb2.Step()
        if self._sync is _Sync.LIVE:
            self._move_events(step)
        # Tokens do not overtake the events of their step.
        if self._sync is not _Sync.LIVE or not self._events:
            self._move_outputs(step)
            step.others.extend(self.others.pop(self._limits.message_bytes))
        self._attach_load(step, now)
        return step

    def _move_events(self, step: worker_pb2.Step) -> None:
        moved = 0
        while self._events and (not moved or moved + self._events[0].nbytes <= self._limits.message_bytes):
            if self._probed and self._batches_sent == self._probed[0][0]:
                break  # its answer is true here, and not behind the next ones
            batch = self._events.popleft()
            self._batches_sent += 1
            step.events.extend(batch.events)
            moved += batch.nbytes
        self._event_bytes -= moved

    def _move_outputs(self, step: worker_pb2.Step) -> None:
        weight = 0
        while self._outputs and weight < self._limits.message_weight:
            output = self._outputs.popleft()
            if self._open.get(output.job_id) is output:
                del self._open[output.job_id]
            step.outputs.append(output)
            weight += _weight(output)

    def _attach_load(self, step: worker_pb2.Step, now: float) -> None:
        if self._load is None:
            return
        may_send = self._load_is_new and self._load_sent_at + self._limits.load_interval_s <= now
        if may_send or self._must_send_load(now):
            step.load.CopyFrom(self._load)
            step.load.events_behind_ms = self._behind_ms(now)
            step.load.last_job_id = self.last_job_id
            step.load.age_ms = max(0.0, now - self._load_at) * 1000
            self._load_is_new = self._load_is_due = False
            self._load_sent_at = now

    def _behind_ms(self, now: float) -> float:
        """Milliseconds since the oldest event that the router has not been sent."""
        waiting = self._events[0].at if self._events else None
        since = min((at for at in (self._behind_since, waiting) if at is not None), default=now)
        return max(0.0, now - since) * 1000


def _merge(into: worker_pb2.SequenceOutput, later: worker_pb2.SequenceOutput) -> None:
    text = into.text + later.text
    into.MergeFrom(later)  # appends ids and logprobs; later scalars win where they are set
    into.text = text


def _weight(output: worker_pb2.SequenceOutput) -> int:
    return len(output.token_ids) + 16 * len(output.logprobs)


def _busy(load: worker_pb2.Load) -> tuple[int, int, int, int]:
    return (load.running, load.waiting, load.pending_prefill_tokens, load.decoding)
