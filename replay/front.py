"""What a search compares: figures that are to be better, configurations with theirs, and which of them nobody beats.

Covers: objectives, finalists, the Pareto front. Does not cover: finding them (`tuning`), noise (`significance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from replay.comparison import Spread, spread
from replay.outcome import Figures
from replay.policy_space import Configuration


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


def dominated(one: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    """Whether another one is at least as good everywhere and better somewhere; less is better."""
    return any(
        all(b <= a for a, b in zip(one, other, strict=True)) and any(b < a for a, b in zip(one, other, strict=True))
        for other in others
    )


def on_front(finalists: Sequence[Finalist]) -> list[Finalist]:
    """The same, told who is on the front."""
    costs = [[objective.cost(each.figures) for objective in OBJECTIVES.values()] for each in finalists]
    return [replace(each, on_front=not dominated(cost, costs)) for each, cost in zip(finalists, costs, strict=True)]
