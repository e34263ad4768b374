"""What a request needs its worker to understand: what newer versions of the protocol brought. Pure.

A worker of the version before would skip a field that it does not know, and answer as if it had not been set. So such a
request goes to newer workers only, as long as a fleet has both.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.errors import NoWorkerAvailable
from router.link import WorkerLink
from warmkv.v1 import common_pb2


def protocol_of(sampling: common_pb2.SamplingParams) -> int:
    """The version of the protocol that a worker must speak for these parameters; zero: any does."""
    repeats = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    penalizes = repeats != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
    return 3 if penalizes or sampling.logit_bias or sampling.HasField("constraint") else 0


def too_old(links: Iterable[WorkerLink], protocol: int) -> list[str]:
    """Names of the workers that are there and do not speak it."""
    return [link.name for link in links if link.hello is not None and link.hello.protocol_version < protocol]


def none_left(error: NoWorkerAvailable, links: Iterable[WorkerLink], protocol: int) -> NoWorkerAvailable:
    """The error for a request that needs that version: `error`, and which workers would be there if they spoke it."""
    old = too_old(links, protocol)
    if not old:
        return error
    why = f"{', '.join(old)} run an older warmkv that knows no penalties, logit_bias or constraint"
    return NoWorkerAvailable(f"{error.message} ({why}: upgrade them, or leave these out.)", retry_after_s=1.0)
