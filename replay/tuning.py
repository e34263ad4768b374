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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from replay.comparison import Fleet, Result, Run, Runner, Source, prepared
from replay.front import OBJECTIVES, Finalist, on_front
from replay.outcome import Figures
from replay.policy_space import Configuration, draw
from replay.significance import Difference, difference
from router.policy import find_policy

KEPT = 3  # one of so many goes on to a part that is so many times as long
HELD_OUT = 0.3
LEAST_REQUESTS = 300  # of the shortest part
FINALISTS = 5
_RUNGS = 3
_MOST_TRIALS = 1000


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
    finalists = on_front(_replayed(search, runner, left, search.seeds, None, search.trained / search.requests, on_done))
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


def _mean(times: Sequence[float]) -> float:
    return sum(times) / len(times)


def _relative(cost: float, base: float) -> float:
    """By the present one's; above 1 is worse, also where more is better."""
    if not math.isfinite(cost) or not base:
        return math.inf
    return cost / base if base > 0 else base / cost if cost else math.inf
