"""How often routers side by side choose as one router would that sees all traffic.

Covers: a replay in which a further router, the seer, is told of every placement at once and is asked about every
request at the same moment as the router whose turn it is, without acting; and what the two said. Does not cover: the
replay itself (`simulation`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from replay.simulated_router import Given, SimulatedRouter
from replay.simulation import Setup, Simulation
from replay.workload import Workload
from router.decide import Choice


@dataclass(slots=True)
class Agreement:
    """What came of comparing.

    Attributes:
        asked: decisions of both. equal: of those with the same worker.
        extra_ms: for each other one, how much dearer the chosen worker was to the seer than its own; negative where it
        was cheaper, since near-ties go to the quietest.
    """

    asked: int = 0
    equal: int = 0
    extra_ms: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of equal choices; 1 where nobody was asked."""
        return self.equal / self.asked if self.asked else 1.0

    @property
    def dearer_ms(self) -> float:
        """By how much a choice was dearer to the seer, mean over all of them."""
        return sum(max(0.0, extra) for extra in self.extra_ms) / self.asked if self.asked else 0.0

    def add(self, acted: Choice, seen: Choice) -> None:
        """One decision of both."""
        self.asked += 1
        self.equal += acted.worker == seen.worker
        if acted.worker != seen.worker:
            costs = {c.worker: cost for c, cost in zip(seen.candidates, seen.decision.costs, strict=True)}
            self.extra_ms.append(costs[acted.worker] - costs[seen.worker])


class _Seer(SimulatedRouter):
    """Knows of each placement when it is made, as the one who made it."""

    def heard_of(self, number: int, given: Given, *, is_met: bool = False) -> None:
        self.took(number, given)


class ComparedSimulation(Simulation):
    """A replay with a seer beside its routers.

    Attributes:
        agreement: so far. since_s: decisions before that time do not count.
    """

    def __init__(self, work: Workload, setup: Setup, *, since_s: float = 0.0) -> None:
        super().__init__(work, setup)
        self.agreement = Agreement()
        self.since_s = since_s
        self._seer = self._router(_Seer)
        self._routers.append(self._seer)  # it hears all that they hear, but no request goes to it

    def _choose(self, number: int) -> Choice | None:
        seen = self._seer.would_choose(number)
        acted = super()._choose(number)
        if acted is not None and seen is not None and self._timeline.now >= self.since_s:
            self.agreement.add(acted, seen)
        return acted


def compare(work: Workload, setup: Setup, *, since_s: float = 0.0) -> Agreement:
    """Replay the workload. Raises InvalidRequest when the policy or a weight is unknown."""
    simulation = ComparedSimulation(work, setup, since_s=since_s)
    simulation.run()
    return simulation.agreement
