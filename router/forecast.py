"""How long a request would take here, how well that is known, and whether a deadline can still be met. Pure.

Covers: the measured pace of answers, the measured error of past forecasts, the correction that follows. Does not cover:
the order of the queue (`fair_queue`), how fast it drains (`drain_rate`), what a worker will take (`cost`) or whether it
keeps to that (`lateness`).

A forecast has three parts: the wait here, the time at the worker until the first token, the rest of the answer. Their
errors have nothing to do with one another, so each part is held against what came, and corrected by itself. A request
is let in when it is more likely to be in time than late. Not less: a queue of requests that have deadlines grows until
those whose turn comes are at the edge of theirs, so whatever is let in beyond the edge takes the place of what would
have been in time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvstore.fading_sum import FadingSum
from router.drain_rate import DrainRate

_SAMPLES = 256
_SAMPLES_S = 120.0
_LEAST_SAMPLES = 8
MOST = 1.5  # times what was predicted: beyond that it is no longer an error that will be the same next time
_PACE_MEMORY_S = 5.0  # a pace that was measured under a load must not outlive it
_LEAST_TOKENS = 8.0


class Parts(NamedTuple):
    """A forecast in milliseconds: of the wait in this router, the time at the worker until the first token, and the
    time from there to the end of the answer.
    """

    wait_ms: float
    own_ms: float
    answer_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """Until the end of the answer."""
        return self.wait_ms + self.own_ms + self.answer_ms


NOTHING = Parts(0.0, 0.0)


class AnswerPace:
    """Milliseconds between two tokens of an answer, over all that come now; forgets exponentially."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ms, self._tokens = FadingSum(_PACE_MEMORY_S), FadingSum(_PACE_MEMORY_S)

    def came(self, seconds: float, tokens: int) -> None:
        """So many tokens came so long after those before."""
        now = self._clock()
        self._ms.add(seconds * 1000.0, now)
        self._tokens.add(tokens, now)

    def token_ms(self) -> float:
        """Zero: not known."""
        now = self._clock()
        tokens = self._tokens.value(now)
        return self._ms.value(now) / tokens if tokens >= _LEAST_TOKENS else 0.0


class Errors:
    """By how much forecasts were wrong.

    Of the last `_SAMPLES` of two minutes the median ratio of real to predicted time counts, each weighed by what was
    predicted: what a prediction of 5 ms missed by says nothing of one of 5 s.

    Args:
        unproven: what a forecast is multiplied by while there are fewer than `_LEAST_SAMPLES`. Zero for one by which
        everybody could be refused for good: nothing would come any more that it could be held against.
    """

    def __init__(self, clock: Callable[[], float], *, unproven: float = 0.0) -> None:
        self._clock = clock
        self._unproven = unproven
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES)
        self._median: float | None = None

    def came(self, predicted_ms: float, real_ms: float) -> None:
        """It was predicted, and came."""
        if predicted_ms > 0.0:
            self._samples.append(_Sample(self._clock(), real_ms / predicted_ms, predicted_ms))
            self._median = None

    def cut_short(self, predicted_ms: float, real_ms: float) -> None:
        """It was predicted, and had not come by its deadline: it would have taken longer, nobody knows by how much.

        Left out, only what is in time would count, and forecasts would seem too high because of those that they let in.
        """
        self.came(predicted_ms, max(predicted_ms, real_ms))

    def likely_ms(self, predicted_ms: float) -> float:
        """What a forecast comes to in one case of two."""
        self._forget()
        if len(self._samples) < _LEAST_SAMPLES:
            return predicted_ms * self._unproven
        if self._median is None:
            self._median = _median(self._samples)
        return predicted_ms * min(MOST, self._median)

    def _forget(self) -> None:
        oldest = self._clock() - _SAMPLES_S
        while self._samples and self._samples[0].at < oldest:
            self._samples.popleft()
            self._median = None


class _Sample(NamedTuple):
    at: float
    ratio: float
    predicted_ms: float


def _median(samples: Iterable[_Sample]) -> float:
    """The ratio that half of all predicted time is below."""
    ordered = sorted((sample.ratio, sample.predicted_ms) for sample in samples)
    half = sum(predicted_ms for _, predicted_ms in ordered) / 2.0
    for ratio, predicted_ms in ordered:
        half -= predicted_ms
        if half <= 0.0:
            return ratio
    return ordered[-1][0]


class Forecast:
    """Waits, answers and deadlines. `rate` is told of the queue by its owner, `pace` of tokens, and the errors of
    waits, first tokens and answers what came of their forecasts.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.rate = DrainRate(clock)
        self.pace = AnswerPace(clock)
        self.waits = Errors(clock, unproven=1.0)  # where all are refused nobody waits, and then no wait is forecast
        self.firsts, self.answers = Errors(clock), Errors(clock)

    def wait_ms(self, work_ms: float) -> float:
        """Until so much work has left the queue; zero while its rate is not known."""
        rate = self.rate.per_second()
        return work_ms / rate * 1000.0 if rate else 0.0

    def answer_ms(self, tokens: float) -> float:
        """From the first to the last of so many tokens; zero while their pace is not known."""
        return max(0.0, tokens - 1.0) * self.pace.token_ms()

    def likely_ms(self, parts: Parts) -> float:
        """What a forecast comes to, by the errors of those before; at most `MOST` times what it says."""
        own_ms = self.firsts.likely_ms(parts.own_ms)
        return self.waits.likely_ms(parts.wait_ms) + own_ms + self.answers.likely_ms(parts.answer_ms)
