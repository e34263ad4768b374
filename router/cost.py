"""Prices a worker for a request in milliseconds: wait for its queue + load from slower tiers + compute the rest.

Covers: the prefill model, load or compute tier by tier, the backlog, the pool of prefill fits. Does not cover: what the
terms weigh (`policy`) or what was sent where (`traffic`). Pure functions over measurements that the workers report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import median
from types import MappingProxyType
from typing import NamedTuple

from kvstore.events import TierName
from router.index import Overlap
from router.traffic import Unreported

# Until the first report of a fleet: about a mid-sized model on one accelerator. Replaced within a heartbeat.
_REFERENCE_TOKENS = 1000
# Two workers whose predictions differ by less than this factor count as the same machine: fits are noisy, and routing
# after noise would send every new prompt to the worker that happened to be measured best.
_SAME_MACHINE = 1.5


class PrefillFit(NamedTuple):
    """Prefill of n new tokens after m cached ones takes `fixed_ms + token_ms * n + pair_ms * n * (m + n / 2)`."""

    fixed_ms: float
    token_ms: float
    pair_ms: float = 0.0

    def ms(self, new_tokens: float, cached_tokens: float = 0.0) -> float:
        """Predicted milliseconds; the fixed part included."""
        return self.fixed_ms + self.token_ms * new_tokens + self.pair_ms * new_tokens * (cached_tokens + new_tokens / 2)


DEFAULT_FIT = PrefillFit(fixed_ms=10.0, token_ms=0.125)


class TierRead(NamedTuple):
    """Measured time of reading blocks from a tier."""

    latency_ms: float
    block_ms: float

    def ms(self, blocks: int) -> float:
        """One read of `blocks` blocks."""
        return self.latency_ms + blocks * self.block_ms if blocks else 0.0


class WorkerLoad(NamedTuple):
    """What a worker last reported.

    Attributes:
        fit: None until it measured one.
        reads: by tier; a tier that is missing or unhealthy cannot be read.
        pending_tokens: prompt tokens still to be computed, of all routers. waiting: sequences not yet started.
        running: in the batch. decoding: of those, past their prefill. decode_step_ms: one step of theirs.
        prefill_share: of its time lately (memory: 30 s) that it prefilled, for all routers; None: it does not tell.
        pool_blocks: blocks that its device tier has room for; 0: not known.
    """

    fit: PrefillFit | None = None
    reads: Mapping[TierName, TierRead] = MappingProxyType({})
    pending_tokens: int = 0
    waiting: int = 0
    running: int = 0
    decoding: int = 0
    decode_step_ms: float = 0.0
    prefill_share: float | None = None
    pool_blocks: int = 0


NO_LOAD = WorkerLoad()


class Price(NamedTuple):
    """The predicted milliseconds of one worker for one request.

    Attributes:
        queue_ms, load_ms, compute_ms: the terms; their sum is the predicted time to the first token.
        cold_ms: compute_ms if nothing were cached.
        cached: tokens that the plan reuses, by tier. cached_tokens: their sum.
    """

    queue_ms: float
    load_ms: float
    compute_ms: float
    cold_ms: float
    cached: Mapping[TierName, int]
    cached_tokens: int

    @property
    def ttft_ms(self) -> float:
        """Unweighted prediction."""
        return self.queue_ms + self.load_ms + self.compute_ms


_Span = tuple[TierName, int, int]  # tier, first block, end block
_Plan = tuple[float, float, dict[TierName, int], int]  # milliseconds to load and to compute, tokens by tier, their sum


def pool_fits(fits: Mapping[str, PrefillFit | None]) -> dict[str, PrefillFit]:
    """A fit for every worker: the median one where a worker's own differs from it by noise only, else its own.

    Workers without a fit get the median of the others, and `DEFAULT_FIT` when there is none.
    """
    known = [fit for fit in fits.values() if fit is not None]
    if not known:
        return dict.fromkeys(fits, DEFAULT_FIT)
    middle = PrefillFit(*map(median, zip(*known, strict=True)))
    theirs = middle.ms(_REFERENCE_TOKENS)

    def pooled(own: PrefillFit) -> PrefillFit:
        mine = own.ms(_REFERENCE_TOKENS)
        return middle if mine <= theirs * _SAME_MACHINE and theirs <= mine * _SAME_MACHINE else own

    return {name: middle if fit is None else pooled(fit) for name, fit in fits.items()}


def queue_ms(
    load: WorkerLoad, fit: PrefillFit, *, now: float, at: float, unreported: Unreported, keep: float = 0.2
) -> float:
    """Milliseconds until a prefill that is sent now could start.

    The backlog that a report of the moment `at` tells is worked off from then on, and what was sent since and the
    report does not know of follows it, each at its own time (Lindley's recursion): a prefill that runs counts what is
    left of it. `keep` of all that stays, because a believed rate above the true one would empty queues too soon.
    """
    backlog = fit.token_ms * load.pending_tokens + fit.fixed_ms * load.waiting
    work = backlog + unreported.ms
    left = max(work + (at - now) * 1000.0, (unreported.ends_at - now) * 1000.0, keep * work)
    return left + (load.decode_step_ms if load.decoding else 0.0)


def price(
    overlap: Overlap,
    prompt_tokens: int,
    block_size: int,
    load: WorkerLoad,
    fit: PrefillFit,
    *,
    queue: float,
    shared_reads: bool,
    peers: int = 0,
) -> Price:
    """The cheapest plan on one worker: how deep to read each tier, as its store would decide (load or compute).

    `queue` is its `queue_ms`; `peers`: leading blocks that one other worker holds in reach of this one.
    """
    if (overlap.shared if shared_reads else overlap.disk) == overlap.device:
        best = _pool_plan(overlap.device, prompt_tokens, block_size, fit)
    else:
        best = _best(_spans(overlap, shared_reads=shared_reads), prompt_tokens, block_size, load, fit)
    if peers > overlap.host and TierName.PEER in load.reads:
        for spans in _spans_with_peer(overlap, peers, shared_reads=shared_reads):
            best = min(best, _best(spans, prompt_tokens, block_size, load, fit), key=_plan_ms)
    load_ms, compute_ms, cached, cached_tokens = best
    return Price(queue, load_ms, compute_ms, fit.ms(prompt_tokens), cached, cached_tokens)


def _best(spans: Sequence[_Span], prompt_tokens: int, block_size: int, load: WorkerLoad, fit: PrefillFit) -> _Plan:
    """The cheapest plan that reads these spans up to some depth."""
    best, least = None, math.inf
    load_ms, total, cached = 0.0, 0, dict[TierName, int]()
    for tier, start, end in spans:
        # One token is always computed: the forward that gives the first new token needs it.
        cached[tier] = min(end * block_size, prompt_tokens - 1) - total
        total += cached[tier]
        if tier is not TierName.DEVICE:
            read = load.reads.get(tier)
            load_ms += math.inf if read is None else read.ms(end - start)
        compute_ms = fit.ms(prompt_tokens - total, total)
        if best is None or load_ms + compute_ms < least:
            best, least = (load_ms, compute_ms, cached.copy(), total), load_ms + compute_ms
    return best or (0.0, fit.ms(prompt_tokens), cached, 0)


@lru_cache(maxsize=256)  # in one decision it is the same for most workers of a fleet
def _pool_plan(blocks: int, prompt_tokens: int, block_size: int, fit: PrefillFit) -> _Plan:
    """The plan that reads nothing: so many blocks lie in the pool."""
    return _best([(TierName.DEVICE, 0, blocks)], prompt_tokens, block_size, NO_LOAD, fit)


def _plan_ms(plan: _Plan) -> float:
    return plan[0] + plan[1]


def _spans(overlap: Overlap, *, shared_reads: bool) -> list[_Span]:
    """The part that each tier adds, fastest first; the pool always stands first."""
    deepest = overlap.shared if shared_reads else overlap.disk
    host, disk, redis = (TierName.HOST, overlap.host), (TierName.DISK, overlap.disk), (TierName.REDIS, deepest)
    return _in_order(overlap.device, (host, disk, redis))


def _spans_with_peer(overlap: Overlap, peers: int, *, shared_reads: bool) -> list[list[_Span]]:
    """The same with a peer before and behind the disk: which one is faster depends on both machines."""
    deepest = overlap.shared if shared_reads else overlap.disk
    host, disk, redis = (TierName.HOST, overlap.host), (TierName.DISK, overlap.disk), (TierName.REDIS, deepest)
    peer = (TierName.PEER, peers)
    orders = [(host, peer, disk, redis)]
    if peers > overlap.disk > overlap.host:
        orders.append((host, disk, peer, redis))
    return [_in_order(overlap.device, order) for order in orders]


def _in_order(pool: int, ends: Sequence[tuple[TierName, int]]) -> list[_Span]:
    spans, at = [(TierName.DEVICE, 0, pool)], pool
    for tier, end in ends:
        if end > at:
            spans.append((tier, at, end))
            at = end
    return spans
