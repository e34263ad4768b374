"""Whether one worker prefills a prompt for another one that answers: the same prices, of two workers together. Pure.

Covers: roles, the price of a pair, the choice. Does not cover: who answers (the policy chooses that, of all workers
that do not only prefill), sending the two jobs (`prefill_jobs`), waiting for blocks (the worker's store).

A pair is chosen where it costs less than the answering worker alone. Both are counted as milliseconds to the first
token, and what the computing costs others: it delays every request that decodes on the same worker, which is charged
`interference` for each. While blocks are made they travel, so that the first token waits for

    max(queue + load + compute of the prefill + reading of its last piece,  its queue + reading of all,  own queue)

and the answering worker's own forward of the tail, which fills no block. A worker that does both is paired for decode
workers only: where it may answer itself, moving the blocks only costs, so that a fleet without roles has no pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from kvstore.events import TierName
from router.cost import PrefillFit, Price, TierRead
from router.peers import Holder
from router.policies.protocol import Candidate
from warmkv.v1 import worker_pb2

PREFILL = worker_pb2.WORKER_ROLE_PREFILL
DECODE = worker_pb2.WORKER_ROLE_DECODE
BOTH = worker_pb2.WORKER_ROLE_BOTH
NO_ROLE = worker_pb2.WORKER_ROLE_UNSPECIFIED  # a version that does not know how to prefill for another one
ROLE_NAMES: Mapping[int, str] = MappingProxyType({NO_ROLE: "both", BOTH: "both", PREFILL: "prefill", DECODE: "decode"})
INTERFERENCE = 0.1  # of a decode worker, where the policy has no such weight
PIECE_TOKENS = 2048  # that become full together at most: a step's
UNTRIED = TierRead(2.0, 0.0)  # while nothing was ever read from another worker: one has to begin


class Maker(NamedTuple):
    """A worker that could prefill for another one.

    Attributes:
        candidate: it, priced for the prompt. address: where it serves blocks. peers: whom it could read from itself.
    """

    candidate: Candidate
    address: str
    peers: Sequence[Holder] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Who prefills.

    Attributes:
        maker: the worker and where its blocks are read. blocks: leading ones that it makes.
        price: of the first token, by both. cost: what was compared with `alone_cost`, that of answering alone.
        tail_ms: of the answering worker's own time. margin_ms: what its doing all of it would cost others.
    """

    maker: Maker
    blocks: int
    price: Price
    cost: float
    alone_cost: float
    tail_ms: float
    margin_ms: float

    @property
    def worker(self) -> str:
        """Who prefills."""
        return self.maker.candidate.worker

    @property
    def work_ms(self) -> float:
        """Of the prefilling worker's time."""
        return self.maker.candidate.price.load_ms + self.maker.candidate.price.compute_ms

    @property
    def ready_ms(self) -> float:
        """When it will have made all."""
        return self.maker.candidate.price.ttft_ms


def may_make(role: int, answering: int) -> bool:
    """Whether a worker of that role may prefill for one of the other."""
    if answering == NO_ROLE:
        return False
    return role == PREFILL or (answering == DECODE and role == BOTH)


def best_pair(
    answering: Candidate,
    makers: Sequence[Maker],
    *,
    prompt_tokens: int,
    block_size: int,
    fit: PrefillFit,
    reads: Mapping[TierName, TierRead],
    interference: float,
) -> Pair | None:
    """The cheapest of the pairs, if it is cheaper than the answering worker alone.

    Args:
        answering: whom the policy chose. makers: who could prefill for it.
        fit, reads: of the answering worker. interference: milliseconds charged for each by which one is delayed.
    """
    blocks = (prompt_tokens - 1) // block_size  # the forward that gives the first token needs one token
    own = own_blocks(answering, block_size)
    if blocks <= own:
        return None
    margin_ms = answering.price.compute_ms * answering.decoding * interference
    alone = answering.price.ttft_ms + margin_ms
    tail_ms = fit.ms(prompt_tokens - blocks * block_size, blocks * block_size)
    read = reads.get(TierName.PEER, UNTRIED)
    last_ms = read.ms(min(blocks - own, max(1, PIECE_TOKENS // block_size)))
    best: Pair | None = None
    for maker in makers:
        each = maker.candidate
        price = _price(answering, each.price, read.ms(blocks - own), last_ms, tail_ms)
        others_ms = each.price.compute_ms * each.decoding + tail_ms * answering.decoding
        cost = price.ttft_ms + others_ms * interference
        if cost < alone and (best is None or (cost, each.worker) < (best.cost, best.worker)):
            best = Pair(maker, blocks, price, cost, alone, tail_ms, margin_ms)
    return best


def own_blocks(answering: Candidate, block_size: int) -> int:
    """Leading blocks that it need not be sent."""
    price = answering.price
    return (price.cached_tokens - price.cached.get(TierName.PEER, 0)) // block_size


def _price(answering: Candidate, made: Price, all_ms: float, last_ms: float, tail_ms: float) -> Price:
    """Of the first token; what waits is the queue, what is behind the computing is the load."""
    ready_ms = max(made.ttft_ms + last_ms, made.queue_ms + all_ms, answering.price.queue_ms)
    compute_ms = made.compute_ms + tail_ms
    load_ms = made.load_ms + max(last_ms, all_ms - made.load_ms - made.compute_ms)
    queue = ready_ms + tail_ms - load_ms - compute_ms
    found: dict[TierName, int] = dict(answering.price.cached)
    found.pop(TierName.PEER, None)
    here = sum(found.values())
    # What the maker has already is a hit, and comes from a peer; what it makes is computed.
    there = max(0, made.cached_tokens - here)
    if there:
        found[TierName.PEER] = there
    return Price(max(0.0, queue), load_ms, compute_ms, answering.price.cold_ms, found, here + there)
