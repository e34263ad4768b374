"""`cache_aware`: fewest predicted milliseconds to the first token, with computing priced by how busy the fleet is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum  # a sum that depends on the order would make choices depend on it

from router.policies.keys import rendezvous
from router.policies.protocol import Candidate, Decision, RouteRequest, Term, Weight
from router.policies.ties import hit_reason, only, quietest

# Who was given less than this in the last half minute, a hundredth of it, needs no help: a second turn that was moved
# to a worker that came a moment later would miss what the first one left.
_IDLE_MS = 300.0


class CacheAware:
    """Fewest predicted milliseconds to the first token, where computing costs more the busier the fleet is.

    A second of waiting is lost by one request; a second of prefill is lost by everybody who joins that queue before it
    runs empty, and a busy period grows by 1/(1 - utilisation) for each second of work. So compute is priced by that
    factor. Near-ties go to the worker that was given least work lately: estimates are not better than that, and a new
    session's later turns will come back to where it starts.
    """

    name = "cache_aware"
    help = "Fewest predicted milliseconds to the first token: queue + load from the slower tiers + compute of the rest."
    weights: tuple[Weight, ...] = (
        Weight("queue", 1.0, 0.0, 100.0, "", "Weight of waiting behind the worker's queue."),
        Weight(
            "load",
            1.0,
            0.0,
            100.0,
            "",
            "Weight of reading blocks from host RAM, disk, other workers or the shared tier.",
        ),
        Weight("compute", 1.0, 0.0, 100.0, "", "Weight of computing what is not cached; the price multiplies it."),
        Weight("price_floor", 1.5, 1.0, 100.0, "", "Price of compute in an idle fleet; higher keeps sessions warm."),
        Weight("price_cap", 10.0, 1.0, 1000.0, "", "Price of compute in a saturated fleet."),
        Weight(
            "sharing", 1.0, 0.0, 1.0, "", "Part of a hot block's copy that is charged to all who use it; 0: to the one."
        ),
        Weight(
            "decode", 0.0005, 0.0, 1.0, "", "Price of a millisecond by which computing delays one request that decodes."
        ),
        Weight("interference", 0.1, 0.0, 10.0, "", "The same on workers of role decode, for which others prefill."),
        Weight(
            "tie_ms", 20.0, 0.0, 10_000.0, "ms", "Costs closer than this go to the quietest worker, but see tie_share."
        ),
        Weight("tie_share", 0.05, 0.0, 1.0, "", "A tie is never wider than this share of the prompt's cold prefill."),
        Weight(
            "warm_up",
            0.25,
            0.0,
            1.0,
            "",
            "A worker that has just come is given so much of the others' work, cached or not.",
        ),
        Weight(
            "affinity_ms", 10.0, 0.0, 60_000.0, "ms", "Charged to workers that a request's affinity key does not name."
        ),
    )
    predicts = True
    counts_blocks = False
    cost_unit = "ms"

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The cheapest, or the quietest of those that are nearly as cheap."""
        price = _price_of_compute(request, w)
        home = _home(request, candidates)
        plain = _costs(candidates, price, w)
        if any(c.new for c in candidates):
            plain = [cost - owed for cost, owed in zip(plain, _owed_ms(candidates, w), strict=True)]
        costs = (
            plain
            if home is None
            else [cost + w["affinity_ms"] * (c.worker != home) for cost, c in zip(plain, candidates, strict=True)]
        )
        chosen = _quietest_of_cheapest(request, candidates, costs, w)
        by_affinity = home == chosen.worker and _quietest_of_cheapest(request, candidates, plain, w) is not chosen
        most = max(c.price.cached_tokens for c in candidates)
        reason = only(candidates) or ("affinity" if by_affinity else hit_reason(chosen.price.cached_tokens, most))
        return Decision(chosen, reason, tuple(costs))

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """queue, load, compute, decode, warm_up, affinity; compute's weight holds its price and what others pay."""
        price = candidate.price
        terms: tuple[Term, ...] = (
            Term("queue", price.queue_ms, w["queue"]),
            Term("load", price.load_ms, w["load"]),
            Term("compute", price.compute_ms, _price_of_compute(request, w) * _own_share(candidate, w)),
        )
        if candidate.decoding:
            terms = (*terms, Term("decode", price.compute_ms * candidate.decoding, _delay(candidate, w)))
        if owed_ms := _owed_ms(candidates, w)[candidates.index(candidate)]:
            terms = (*terms, Term("warm_up", owed_ms, -1.0))
        home = _home(request, candidates)
        away = 0.0 if home == candidate.worker else 1.0
        return terms if home is None else (*terms, Term("affinity", w["affinity_ms"], away))


def _price_of_compute(request: RouteRequest, w: Mapping[str, float]) -> float:
    """What a millisecond of prefill costs the fleet, times its weight."""
    busy = min(request.utilisation, 1.0 - 1e-9)
    return w["compute"] * min(max(1.0 / (1.0 - busy), w["price_floor"]), max(w["price_cap"], w["price_floor"]))


def _costs(candidates: Sequence[Candidate], price_of_compute: float, w: Mapping[str, float]) -> list[float]:
    """The sums of `terms`, but for affinity. Of all in one go: this is asked of every worker at each decision."""
    queue, load, sharing, decode, there = w["queue"], w["load"], w["sharing"], w["decode"], w["interference"]
    return [
        (p := c.price).queue_ms * queue
        + p.load_ms * load
        + p.compute_ms
        * (price_of_compute * (1.0 - sharing * (1.0 - c.share)) + c.decoding * (there if c.only_answers else decode))
        for c in candidates
    ]


def _delay(c: Candidate, w: Mapping[str, float]) -> float:
    """Price of a millisecond by which one request is delayed that decodes there."""
    return w["interference"] if c.only_answers else w["decode"]


def _own_share(c: Candidate, w: Mapping[str, float]) -> float:
    """The part of its computing that a request is charged; the rest is on those in flight that share the blocks."""
    return 1.0 - w["sharing"] * (1.0 - c.share)


def _owed_ms(candidates: Sequence[Candidate], w: Mapping[str, float]) -> list[float]:
    """What each new worker lacks of its share of work, where the others have any to speak of."""
    others = [c.recent_work_ms for c in candidates if not c.new]
    work_ms = fsum(others) / len(others) if others else 0.0
    share_ms = w["warm_up"] * work_ms if work_ms >= _IDLE_MS else 0.0
    return [max(0.0, share_ms - c.recent_work_ms) if c.new else 0.0 for c in candidates]


def _quietest_of_cheapest(
    request: RouteRequest, candidates: Sequence[Candidate], costs: Sequence[float], w: Mapping[str, float]
) -> Candidate:
    least = min(costs)
    tolerance = min(w["tie_ms"], w["tie_share"] * min(c.price.cold_ms for c in candidates))
    near = [c for c, cost in zip(candidates, costs, strict=True) if cost <= least + tolerance]
    return quietest(request, near)


def _home(request: RouteRequest, candidates: Sequence[Candidate]) -> str | None:
    """The worker that an affinity key names: stable while the fleet is, and moved only when that worker goes."""
    if not request.affinity:
        return None
    key = request.affinity.encode()
    return min((c.worker for c in candidates), key=lambda worker: rendezvous(key, worker))
