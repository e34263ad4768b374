"""What caches of other sizes would have had of a trace: a fleet's tiers before and after something is added.

Covers: sizes to show, tiers of a fleet as sizes of caches, the difference that an addition makes, and where the engine
has figures of its tiers, times. Does not cover: the curve itself (`stack_distance`), one replay (`comparison`).

Slower tiers hold copies of what lies in faster ones, so what a worker can find is what its largest tier holds; the
shared tier is one cache for all workers. A fleet's hit rate is at least the better of the two. That is an approximation
(what a pool holds for running requests is not counted); the tests hold it to replays with the tiers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from replay.comparison import Fleet, Run, Runner, Source
from replay.policy_space import Configuration
from replay.profiles import PROFILES
from replay.stack_distance import Curve

OWN_TIERS = ("device", "host", "disk")
TIERS = (*OWN_TIERS, "redis")


@dataclass(frozen=True, slots=True)
class Tiers:
    """Tokens that the tiers hold: `own` of one worker by name, `redis` of the fleet; zero: no such tier."""

    own: Mapping[str, int]
    redis: int = 0

    @property
    def worker_tokens(self) -> int:
        """What one worker can find in its own tiers."""
        return max(self.own.values(), default=0)

    def plus(self, tier: str, tokens: int) -> Tiers:
        """The same with so much more of a tier."""
        if tier == "redis":
            return replace(self, redis=self.redis + tokens)
        return replace(self, own={**self.own, tier: self.own.get(tier, 0) + tokens})


@dataclass(frozen=True, slots=True)
class Hits:
    """Hit rates of a fleet.

    Attributes:
        own: of the workers' own tiers; 0 without any. shared: of the shared tier alone; 0 without one.
        bound: of one LRU cache as large as all workers together: what routing would reach that makes no copies.
    """

    own: float
    shared: float
    bound: float

    @property
    def all(self) -> float:
        """Of both; at least that."""
        return max(self.own, self.shared)


@dataclass(frozen=True, slots=True)
class Timed:
    """What a replay with the tiers themselves gives: read times, queues, and computing where that beats reading."""

    hit: float
    ttft_mean_s: float


def sizes(curve: Curve, count: int = 12) -> list[int]:
    """Sizes in tokens worth showing: doubling up to the one that is enough."""
    largest = max(curve.enough_tokens, curve.block_size)
    doubling = [round(largest / 2**step) for step in range(count)]
    return [size for size in reversed(doubling) if size >= curve.block_size]


class FleetCapacity:
    """Answers for one trace and one fleet, each size replayed once.

    Args:
        curve: of one cache without a time to live. configuration: who routes.
    """

    def __init__(
        self, curve: Curve, runner: Runner, source: Source, fleet: Fleet, configuration: Configuration
    ) -> None:
        self._curve = curve
        self._runner = runner
        self._run = Run(source, fleet, configuration)
        self._known: dict[int, float] = {}

    def ask(self, worker_tokens: Sequence[int]) -> dict[int, float]:
        """Hit rates of the fleet with so many tokens in every worker."""
        least = self._curve.block_size
        unknown = [tokens for tokens in dict.fromkeys(worker_tokens) if tokens not in self._known and tokens >= least]
        if self._run.fleet.workers == 1:
            self._known.update((tokens, self._curve.hit_rate(tokens)) for tokens in unknown)
        else:
            runs = [replace(self._run, fleet=replace(self._run.fleet, capacity_tokens=each)) for each in unknown]
            results = self._runner.results(runs)
            self._known.update(zip(unknown, (result.figures.hit for result in results), strict=True))
        return {tokens: self._known.get(tokens, 0.0) for tokens in worker_tokens}

    def hits(self, tiers: Tiers) -> Hits:
        """Of a fleet with these tiers."""
        tokens = tiers.worker_tokens
        return Hits(
            own=self.ask([tokens])[tokens],
            shared=self._curve.hit_rate(tiers.redis) if tiers.redis else 0.0,
            bound=self._curve.hit_rate(max(tokens * self._run.fleet.workers, tiers.redis)),
        )

    def timed(self, fleets: Sequence[Tiers]) -> list[Timed | None]:
        """Each with its tiers as tiers. None: the engine has one tier, or a size is missing that it takes.

        Raises:
            ValueError: the engine has no figures of a tier that was given.
        """
        runs = {n: self._run_with(tiers) for n, tiers in enumerate(fleets) if self._has_times(tiers)}
        results = dict(zip(runs, self._runner.results(runs.values()), strict=True))
        figures = {n: result.figures for n, result in results.items()}
        return [Timed(figures[n].hit, figures[n].ttft_mean_s) if n in figures else None for n, _ in enumerate(fleets)]

    def _has_times(self, tiers: Tiers) -> bool:
        return self._run.fleet.engine in PROFILES and bool(tiers.own.get("device")) and "disk" not in tiers.own

    def _run_with(self, tiers: Tiers) -> Run:
        fleet = replace(
            self._run.fleet,
            capacity_tokens=tiers.own["device"],
            host_tokens=tiers.own.get("host"),
            redis_tokens=tiers.redis or None,
        )
        return replace(self._run, fleet=fleet)


def saved_prefill(before: float, after: float) -> float:
    """Share of the computed tokens that a better hit rate saves."""
    return (after - before) / (1 - before) if before < 1 else 0.0


def enough_for(curve: Curve, hit: float) -> float:
    """The smallest size in tokens with that hit rate; inf when none has it."""
    if hit > curve.most:
        return math.inf
    low, high = 0, curve.ends[-1]
    while low < high:
        middle = (low + high) // 2
        if curve.hit_rate(middle * curve.block_size) >= hit:
            high = middle
        else:
            low = middle + 1
    return float(low * curve.block_size)
