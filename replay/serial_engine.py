"""An engine on a virtual clock: one prefill at a time, first come first served, and decode that never waits.

Covers: the timing model, the pool, what the engine reports of itself, its failure. Does not cover: the router or where
requests come from. Deliberately simple, so that policies are compared and not schedulers: prefill is not chunked and
not batched, decode has no queue and no limit of memory, blocks in use are not pinned.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.events import TierName
from replay.engine import CacheChange, Reuse, Told
from replay.pool import Change, Partial, Pool
from replay.timeline import Timeline
from replay.workload import Chain, Workload
from router.cost import PrefillFit, WorkerLoad

SHARE_MEMORY_S = 30.0
_NOBODY = -1  # whose prefill goes on though its request was cancelled


@dataclass(frozen=True, slots=True)
class SerialProfile:
    """How fast an engine is; the defaults are about an 8B model on one H100 with 49 GiB of pool.

    Attributes:
        prefill_tokens_per_s: computed tokens. request_s: of each request, however short.
        decode_token_s: between two tokens of one answer. decode_drag: so many decoding requests double a prefill.
        pool_tokens: tokens whose blocks the pool holds. report_s: the engine tells its load so often.
        fit_error: the rate that the router is told, as a multiple of the true one.
    """

    prefill_tokens_per_s: float = 8000.0
    request_s: float = 0.01
    decode_token_s: float = 0.02
    decode_drag: float = 500.0
    pool_tokens: int = 400_000
    report_s: float = 0.02
    fit_error: float = 1.0

    @property
    def fit(self) -> PrefillFit:
        """What an engine like this would measure of itself."""
        return PrefillFit(self.request_s * 1e3, 1e3 / (self.prefill_tokens_per_s * self.fit_error))


class _Prefill(NamedTuple):
    """The request that is being computed, and the tokens it was expected to compute."""

    number: int
    expected: float
    started: float
    seconds: float


class _State(NamedTuple):
    """What a report is made of; valid from `since` on."""

    since: float
    queued_tokens: float
    waiting: int
    decoding: int
    running: _Prefill | None
    share: float  # of the time until then that was spent in prefill

    def share_at(self, now: float) -> float:
        """The same later, when nothing has changed meanwhile."""
        kept = math.exp((self.since - now) / SHARE_MEMORY_S)
        return self.share * kept + (1.0 - kept) * (self.running is not None)


class SerialEngine:
    """One worker's engine. All times are those of the timeline.

    Attributes:
        busy_s: time spent in prefill.
    """

    def __init__(
        self, profile: SerialProfile, work: Workload, timeline: Timeline, told: Told, *, remember_s: float
    ) -> None:
        """`remember_s`: reports are asked for that are at most this old."""
        self._profile = profile
        self._work = work
        self._timeline = timeline
        self._told = told
        self._fit = profile.fit
        self._remember_s = remember_s + profile.report_s
        self._pool = Pool(profile.pool_tokens // work.block_size, work.lengths)
        self._queue: deque[tuple[int, float]] = deque()  # request, tokens that it was expected to compute
        self._expected: Counter[int] = Counter()  # segments that requests before their first token will leave
        self._queued_tokens = 0.0
        self._running: _Prefill | None = None
        self._decoding: dict[int, float] = {}  # until when
        self._life = 0
        self._partial: Partial | None = None  # as it was told
        self._history = deque([_State(timeline.now, 0.0, 0, 0, None, 0.0)])
        self.busy_s = 0.0

    def submit(self, number: int) -> None:
        """Queue a request."""
        chain = self._work.chains[number]
        expected = float(self._uncached(number, self._reachable(chain)))
        self._expected.update(chain.segments)
        self._queue.append((number, expected))
        self._queued_tokens += expected
        self._start_next()
        self._note()

    def cancel(self, number: int) -> None:
        """Forget a request; a prefill that runs goes on to its end, as nothing is chunked here."""
        for queued in [each for each in self._queue if each[0] == number]:
            self._queue.remove(queued)
            self._queued_tokens -= queued[1]
            self._expected.subtract(self._work.chains[number].segments)
        if self._running is not None and self._running.number == number:
            self._running = self._running._replace(number=_NOBODY)
        self._decoding.pop(number, None)
        self._note()

    def catch_up(self) -> None:
        """Nothing happens here between events."""

    def holding(self) -> list[CacheChange]:
        """All that it holds, as a change from nothing."""
        partial = self._pool.partial()
        return [CacheChange(TierName.DEVICE, self._pool.whole(), (), {} if partial is None else dict([partial]))]

    def fail(self) -> tuple[list[int], list[int]]:
        """Lose everything: (requests that had no token yet, requests that were being answered)."""
        unstarted = [number for number, _ in self._queue]
        if self._running is not None:
            if self._running.number != _NOBODY:
                unstarted.insert(0, self._running.number)
            self.busy_s -= self._running.started + self._running.seconds - self._timeline.now
        lost = unstarted, sorted(self._decoding)
        self._life += 1
        self._queue.clear()
        self._expected.clear()
        self._running = None
        self._decoding.clear()
        self._pool.clear()
        self._partial = None
        self._queued_tokens = 0.0
        self._history = deque([_State(self._timeline.now, 0.0, 0, 0, None, 0.0)])
        return lost

    def report_time(self, by: float) -> float:
        """When the last report was sent that was sent by that time."""
        tick = self._profile.report_s
        return by // tick * tick if tick else by

    def reported(self, sent: float) -> WorkerLoad:
        """The load as it was at that time."""
        state = self._history[0]
        for later in self._history:
            if later.since > sent:
                break
            state = later
        return WorkerLoad(
            self._fit,
            pending_tokens=round(state.queued_tokens + _left(state.running, sent)),
            waiting=state.waiting,
            running=state.decoding + (state.running is not None),
            decoding=state.decoding,
            prefill_share=state.share_at(sent),
            pool_blocks=self._profile.pool_tokens // self._work.block_size,
        )

    def known_until(self, sent: float) -> float:
        """Requests are in the next report."""
        return sent

    def _start_next(self) -> None:
        if self._running is not None or not self._queue:
            return
        number, expected = self._queue.popleft()
        self._queued_tokens -= expected
        request, profile, now = self._work.requests[number], self._profile, self._timeline.now
        computed = self._uncached(number, self._pool.leading(self._work.chains[number].segments))
        drag = 1 + len(self._decoding) / profile.decode_drag
        seconds = profile.request_s + computed / profile.prefill_tokens_per_s * drag
        self.busy_s += seconds
        self._running = _Prefill(number, expected, now, seconds)
        reuse = Reuse(request.input_length - computed, computed, now + seconds)
        self._timeline.at(now + seconds, self._if_alive(lambda: self._prefilled(number, reuse)))

    def _prefilled(self, number: int, reuse: Reuse) -> None:
        chain, running = self._work.chains[number].segments, self._running
        self._running = None
        self._expected.subtract(chain)
        self._tell(self._pool.take(chain))
        if running is not None and running.number == number:
            until = self._timeline.now + self._work.requests[number].output_length * self._profile.decode_token_s
            self._decoding[number] = until
            self._told.first_token(number, reuse)
            self._timeline.at(until, self._if_alive(lambda: self._finished(number, until)))
        self._start_next()
        self._note()

    def _tell(self, change: Change) -> None:
        before, self._partial = self._partial, self._pool.partial()
        partial = {} if before is None else {before.segment: 0}
        partial.update({} if self._partial is None else dict([self._partial]))
        self._told.cache_changed([CacheChange(TierName.DEVICE, change.stored, change.removed, partial)])

    def _finished(self, number: int, until: float) -> None:
        if self._decoding.get(number) != until:
            return
        del self._decoding[number]
        self._note()
        self._told.ended(number)

    def _if_alive(self, action: Callable[[], None]) -> Callable[[], None]:
        """A failed engine's plans come to nothing."""
        life = self._life

        def act() -> None:
            if life == self._life:
                action()

        return act

    def _reachable(self, chain: Chain) -> int:
        """Leading blocks that will be in the pool when a request that comes now has its turn."""
        leading = 0
        for segment in chain.segments:
            if not self._expected[segment]:
                break
            leading += self._work.lengths[segment]
        return max(leading, self._pool.leading(chain.segments))

    def _uncached(self, number: int, leading: int) -> int:
        return max(0, self._work.requests[number].input_length - leading * self._work.block_size)

    def _note(self) -> None:
        """Remember the state for the reports to come; of several at the same moment only the last was ever true."""
        now, history = self._timeline.now, self._history
        share = history[-1].share_at(now)
        if history[-1].since == now:
            history.pop()
        history.append(_State(now, self._queued_tokens, len(self._queue), len(self._decoding), self._running, share))
        while len(history) > 1 and history[1].since <= now - self._remember_s:
            history.popleft()


def _left(running: _Prefill | None, now: float) -> float:
    """Tokens of a prefill that are still to be computed."""
    if running is None:
        return 0.0
    return running.expected * min(1.0, max(0.0, 1.0 - (now - running.started) / running.seconds))
