"""`least_loaded`: the worker with the fewest requests, whatever they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.protocol import Candidate, Decision, RouteRequest
from router.policies.ranked import Ranked, ranked
from router.policies.ties import by_requests


class LeastLoaded(Ranked):
    """Fewest requests; among equals the one that was given least work lately."""

    name = "least_loaded"
    help = "The worker with the fewest requests; among equals the one that was given least work lately."

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """Fewest active requests."""
        return ranked(candidates, by_requests(request, candidates), "balance")
