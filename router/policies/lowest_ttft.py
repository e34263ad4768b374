"""`lowest_ttft`: fewest predicted milliseconds to the first token, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.protocol import Candidate, Decision, RouteRequest, Term, Weight
from router.policies.ties import hit_reason, only, quietest


class LowestTtft:
    """Greedy: each request takes what is soonest for itself, as in Mooncake's scheduling (Qin and others, FAST 2025).

    queue + load + compute, of the same prediction as `cache_aware`, without its price, shares and near-ties: the
    difference of both policies is what those bring. Mooncake's own estimate queues, moves blocks between workers and
    computes; here moving is reading from a slower tier or another worker. It refuses requests that would be late; here
    that is not the policy's matter. Under overload it gives up hits exactly when they are needed most.
    """

    name = "lowest_ttft"
    help = "Fewest predicted milliseconds for this request alone: queue + load + compute, unweighted."
    weights: tuple[Weight, ...] = ()
    predicts = True
    counts_blocks = False
    cost_unit = "ms"

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The least prediction; equals go to the quietest."""
        costs = tuple(c.price.ttft_ms for c in candidates)
        least = min(costs)
        chosen = quietest(request, (c for c, cost in zip(candidates, costs, strict=True) if cost == least))
        most = max(c.price.cached_tokens for c in candidates)
        return Decision(chosen, only(candidates) or hit_reason(chosen.price.cached_tokens, most), costs)

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """queue, load, compute, as they are."""
        price = candidate.price
        return (
            Term("queue", price.queue_ms, 1.0),
            Term("load", price.load_ms, 1.0),
            Term("compute", price.compute_ms, 1.0),
        )
