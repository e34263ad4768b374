"""Replays a workload against routers and engines on a virtual clock: what a policy would have done, in seconds.

Covers: arrivals, placing, closed loops, failures of workers, what became of every request. Does not cover: decisions
(`simulated_router`), timing (`serial_engine`), figures (`outcome`). Same arguments, same result, bit by bit.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from kvstore.fading_sum import FadingSum
from replay.batched_engine import BatchedEngine, Delivered
from replay.batched_profile import BatchedProfile
from replay.engine import CacheChange, Engine, Reuse, Told
from replay.outcome import Fate, Outcome
from replay.pairs import Pairs
from replay.serial_engine import SerialEngine, SerialProfile
from replay.simulated_router import Given, RouterSettings, SimulatedRouter, events_of, given_by
from replay.tiers import NO_TIERS, SharedTier, TierProfile, Tiers
from replay.timeline import Action, Timeline
from replay.workload import Workload
from router.decide import Choice
from workers.roles import parse_roles


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker dies at a time, holding nothing when it is back.

    Attributes:
        worker: its number, from 0. at_s: when. down_s: until it takes requests again.
    """

    worker: int
    at_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class RouterRestart:
    """A router dies at a time; the new one knows what the workers' snapshots tell.

    Its requests are called off at the workers. Clients ask again where no token had come, and lose their answer else.

    Attributes:
        router: its number, from 0. at_s: when. down_s: until it takes requests again; meanwhile others do, if any.
    """

    router: int
    at_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated.

    Attributes:
        profile: of each worker's engine. tiers: below its pool; only a `BatchedProfile` has such.
        routers: each request goes to a random one; every one hears all workers, and by them of the others' requests.
        seed: of that choice and of ties. roles: who prefills for whom, see `workers.roles`; empty: nobody.
    """

    workers: int
    router: RouterSettings
    profile: SerialProfile | BatchedProfile = field(default_factory=SerialProfile)
    tiers: Tiers = NO_TIERS
    routers: int = 1
    failures: Sequence[Failure] = ()
    restarts: Sequence[RouterRestart] = ()
    seed: int = 1
    roles: str = ""


def simulate(work: Workload, setup: Setup) -> Outcome:
    """Replay the workload.

    Raises:
        ValueError: there are no workers or no routers, or a failure names a worker that there is not, or a router is to
        restart while it is down.
        InvalidRequest: the policy or a weight is unknown.
    """
    if setup.workers < 1 or setup.routers < 1:
        raise ValueError(f"{setup.workers} workers and {setup.routers} routers; give at least one of each")
    if any(not 0 <= failure.worker < setup.workers for failure in setup.failures):
        raise ValueError(f"a failure of a worker that there is not; number them from 0 to {setup.workers - 1}")
    if any(not 0 <= restart.router < setup.routers for restart in setup.restarts):
        raise ValueError(f"a restart of a router that there is not; number them from 0 to {setup.routers - 1}")
    if any(_overlap(one, other) for one, other in combinations(setup.restarts, 2)):
        raise ValueError("a router that is down cannot restart; let its restarts begin after the one before has ended")
    if isinstance(setup.profile, SerialProfile) and setup.tiers != NO_TIERS:
        raise ValueError("the serial engine has no tiers below its pool; give a BatchedProfile, or no tiers")
    if setup.roles and setup.tiers.peer is None:
        raise ValueError("with roles blocks travel between workers; give the time of that, as tiers.peer")
    parse_roles(setup.roles)
    return Simulation(work, setup).run()


def _overlap(one: RouterRestart, other: RouterRestart) -> bool:
    is_same = one.router == other.router
    return is_same and one.at_s <= other.at_s + other.down_s and other.at_s <= one.at_s + one.down_s


class Simulation:
    """One replay; `simulate` checks its arguments and makes it."""

    def __init__(self, work: Workload, setup: Setup) -> None:
        self._work = work
        self._setup = setup
        self._timeline = Timeline()
        self._rng = random.Random(setup.seed)
        width = len(str(setup.workers - 1))
        self._names = [f"worker-{n:0{width}}" for n in range(setup.workers)]
        redis = setup.tiers.redis
        self._shared = None if redis is None else SharedTier(redis, work, ttl_s=setup.tiers.ttl_s)
        self._engines = {name: self._engine(name) for name in self._names}
        self._pairs = Pairs(
            self._engines,
            work,
            self._timeline,
            setup.tiers.peer or TierProfile(0, 0.0, 0.0),
            arrived=self._prompt_arrived,
            left=self._prefill_left,
        )
        self._routers: list[SimulatedRouter] = [self._router() for _ in range(setup.routers)]
        self._up = list(self._routers)  # those that take requests
        self._router_of: dict[int, SimulatedRouter] = {}
        self._down: set[str] = set()
        self._flights: dict[int, Given] = {}  # requests on workers
        self._given = {name: FadingSum() for name in self._names}
        self._began = dict.fromkeys(self._names, self._timeline.now)  # the present life of each worker
        self._fates = [
            Fate(arrived_s=at, output=request.output_length)
            for at, request in zip(work.arrivals_s, work.requests, strict=True)
        ]
        self._parked: list[int] = []  # requests that came while no worker was up
        self._unasked: list[int] = []  # requests that came while no router was up
        self._next_turns: dict[int, list[int]] = {}
        for number, before in work.waits_for.items():
            self._next_turns.setdefault(before, []).append(number)

    def run(self) -> Outcome:
        """From the first arrival until the last answer has ended."""
        for number, at in enumerate(self._work.arrivals_s):
            if number not in self._work.waits_for:
                self._timeline.at(at, self._arrival(number))
        for failure in self._setup.failures:
            self._schedule(failure)
        for restart in self._setup.restarts:
            self._timeline.at(restart.at_s, self._restart(restart))
        self._timeline.run()
        busy = {name: engine.busy_s for name, engine in self._engines.items()}
        gaps: Counter[int] = Counter()
        for engine in self._engines.values():
            gaps.update(engine.gaps if isinstance(engine, BatchedEngine) else {})
        return Outcome(self._fates, busy, self._timeline.now, gaps)

    def check(self) -> None:
        """Raises InvariantError when a router's books are wrong after the end. O(everything)."""
        for router in self._routers:
            router.check()

    # Requests

    def _arrival(self, number: int) -> Action:
        return lambda: self._arrive(number)

    def _arrive(self, number: int) -> None:
        self._fates[number].arrived_s = self._timeline.now
        self._ask(number)

    def _ask(self, number: int) -> None:
        """A client asks a router, or tries until there is one."""
        routers = self._up
        if not routers:
            self._unasked.append(number)
            return
        self._router_of[number] = routers[0] if len(routers) == 1 else self._rng.choice(routers)
        self._place(number)

    def _place(self, number: int) -> None:
        for engine in self._engines.values():
            engine.catch_up()
        choice = self._choose(number)
        if choice is None:
            self._parked.append(number)
            return
        fate = self._fates[number]
        fate.worker, fate.attempts = choice.worker, fate.attempts + 1
        fate.predicted_ttft_s = choice.predicted_ttft_ms / 1e3
        fate.predicted_tokens = choice.price.cached_tokens
        self._tell_others(number, given_by(choice, self._work.block_size))
        if choice.pair is None:
            self._engines[choice.worker].submit(number)
            return
        held = choice.pair.maker.candidate.price.cached_tokens // self._work.block_size
        given = Given(choice.pair.worker, choice.pair.work_ms, min(held, choice.pair.blocks))
        self._given[given.worker].add(given.work_ms, self._timeline.now)
        for router in self._routers:
            router.prefills(number, given, is_own=router is self._router_of[number])
        self._pairs.begin(number, choice.pair, choice.worker)

    def _prompt_arrived(self, number: int, worker: str, delivered: Delivered | None) -> None:
        """The worker that answers may begin, with what was made for it or without."""
        if delivered is not None and isinstance(engine := self._engines[worker], BatchedEngine):
            engine.submit(number, delivered)
        else:
            self._engines[worker].submit(number)

    def _prefill_left(self, number: int) -> None:
        for router in self._routers:
            router.prefilled(number)

    def _choose(self, number: int) -> Choice | None:
        return self._router_of[number].choose(number)

    def _tell_others(self, number: int, given: Given) -> None:
        """A worker was sent a request, and tells the other routers."""
        self._flights[number] = given
        self._given[given.worker].add(given.work_ms, self._timeline.now)
        for other in self._routers:
            if other is not self._router_of[number]:
                other.heard_of(number, given)

    def _first_token(self, number: int, reuse: Reuse) -> None:
        fate = self._fates[number]
        fate.cached, fate.computed, fate.first_token_s, fate.tiers = reuse
        for router in self._routers:
            router.first_token(number)

    def _ended(self, number: int) -> None:
        del self._flights[number]
        for router in self._routers:
            router.ended(number)
        self._go_on(number)

    def _go_on(self, number: int) -> None:
        """The client has its answer, or what there is of it."""
        now = self._fates[number].ended_s = self._timeline.now
        for later in self._next_turns.pop(number, ()):
            think_s = self._work.requests[later].think_s or 0.0
            self._timeline.at(now + think_s / self._work.speed, self._arrival(later))

    def _refused(self, number: int) -> None:
        """No worker of the fleet could ever serve it."""
        del self._flights[number]
        self._fates[number].failed = True
        self._cut_off(number)
        self._go_on(number)

    def _cut_off(self, number: int) -> None:
        for router in self._routers:
            router.cut_off(number)

    def _router(self, kind: type[SimulatedRouter] = SimulatedRouter) -> SimulatedRouter:
        setup = self._setup
        shared_id = "" if self._shared is None else "redis"
        return kind(
            setup.router,
            self._work,
            self._engines,
            self._timeline,
            seed=setup.seed,
            shared_id=shared_id,
            roles=setup.roles,
        )

    def _engine(self, name: str) -> Engine:
        setup, work, timeline, told = self._setup, self._work, self._timeline, self._told_by(name)
        delay_s = setup.router.report_delay_s
        if isinstance(setup.profile, SerialProfile):
            return SerialEngine(setup.profile, work, timeline, told, remember_s=delay_s)
        return BatchedEngine(setup.profile, setup.tiers, work, timeline, told, shared=self._shared, remember_s=delay_s)

    def _told_by(self, worker: str) -> Told:
        def cache_changed(changes: Sequence[CacheChange]) -> None:
            events = [event for change in changes for event in events_of(change)]
            for router in self._routers:
                router.cache_changed(worker, changes, events)

        return Told(self._first_token, self._ended, cache_changed, self._refused, self._pairs_made)

    def _pairs_made(self, number: int, found: int, started: float) -> None:
        self._pairs.made(number, found, started)

    # Failures

    def _schedule(self, failure: Failure) -> None:
        worker = self._names[failure.worker]
        self._timeline.at(failure.at_s, lambda: self._fail(worker))
        self._timeline.at(failure.at_s + failure.down_s, lambda: self._recover(worker))

    def _fail(self, worker: str) -> None:
        """Requests without a token go elsewhere, as the router sends them; those with one have failed."""
        self._down.add(worker)
        unstarted, cut_off = self._engines[worker].fail()
        for router in self._routers:
            router.lost(worker)
        unstarted = [*unstarted, *self._pairs.lost(worker)]
        self._given[worker] = FadingSum()
        for number in (*unstarted, *cut_off):
            del self._flights[number]
            self._cut_off(number)
        for number in cut_off:
            self._fates[number].failed = True
            self._go_on(number)
        for number in unstarted:
            self._place(number)

    def _restart(self, restart: RouterRestart) -> Action:
        def die() -> None:
            dead = self._routers[restart.router]
            self._up.remove(dead)
            dead.die()
            self._timeline.at(self._timeline.now + restart.down_s, lambda: self._start_router(restart.router))
            for number in [n for n, router in self._router_of.items() if router is dead and n in self._flights]:
                self._call_off(number)
            orphans = [number for number in self._parked if self._router_of[number] is dead]
            self._parked = [number for number in self._parked if self._router_of[number] is not dead]
            for number in orphans:
                self._ask(number)

        return die

    def _call_off(self, number: int) -> None:
        self._pairs.cancel(number)
        self._engines[self._flights.pop(number).worker].cancel(number)
        self._cut_off(number)
        if self._fates[number].first_token_s is None:
            self._ask(number)
        else:
            self._fates[number].failed = True
            self._go_on(number)

    def _start_router(self, number: int) -> None:
        fresh = self._router()
        self._tell_all(fresh)
        for worker in sorted(self._down):
            fresh.lost(worker)
        self._routers[number] = fresh
        self._up.append(fresh)
        unasked, self._unasked = self._unasked, []
        for waiting in unasked:
            self._ask(waiting)

    def _tell_all(self, router: SimulatedRouter) -> None:
        """The workers' hellos: what a router that starts cannot know else."""
        now = self._timeline.now
        for worker, work in self._given.items():
            router.met(worker, work.value(now), now - self._began[worker])
        for number, given in self._flights.items():
            router.heard_of(number, given, is_met=True)
            if self._fates[number].first_token_s is not None:
                router.first_token(number)

    def _recover(self, worker: str) -> None:
        self._down.discard(worker)
        self._began[worker] = self._timeline.now
        for router in self._routers:
            router.back(worker)
        parked, self._parked = self._parked, []
        for number in parked:
            self._place(number)
