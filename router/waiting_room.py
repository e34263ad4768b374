"""Where requests wait when the workers' queues are long enough: sent late, with fresh facts, in fair turns.

Covers: whether a request is sent now, waits or is refused; when those that wait are looked at again. Does not cover:
whose turn it is (`fair_queue`), what it costs (`charges`), how long it takes (`forecast`) or where it goes (`decide`).

A request is sent when the queue of the worker that was chosen for it is predicted to take at most
`max_worker_queue_s`. While nobody waits that is all that happens. Else it waits, and is decided again when its turn
comes: what was cached meanwhile counts, a higher priority can still overtake, and leaving costs the workers nothing.
One pass sends as many as fit; each is on the books before the next is decided, so a pass cannot send a storm. A request
whose own worker is full lets those pass whose worker is not, and is not decided again before that worker is predicted
to have room. Passes follow reports, first tokens and ends, at most every `_PASS_EVERY_S`, and that moment. Owned by the
event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from router.charges import Charge, Charges
from router.config import OverloadConfig
from router.decide import Choice, Decider, Question
from router.errors import Draining, RouterError
from router.fair_queue import FairQueue, Ticket
from router.fleet import Fleet
from router.forecast import Forecast
from router.ledger import Entry
from router.metrics import Metrics
from router.pace import Pace
from router.policies.protocol import Candidate
from router.quotas import TokenQuotas
from router.readiness import Readiness, time_left
from router.refusals import Refusals

_PASS_EVERY_S = 0.01
_LOOK_AGAIN_S = 0.25  # at the latest
_ROOM_AGAIN_S = 0.05  # predictions of room are that wrong at times, and others must not take it
_MOST_DECIDED = 8  # of those that turn out not to fit, in a pass: a decision costs a tenth of a millisecond and more
_MOST_SKIPPED = 64
_JUDGE_EVERY_S = 0.25
_STUCK_AFTER_S = 10.0  # a worker that is so late is not waited for: others are chosen


@dataclass(slots=True, eq=False)
class Guest:
    """A request at the door.

    Attributes:
        max_tokens: of its answer. deadline: on the event loop's clock. arrived: on the router's.
        send: gives it to a worker; called at most once.
        charge: what it was charged, once it was let in. forecast_ms: of its first token, from its arrival; own_ms: of
        that what its worker takes.
        queued_at: on the router's clock, when it waits. waited_ms: how long it waited here. not_before: when its worker
        may have room; waits_for: that worker.
    """

    tenant: str
    priority: int
    question: Question
    max_tokens: int
    deadline: float | None
    arrived: float
    send: Callable[[Choice], None]
    charge: Charge | None = None
    forecast_ms: float = 0.0
    own_ms: float = 0.0
    queued_at: float = 0.0
    waited_ms: float = 0.0
    not_before: float = 0.0
    waits_for: str = ""
    left: asyncio.Future[None] | None = field(default=None, repr=False)


class WaitingRoom:
    """The only way to the workers for a request that was not there yet."""

    def __init__(
        self,
        config: OverloadConfig,
        fleet: Fleet,
        decider: Decider,
        readiness: Readiness,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._decider = decider
        self._readiness = readiness
        self._metrics = metrics
        self._clock = clock
        self._queue: FairQueue[Guest] = FairQueue(config.tenant_weights)
        self._quotas = TokenQuotas(
            config.tokens_per_minute, config.default_tokens_per_minute, clock, routers=fleet.routers
        )
        self._forecast = Forecast(clock)
        self._refusals = Refusals(config, self._queue, self._quotas, self._forecast)
        self._charges = Charges(config, self._queue, self._quotas)
        self._pace = Pace(clock)
        self._timer: asyncio.TimerHandle | None = None
        self._passed_at = self._judged_at = -_LOOK_AGAIN_S
        self._nobody_until: float | None = None
        self._draining = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._queue)

    @property
    def tokens(self) -> int:
        """Of the prompts that wait."""
        return self._queue.tokens

    # The door

    def check_quota(self, tenant: str) -> None:
        """Raises QuotaExceeded when a tenant has nothing left, before its prompt costs anything."""
        self._refusals.check_quota(tenant, 1.0)

    async def enter(self, guest: Guest, first: Choice) -> None:
        """Send a request, now or when its turn comes. `first` is what was just decided for it.

        Raises:
            DeadlineUnreachable, QuotaExceeded, Overloaded: refused; each says when to come back.
            Draining, NoWorkerAvailable: while it waited. RouterError: as `guest.send` does.
        """
        choice = first if first.worker not in self._stuck() else self._decide(guest.question)
        charge = self._charge(guest, choice or first)
        now = not self._queue and choice is not None and self._has_room(choice)
        wait_ms = 0.0 if now else self.wait_ms(guest.tenant, guest.priority)
        guest.own_ms = (choice or first).price.ttft_ms
        guest.forecast_ms = (self._clock() - guest.arrived) * 1000.0 + wait_ms + guest.own_ms
        if self._is_measured((choice or first).worker):
            self._check_deadline(guest, wait_ms)
        self._refusals.check_quota(guest.tenant, charge.quota)
        if not now:
            self._refusals.check_wait(0.0, wait_ms)
            self._refusals.check_room(guest.tenant, guest.question.prompt_tokens)
        guest.charge = charge
        self._quotas.take(guest.tenant, charge.quota)
        if now and choice is not None:
            self._queue.charge(guest.tenant, charge.cost)
            self._send(guest, choice)
        else:
            await self._wait(guest, charge)

    def wait_ms(self, tenant: str, priority: int) -> float:
        """How long a request that came now would wait for its turn; zero while nobody waits or the rate is unknown."""
        return self._forecast.wait_ms(self._queue.ahead(tenant, priority)) if self._queue else 0.0

    # What it is told

    def sent(self, key: int, choice: Choice) -> None:
        """A job went to a worker."""
        if self._config.max_worker_queue_s is not None:
            self._pace.sent(key, choice.worker, choice.price.load_ms + choice.price.compute_ms)

    def first_token(self, key: int, worker: str) -> None:
        """It has a first token."""
        self._pace.spoke(key, worker)
        self.look_again()

    def ended(self, key: int, worker: str) -> None:
        """Its worker has no more to say."""
        self._pace.spoke(key, worker)
        self.look_again()

    def answered(self, guest: Guest, ttft_ms: float) -> None:
        """A request has its first token."""
        self._forecast.came(guest.forecast_ms, ttft_ms)

    def settle(self, guest: Guest | None, entry: Entry) -> None:
        """A request has ended: what it was charged becomes what it took."""
        if guest is not None and guest.charge is not None:
            self._charges.settle(guest.charge, entry)
            guest.charge = None

    def drain(self) -> None:
        """Send those that wait, and would from now on, to other routers."""
        self._draining = True
        for ticket, _ in list(self._queue.in_order()):
            self._turn_away(ticket, _gone())

    def look_again(self) -> None:
        """Something changed: those that wait may fit now."""
        if self._queue:
            self._look_in(0.0)

    def check(self) -> bool:
        """Whether the books are right."""
        return self._queue.check()

    # Waiting

    async def _wait(self, guest: Guest, charge: Charge) -> None:
        if self._draining:
            raise _gone()
        guest.left = asyncio.get_running_loop().create_future()
        guest.queued_at = self._clock()
        ticket = self._queue.add(
            guest.tenant,
            cost=charge.cost,
            tokens=guest.question.prompt_tokens,
            priority=guest.priority,
            body=guest,
        )
        self._forecast.rate.began()
        self.look_again()
        try:
            await guest.left
        finally:
            if self._queue.remove(ticket):
                self._note_length()

    def _turn_away(self, ticket: Ticket[Guest], error: RouterError) -> None:
        self._queue.remove(ticket)
        self._left(ticket.body, error)

    def _left(self, guest: Guest, error: BaseException | None = None) -> None:
        guest.waited_ms = (self._clock() - guest.queued_at) * 1000.0
        self._metrics.queue_wait_seconds.observe(guest.waited_ms / 1000.0)
        self._note_length()
        if guest.left is None or guest.left.done():
            return  # its caller has just gone
        if error is None:
            guest.left.set_result(None)
        else:
            guest.left.set_exception(error)

    def _note_length(self) -> None:
        if not self._queue:
            self._forecast.rate.ended()
            self._nobody_until = None

    # Passes

    def _look_in(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        when = max(loop.time() + seconds, self._passed_at + _PASS_EVERY_S)
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = loop.call_at(when, self._pass)

    def _pass(self) -> None:
        """Send those that fit, in turn."""
        self._timer = None
        self._passed_at = asyncio.get_running_loop().time()
        self._judge()
        skipped: set[Ticket[Guest]] = set()
        claimed: set[str] = set()  # full workers that somebody waits for whose turn comes first
        now, left, wake_s = self._clock(), _MOST_DECIDED, _LOOK_AGAIN_S
        while left and len(skipped) < _MOST_SKIPPED and (ticket := self._queue.next(skipped)) is not None:
            guest = ticket.body
            if guest.not_before <= now:
                choice = self._decide(guest.question)
                if choice is None:
                    self._nobody()
                    break
                self._nobody_until = None
                guest.own_ms = choice.price.ttft_ms
                if choice.worker not in claimed and self._has_room(choice):
                    self._serve(ticket, choice)
                    continue
                guest.waits_for = choice.worker
                guest.not_before = now + self._room_in_s(choice.decision.chosen)
                left = left - 1 if self._anybody_has_room(choice) else 0
            skipped.add(ticket)
            claimed.add(guest.waits_for)
            wake_s = min(wake_s, guest.not_before - now)
        if self._queue:
            self._look_in(wake_s)

    def _serve(self, ticket: Ticket[Guest], choice: Choice) -> None:
        guest = ticket.body
        try:
            self._check_deadline(guest, 0.0)
        except RouterError as error:
            self._turn_away(ticket, error)
            return
        charge = self._charge(guest, choice)
        self._queue.serve(ticket, charge.cost)
        self._forecast.rate.served(charge.cost)
        guest.waited_ms = (self._clock() - guest.queued_at) * 1000.0
        if guest.charge is not None:
            guest.charge.cost = charge.cost
        try:
            self._send(guest, choice)
        except Exception as error:  # noqa: BLE001 - the caller's to handle, and no reason to stop serving the others
            self._left(guest, error)
        else:
            self._left(guest)

    def _send(self, guest: Guest, choice: Choice) -> None:
        guest.send(choice)
        if guest.charge is not None:
            guest.charge.sent = True

    def _nobody(self) -> None:
        """No worker can take anything: those that wait are told so when the patience is over."""
        if any(self._fleet.takes_requests(link) for link in self._fleet.links()):
            self._nobody_until = None  # they are stuck, not gone
        elif self._nobody_until is None:
            self._nobody_until = self._readiness.until()
        elif self._clock() >= self._nobody_until:
            for ticket, _ in list(self._queue.in_order()):
                self._turn_away(ticket, self._readiness.none_ready())

    def _judge(self) -> None:
        """Refuse who has waited for too long, and whose deadline cannot be met any more."""
        now = self._clock()
        if now - self._judged_at < _JUDGE_EVERY_S:
            return
        self._judged_at = now
        for ticket, ahead in list(self._queue.in_order()):
            guest = ticket.body
            wait_ms = self._forecast.wait_ms(ahead)
            try:
                self._refusals.check_wait(now - guest.queued_at, wait_ms)
                self._check_deadline(guest, wait_ms)
            except RouterError as error:
                self._turn_away(ticket, error)

    # What is known

    def _decide(self, question: Question) -> Choice | None:
        """What the decider says, of workers that are not stuck."""
        stuck = self._stuck()
        return self._decider.decide(question.avoiding(question.avoid | stuck) if stuck else question)

    def _charge(self, guest: Guest, choice: Choice) -> Charge:
        return self._charges.expected(
            guest.tenant,
            prompt_tokens=guest.question.prompt_tokens,
            cached_tokens=choice.price.cached_tokens,
            max_tokens=guest.max_tokens,
        )

    def _check_deadline(self, guest: Guest, wait_ms: float) -> None:
        if guest.deadline is not None:
            self._refusals.check_deadline(time_left(guest.deadline) * 1000.0, wait_ms, guest.own_ms)

    def _is_measured(self, worker: str) -> bool:
        """Whether the worker has measured its prefill, so that predictions of it are more than a guess."""
        report = self._fleet.link(worker).report
        return report is not None and report.load.fit is not None

    def _stuck(self) -> frozenset[str]:
        limit_s = self._config.max_worker_queue_s
        return frozenset() if limit_s is None else self._pace.late(max(limit_s, _STUCK_AFTER_S))

    def _has_room(self, choice: Choice) -> bool:
        return self._is_short(choice.decision.chosen)

    def _anybody_has_room(self, choice: Choice) -> bool:
        return any(self._is_short(candidate) for candidate in choice.candidates)

    def _is_short(self, candidate: Candidate) -> bool:
        """Whether its queue is, by prediction and by what it has yet to answer."""
        limit_s = self._config.max_worker_queue_s
        if limit_s is None:
            return True
        return candidate.price.queue_ms <= limit_s * 1000.0 and not self._pace.is_late(candidate.worker, limit_s)

    def _room_in_s(self, candidate: Candidate) -> float:
        """A queue is predicted to shrink by a second in a second."""
        over_s = candidate.price.queue_ms / 1000.0 - (self._config.max_worker_queue_s or 0.0)
        return min(_ROOM_AGAIN_S, max(_PASS_EVERY_S, over_s))


def _gone() -> Draining:
    return Draining("This router is shutting down; send the request to another router.", retry_after_s=1.0)
