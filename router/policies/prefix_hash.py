"""`prefix_hash`: prompts that begin alike go to the same worker, within a bound on its load."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from functools import lru_cache

from router.policies.keys import beginning
from router.policies.protocol import Candidate, Decision, RouteRequest, Weight
from router.policies.ranked import Ranked, ranked

_RING_POINTS = 64  # points a worker: the largest share is then within about a quarter of the mean


class PrefixHash(Ranked):
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

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """The first on the ring, from the key on, that has room."""
        by_name = {c.worker: c for c in candidates}
        order = _ring_order(tuple(sorted(by_name)), beginning(request, int(w["prefix_tokens"])))
        room = math.ceil(w["load_factor"] * (1 + sum(c.active for c in candidates)) / len(candidates))
        chosen = next(by_name[name] for name in order if by_name[name].active < room)
        reason = "balance" if chosen.worker != order[0] else "affinity" if request.affinity else "hash"
        after = order.index(chosen.worker)
        return ranked(candidates, [by_name[name] for name in order[after:] + order[:after]], reason)


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
