"""Routing policies: which worker gets a request. Each is a pure function of what the router knows at that moment.

Covers: the policies, their weights and the check of both. Does not cover: where the numbers come from (`cost`, `index`,
`traffic`). A policy never sees an ineligible worker, never keeps state, and never decides by the order of the list.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from router.cost import Price
from router.errors import InvalidRequest

_RING_POINTS = 64  # points a worker: the largest share is then within about a quarter of the mean


@dataclass(frozen=True, slots=True)
class Weight:
    """One number that can be set while the fleet runs; `unit` is empty for a ratio."""

    name: str
    default: float
    min: float
    max: float
    unit: str
    help: str


class Candidate(NamedTuple):
    """An eligible worker, as a policy sees it.

    Attributes:
        price: the prediction. share: which part of `price.compute_ms` this request is charged; the rest is on the
        requests in flight that share the blocks. active: requests that run or wait there, of all routers.
        recent_work_ms: work that this router gave it lately.
    """

    worker: str
    price: Price
    share: float
    active: int
    recent_work_ms: float


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a policy may know of a request.

    Attributes:
        hashes: short hashes of its full blocks. digest: of the whole prompt, in the tenant's namespace.
        affinity: the caller's key, with the tenant in it; empty: none. turn: decisions that this router made before.
        utilisation: share of the fleet's time that is taken.
    """

    hashes: Sequence[bytes]
    block_size: int
    digest: bytes
    affinity: str
    turn: int
    utilisation: float


class Term(NamedTuple):
    """A summand of a cost: `ms` times `weight`."""

    name: str
    ms: float
    weight: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy chose.

    Attributes:
        reason: prefix, balance, affinity, no_hit, only_one, order or hash. costs: aligned with the candidates; least is
        best. Milliseconds where the policy predicts, else a rank.
    """

    chosen: Candidate
    reason: str
    costs: tuple[float, ...]


class Policy(Protocol):
    """A rule. `predicts`: whether its costs are milliseconds."""

    name: str
    help: str
    weights: tuple[Weight, ...]
    predicts: bool

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """Choose among at least one candidate; `w` has every weight. Changes nothing."""
        ...

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """How the cost of one of the candidates came about; empty when nothing is predicted."""
        ...


class RoundRobin:
    """One after the other, whatever they hold: the baseline."""

    name = "round_robin"
    help = "One worker after the other, whatever they hold; the baseline to compare with."
    weights: tuple[Weight, ...] = ()
    predicts = False

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The next in the order of names."""
        names = sorted(c.worker for c in candidates)
        start = request.turn % len(names)
        costs = tuple(float((names.index(c.worker) - start) % len(names)) for c in candidates)
        return Decision(candidates[costs.index(0.0)], "order", costs)

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """None."""
        return ()


class LeastLoaded:
    """Fewest requests; among equals the one that was given least work lately."""

    name = "least_loaded"
    help = "The worker with the fewest requests; among equals the one that was given least work lately."
    weights: tuple[Weight, ...] = ()
    predicts = False

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """Fewest active requests."""
        order = sorted(candidates, key=lambda c: (c.active, c.recent_work_ms, _rendezvous(request.digest, c.worker)))
        rank = {c.worker: float(n) for n, c in enumerate(order)}
        return Decision(order[0], _only(candidates) or "balance", tuple(rank[c.worker] for c in candidates))

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """None."""
        return ()


class PrefixHash:
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2016) over the prompt's beginning."""

    name = "prefix_hash"
    help = (
        "Prompts that begin alike, or carry the same affinity key, go to the same worker unless it is fuller than"
        " the mean allows; needs no knowledge of caches."
    )
    weights: tuple[Weight, ...] = (
        Weight("prefix_tokens", 256, 1, 1 << 20, "tokens", "How much of the prompt's beginning is hashed."),
        Weight("load_factor", 1.25, 1.01, 100, "", "A worker may have this many times the mean number of requests."),
    )
    predicts = False

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The first on the ring, from the key on, that has room."""
        by_name = {c.worker: c for c in candidates}
        order = _ring_order(tuple(sorted(by_name)), _ring_key(request, int(w["prefix_tokens"])))
        room = math.ceil(w["load_factor"] * (1 + sum(c.active for c in candidates)) / len(candidates))
        chosen = next(by_name[name] for name in order if by_name[name].active < room)
        reason = "balance" if chosen.worker != order[0] else "affinity" if request.affinity else "hash"
        after = order.index(chosen.worker)
        rank = {name: float((n - after) % len(order)) for n, name in enumerate(order)}
        return Decision(chosen, _only(candidates) or reason, tuple(rank[c.worker] for c in candidates))

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """None."""
        return ()


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
            "tie_ms", 20.0, 0.0, 10_000.0, "ms", "Costs closer than this go to the quietest worker, but see tie_share."
        ),
        Weight("tie_share", 0.1, 0.0, 1.0, "", "A tie is never wider than this share of the prompt's cold prefill."),
        Weight(
            "affinity_ms", 10.0, 0.0, 60_000.0, "ms", "Charged to workers that a request's affinity key does not name."
        ),
    )
    predicts = True

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The cheapest, or the quietest of those that are nearly as cheap."""
        price = _price_of_compute(request, w)
        home = _home(request, candidates)
        plain = [_cost(c, price, w) for c in candidates]
        costs = (
            plain
            if home is None
            else [cost + w["affinity_ms"] * (c.worker != home) for cost, c in zip(plain, candidates, strict=True)]
        )
        chosen = _quietest_of_cheapest(request, candidates, costs, w)
        by_affinity = home == chosen.worker and _quietest_of_cheapest(request, candidates, plain, w) is not chosen
        reason = _only(candidates) or ("affinity" if by_affinity else _hit_reason(chosen, candidates))
        return Decision(chosen, reason, tuple(costs))

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """queue, load, compute, affinity; compute's weight holds its price and the share of a copy that others pay."""
        price = candidate.price
        terms = (
            Term("queue", price.queue_ms, w["queue"]),
            Term("load", price.load_ms, w["load"]),
            Term("compute", price.compute_ms, _price_of_compute(request, w) * candidate.share),
        )
        home = _home(request, candidates)
        away = 0.0 if home == candidate.worker else 1.0
        return terms if home is None else (*terms, Term("affinity", w["affinity_ms"], away))


