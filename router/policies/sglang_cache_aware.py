"""`sglang_cache_aware`: the longest match if it is long enough, unless the fleet is out of balance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.policies.protocol import Candidate, Decision, RouteRequest, Weight
from router.policies.ranked import Ranked, ranked
from router.policies.ties import by_requests, quietest


class SglangCacheAware(Ranked):
    """`cache_aware` of the SGLang gateway 0.3.2 in our words, with the defaults of its command line.

    1. Out of balance, by requests in flight: most - least > `balance_abs`, and most > `balance_rel` * least. Then the
       least loaded worker, whatever is cached.
    2. Else a worker with the longest match, if that is more than `cache_threshold` of the prompt.
    3. Else the least loaded worker.

    Three differences. A match is counted in tokens, by what the worker holds in tiers of its own or what prefills now
    running leave there, where the original keeps a radix tree of the text that it sent. Ties go to the quietest worker,
    where the original takes the first of its list. Load is that of all routers.
    """

    name = "sglang_cache_aware"
    help = (
        "SGLang's rule: the longest match above a threshold, but the least loaded worker when the fleet is unbalanced."
    )
    weights: tuple[Weight, ...] = (
        Weight("cache_threshold", 0.3, 0.0, 1.0, "", "Share of the prompt that a match must exceed."),
        Weight(
            "balance_abs",
            64,
            0,
            100_000,
            "requests",
            "Unbalanced: the busiest has more than this many above the least busy; both must hold.",
        ),
        Weight(
            "balance_rel",
            1.5,
            1.0,
            1000,
            "",
            "Unbalanced: the busiest has more than this many times the requests of the least busy.",
        ),
    )

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The least loaded, or the one with the longest match."""
        order = by_requests(request, candidates)
        least, most = order[0].active, order[-1].active
        longest = max(_matched(c) for c in candidates)
        if most - least > w["balance_abs"] and most > w["balance_rel"] * least:
            return ranked(candidates, order, "balance")
        if longest * request.block_size <= w["cache_threshold"] * request.prompt_tokens:
            return ranked(candidates, order, "balance" if longest else "no_hit")
        matched = quietest(request, (c for c in candidates if _matched(c) == longest))
        return ranked(candidates, [matched, *(c for c in order if c is not matched)], "prefix")


def _matched(candidate: Candidate) -> int:
    """Leading blocks."""
    return max(candidate.overlap.disk, candidate.arriving)
