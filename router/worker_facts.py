"""What a worker is, in words for people and labels: its role, its ranks, how it computes and stores. Pure.

Covers: reading that from its hello. Does not cover: whether it fits the fleet (`handshake`), how busy it is (`link`).
"""

from __future__ import annotations

from dataclasses import dataclass

from router.pairing import ROLE_NAMES
from warmkv.v1 import worker_pb2

_LAYOUT_WORDS = 6  # "L8 KVH4 K64 V64 float32 B16", and one more where it is quantised


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """Of one worker.

    Attributes:
        role: both, prefill or decode. ranks: processes that share out its model. deterministic: canonical mode.
        kv_dtype: what K/V is stored as; empty: it does not say so that this version understands.
    """

    role: str
    ranks: int
    deterministic: bool
    kv_dtype: str


def facts_of(hello: worker_pb2.WorkerHello) -> WorkerFacts:
    """What a worker said when it joined."""
    scheme = hello.scheme
    role = ROLE_NAMES.get(hello.role, "unknown")
    return WorkerFacts(role, max(1, scheme.tp_size), scheme.canonical, stored_dtype(scheme.layout))


def stored_dtype(layout: str) -> str:
    """What K/V is stored as, of a layout in the words of `HashScheme.layout`; empty: it says something else."""
    words = layout.split()
    if len(words) < _LAYOUT_WORDS:
        return ""
    return words[-1].partition("/")[0] if "/" in words[-1] else words[_LAYOUT_WORDS - 2]
