"""Where a prefix would come from, run by run, and what that would cost: a question that changes nothing.

Covers: the plan that operators and routers are shown. Does not cover: acting on it (`promotion`, which decides
anew with what it finds).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from kvstore.acquisition import PlannedRun, Wish
from kvstore.device import DeviceTier
from kvstore.events import TierName
from kvstore.slow_reads import until_device
from kvstore.source import Source


def plan(wish: Wish, device: DeviceTier, sources: Collection[Source]) -> list[PlannedRun]:
    """Where each run of the prefix would come from, and what that costs. A question; nothing is asked of a server.

    The last run is what would be computed; the first one that is not loaded makes all that follow it computed.
    """
    runs: list[PlannedRun] = []
    first = 0
    while first < len(wish.hashes):
        run = _plan_run(wish, first, device, sources)
        if not run.load:
            left = len(wish.hashes) - first
            run = replace(run, count=left, compute_ms=wish.price(first, left))
        runs.append(run)
        first += run.count
    return runs


def _plan_run(wish: Wish, first: int, device: DeviceTier, sources: Collection[Source]) -> PlannedRun:
    names = wish.hashes[first:]
    held = device.match(names) if wish.reads.device else 0
    if held:
        return PlannedRun(TierName.DEVICE, first, held, 0.0, wish.price(first, held), load=True)
    best: PlannedRun | None = None
    rest = until_device(device, wish, names)
    for source in sources:
        count = source.known(rest) if wish.reads.allows(source.name) else 0
        if not count:
            continue
        load_ms, compute_ms = source.predict_ms(count), wish.price(first, count)
        run = PlannedRun(source.name, first, count, load_ms, compute_ms, source.affordable(count, compute_ms) > 0)
        if best is None or _pace(run) < _pace(best):
            best = run
    if best is not None:
        return best
    return PlannedRun(None, first, len(names), None, wish.price(first, len(names)), load=False)


def _pace(run: PlannedRun) -> tuple[bool, float]:
    """What is loaded rather goes first, then what takes less time a block."""
    return not run.load, 0.0 if run.load_ms is None else run.load_ms / run.count
