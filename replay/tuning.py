"""Searches policies and weights for a trace, and tells whether what it found is better than what is in force.

Successive halving (Jamieson and Talwalkar, 2016; the schedule of Hyperband's first bracket, Li et al., 2018): many
configurations are replayed on a short beginning of the trace, the best third on a beginning three times as long, and so
on. All see the same requests and the same seeds, so differences are between configurations. Of those that end level the
simplest is chosen. The last part of the trace is held out: nothing is chosen by it, and the final table is of it alone.

Whether the winner is better beyond noise is judged request by request on the held-out part (`difference`), once, for
the one configuration that the search chose.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from replay.comparison import Fleet, Result, Run, Runner, Source, Spread, prepared, spread
from replay.outcome import Figures, quantile
from replay.policy_space import Configuration, draw
from router.policy import find_policy

KEPT = 3  # one of so many goes on to a part that is so many times as long
HELD_OUT = 0.3
LEAST_REQUESTS = 300  # of the shortest part
FINALISTS = 5
_RUNGS = 3
_MOST_TRIALS = 1000
_BATCHES = 20
_RESAMPLES = 400
# Student's t, two-sided 95 %, from 1 degree of freedom; more than the last count as that.
_T_95 = (
    *(12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
_LEAST_GAIN = 0.01  # a gain below a hundredth is not worth a change, however certain


@dataclass(frozen=True, slots=True)
class Objective:
    """A figure of which less (`sign` 1) or more (-1) is better."""

    name: str
    label: str
    sign: int
    figure: Callable[[Figures], float]

    def cost(self, figures: Sequence[Figures]) -> float:
        """Less is better; a figure that is no number is worst."""
        value = spread([self.figure(one) for one in figures]).mean
        return math.inf if math.isnan(value) else self.sign * value


OBJECTIVES = {
    "ttft_mean": Objective("ttft_mean", "TTFT mean", 1, lambda figures: figures.ttft_mean_s),
    "ttft_p99": Objective("ttft_p99", "TTFT p99", 1, lambda figures: figures.ttft_p99_s),
    "hit": Objective("hit", "hit rate", -1, lambda figures: figures.hit),
    "busiest": Objective("busiest", "busiest worker", 1, lambda figures: figures.busiest),
}


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched.

    Attributes:
        requests: of the whole trace. present: what is in force. policies: by name.
        trials: configurations to begin with, the present one and each policy's defaults among them.
        seeds: replays of each finalist. seed: of the search. objective: name of what is to be better.
    """

    source: Source
    fleet: Fleet
    requests: int
    present: Configuration
    policies: tuple[str, ...]
    trials: int = 27
    seeds: int = 3
    seed: int = 1
    objective: str = "ttft_mean"

    @property
    def trained(self) -> int:
        """Requests that are searched on; those behind them are held out."""
        return int(self.requests * (1 - HELD_OUT))


@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration on one rung. `relative`: its objective by the present one's there; below 1 is better."""

    number: int
    rung: int
    requests: int
    configuration: Configuration
    figures: Sequence[Figures]
    relative: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Finalist:
    """A configuration on the part that counts, in the end the held-out one.

    Attributes:
        on_front: no other finalist is as good in everything and better in something.
        times, cached: of each request, mean over seeds: seconds to the first token (nan: it got none), and
        prompt tokens that were cached. prompts: tokens of each.
    """

    configuration: Configuration
    figures: Sequence[Figures]
    on_front: bool
    times: Sequence[float]
    cached: Sequence[float]
    prompts: Sequence[int]

    def spread(self, objective: str) -> Spread:
        """Of one figure over seeds."""
        return spread([OBJECTIVES[objective].figure(each) for each in self.figures])


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


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found. `winner` is the present configuration where the search found none better."""

    search: Search
    trials: Sequence[Trial]
    finalists: Sequence[Finalist]
    winner: Configuration
    difference: Difference | None = None
    replays: int = 0

    def finalist(self, configuration: Configuration) -> Finalist:
        """That one. Raises KeyError."""
        for each in self.finalists:
            if each.configuration.text == configuration.text:
                return each
        raise KeyError(configuration.text)


def tune(search: Search, runner: Runner, *, on_done: Callable[[Result], None] = lambda _: None) -> Tuned:
    """Search. The same arguments give the same answer.

    Raises:
        ValueError: the trace is too short.
    """
    if search.trained < LEAST_REQUESTS:
        least = math.ceil(LEAST_REQUESTS / (1 - HELD_OUT))
        raise ValueError(f"the trace has {search.requests} requests; tuning needs {least} at least, record more")
    left, trials, replays = candidates(search), list[Trial](), 0
    for rung, (requests, seeds) in enumerate(rungs(search)):
        tried = _replayed(search, runner, left, seeds, requests, 0.1, on_done)
        replays += len(left) * seeds
        ranked = _ranked(search, rung, requests, tried)
        last = requests == search.trained
        kept = _kept(search, ranked, FINALISTS if last else max(FINALISTS, math.ceil(len(left) / KEPT)))
        texts = {trial.configuration.text for trial in kept}
        trials += [replace(trial, kept=trial.configuration.text in texts) for trial in ranked]
        left = [trial.configuration for trial in kept]
    winner = _simplest_of_the_best(search, left, tried)
    finalists = _on_front(
        _replayed(search, runner, left, search.seeds, None, search.trained / search.requests, on_done)
    )
    found = Tuned(search, trials, finalists, winner, None, replays + len(left) * search.seeds)
    if winner.text == search.present.text:
        return found
    told = difference(OBJECTIVES[search.objective], found.finalist(search.present), found.finalist(winner))
    return replace(found, difference=told)


def rungs(search: Search) -> list[tuple[int, int]]:
    """(requests, seeds) of each rung; the last one is all that is searched on."""
    lengths = [search.trained]
    while len(lengths) < _RUNGS and lengths[0] // KEPT >= LEAST_REQUESTS:
        lengths.insert(0, lengths[0] // KEPT)
    return [(length, min(2, search.seeds) if length == lengths[-1] else 1) for length in lengths]


def cost_in_replays(search: Search) -> float:
    """About how many replays of the whole trace a search takes."""
    left, cost = float(search.trials), 0.0
    for requests, seeds in rungs(search):
        cost += left * seeds * requests / search.requests
        left = max(FINALISTS, left / KEPT)
    return cost + (FINALISTS + 1) * search.seeds


def trials_within(search: Search, replays: float) -> int:
    """The most configurations with which a search takes no more replays than that; at least those that are given."""
    least, most = len(candidates_given(search)), _MOST_TRIALS
    while least < most:
        middle = (least + most + 1) // 2
        if cost_in_replays(replace(search, trials=middle)) <= replays:
            least = middle
        else:
            most = middle - 1
    return least


def candidates_given(search: Search) -> list[Configuration]:
    """The present one, and each policy's defaults."""
    plain = [Configuration(policy) for policy in search.policies]
    return list({each.text: each for each in (search.present, *plain)}.values())


