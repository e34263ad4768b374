"""What became of the requests of a replay, and its figures.

Covers: the fate of every request, shares of hits, times to the first token, the split over workers. Does not cover: how
they came about (`simulation`).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.events import TierName
from replay.engine import NO_TIERS


@dataclass(slots=True)
class Fate:
    """One request.

    Attributes:
        arrived_s, first_token_s: on the virtual clock; None: it never got a token.
        cached, computed: prompt tokens, in the prefill that gave the first token; their sum is the prompt.
        worker: of the last attempt. attempts: 1 unless workers were lost. failed: cut off in mid-answer.
        predicted_ttft_s, predicted_tokens: of the last attempt; zero for policies that predict nothing.
        ended_s: when the last token came, or the answer broke off. output: tokens of the answer in the trace.
        tiers: cached tokens by tier, where the engine has tiers.
    """

    arrived_s: float
    first_token_s: float | None = None
    cached: int = 0
    computed: int = 0
    worker: str = ""
    attempts: int = 0
    failed: bool = False
    predicted_ttft_s: float = 0.0
    predicted_tokens: int = 0
    ended_s: float | None = None
    output: int = 0
    tiers: Mapping[TierName, int] = field(default_factory=lambda: NO_TIERS)

    @property
    def tpot_s(self) -> float | None:
        """Mean time between two tokens of the answer; None for one of fewer than two, and one that broke off."""
        if self.failed or self.first_token_s is None or self.ended_s is None or self.output < 2:
            return None
        return (self.ended_s - self.first_token_s) / (self.output - 1)

    @property
    def ttft_s(self) -> float:
        """Raises ValueError for a request without a token."""
        if self.first_token_s is None:
            raise ValueError("this request never got a token; ask only those with first_token_s")
        return self.first_token_s - self.arrived_s


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the requests that counted.

    Attributes:
        hit: share of prompt tokens that were cached. ttft_*: seconds; nan without a request.
        split: requests by worker. busiest: the busiest worker's time in prefill by the mean.
        utilisation: share of all workers' time in prefill, warm-up included.
        unanswered: requests that never got a token. failed: those cut off in mid-answer. retried: placed twice or more.
        late_s: mean of the real less the predicted time to the first token; zero for policies that predict nothing.
        overrated: tokens that the router expected in the cache and that were not there, as a share of the prompts.
        tiers: share of prompt tokens by the tier that they came from, where the engine tells.
        tpot_*: seconds between two tokens, a request's mean counting once; nan where nothing has two tokens.
        itl_p99_s: of all gaps between two tokens, warm-up included; zero where the engine does not tell.
        tokens_per_s: of answers, by the time until the last one has ended.
    """

    requests: int
    hit: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    split: Mapping[str, int]
    busiest: float
    utilisation: float
    unanswered: int
    failed: int
    retried: int
    late_s: float
    overrated: float
    tiers: Mapping[TierName, float]
    tpot_mean_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    itl_p99_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All fates, in the order of the workload.

    Attributes:
        busy_s: time in prefill by worker. end_s: when the last answer ended.
        gaps: how often which time lay between two tokens, in tenths of a millisecond, where the engines tell.
    """

    fates: Sequence[Fate]
    busy_s: Mapping[str, float]
    end_s: float
    gaps: Mapping[int, int] = field(default_factory=dict)

    def figures(self, *, warm_up: float = 0.1) -> Figures:
        """Of all requests but the first; `warm_up` is the share of those that only fill the caches."""
        counted = self.fates[int(warm_up * len(self.fates)) :]
        answered = [fate for fate in counted if fate.first_token_s is not None]
        times = [fate.ttft_s for fate in answered]
        tokens = sum(fate.cached + fate.computed for fate in answered)
        predicted = [fate.ttft_s - fate.predicted_ttft_s for fate in answered if fate.predicted_ttft_s]
        busy = list(self.busy_s.values())
        between = [tpot for fate in answered if (tpot := fate.tpot_s) is not None]
        by_tier: Counter[TierName] = Counter()
        for fate in answered:
            by_tier.update(fate.tiers)
        return Figures(
            requests=len(counted),
            hit=sum(fate.cached for fate in answered) / tokens if tokens else 0.0,
            ttft_mean_s=statistics.fmean(times) if times else float("nan"),
            ttft_p50_s=quantile(times, 0.5),
            ttft_p99_s=quantile(times, 0.99),
            split=Counter(fate.worker for fate in answered),
            busiest=max(busy) / statistics.fmean(busy) if any(busy) else 1.0,
            utilisation=statistics.fmean(busy) / self.end_s if self.end_s else 0.0,
            unanswered=len(counted) - len(answered),
            failed=sum(fate.failed for fate in counted),
            retried=sum(fate.attempts > 1 for fate in counted),
            late_s=statistics.fmean(predicted) if predicted else 0.0,
            overrated=sum(max(0, fate.predicted_tokens - fate.cached) for fate in answered) / tokens if tokens else 0.0,
            tiers={tier: count / tokens for tier, count in by_tier.items()},
            tpot_mean_s=statistics.fmean(between) if between else float("nan"),
            tpot_p50_s=quantile(between, 0.5),
            tpot_p99_s=quantile(between, 0.99),
            itl_p99_s=_counted_quantile(self.gaps, 0.99) / 1e4,
            tokens_per_s=sum(fate.output for fate in answered) / self.end_s if self.end_s else 0.0,
        )


def _counted_quantile(counts: Mapping[int, int], share: float) -> float:
    """The least value that so large a share is not above; zero of nothing."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return 0.0


def quantile(samples: Sequence[float], share: float) -> float:
    """Between neighbours by straight line (Hyndman and Fan, 1996, definition 7); nan of nothing."""
    if not samples:
        return float("nan")
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)
