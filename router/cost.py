"""Prices a worker for a request in milliseconds: wait for its queue + load from slower tiers + compute the rest.

Covers: the prefill model, load or compute tier by tier, the backlog, the pool of prefill fits. Does not cover: what the
terms weigh (`policy`) or what was sent where (`traffic`). Pure functions over measurements that the workers report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
        answer_blocks: of those, what answers under way hold besides their prompts, and will before one of them ends.
        slots: sequences that may hold blocks; 0: not known.
        answer_ms: mean time from an answer's first token to its end; 0: not known.
        freed_blocks: mean that one gave back when it ended.
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
    answer_blocks: int = 0
    slots: int = 0
    answer_ms: float = 0.0
    freed_blocks: float = 0.0


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


_End = tuple[TierName, int]  # how many leading blocks a tier has, with those before it
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
    most = theirs * _SAME_MACHINE
    return {
        name: middle
        if fit is None or ((mine := fit.ms(_REFERENCE_TOKENS)) <= most and theirs <= mine * _SAME_MACHINE)
        else fit
        for name, fit in fits.items()
    }


def lacked_blocks(load: WorkerLoad, prompt_blocks: int) -> int:
    """Blocks that a pool has too few; zero or less: there is room, or the worker does not tell.

    `prompt_blocks`: different ones of all prompts there, with the one that is asked for.
    """
    known = load.answer_ms and load.pool_blocks
    return prompt_blocks + load.answer_blocks - load.pool_blocks if known else 0


def room_ms(load: WorkerLoad, blocks: int, requests: int) -> float:
    """Milliseconds until so many answers have ended that a worker has blocks and a slot for one more prompt.

    Of n that run one ends every `answer_ms / n` on average (Little's law), however long those will be. Zero where there
    is room, and while the worker does not tell.

    `blocks`: its `lacked_blocks`. `requests`: that are there, without this one.
    """
    ends = math.ceil(max(0, blocks) / max(1.0, load.freed_blocks))
    if load.slots:
        ends = max(ends, requests + 1 - load.slots)
    return load.answer_ms * ends / max(1, load.running)


def queue_ms(
    load: WorkerLoad,
    fit: PrefillFit,
    sent: Unreported,
    *,
    now: float,
    reported_at: float,
    room: float = 0.0,
    keep: float = 0.2,
) -> float:
    """Milliseconds until a prefill that is sent now could start.

    The backlog that a report tells is worked off from its moment on, and what was sent since and the report does not
    know of follows it, each at its own time (Lindley's recursion): a prefill that runs counts what is left of it.
    `keep` of the backlog stays, because a believed rate above the true one would empty queues too soon.

    `room`: its `room_ms`; those before this prompt are computed meanwhile, so the longer of both waits counts.
    `now`, `reported_at`: on one clock, in seconds; without a report `reported_at` is minus infinity.
    """
    backlog = fit.token_ms * load.pending_tokens + fit.fixed_ms * load.waiting
    left = backlog + sent.ms + (reported_at - now) * 1000.0
    alone = (sent.ends_at - now) * 1000.0
    return max(left, alone, keep * backlog, room) + (load.decode_step_ms if load.decoding else 0.0)


class Prices:
    """Of one prompt on any number of workers; what several of them have in common is worked out once.

    A price is that of the cheapest plan: how deep to read each tier, as the worker's store would decide (load or
    compute).
    """

    def __init__(self, prompt_tokens: int, block_size: int, *, shared_reads: bool) -> None:
        self._prompt_tokens = prompt_tokens
        self._block_size = block_size
        self._shared_reads = shared_reads
        self._fit: PrefillFit | None = None  # of the last worker: most have the same one
        self._cold_ms = 0.0
        self._of_pool: dict[int, _Plan] = {}  # for that fit, by blocks in the pool

    def of(self, overlap: Overlap, load: WorkerLoad, fit: PrefillFit, queue: float, peers: int = 0) -> Price:
        """On one worker. `queue`: its `queue_ms`; `peers`: leading blocks that one other worker holds in its reach."""
        if fit is not self._fit:
            self._fit, self._cold_ms, self._of_pool = fit, fit.ms(self._prompt_tokens), {}
        device, host, disk, shared = overlap
        deepest = shared if self._shared_reads else disk
        if deepest == device:
            plan = self._of_pool.get(device)
            if plan is None:
                plan = self._of_pool[device] = self._plan(device, (), load, fit)
        else:
            own = (TierName.HOST, host), (TierName.DISK, disk), (TierName.REDIS, deepest)
            plan = self._plan(device, own, load, fit)
        if peers > host and TierName.PEER in load.reads:
            for ends in _ends_with_peer(overlap, deepest, peers):
                plan = min(plan, self._plan(device, ends, load, fit), key=_plan_ms)
        load_ms, compute_ms, cached, cached_tokens = plan
        return Price(queue, load_ms, compute_ms, self._cold_ms, cached, cached_tokens)

    def _plan(self, pool: int, ends: Sequence[_End], load: WorkerLoad, fit: PrefillFit) -> _Plan:
        """The cheapest plan that takes `pool` blocks as they are and reads these tiers up to some depth, in order."""
        size, most = self._block_size, self._prompt_tokens - 1  # the forward that gives the first token needs one
        total, load_ms, at = min(pool * size, most), 0.0, pool
        cached = {TierName.DEVICE: total}
        compute_ms = fit.ms(self._prompt_tokens - total, total)
        best, reads, found = (load_ms, compute_ms, cached, total), load.reads, cached
        for tier, end in ends:
            if end <= at:
                continue
            read = reads.get(tier)
            if read is None:
                break  # what lies behind it cannot be had without it
            before, total = total, min(end * size, most)
            load_ms, at = load_ms + read.ms(end - at), end
            found = {**found, tier: total - before}
            compute_ms = fit.ms(self._prompt_tokens - total, total)
            if load_ms + compute_ms < best[0] + best[1]:
                best = (load_ms, compute_ms, found, total)
        return best


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
    """The price on one worker; see `Prices`."""
    return Prices(prompt_tokens, block_size, shared_reads=shared_reads).of(overlap, load, fit, queue, peers)


def _plan_ms(plan: _Plan) -> float:
    return plan[0] + plan[1]


def _ends_with_peer(overlap: Overlap, deepest: int, peers: int) -> list[tuple[_End, ...]]:
    """The tiers with a peer before and behind the disk: which one is faster depends on both machines."""
    host, disk, redis = (TierName.HOST, overlap.host), (TierName.DISK, overlap.disk), (TierName.REDIS, deepest)
    peer = (TierName.PEER, peers)
    orders: list[tuple[_End, ...]] = [(host, peer, disk, redis)]
    if peers > overlap.disk > overlap.host:
        orders.append((host, disk, peer, redis))
    return orders
