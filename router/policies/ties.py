"""What policies have in common: how ties are broken (never by the order of the list), and the reasons they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from router.policies.keys import rendezvous
from router.policies.protocol import Candidate, RouteRequest


def quietest(request: RouteRequest, candidates: Iterable[Candidate]) -> Candidate:
    """Of equals the one that was given least work lately, and of those the one that the prompt's digest names.

    Requests in flight do not tell workers apart where there is one at a time: the work of the last seconds does.
    """
    equals = list(candidates)
    least = min(c.recent_work_ms for c in equals)
    # Most often that is one worker: a hash of every near-tied one would cost more than the rest of the decision.
    quiet = [c for c in equals if c.recent_work_ms == least]
    return quiet[0] if len(quiet) == 1 else min(quiet, key=lambda c: rendezvous(request.digest, c.worker))


def by_requests(request: RouteRequest, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Fewest active requests first; ties as in `quietest`."""
    return sorted(candidates, key=lambda c: (c.active, c.recent_work_ms, rendezvous(request.digest, c.worker)))


def only(candidates: Sequence[Candidate]) -> str:
    """The reason that beats all others where there is no choice; empty where there is one."""
    return "only_one" if len(candidates) == 1 else ""


def hit_reason(own: float, most: float) -> str:
    """By how much of the prompt the chosen worker has, and how much the one that has most."""
    if not most:
        return "no_hit"
    return "prefix" if own == most else "balance"
