"""One router on a virtual clock: the real decider, index and traffic memory, over engines that are only simulated.

Covers: what a router knows of its workers and when it learns it. Does not cover: how it decides (`router.decide`), how
long anything takes (`serial_engine`). Only the streams are replaced: what a worker says arrives `delay_s` later, in
order, its events and its load alike, and what it says of the requests of other routers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, cast

from kvstore.errors import InvariantError
from kvstore.events import BlockRemoved, BlockStored, KvEvent, RemovalCause
from replay.engine import CacheChange, Engine
from replay.run_index import RunIndex, RunTraffic
from replay.timeline import Timeline
from replay.workload import Workload, segment_key
from router.cost import WorkerLoad
from router.decide import Choice, Decider, Question
from router.fleet import Fleet
from router.fleet_record import FleetRecord
from router.pairing import DECODE, NO_ROLE, PREFILL
from router.policy import checked_weights, find_policy
from router.traffic import Known
from warmkv.v1 import worker_pb2
from workers.roles import Role, role_of

_ROLES = {Role.PREFILL: PREFILL, Role.DECODE: DECODE, Role.BOTH: worker_pb2.WORKER_ROLE_BOTH}


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """How a router is set.

    Attributes:
        policy, weights: as `warmkv policy set` takes them. delay_s: from a worker's word to the router.
        load_delay_s: the same of its load, where that differs. tells_sessions: requests carry their session as the
        affinity key.
    """

    policy: str
    weights: Mapping[str, float] = field(default_factory=dict)
    delay_s: float = 0.0
    tells_sessions: bool = False
    load_delay_s: float | None = None

    @property
    def report_delay_s(self) -> float:
        """From a worker's report of its load to the router."""
        return self.delay_s if self.load_delay_s is None else self.load_delay_s


class Given(NamedTuple):
    """A request that a router sent to a worker: what the other routers are told of it.

    Attributes:
        work_ms: predicted, to load and to compute. cached_blocks: that the router counted on.
    """

    worker: str
    work_ms: float
    cached_blocks: int


@dataclass(frozen=True, slots=True)
class _Report:
    load: WorkerLoad
    at: float
    known: Known


class _Hello(NamedTuple):
    peer_address: str


class _Link:
    """What the decider reads of a `router.link.WorkerLink`."""

    owes_clear = False  # nobody clears anything

    def __init__(self, name: str, engine: Engine, timeline: Timeline, delay_s: float, role: int) -> None:
        self.name = name
        self.role = role
        # Blocks are served only to those for whom they are made, and only where there are roles.
        self.hello = None if role == NO_ROLE else _Hello(name)
        self.incarnation = 1
        self.connected = True
        self.joined_at = timeline.now
        self._engine = engine
        self._timeline = timeline
        self._delay_s = delay_s
        self.report: _Report | None = None

    def listen(self) -> None:
        """Take in the latest report that has arrived; `report` until the next call."""
        sent = self._engine.report_time(self._timeline.now - self._delay_s)
        if self.report is None or self.report.at != sent:
            known_until = self._engine.known_until(sent)
            self.report = _Report(self._engine.reported(sent), sent, Known(known_until, known_until))

    def start_again(self) -> None:
        """A new life of the worker: what the old one reported is void."""
        self.incarnation += 1
        self.connected = True
        self.joined_at = self._timeline.now
        self.report = None


class _Fleet:
    """What the decider reads of a `router.fleet.Fleet`."""

    def __init__(self, record: FleetRecord, links: Mapping[str, _Link]) -> None:
        self.record = record
        self._links = links

    def links(self) -> list[_Link]:
        return list(self._links.values())

    def is_alive(self, link: _Link) -> bool:
        return False  # asked of those that others could read from: here nobody does, but of whom makes blocks for him

    def takes_requests(self, link: _Link) -> bool:
        return link.connected


