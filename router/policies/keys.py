"""A key for a request, and a worker for a key: what hashing policies have in common."""

from __future__ import annotations

import hashlib

from router.policies.protocol import RouteRequest


def beginning(request: RouteRequest, tokens: int) -> bytes:
    """The affinity key; without one the hash of the prompt's first full blocks, about `tokens`; else of all of it."""
    if request.affinity:
        return request.affinity.encode()
    blocks = max(1, tokens // request.block_size)
    return request.hashes[min(blocks, len(request.hashes)) - 1] if request.hashes else request.digest


def rendezvous(key: bytes, worker: str) -> bytes:
    """Highest random weight (Thaler, Ravishankar, 1998), as the least digest."""
    return hashlib.blake2b(key + b"\0" + worker.encode(), digest_size=8).digest()
