"""What a request needs its worker to understand: what newer versions of the protocol brought. Pure.

A worker of the version before would skip a field that it does not know, and answer as if it had not been set. So such a
request goes to newer workers only, as long as a fleet has both.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.link import WorkerLink
from warmkv.v1 import common_pb2

_SINCE_3 = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def protocol_of(sampling: common_pb2.SamplingParams) -> int:
    """The version of the protocol that a worker must speak for these parameters; zero: any does."""
    penalizes = any(sampling.HasField(name) and getattr(sampling, name) != _NEUTRAL[name] for name in _SINCE_3)
    return 3 if penalizes or sampling.logit_bias or sampling.HasField("constraint") else 0


def too_old(links: Iterable[WorkerLink], protocol: int) -> list[str]:
    """Names of the workers that are there and do not speak it."""
    return [link.name for link in links if link.hello is not None and link.hello.protocol_version < protocol]