def candidates(search: Search) -> list[Configuration]:
    """What the search begins with: those given, and drawn ones, more of policies that have more weights."""
    rng = random.Random(search.seed)
    found = {each.text: each for each in candidates_given(search)}
    sizes = [len(find_policy(policy).weights) for policy in search.policies]
    attempts = 50 * search.trials if any(sizes) else 0
    while len(found) < search.trials and attempts:
        attempts -= 1
        drawn = draw(rng.choices(search.policies, sizes)[0], rng)
        found.setdefault(drawn.text, drawn)
    return list(found.values())


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


def dominated(one: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Whether another one is at least as good everywhere and better somewhere; less is better."""
    return any(
        all(b <= a for a, b in zip(one, other, strict=True)) and any(b < a for a, b in zip(one, other, strict=True))
        for other in others
    )


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


def _ranked(search: Search, rung: int, requests: int, tried: Sequence[Finalist]) -> list[Trial]:
    """The best first; equals in the order in which they came, so that what is in force wins a tie."""
    objective = OBJECTIVES[search.objective]
    costs = {each.configuration.text: objective.cost(each.figures) for each in tried}
    base = costs[search.present.text]
    trials = [
        Trial(
            n, rung, requests, each.configuration, each.figures, _relative(costs[each.configuration.text], base), False
        )
        for n, each in enumerate(tried)
    ]
    present_first = sorted(trials, key=lambda trial: trial.configuration.text != search.present.text)
    return sorted(present_first, key=lambda trial: costs[trial.configuration.text])


def _simplest_of_the_best(search: Search, left: Sequence[Configuration], tried: Sequence[Finalist]) -> Configuration:
    """Of those that are within one standard error of the best the one that changes least (Breiman et al., 1984).

    The very best of many is the luckiest as well; what is in force, and then a policy's defaults, need no luck.
    """
    objective, by_text = OBJECTIVES[search.objective], {each.configuration.text: each for each in tried}
    best = by_text[left[0].text]
    level = []
    for place, each in enumerate(left):
        apart = difference(objective, best, by_text[each.text])
        if place == 0 or apart.mean <= apart.half / 2:  # half of a 95 % interval is about two standard errors
            level.append((each.text != search.present.text, len(each.weights), place))
    return left[min(level)[-1]]


def _kept(search: Search, ranked: Sequence[Trial], count: int) -> list[Trial]:
    """The best by the objective, the best by each other figure, and always what is in force."""
    texts = {trial.configuration.text for trial in ranked[:count]} | {search.present.text}
    for objective in OBJECTIVES.values():
        costs = [objective.cost(trial.figures) for trial in ranked]
        texts.add(ranked[costs.index(min(costs))].configuration.text)
    return [trial for trial in ranked if trial.configuration.text in texts]


def _replayed(
    search: Search,
    runner: Runner,
    left: Sequence[Configuration],
    seeds: int,
    requests: int | None,
    warm_up: float,
    on_done: Callable[[Result], None],
) -> list[Finalist]:
    """Each on the first requests (None: all), of which those behind the warm-up count."""
    runs = [
        Run(search.source, search.fleet, each, seed, requests, warm_up, keep_requests=True)
        for each in left
        for seed in range(1, seeds + 1)
    ]
    results = runner.results(runs, on_done=on_done)
    groups = [results[at : at + seeds] for at in range(0, len(results), seeds)]
    count = search.requests if requests is None else requests
    first = int(warm_up * count)
    prompts = [request.input_length for request in prepared(search.source).requests[first:count]]
    return [
        Finalist(
            each,
            [one.figures for one in group],
            False,
            [_mean(times) for times in zip(*(one.times[first:] for one in group), strict=True)],
            [_mean(tokens) for tokens in zip(*(one.cached[first:] for one in group), strict=True)],
            prompts,
        )
        for each, group in zip(left, groups, strict=True)
    ]


def _on_front(finalists: Sequence[Finalist]) -> list[Finalist]:
    """The same, told who is on the front."""
    costs = [[objective.cost(each.figures) for objective in OBJECTIVES.values()] for each in finalists]
    return [replace(each, on_front=not dominated(cost, costs)) for each, cost in zip(finalists, costs, strict=True)]


def _mean(times: Sequence[float]) -> float:
    return sum(times) / len(times)


def _relative(cost: float, base: float) -> float:
    """By the present one's; above 1 is worse, also where more is better."""
    if not math.isfinite(cost) or not base:
        return math.inf
    return cost / base if base > 0 else base / cost if cost else math.inf
