"""One decision: from a prompt's hashes to a worker, with the numbers that led there.

Covers: gathering what index, traffic and reports know into candidates, and asking the policy in force. Does not cover:
how any of these works. A question changes nothing, so `explain` and `generate` ask the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from router.cost import DEFAULT_FIT, NO_LOAD, PrefillFit, Price, WorkerLoad, pool_fits, price, queue_ms
from router.fleet import Fleet
from router.index import NO_OVERLAP, Overlap
from router.link import WorkerLink
from router.peers import Holder, Holders, holders
from router.policies.protocol import NO_BLOCK_LOAD, BlockLoad, Candidate, Decision, Policy, RouteRequest
from router.policy import checked_weights, find_policy
from router.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        hashes: short ones, of the full blocks. digest: of the whole prompt. affinity: key with its tenant, or empty.
        no_read: nothing cached may be used. avoid: workers that have refused this request.
    """

    hashes: Sequence[bytes]
    prompt_tokens: int
    block_size: int
    digest: bytes
    affinity: str = ""
    no_read: bool = False
    avoid: frozenset[str] = frozenset()

    def avoiding(self, workers: Collection[str]) -> Question:
        """The same, with workers that must not be chosen."""
        return replace(self, avoid=frozenset(workers)) if workers else self


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided, and what the policy saw.

    Attributes:
        candidates: the eligible ones. held: blocks that the chosen worker really has, those on their way not counted.
        peers: whom the chosen worker could read blocks from that it lacks.
        runner_up: empty when there was no other; runner_up_extra_ms: what it would have cost more.
    """

    policy: Policy
    weights: Mapping[str, float]
    request: RouteRequest
    candidates: list[Candidate]
    decision: Decision
    held: int
    peers: Sequence[Holder]
    runner_up: str
    runner_up_extra_ms: float

    @property
    def worker(self) -> str:
        """The chosen worker."""
        return self.decision.chosen.worker

    @property
    def price(self) -> Price:
        """Its price."""
        return self.decision.chosen.price

    @property
    def predicted_ttft_ms(self) -> float:
        """Zero for policies that predict nothing."""
        return self.price.ttft_ms if self.policy.predicts else 0.0


class Matches(Protocol):
    """Who holds what of a chain: the index, or `beliefs` over it."""

    def match(self, hashes: Sequence[bytes]) -> dict[str, Overlap]:
        """As `PrefixIndex.match`."""
        ...


class Decider:
    """Asks. Holds no state but the number of decisions that were made."""

    def __init__(self, fleet: Fleet, index: Matches, traffic: Traffic, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._index = index
        self._traffic = traffic
        self._clock = clock
        self._turn = 0

    def decide(self, question: Question) -> Choice | None:
        """What the policy in force chooses now; None when no worker is eligible. Changes nothing."""
        able = [link for link in self._fleet.links() if self._able(link, question)]
        if not able:
            return None
        policy = find_policy(self._fleet.record.policy)
        weights = checked_weights(policy, self._fleet.record.weights)
        overlaps = {} if question.no_read else self._index.match(question.hashes)
        peers = self.peers(overlaps)
        candidates = self.candidates(question, able, overlaps, peers)
        request = self._request(question, len(able))
        decision = policy.choose(request, candidates, weights)
        runner_up, extra_ms = _runner_up(candidates, decision, predicts=policy.predicts)
        chosen = decision.chosen.worker
        own = overlaps.get(chosen, NO_OVERLAP)
        hints = peers.hints(chosen, own.host)
        return Choice(policy, weights, request, candidates, decision, own.disk, hints, runner_up, extra_ms)

    def taken(self) -> None:
        """A decision was acted on: the next one is another turn."""
        self._turn += 1

    def peers(self, overlaps: Mapping[str, Overlap]) -> Holders:
        """Workers that others can read from: a drained one is as good as any, a silent one is not."""
        if not overlaps:
            return Holders()
        # What one that has yet to confirm a clear holds must not come back by others.
        clean = (link for link in self._fleet.links() if self._fleet.is_alive(link) and not link.owes_clear)
        return holders(clean, overlaps)

    def candidates(
        self, question: Question, links: Sequence[WorkerLink], overlaps: Mapping[str, Overlap], peers: Holders
    ) -> list[Candidate]:
        """What is known of each of these workers with regard to the question."""
        fits = pool_fits({link.name: link.report.load.fit if link.report else None for link in links})
        shares = _Shares(question, [] if question.no_read else self._traffic.sharers(question.hashes))
        blocks = find_policy(self._fleet.record.policy).counts_blocks
        return [
            self._candidate(
                question,
                link,
                overlaps,
                fits.get(link.name, DEFAULT_FIT),
                shares,
                peers.depth(link.name),
                blocks=blocks,
            )
            for link in links
        ]

    def _candidate(
        self,
        question: Question,
        link: WorkerLink,
        overlaps: Mapping[str, Overlap],
        fit: PrefillFit,
        shares: _Shares,
        peers: int,
        *,
        blocks: bool,
    ) -> Candidate:
        held = overlaps.get(link.name, NO_OVERLAP)
        arriving = 0 if question.no_read else self._traffic.arriving_run(link.name, question.hashes)
        report, load = link.report, link.report.load if link.report else NO_LOAD
        unreported_ms, unreported = self._traffic.unreported(link.name, report.at if report else 0.0)
        age_ms = (self._clock() - report.at) * 1000.0 if report else 0.0
        priced = price(
            _at_least(held, arriving),
            question.prompt_tokens,
            question.block_size,
            load,
            fit,
            queue=queue_ms(load, fit, age_ms=age_ms, unreported_ms=unreported_ms),
            shared_reads=self._fleet.record.shared_tier_reads,
            peers=peers,
        )
        return Candidate(
            link.name,
            priced,
            shares.of(priced.cached_tokens),
            load.running + load.waiting + unreported,
            self._traffic.recent_work_ms(link.name),
            held,
            arriving,
            self._block_load(question, link.name, report.at if report else 0.0, load) if blocks else NO_BLOCK_LOAD,
        )

    def _block_load(self, question: Question, worker: str, reported_at: float, load: WorkerLoad) -> BlockLoad:
        reported = load.pending_tokens / question.block_size
        unreported = self._traffic.unreported_blocks(worker, reported_at)
        return BlockLoad(reported + unreported, self._traffic.active_blocks(worker, question.hashes))

    def _request(self, question: Question, workers: int) -> RouteRequest:
        return RouteRequest(
            question.hashes,
            question.block_size,
            question.digest,
            question.affinity,
            self._turn,
            self._traffic.utilisation(workers),
            question.prompt_tokens,
        )

    def _able(self, link: WorkerLink, question: Question) -> bool:
        return self._fleet.takes_requests(link) and link.name not in question.avoid


class _Shares:
    """Which part of the computing a request is charged: a block that k requests in flight share costs it 1/(1+k)."""

    def __init__(self, question: Question, sharers: Sequence[int]) -> None:
        self._question = question
        self._sums = [0.0]
        for k in sharers:
            self._sums.append(self._sums[-1] + question.block_size / (1 + k))

    def of(self, cached_tokens: int) -> float:
        """For a worker that has this many tokens; 1: everything."""
        size, missing = self._question.block_size, self._question.prompt_tokens - cached_tokens
        first, end = cached_tokens // size, len(self._sums) - 1
        if first >= end or missing < size:
            return 1.0
        discounted = self._sums[end] - self._sums[first]
        return (discounted + missing - (end - first) * size) / missing


def _at_least(overlap: Overlap, device: int) -> Overlap:
    """Blocks on their way will be in the pool when this request's turn comes."""
    if device <= overlap.device:
        return overlap
    return Overlap(*(max(device, depth) for depth in overlap))


def _runner_up(candidates: Sequence[Candidate], decision: Decision, *, predicts: bool) -> tuple[str, float]:
    others = [(cost, c.worker) for cost, c in zip(decision.costs, candidates, strict=True) if c is not decision.chosen]
    if not others:
        return "", 0.0
    cost, worker = min(others)
    own = decision.costs[candidates.index(decision.chosen)]
    return worker, cost - own if predicts else 0.0
