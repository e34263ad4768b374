"""One decision: from a prompt's hashes to a worker, with the numbers that led there.

Covers: gathering what index, traffic and reports know into candidates, and asking the policy in force. Does not cover:
how any of these works. A question changes nothing, so `explain` and `generate` ask the same one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvstore.events import TierName
from router.chain_tree import Runs
from router.cost import NO_LOAD, PrefillFit, Price, pool_fits, price, queue_ms
from router.fleet import Fleet
from router.fleet_record import FleetRecord
from router.index import NO_OVERLAP, Overlap
from router.link import WorkerLink
from router.peers import Holder, Holders, holders
from router.policies.protocol import BlockLoad, Candidate, Decision, Policy, RouteRequest
from router.policy import checked_weights, find_policy
from router.policy_history import PolicySetting
from router.traffic import Traffic

# Where both agree, the greater of two noisy numbers would be too great.
_REPORTED = 0.9


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
        shadow: what the policy that only scores would have chosen of the same candidates; None: there is no such.
        shadowed_by: that policy.
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
    shadow: Decision | None = None
    shadowed_by: PolicySetting | None = None

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
    """Asks. Holds no state but the number of decisions that were made, and what it worked out of settings and reports
    last time, for as long as those are the same: they change every few milliseconds at most, decisions may come faster.
    """

    def __init__(self, fleet: Fleet, index: Matches, traffic: Traffic, clock: Callable[[], float]) -> None:
        self._fleet = fleet
        self._index = index
        self._traffic = traffic
        self._clock = clock
        self._turn = 0
        self._checked: tuple[FleetRecord | None, Policy, dict[str, float]] = (None, find_policy("cache_aware"), {})
        self._fits: tuple[dict[str, PrefillFit | None], dict[str, PrefillFit]] = ({}, {})

    def decide(self, question: Question) -> Choice | None:
        """What the policy in force chooses now; None when no worker is eligible. Changes nothing."""
        able = [link for link in self._fleet.links() if self._able(link, question)]
        if not able:
            return None
        policy, weights = self._rule()
        overlaps = {} if question.no_read else self._index.match(question.hashes)
        peers = self.peers(overlaps)
        candidates = self.candidates(question, able, overlaps, peers)
        request = self._request(question, able)
        decision = policy.choose(request, candidates, weights)
        runner_up, extra_ms = _runner_up(candidates, decision, predicts=policy.predicts)
        chosen = decision.chosen.worker
        own = overlaps.get(chosen, NO_OVERLAP)
        deepest = max((overlap.host for overlap in overlaps.values()), default=0)
        hints = peers.hints(chosen, own.host) if deepest > own.host else ()
        choice = Choice(policy, weights, request, candidates, decision, own.disk, hints, runner_up, extra_ms)
        shadow = self._fleet.record.shadow
        return choice if shadow is None else replace(choice, shadow=_scored(choice, shadow), shadowed_by=shadow)

    def taken(self) -> None:
        """A decision was acted on: the next one is another turn."""
        self._turn += 1

    def peers(self, overlaps: Mapping[str, Overlap]) -> Holders:
        """Workers that others can read from: a drained one is as good as any, a silent one is not."""
        return Holders(lambda: self._holders(overlaps)) if overlaps else Holders()

    def _holders(self, overlaps: Mapping[str, Overlap]) -> Iterable[Holder]:
        depths = {name: overlap.host for name, overlap in overlaps.items() if overlap.host}
        holding = [link for link in self._fleet.links() if link.name in depths]
        holding.sort(key=lambda link: -depths[link.name])
        # What one that has yet to confirm a clear holds must not come back by others.
        clean = (link for link in holding if self._fleet.is_alive(link) and not link.owes_clear)
        return holders(clean, overlaps)

    def candidates(
        self, question: Question, links: Sequence[WorkerLink], overlaps: Mapping[str, Overlap], peers: Holders
    ) -> list[Candidate]:
        """What is known of each of these workers with regard to the question, in their order."""
        now, traffic = self._clock(), self._traffic
        # Whatever is one question for all workers is asked once, and not of each.
        arriving = {} if question.no_read else traffic.arriving(question.hashes)
        shares = _Shares(question, [] if question.no_read else traffic.sharers(question.hashes))
        reports = {link.name: link.report for link in links}
        joined = {link.name: link.joined_at for link in links}
        fits = self._pooled({name: report.load.fit if report else None for name, report in reports.items()})
        shared_reads = self._fleet.record.shared_tier_reads
        charged: dict[int, float] = {}  # shares by cached tokens, of which most workers have equally many
        candidates = []
        for name, report in reports.items():
            load, at, until = (
                (report.load, report.at, report.knows_until) if report else (NO_LOAD, -math.inf, -math.inf)
            )
            unreported = traffic.unreported(name, until)
            fit, held, coming = fits[name], overlaps.get(name, NO_OVERLAP), arriving.get(name, 0)
            if load.pool_blocks:
                coming = min(coming, load.pool_blocks)  # of a longer prompt the rest cannot stay
            priced = price(
                _at_least(held, coming) if coming else held,
                question.prompt_tokens,
                question.block_size,
                load,
                fit,
                queue=queue_ms(load, fit, now=now, at=at, unreported=unreported),
                shared_reads=shared_reads,
                peers=peers.depth(name) if TierName.PEER in load.reads else 0,
            )
            active = load.running + load.waiting + unreported.requests
            if priced.cached_tokens not in charged:
                charged[priced.cached_tokens] = shares.of(priced.cached_tokens)
            share, work_ms = charged[priced.cached_tokens], traffic.recent_work_ms(name, joined_at=joined[name])
            candidates.append(Candidate(name, priced, share, active, work_ms, held, coming, decoding=load.decoding))
        return self._with_blocks(question, links, candidates) if self._counts_blocks() else candidates

    def _with_blocks(
        self, question: Question, links: Sequence[WorkerLink], candidates: Sequence[Candidate]
    ) -> list[Candidate]:
        """The candidates with their loads in blocks."""
        active = self._traffic.active_blocks(question.hashes, [link.name for link in links])
        counted = []
        for link, candidate, blocks in zip(links, candidates, active, strict=True):
            report = link.report
            reported, until = (report.load.pending_tokens, report.knows_until) if report else (0, -math.inf)
            pending = reported / question.block_size + self._traffic.unreported_blocks(link.name, until)
            counted.append(candidate._replace(blocks=BlockLoad(pending, blocks)))
        return counted

    def _counts_blocks(self) -> bool:
        shadow = self._fleet.record.shadow
        return self._rule()[0].counts_blocks or (shadow is not None and find_policy(shadow.name).counts_blocks)

    def _rule(self) -> tuple[Policy, dict[str, float]]:
        """The policy in force and all its weights."""
        record = self._fleet.record
        if self._checked[0] is not record:  # records are never changed, only replaced
            policy = find_policy(record.policy)
            self._checked = (record, policy, checked_weights(policy, record.weights))
        return self._checked[1:]

    def _pooled(self, fits: dict[str, PrefillFit | None]) -> dict[str, PrefillFit]:
        if self._fits[0] != fits:
            self._fits = (fits, pool_fits(fits))
        return self._fits[1]

    def _request(self, question: Question, able: Sequence[WorkerLink]) -> RouteRequest:
        return RouteRequest(
            question.hashes,
            question.block_size,
            question.digest,
            question.affinity,
            self._turn,
            self.utilisation(able),
            question.prompt_tokens,
        )

    def utilisation(self, links: Sequence[WorkerLink]) -> float:
        """Share of these workers' time that prefills take: what this router sent, or what they report if it is more.

        Reports know what other routers send, and how long it really took, but come after the fact: they count less.
        """
        shares = [link.report.load.prefill_share for link in links if link.report]
        told = [share for share in shares if share is not None]
        reported = _REPORTED * sum(told) / len(told) if told else 0.0
        return max(self._traffic.utilisation(len(links)), reported)

    def _able(self, link: WorkerLink, question: Question) -> bool:
        return self._fleet.takes_requests(link) and link.name not in question.avoid


def _scored(choice: Choice, shadow: PolicySetting) -> Decision:
    policy = find_policy(shadow.name)
    return policy.choose(choice.request, choice.candidates, checked_weights(policy, shadow.weights))


class _Shares:
    """Which part of the computing a request is charged: a block that k requests in flight share costs it 1/(1+k)."""

    def __init__(self, question: Question, sharers: Runs) -> None:
        """`sharers`: see `Traffic.sharers`."""
        self._size = question.block_size
        self._prompt_tokens = question.prompt_tokens
        self._ends = [end for _, end in sharers]
        self._each = [question.block_size / (1 + uses) for uses, _ in sharers]  # tokens charged of a block in a run
        self._sums = [0.0]  # tokens charged of all blocks up to the end of a run
        for each, start, end in zip(self._each, [0, *self._ends], self._ends, strict=False):
            self._sums.append(self._sums[-1] + (end - start) * each)

    def of(self, cached_tokens: int) -> float:
        """For a worker that has this many tokens; 1: everything."""
        missing, first = self._prompt_tokens - cached_tokens, cached_tokens // self._size
        if not self._ends or first >= self._ends[-1] or missing < self._size:
            return 1.0
        run = bisect_right(self._ends, first)
        discounted = self._sums[-1] - self._sums[run + 1] + (self._ends[run] - first) * self._each[run]
        return (discounted + missing - (self._ends[-1] - first) * self._size) / missing


def _at_least(overlap: Overlap, device: int) -> Overlap:
    """Blocks on their way will be in the pool when this request's turn comes."""
    if device <= overlap.device:
        return overlap
    return Overlap(device, max(device, overlap.host), max(device, overlap.disk), max(device, overlap.shared))


def _runner_up(candidates: Sequence[Candidate], decision: Decision, *, predicts: bool) -> tuple[str, float]:
    others = [(cost, c.worker) for cost, c in zip(decision.costs, candidates, strict=True) if c is not decision.chosen]
    if not others:
        return "", 0.0
    cost, worker = min(others)
    own = decision.costs[candidates.index(decision.chosen)]
    return worker, cost - own if predicts else 0.0