POLICIES: dict[str, Policy] = {p.name: p for p in (CacheAware(), PrefixHash(), LeastLoaded(), RoundRobin())}


def find_policy(name: str) -> Policy:
    """The policy of that name. Raises InvalidRequest that names those there are."""
    if name not in POLICIES:
        raise InvalidRequest(f"There is no policy {name!r}; set one of {', '.join(sorted(POLICIES))}.")
    return POLICIES[name]


def checked_weights(policy: Policy, given: Mapping[str, float]) -> dict[str, float]:
    """All weights of the policy: those given, else the defaults. Raises InvalidRequest that names what is allowed."""
    known = {weight.name: weight for weight in policy.weights}
    for name, value in given.items():
        weight = known.get(name)
        if weight is None:
            allowed = f"set some of {', '.join(sorted(known))}" if known else "it has none"
            raise InvalidRequest(f"The policy {policy.name} has no weight {name!r}; {allowed}.")
        if not weight.min <= value <= weight.max:  # false for NaN as well
            raise InvalidRequest(
                f"The weight {name} of {policy.name} was {value:g}; set it from {weight.min:g} to {weight.max:g}."
            )
    return {name: float(given.get(name, weight.default)) for name, weight in known.items()}


def _price_of_compute(request: RouteRequest, w: Mapping[str, float]) -> float:
    """What a millisecond of prefill costs the fleet, times its weight."""
    busy = min(request.utilisation, 1.0 - 1e-9)
    return w["compute"] * min(max(1.0 / (1.0 - busy), w["price_floor"]), max(w["price_cap"], w["price_floor"]))


def _cost(c: Candidate, price_of_compute: float, w: Mapping[str, float]) -> float:
    p = c.price
    return p.queue_ms * w["queue"] + p.load_ms * w["load"] + p.compute_ms * price_of_compute * c.share


def _quietest_of_cheapest(
    request: RouteRequest, candidates: Sequence[Candidate], costs: Sequence[float], w: Mapping[str, float]
) -> Candidate:
    least = min(costs)
    tolerance = min(w["tie_ms"], w["tie_share"] * min(c.price.cold_ms for c in candidates))
    near = [c for c, cost in zip(candidates, costs, strict=True) if cost <= least + tolerance]
    return min(near, key=lambda c: (c.recent_work_ms, _rendezvous(request.digest, c.worker)))


def _hit_reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    most = max(c.price.cached_tokens for c in candidates)
    if not most:
        return "no_hit"
    return "prefix" if chosen.price.cached_tokens == most else "balance"


def _only(candidates: Sequence[Candidate]) -> str:
    return "only_one" if len(candidates) == 1 else ""


def _home(request: RouteRequest, candidates: Sequence[Candidate]) -> str | None:
    """The worker that an affinity key names: stable while the fleet is, and moved only when that worker goes."""
    if not request.affinity:
        return None
    key = request.affinity.encode()
    return min((c.worker for c in candidates), key=lambda worker: _rendezvous(key, worker))


def _rendezvous(key: bytes, worker: str) -> bytes:
    """Highest random weight (Thaler, Ravishankar, 1998), as the least digest."""
    return hashlib.blake2b(key + b"\0" + worker.encode(), digest_size=8).digest()


def _ring_key(request: RouteRequest, prefix_tokens: int) -> bytes:
    if request.affinity:
        return request.affinity.encode()
    blocks = max(1, prefix_tokens // request.block_size)
    return request.hashes[min(blocks, len(request.hashes)) - 1] if request.hashes else request.digest


def _ring_order(workers: tuple[str, ...], key: bytes) -> list[str]:
    """Workers in the order in which the ring meets them from the key on."""
    points, owners = _ring(workers)
    start = bisect(points, _point(key))
    return list(dict.fromkeys(owners[start:] + owners[:start]))


@lru_cache(maxsize=64)
def _ring(workers: tuple[str, ...]) -> tuple[list[bytes], list[str]]:
    ring = sorted((_point(f"{name}#{n}".encode()), name) for name in workers for n in range(_RING_POINTS))
    return [point for point, _ in ring], [name for _, name in ring]


def _point(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
