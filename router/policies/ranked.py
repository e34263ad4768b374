"""The base of policies that predict nothing: they put the workers in an order, and have no terms to explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.protocol import Candidate, Decision, RouteRequest, Term, Weight
from router.policies.ties import only


class Ranked:
    """What they share. Costs are ranks: 0 for the first of the order."""

    weights: tuple[Weight, ...] = ()
    predicts = False
    counts_blocks = False
    cost_unit = "rank"

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """None."""
        return ()


def ranked(candidates: Sequence[Candidate], order: Sequence[Candidate], reason: str) -> Decision:
    """Chooses the first of the order, which names every candidate once."""
    rank = {c.worker: float(n) for n, c in enumerate(order)}
    return Decision(order[0], only(candidates) or reason, tuple(rank[c.worker] for c in candidates))
