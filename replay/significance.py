"""Whether one configuration is better than another one beyond noise, judged request by request.

Covers: the difference of two figures on the same requests, and its interval. Does not cover: which two (`tuning`).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from replay.front import Finalist, Objective
from replay.outcome import quantile

_BATCHES = 20
_RESAMPLES = 400
# Student's t, two-sided 95 %, from 1 degree of freedom; more than the last count as that.
_T_95 = (
    *(12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
_LEAST_GAIN = 0.01  # a gain below a hundredth is not worth a change, however certain


@dataclass(frozen=True, slots=True)
class Difference:
    """The winner's objective less the present one's, on the held-out part; below 0 is better.

    Attributes:
        mean: of it. half: of its 95 % interval. relative: mean by the present value. certain: it is a real gain.
    """

    mean: float
    half: float
    relative: float
    certain: bool


def difference(objective: Objective, present: Finalist, winner: Finalist) -> Difference:
    """How far apart two configurations are on the same held-out requests, and how sure that is.

    Means over requests (TTFT mean, hit rate) by batch means: requests that are neighbours are alike, batches of a
    twentieth hardly (Conway, 1963). TTFT p99 by a bootstrap of the same batches (Künsch, 1989). The busiest worker is
    no figure of requests; there the seeds are compared pairwise.
    """
    if objective.name == "ttft_mean":
        mean, half = _of_batches(_apart(present.times, winner.times))
    elif objective.name == "hit":
        share = statistics.fmean(present.prompts)
        mean, half = _of_batches([(a - b) / share for a, b in zip(present.cached, winner.cached, strict=True)])
    elif objective.name == "ttft_p99":
        mean, half = _of_tails(present.times, winner.times)
    else:
        pairs = zip(present.figures, winner.figures, strict=True)
        mean, half = _interval([objective.figure(after) - objective.figure(before) for before, after in pairs])
    base = abs(present.spread(objective.name).mean)
    relative = mean / base if base else 0.0
    return Difference(mean, half, relative, certain=mean + half < 0 and relative < -_LEAST_GAIN)


def _apart(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Of the requests that got a token in both."""
    return [b - a for a, b in zip(before, after, strict=True) if not math.isnan(b - a)]


def _of_batches(samples: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval)."""
    return _interval([statistics.fmean(samples[a:b]) for a, b in _batches(len(samples))])


def _of_tails(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The same of the difference of two 99th percentiles."""
    rng, drawn = random.Random(1), []
    batches = _batches(len(before))
    for _ in range(_RESAMPLES):
        chosen = [n for a, b in rng.choices(batches, k=len(batches)) for n in range(a, b)]
        drawn.append(_p99(after, chosen) - _p99(before, chosen))
    everything = range(len(before))
    low, high = quantile(drawn, 0.025), quantile(drawn, 0.975)
    return _p99(after, everything) - _p99(before, everything), (high - low) / 2 if drawn else math.inf


def _p99(times: Sequence[float], chosen: Sequence[int]) -> float:
    return quantile([times[n] for n in chosen if not math.isnan(times[n])], 0.99)


def _interval(samples: Sequence[float]) -> tuple[float, float]:
    """Mean of independent samples and half of its 95 % interval (Student's t); infinite for less than two."""
    if len(samples) < 2:
        return (samples[0] if samples else 0.0), math.inf
    factor = _T_95[min(len(samples) - 2, len(_T_95) - 1)]
    return statistics.fmean(samples), factor * statistics.stdev(samples) / math.sqrt(len(samples))


def _batches(count: int) -> list[tuple[int, int]]:
    """Parts of a sequence of that length, in order and nearly equal."""
    parts = min(_BATCHES, count)
    edges = [round(n * count / parts) for n in range(parts + 1)] if parts else []
    return list(pairwise(edges))
