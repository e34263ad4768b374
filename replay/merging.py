"""Several traces as one, by time.

Covers: traces that were recorded at the same time of different routers or fleets, and others, which all begin at zero.
Does not cover: prefixes that two files share: each file has numbers of its own, so they count as different. (`warmkv
record --also` follows several routers with one numbering.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from replay.traces import Request, Trace


def merge(traces: Sequence[Trace]) -> Trace:
    """All requests, with ids, tenants and sessions of their own for each file.

    Times count from the earliest start where every trace says when it was recorded, else all begin together.

    Raises:
        ValueError: there is none, or block sizes differ.
    """
    if not traces:
        raise ValueError("there is no trace; give at least one")
    if len(traces) == 1:
        return traces[0]
    if len({trace.block_size for trace in traces}) > 1:
        sizes = ", ".join(f"{trace.name} {trace.block_size}" for trace in traces)
        raise ValueError(f"traces of different block sizes cannot be merged ({sizes}); replay them one by one")
    starts = [trace.started_s for trace in traces]
    known = [start for start in starts if start is not None]
    begin = min(known) if len(known) == len(starts) else None
    requests: list[Request] = []
    blocks = tenants = 0
    for number, trace in enumerate(traces):
        later_s = 0.0 if begin is None or trace.started_s is None else trace.started_s - begin
        requests += [_moved(request, later_s, blocks, tenants, number) for request in trace.requests]
        blocks += 1 + max((first + count for r in trace.requests for first, count in r.runs), default=0)
        tenants += 1 + max((r.tenant for r in trace.requests if r.tenant is not None), default=0)
    requests.sort(key=lambda request: request.time_s)
    name = "+".join(trace.name for trace in traces)
    return Trace(name, traces[0].block_size, tuple(requests), begin, any(trace.cut_off for trace in traces))


def _moved(request: Request, later_s: float, blocks: int, tenants: int, number: int) -> Request:
    return replace(
        request,
        time_s=request.time_s + later_s,
        runs=tuple((first + blocks, count) for first, count in request.runs),
        session=None if request.session is None else f"{number}/{request.session}",
        parent=None if request.parent is None else f"{number}/{request.parent}",
        tenant=None if request.tenant is None else request.tenant + tenants,
    )
