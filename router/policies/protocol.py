"""What a policy is: a pure rule that chooses one of the workers that could take a request, from what is known then.

Covers: what every policy is given and gives. Does not cover: the rules (one file each beside this one), the list of
them (`router.policy`) or where the numbers come from (`cost`, `index`, `traffic`). A policy never sees an ineligible
worker, never keeps state, and never decides by the order of the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from router.cost import Price
from router.index import NO_OVERLAP, Overlap


@dataclass(frozen=True, slots=True)
class Weight:
    """One number that can be set while the fleet runs; `unit` is empty for a ratio."""

    name: str
    default: float
    min: float
    max: float
    unit: str
    help: str


class BlockLoad(NamedTuple):
    """A worker's load in blocks of K/V.

    Attributes:
        pending: blocks of prompts still to be computed there. active: different blocks of all routers' requests in
        flight there, those of the request that is decided among them.
    """

    pending: float
    active: int


NO_BLOCK_LOAD = BlockLoad(0.0, 0)


class Candidate(NamedTuple):
    """An eligible worker, as a policy sees it.

    Attributes:
        price: the prediction. share: which part of `price.compute_ms` this request is charged; the rest is on the
        requests in flight that share the blocks. active: requests that run or wait there, of all routers.
        recent_work_ms: work that routers gave it lately; for a worker that has just come, the same rate for long.
        overlap: leading blocks that it holds, by tier. arriving: leading blocks that prompts in prefill leave there.
        blocks: its load in blocks; counted only for policies that say `counts_blocks`, since that takes microseconds.
        decoding: requests that are past their prefill there, of all routers.
        only_answers: its role is decode: others prefill where that is cheaper, and what is computed there costs more.
        new: whether it joined after others did, and so lately that the memory of work is longer.
    """

    worker: str
    price: Price
    share: float
    active: int
    recent_work_ms: float
    overlap: Overlap = NO_OVERLAP
    arriving: int = 0
    blocks: BlockLoad = NO_BLOCK_LOAD
    decoding: int = 0
    new: bool = False
    only_answers: bool = False


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a policy may know of a request.

    Attributes:
        hashes: short hashes of its full blocks. digest: of the whole prompt, in the tenant's namespace.
        affinity: the caller's key, with the tenant in it; empty: none. turn: decisions that this router made before.
        utilisation: share of the fleet's time that prefills take. prompt_tokens: length of the prompt.
    """

    hashes: Sequence[bytes]
    block_size: int
    digest: bytes
    affinity: str
    turn: int
    utilisation: float
    prompt_tokens: int = 0


class Term(NamedTuple):
    """A summand of a cost: `ms` times `weight`."""

    name: str
    ms: float
    weight: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy chose.

    Attributes:
        reason: prefix, balance, affinity, no_hit, only_one, order or hash. costs: aligned with the candidates; least is
        best. Milliseconds where the policy predicts, else a rank or a score of the policy's own.
    """

    chosen: Candidate
    reason: str
    costs: tuple[float, ...]


class Policy(Protocol):
    """A rule.

    Attributes:
        predicts: whether its costs are milliseconds. counts_blocks: whether it reads `Candidate.blocks`.
        cost_unit: of its costs: ms, blocks, or rank (a place in an order, from 0).
    """

    name: str
    help: str
    weights: tuple[Weight, ...]
    predicts: bool
    counts_blocks: bool
    cost_unit: str

    def choose(self, request: RouteRequest, candidates: Sequence[Candidate], w: Mapping[str, float]) -> Decision:
        """Choose among at least one candidate; `w` has every weight. Changes nothing."""
        ...

    def terms(
        self, request: RouteRequest, candidates: Sequence[Candidate], candidate: Candidate, w: Mapping[str, float]
    ) -> tuple[Term, ...]:
        """How the cost of one of the candidates came about; empty when nothing is predicted."""
        ...
