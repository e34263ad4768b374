"""Where requests wait when the workers' queues are long enough: sent late, with fresh facts, in fair turns.

Covers: whether a request is sent now, waits or is refused; when those that wait are looked at again. Does not cover:
whose turn it is (`fair_queue`), what it costs (`charges`), how long it takes (`forecast`), which worker has room
(`headroom`) or where it goes (`decide`).

A request is sent when the queue of the worker that was chosen for it is predicted to take at most
`max_worker_queue_s`. While nobody waits that is all that happens. Else it waits, and is decided again when its turn
comes: what was cached meanwhile counts, a higher priority can still overtake, and leaving costs the workers nothing.
One pass sends as many as fit; each is on the books before the next is decided, so a pass cannot send a storm. A request
whose own worker is full lets those pass whose worker is not, and is not decided again before that worker is predicted
to have room. Passes follow reports, first tokens and ends, at most every `headroom.SOONEST_S`, and that moment. Owned
by the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from router import features
from router.charges import Charge, Charges
from router.config import OverloadConfig
from router.decide import Choice, Decider
from router.errors import Draining, RouterError
from router.fair_queue import FairQueue, Ticket
from router.fleet import Fleet
from router.forecast import Forecast, Parts
from router.guest import Guest
from router.headroom import SOONEST_S, Headroom
from router.lateness import Lateness
from router.ledger import Entry
from router.metrics import Metrics
from router.quotas import TokenQuotas
from router.readiness import Readiness, time_left
from router.refusals import Refusals

_DOUBT = 1.15  # who was let in is turned away only if it is clearly late: forecasts vary while it waits
_LOOK_AGAIN_S = 0.25  # at the latest
_MOST_DECIDED = 8  # of those that turn out not to fit, in a pass: a decision costs a tenth of a millisecond and more
_MOST_SKIPPED = 64
_JUDGE_EVERY_S = 0.25


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
        self._fleet = fleet
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
        self._lateness = Lateness(clock)
        self._headroom = Headroom(config.max_worker_queue_s, fleet, decider, self._lateness)
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
        choice = first if first.worker not in self._headroom.stuck() else self._headroom.decide(guest.question)
        best = choice or first
        charge = self._charge(guest, best)
        now = not self._queue and choice is not None and self._headroom.has(choice)
        wait_ms = 0.0 if now else self.wait_ms(guest.tenant, guest.priority)
        guest.parts = self._parts(guest, best, wait_ms)
        if self._headroom.is_measured(best.worker):
            self._check_deadline(guest)
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
            await self._wait(guest, charge, _work_ms(best))

    def wait_ms(self, tenant: str, priority: int) -> float:
        """How long a request that came now would wait for its turn; zero while nobody waits or the rate is unknown."""
        return self._forecast.wait_ms(self._queue.ahead_ms(tenant, priority)) if self._queue else 0.0

    def stuck(self) -> frozenset[str]:
        """Workers that are not to be waited for."""
        return self._headroom.stuck()

    # What it is told

    def sent(self, key: int, choice: Choice) -> None:
        """A job went to a worker."""
        self._lateness.sent(key, choice.worker, _silent_ms(choice))

    def first_token(self, key: int, worker: str) -> None:
        """It has a first token."""
        self._lateness.spoke(key, worker)
        self.look_again()

    def ended(self, key: int, worker: str) -> None:
        """Its worker has no more to say."""
        self._lateness.spoke(key, worker)
        self.look_again()

    def forget(self, worker: str) -> None:
        """A worker is gone for good."""
        self._lateness.forget(worker)

    def answered(self, guest: Guest) -> None:
        """A request has its first token."""
        guest.first_at = self._clock()
        self._forecast.firsts.came(guest.parts.own_ms, (guest.first_at - guest.sent_at) * 1000.0)

    def tokens_came(self, seconds: float, tokens: int) -> None:
        """An answer went on: so many tokens, so long after those before."""
        self._forecast.pace.came(seconds, tokens)

    def settle(self, guest: Guest | None, entry: Entry) -> None:
        """A request has ended: what it was charged becomes what it took."""
        if guest is None or guest.charge is None:
            return
        self._learn(guest, entry.code, sent=guest.charge.sent)
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

    async def _wait(self, guest: Guest, charge: Charge, work_ms: float) -> None:
        if self._draining:
            raise _gone()
        guest.left = asyncio.get_running_loop().create_future()
        guest.queued_at, guest.foreseen_wait_ms = self._clock(), guest.parts.wait_ms
        ticket = self._queue.add(
            guest.tenant,
            cost=charge.cost,
            work_ms=work_ms,
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

    def _turn_away(self, ticket: Ticket[Guest], error: Exception) -> None:
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
        when = max(loop.time() + seconds, self._passed_at + SOONEST_S)
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
                try:
                    choice = self._headroom.decide(guest.question)
                except Exception as error:  # noqa: BLE001 - as in _serve
                    self._turn_away(ticket, error)
                    left -= 1
                    continue
                if choice is None and guest.question.protocol:
                    self._alone(ticket)  # the others may have workers
                    skipped.add(ticket)
                    continue
                if choice is None:
                    self._nobody()
                    break
                self._nobody_until = guest.alone_until = None
                guest.parts = self._parts(guest, choice, 0.0)
                if choice.worker not in claimed and self._headroom.has(choice):
                    self._serve(ticket, choice)
                    continue
                guest.waits_for = choice.worker
                guest.not_before = now + self._headroom.in_s(choice)
                is_bound = bool(guest.question.protocol)  # what it may not go to may have room
                left = left - 1 if is_bound or self._headroom.anybody_has(choice) else 0
            skipped.add(ticket)
            claimed.add(guest.waits_for)
            wake_s = min(wake_s, guest.not_before - now)
        if self._queue:
            self._look_in(wake_s)

    def _serve(self, ticket: Ticket[Guest], choice: Choice) -> None:
        guest = ticket.body
        try:
            self._check_deadline(guest)
        except RouterError as error:
            self._turn_away(ticket, error)
            return
        charge = self._charge(guest, choice)
        self._queue.serve(ticket, charge.cost)
        self._forecast.rate.served(_work_ms(choice))
        guest.waited_ms = (self._clock() - guest.queued_at) * 1000.0
        self._forecast.waits.came(guest.foreseen_wait_ms, guest.waited_ms)
        if guest.charge is not None:
            guest.charge.cost = charge.cost
        try:
            self._send(guest, choice)
        except Exception as error:  # noqa: BLE001 - the caller's to handle, and no reason to stop serving the others
            self._left(guest, error)
        else:
            self._left(guest)

    def _send(self, guest: Guest, choice: Choice) -> None:
        guest.sent_at = self._clock()
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

    def _alone(self, ticket: Ticket[Guest]) -> None:
        """No worker can take this one, as it needs newer ones: it is told so when the patience is over."""
        guest, protocol, now = ticket.body, ticket.body.question.protocol, self._clock()
        guest.not_before, guest.waits_for = now + _LOOK_AGAIN_S, ""
        ready = [link for link in self._fleet.links() if self._fleet.takes_requests(link)]
        if len(features.too_old(ready, protocol)) < len(ready):
            guest.alone_until = None  # they are stuck, not gone
        elif guest.alone_until is None:
            guest.alone_until = self._readiness.until()
        elif now >= guest.alone_until:
            self._turn_away(ticket, features.none_left(self._readiness.none_ready(), ready, protocol))

    def _all_stuck(self) -> frozenset[str]:
        """The workers that take requests, where none of them is to be waited for; else none."""
        ready = frozenset(link.name for link in self._fleet.links() if self._fleet.takes_requests(link))
        return ready if ready <= self._headroom.stuck() else frozenset()

    def _judge(self) -> None:
        """Refuse who has waited for too long, and whose deadline cannot be met any more."""
        now = self._clock()
        if now - self._judged_at < _JUDGE_EVERY_S:
            return
        self._judged_at = now
        stuck = self._all_stuck()
        for ticket, ahead_ms in list(self._queue.in_order()):
            guest = ticket.body
            wait_ms = self._forecast.wait_ms(ahead_ms)
            try:
                self._refusals.check_wait(now - guest.queued_at, wait_ms, stuck=stuck)
                guest.parts = guest.parts._replace(wait_ms=wait_ms)
                self._check_deadline(guest, doubt=_DOUBT)
            except RouterError as error:
                self._learn_wait(guest)
                self._turn_away(ticket, error)

    # What is known

    def _charge(self, guest: Guest, choice: Choice) -> Charge:
        return self._charges.expected(
            guest.tenant,
            prompt_tokens=guest.question.prompt_tokens,
            cached_tokens=choice.price.cached_tokens,
            max_tokens=guest.max_tokens,
            samples=guest.samples,
        )

    def _parts(self, guest: Guest, choice: Choice, wait_ms: float) -> Parts:
        """The forecast. Of a tenant that has had no answer, nobody knows how long one takes."""
        tokens = self._charges.answer_tokens(guest.tenant, guest.max_tokens, unknown=0.0)
        return Parts(wait_ms, self._headroom.first_token_ms(choice), self._forecast.answer_ms(tokens))

    def _check_deadline(self, guest: Guest, *, doubt: float = 1.0) -> None:
        if guest.deadline is not None:
            self._refusals.check_deadline(time_left(guest.deadline) * 1000.0 * doubt, guest.parts)

    def _learn_wait(self, guest: Guest) -> None:
        """It is turned away while it waits. Were only the waits of those counted that were served, they would seem
        short.
        """
        waited_ms = (self._clock() - guest.queued_at) * 1000.0
        left_ms = self._forecast.waits.likely_ms(guest.parts.wait_ms)
        self._forecast.waits.came(guest.foreseen_wait_ms, waited_ms + left_ms)

    def _learn(self, guest: Guest, code: str, *, sent: bool) -> None:
        """How right the forecast was of what came last."""
        now, forecast = self._clock(), self._forecast
        if code == grpc.StatusCode.OK.name and guest.first_at:
            forecast.answers.came(guest.parts.answer_ms, (now - guest.first_at) * 1000.0)
        if code != grpc.StatusCode.DEADLINE_EXCEEDED.name:
            return
        if guest.first_at:
            forecast.answers.cut_short(guest.parts.answer_ms, (now - guest.first_at) * 1000.0)
        elif sent:
            forecast.firsts.cut_short(guest.parts.own_ms, (now - guest.sent_at) * 1000.0)
        else:
            forecast.waits.cut_short(guest.foreseen_wait_ms, (now - guest.queued_at) * 1000.0)


def _work_ms(choice: Choice) -> float:
    """Of its worker's time, or of both where one prefills for the other."""
    return choice.price.load_ms + choice.price.compute_ms


def _silent_ms(choice: Choice) -> float:
    """From its turn to its first token; the queue of another worker that prefills is no delay of its own."""
    if choice.pair is None:
        return _work_ms(choice)
    return choice.price.ttft_ms - choice.decision.chosen.price.queue_ms


def _gone() -> Draining:
    return Draining("This router is shutting down; send the request to another router.", retry_after_s=1.0)
