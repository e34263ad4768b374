"""Routing policies by name, and the check of their weights.

Covers: the list of policies, and the names that callers need. Does not cover: what a policy is (`policies.protocol`) or
the rules themselves: one file each in `router/policies`.
"""

from __future__ import annotations

from collections.abc import Mapping

from router.errors import InvalidRequest
from router.policies.cache_aware import CacheAware
from router.policies.dynamo_cost import DynamoCost
from router.policies.least_loaded import LeastLoaded
from router.policies.lowest_ttft import LowestTtft
from router.policies.power_of_two import PowerOfTwo
from router.policies.prefix_hash import PrefixHash
from router.policies.protocol import BlockLoad, Candidate, Decision, Policy, RouteRequest, Term, Weight
from router.policies.round_robin import RoundRobin
from router.policies.sglang_cache_aware import SglangCacheAware
from router.policies.sticky import Sticky

__all__ = [
    "POLICIES",
    "BlockLoad",
    "Candidate",
    "Decision",
    "Policy",
    "RouteRequest",
    "Term",
    "Weight",
    "checked_weights",
    "find_policy",
]

# In the order of the documentation: ours, the peers', what needs no knowledge of caches, the baselines.
_ALL: tuple[Policy, ...] = (
    CacheAware(),
    LowestTtft(),
    DynamoCost(),
    SglangCacheAware(),
    Sticky(),
    PrefixHash(),
    PowerOfTwo(),
    LeastLoaded(),
    RoundRobin(),
)
POLICIES: dict[str, Policy] = {policy.name: policy for policy in _ALL}


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