class SimulatedRouter:
    """Decides for the requests of a workload. `seed` breaks the ties that a policy leaves to a prompt's digest."""

    def __init__(
        self,
        settings: RouterSettings,
        work: Workload,
        engines: Mapping[str, Engine],
        timeline: Timeline,
        *,
        seed: int = 0,
        shared_id: str = "",
        roles: str = "",
    ) -> None:
        """`shared_id`: a name of the shared tier, if there is one. `roles`: see `workers.roles`; empty: there are none.

        Raises InvalidRequest when the settings name an unknown policy or weight.
        """
        checked_weights(find_policy(settings.policy), settings.weights)
        self._settings = settings
        self._work = work
        self._engines = engines
        self._timeline = timeline
        self._seed = seed
        self._shared_id = shared_id
        self._keys: dict[int, int] = {}  # of each request's present attempt, in the memory of traffic
        self._prefills: dict[int, int] = {}  # the same, of the worker that prefills for another one
        self._next_key = count()
        self._index = RunIndex(timeline.clock)
        self._traffic = RunTraffic(timeline.clock)
        delay_s = settings.report_delay_s
        parts = {name: _ROLES[role_of(name, roles)] if roles else NO_ROLE for name in engines}
        self._links = {name: _Link(name, engines[name], timeline, delay_s, parts[name]) for name in sorted(engines)}
        for link in self._links.values():
            self._greet(link)
        record = FleetRecord(0, "replay", settings.policy, dict(settings.weights))
        # The decider asks a fleet for nothing but links, their reports and the record; here they need no sockets.
        fleet = cast("Fleet", _Fleet(record, self._links))
        self._decider = Decider(fleet, self._index, self._traffic, timeline.clock)

    def would_choose(self, number: int) -> Choice | None:
        """Where a request should go; None: no worker is known to be up. Changes nothing."""
        for link in self._links.values():
            link.listen()
        return self._decider.decide(self._question(number))

    def choose(self, number: int) -> Choice | None:
        """The same, and the decision counts as taken."""
        choice = self.would_choose(number)
        if choice is not None:
            self._decider.taken()
            self.took(number, given_by(choice, self._work.block_size))
        return choice

    def took(self, number: int, given: Given) -> None:
        """A request was sent to a worker."""
        self._keys[number] = key = next(self._next_key)
        self._count(key, number, given)

    def heard_of(self, number: int, given: Given, *, is_met: bool = False) -> None:
        """A worker tells of a request that another router sent to it; `is_met`: its hello has told the work."""
        self._keys[number] = key = next(self._next_key)
        sent_at = self._timeline.now

        def hear() -> None:
            if self._keys.get(number) == key:  # else it has ended, or was sent elsewhere
                self._count(key, number, given, place=sent_at, is_met=is_met)

        self._timeline.after(self._settings.delay_s, hear)

    def met(self, worker: str, recent_work_ms: float, up_s: float) -> None:
        """A worker's hello, which tells the work that it was given lately, and for how long it has been there."""
        self._links[worker].joined_at = self._timeline.now - up_s
        self._traffic.met(worker, recent_work_ms, up_ms=up_s * 1000.0)

    def prefills(self, number: int, given: Given, *, is_own: bool) -> None:
        """A worker was sent the prompt of a request that another one answers; `is_own`: by this router."""
        self._prefills[number] = key = next(self._next_key)
        sent_at = self._timeline.now

        def hear() -> None:
            if self._prefills.get(number) == key:
                self._count(key, number, given, place=None if is_own else sent_at)

        if is_own:
            hear()
        else:
            self._timeline.after(self._settings.delay_s, hear)

    def prefilled(self, number: int) -> None:
        """That worker is done with it, or gone."""
        if (key := self._prefills.pop(number, None)) is not None:
            self._timeline.after(self._settings.delay_s, lambda: self._traffic.ended(key))

    def first_token(self, number: int) -> None:
        """A worker sent the first token, to this router or to another one."""
        if (key := self._keys.get(number)) is not None:
            self._timeline.after(self._settings.delay_s, lambda: self._traffic.first_token(key))

    def ended(self, number: int) -> None:
        """A worker sent the last token, to this router or to another one."""
        if (key := self._keys.pop(number, None)) is not None:
            self._timeline.after(self._settings.delay_s, lambda: self._traffic.ended(key))

    def cut_off(self, number: int) -> None:
        """The worker of a request was lost, which needs no word from it."""
        if (key := self._keys.pop(number, None)) is not None:
            self._traffic.ended(key)

    def cache_changed(self, worker: str, changes: Sequence[CacheChange], events: list[KvEvent]) -> None:
        """The events of one step of a worker; `events` as `events_of` made them of the changes."""
        link = self._links[worker]
        incarnation = link.incarnation

        def apply() -> None:
            if self._index.apply(worker, incarnation, events):
                for change in changes:
                    if change.partial:
                        self._index.set_partial(worker, change.tier, change.partial)

        self._timeline.after(self._settings.delay_s, apply)

    def lost(self, worker: str) -> None:
        """The stream to a worker broke; its requests are settled by `cut_off`."""
        self._links[worker].connected = False
        self._index.drop(worker)
        self._index.sweep(len(self._index))
        self._traffic.forget(worker)

    def back(self, worker: str) -> None:
        """The worker was started again and holds nothing."""
        link = self._links[worker]
        link.start_again()
        self._greet(link)

    def die(self) -> None:
        """The process ended: words that are on their way reach nobody."""
        self._keys.clear()
        self._prefills.clear()

    def check(self) -> None:
        """Raises InvariantError when the books are wrong, or something is left of requests that have ended."""
        self._index.check()
        traffic, links = self._traffic, self._links
        if any(traffic.sharers(c) or any(traffic.arriving_run(w, c) for w in links) for c in self._work.chains):
            raise InvariantError("a request that ended is still counted as being on its way; please report this")

    def _count(self, key: int, number: int, given: Given, *, place: float | None = None, is_met: bool = False) -> None:
        self._traffic.sent(
            key,
            given.worker,
            self._work.chains[number],
            work_ms=given.work_ms,
            cached_blocks=given.cached_blocks,
            place=place,
            is_met=is_met,
        )

    def _greet(self, link: _Link) -> None:
        """Hello and snapshot of a worker."""
        name, incarnation, index = link.name, link.incarnation, self._index
        index.join(name, incarnation, shared_id=self._shared_id)
        index.begin_snapshot(name, incarnation)
        for change in self._engines[name].holding():
            stored = [event for event in events_of(change) if isinstance(event, BlockStored)]
            index.snapshot(name, incarnation, stored)
            index.set_partial(name, change.tier, change.partial)
        index.end_snapshot(name, incarnation)

    def _question(self, number: int) -> Question:
        request = self._work.requests[number]
        digest = hashlib.blake2b(f"{self._seed}/{number}".encode(), digest_size=16).digest()
        affinity = (request.session or "") if self._settings.tells_sessions else ""
        return Question(self._work.chains[number], request.input_length, self._work.block_size, digest, affinity)


def given_by(choice: Choice, block_size: int) -> Given:
    """What a choice gives to its worker."""
    return Given(choice.worker, choice.own_work_ms, choice.own_cached_blocks(block_size))


def events_of(change: CacheChange) -> list[KvEvent]:
    """What a worker would say of it."""
    events: list[KvEvent] = []
    if change.stored:
        events.append(BlockStored(change.tier, _keys(change.stored)))
    if change.removed:
        events.append(BlockRemoved(change.tier, _keys(change.removed), RemovalCause.EVICTED))
    return events


def _keys(segments: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(segment_key(segment) for segment in segments)
