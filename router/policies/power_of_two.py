"""`power_of_two`: two workers drawn at random, and the one of them with fewer requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.keys import rendezvous
from router.policies.protocol import Candidate, Decision, RouteRequest
from router.policies.ranked import Ranked, ranked
from router.policies.ties import by_requests


class PowerOfTwo(Ranked):
    """The power of two choices (Mitzenmacher, 2001), as `power_of_two` of the SGLang gateway has it.

    Reading two loads instead of all of them keeps many routers from running to the same idle worker at once. The draw
    comes from the prompt's digest and the turn, so that `explain` and `generate` see the same two, and the same prompt
    sees others the next time.
    """

    name = "power_of_two"
    help = "Of two workers drawn at random the one with fewer requests; for many routers that do not see one another."

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The one with fewer active requests of the two that were drawn."""
        key = request.digest + request.turn.to_bytes(8, "big")
        drawn = sorted(candidates, key=lambda c: rendezvous(key, c.worker))
        return ranked(candidates, by_requests(request, drawn[:2]) + drawn[2:], "balance")
