"""`sticky`: a session stays on its worker, unless that one is far busier than the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.keys import beginning, rendezvous
from router.policies.protocol import Candidate, Decision, RouteRequest, Weight
from router.policies.ranked import Ranked, ranked


class Sticky(Ranked):
    """Session affinity with spill-over.

    The session is the affinity key, else the beginning of the conversation. Each session has an order of workers by
    rendezvous hashing, so it spills to the same second worker every time, and a worker that leaves moves only its own
    sessions. Nothing is remembered, unlike in routers that give a new session to the least loaded worker: any number of
    routers agree without a word. The rule is that of `session` in vLLM's production-stack, which knows no bound; the
    bound is the spill gate of SMG 1.13: a worker is left when its requests exceed the fleet's mean by both margins (1.5
    times, and 4 requests, the least margin there).
    """

    name = "sticky"
    help = (
        "A session (affinity key, else the prompt's beginning) stays on its worker unless that is far above the mean."
    )
    weights: tuple[Weight, ...] = (
        Weight(
            "first_tokens",
            1024,
            1,
            1 << 20,
            "tokens",
            "How much of the prompt's beginning names a session that has no key; more than sessions share.",
        ),
        Weight(
            "spill_factor", 1.5, 1.0, 100, "", "Spill: more than this many times the mean requests; both must hold."
        ),
        Weight("spill_requests", 4, 0, 10_000, "requests", "Spill: more than this many requests above the mean."),
    )

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The session's first worker that is within the bound; there is one, since not all are above the mean."""
        key = beginning(request, int(w["first_tokens"]))
        homes = sorted(candidates, key=lambda c: rendezvous(key, c.worker))
        mean = sum(c.active for c in candidates) / len(candidates)
        bound = max(w["spill_factor"] * mean, mean + w["spill_requests"])
        order = sorted(homes, key=lambda c: c.active > bound)  # stable: the session's order on both sides of the bound
        reason = "balance" if order[0] is not homes[0] else "affinity" if request.affinity else "hash"
        return ranked(candidates, order, reason)
