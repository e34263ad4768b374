"""`round_robin`: one worker after the other, whatever they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.protocol import Candidate, Decision, RouteRequest
from router.policies.ranked import Ranked


class RoundRobin(Ranked):
    """One after the other, whatever they hold: the baseline."""

    name = "round_robin"
    help = "One worker after the other, whatever they hold; the baseline to compare with."

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The next in the order of names."""
        names = sorted(c.worker for c in candidates)
        start = request.turn % len(names)
        costs = tuple(float((names.index(c.worker) - start) % len(names)) for c in candidates)
        return Decision(candidates[costs.index(0.0)], "order", costs)
