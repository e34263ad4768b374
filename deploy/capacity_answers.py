"""What `warmkv capacity` finds out: the curves, a fleet at some of their sizes, and what additions would give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replay.capacity import FleetCapacity, Hits, Tiers, Timed, saved_prefill, sizes
from replay.comparison import Fleet, Runner, Source
from replay.policy_space import Configuration
from replay.stack_distance import Curve, curves
from replay.workload import Workload

_FLEET_POINTS = 6


@dataclass(frozen=True, slots=True)
class Addition:
    """More of a tier: `tokens`, and as it was asked for."""

    tier: str
    tokens: int
    asked: str


@dataclass(frozen=True, slots=True)
class Gain:
    """What one would give. `saved`: share of the computed prompt tokens that are not computed any more.

    `timed`: of a replay with tiers; None: the engine has none.
    """

    addition: Addition
    hits: Hits
    saved: float
    timed: Timed | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """All of it.

    Attributes:
        curves: by time to live in seconds; inf: never ends. sizes: worth showing, tokens of the whole fleet.
        split: hit rate by size where the workers share it evenly; empty for one worker.
        now: of the tiers that were given; None: none were. now_timed: the same replayed with tiers; None: the engine
        has none. bytes_per_token: None: sizes are tokens.
    """

    curves: Mapping[float, Curve]
    sizes: Sequence[int]
    split: Mapping[int, float]
    fleet: Fleet
    configuration: Configuration
    tiers: Tiers
    now: Hits | None
    gains: Sequence[Gain]
    bytes_per_token: int | None
    now_timed: Timed | None = None

    @property
    def endless(self) -> Curve:
        """Without a time to live."""
        return self.curves[math.inf]


def answer(
    work: Workload,
    runner: Runner,
    source: Source,
    fleet: Fleet,
    configuration: Configuration,
    *,
    tiers: Tiers,
    additions: Sequence[Addition],
    ttls_s: Sequence[float],
    bytes_per_token: int | None,
) -> Answers:
    """Find it out. `ttls_s` contains inf. Raises ValueError when nothing counts."""
    found = dict(zip(ttls_s, curves(work, ttls_s=ttls_s), strict=True))
    endless = found[math.inf]
    shown = sizes(endless)
    asked = FleetCapacity(endless, runner, source, fleet, configuration)
    at = shown[-_FLEET_POINTS:] if fleet.workers > 1 else []
    wanted = [tiers, *(tiers.plus(each.tier, each.tokens) for each in additions)]
    # All at once, so that they are replayed side by side.
    rates = asked.ask([*(size // fleet.workers for size in at), *(each.worker_tokens for each in wanted)])
    has_tiers = bool(tiers.own or tiers.redis)
    now = asked.hits(tiers)
    timed = asked.timed(wanted)
    gains = [
        Gain(each, hits, saved_prefill(now.all, hits.all), replayed)
        for each, after, replayed in zip(additions, wanted[1:], timed[1:], strict=True)
        for hits in [asked.hits(after)]
    ]
    return Answers(
        found,
        shown,
        {size: rates[size // fleet.workers] for size in at},
        fleet,
        configuration,
        tiers,
        now if has_tiers or additions else None,
        gains,
        bytes_per_token,
        timed[0],
    )
