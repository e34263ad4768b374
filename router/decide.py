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
from router.cost import NO_LOAD, PrefillFit, Price, Prices, WorkerLoad, lacked_blocks, pool_fits, queue_ms, room_ms
from router.fleet import Fleet
from router.fleet_record import FleetRecord
from router.index import NO_OVERLAP, Overlap
from router.link import WorkerLink
from router.pairing import DECODE, INTERFERENCE, PREFILL, Maker, Pair, best_pair, may_make
from router.peers import Holder, Holders, holders, serves
from router.policies.protocol import NO_BLOCK_LOAD, BlockLoad, Candidate, Decision, Policy, RouteRequest
from router.policy import checked_weights, find_policy
from router.policy_history import PolicySetting
from router.traffic import LEAST_THERE_S, MEMORY_S, NOTHING_KNOWN, Traffic

# Where both agree, the greater of two noisy numbers would be too great.
_REPORTED = 0.9


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        hashes: short ones, of the full blocks. digest: of the whole prompt. affinity: key with its tenant, or empty.
        no_read: nothing cached may be used. no_store: no block may be kept.
        avoid: workers that have refused this request.
        protocol: version of the protocol that its worker must speak; zero: any.
    """

    hashes: Sequence[bytes]
    prompt_tokens: int
    block_size: int
    digest: bytes
    affinity: str = ""
    no_read: bool = False
    no_store: bool = False
    avoid: frozenset[str] = frozenset()
    protocol: int = 0

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
        pair: who prefills for the chosen worker; None: it does that itself.
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
    pair: Pair | None = None
    shadow: Decision | None = None
    shadowed_by: PolicySetting | None = None

    @property
    def worker(self) -> str:
        """The chosen worker."""
        return self.decision.chosen.worker

    @property
    def price(self) -> Price:
        """Of its first token: of the chosen worker, or of the pair."""
        return self.decision.chosen.price if self.pair is None else self.pair.price

    @property
    def own_work_ms(self) -> float:
        """Of the chosen worker's own time."""
        price = self.decision.chosen.price
        return price.load_ms + price.compute_ms if self.pair is None else self.pair.tail_ms

    def own_cached_blocks(self, block_size: int) -> int:
        """Leading blocks that the chosen worker need not compute: those that it has, or that are made for it."""
        return min(self.held, self.price.cached_tokens // block_size) if self.pair is None else self.pair.blocks

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
        self._fits: tuple[list[str], list[PrefillFit | None], list[PrefillFit]] = ([], [], [])

    def decide(self, question: Question) -> Choice | None:
        """What the policy in force chooses now; None when no worker is eligible. Changes nothing."""
        takes, avoid = self._fleet.takes_requests, question.avoid
        able = [link for link in self._fleet.links() if takes(link) and link.name not in avoid]
        if question.protocol:
            able = [link for link in able if link.hello and link.hello.protocol_version >= question.protocol]
        if not able:
            return None
        policy, weights = self._rule()
        overlaps = {} if question.no_read else self._index.match(question.hashes)
        peers = self.peers(overlaps)
        everybody = self.candidates(question, able, overlaps, peers)
        has_roles = len({link.role for link in able}) > 1
        candidates = _answering(able, everybody) if has_roles else everybody
        request = self._request(question, able)
        decision = policy.choose(request, candidates, weights)
        runner_up, extra_ms = _runner_up(candidates, decision, predicts=policy.predicts)
        chosen = decision.chosen.worker
        own = overlaps.get(chosen, NO_OVERLAP)
        hints = peers.hints(chosen, own.host) if any(o.host > own.host for o in overlaps.values()) else ()
        pair = self._pair(question, able, everybody, decision, peers) if has_roles else None
        choice = Choice(policy, weights, request, candidates, decision, own.disk, hints, runner_up, extra_ms, pair)
        shadow = self._fleet.record.shadow
        return choice if shadow is None else replace(choice, shadow=_scored(choice, shadow), shadowed_by=shadow)

    def _pair(
        self,
        question: Question,
        able: Sequence[WorkerLink],
        candidates: Sequence[Candidate],
        decision: Decision,
        peers: Holders,
    ) -> Pair | None:
        """Who of these should prefill for the worker that was chosen; `candidates`: of each of them."""
        chosen = next(link for link in able if link.name == decision.chosen.worker)
        if question.no_read or question.no_store or not serves(chosen):
            return None
        makers = [
            Maker(candidate, link.hello.peer_address, peers.hints(link.name, candidate.overlap.host))
            for link, candidate in zip(able, candidates, strict=True)
            if link is not chosen and may_make(link.role, chosen.role) and serves(link) and link.hello is not None
        ]
        if not makers:
            return None
        loads = [link.report.load if link.report else NO_LOAD for link in able]
        place = able.index(chosen)
        return best_pair(
            decision.chosen,
            makers,
            prompt_tokens=question.prompt_tokens,
            block_size=question.block_size,
            fit=self._pooled(able, loads)[place],
            reads=loads[place].reads,
            interference=self._rule()[1].get("interference", INTERFERENCE),
        )

    def taken(self) -> None:
        """A decision was acted on: the next one is another turn."""
        self._turn += 1

    def peers(self, overlaps: Mapping[str, Overlap]) -> Holders:
        """Workers that others can read from: a drained one is as good as any, a silent one is not."""
        return Holders(lambda: self._holders(overlaps)) if overlaps else Holders()

    def _holders(self, overlaps: Mapping[str, Overlap]) -> Iterable[Holder]:
        depths = [
            (-overlaps[link.name].host, n, link) for n, link in enumerate(self._fleet.links()) if link.name in overlaps
        ]
        holding = [link for depth, _, link in sorted(depths) if depth]
        # What one that has yet to confirm a clear holds must not come back by others.
        clean = (link for link in holding if self._fleet.is_alive(link) and not link.owes_clear)
        return holders(clean, overlaps)

    def candidates(
        self, question: Question, links: Sequence[WorkerLink], overlaps: Mapping[str, Overlap], peers: Holders
    ) -> list[Candidate]:
        """What is known of each of these workers with regard to the question, in their order."""
        # Whatever is one question for all workers is asked once, and not of each.
        now, traffic = self._clock(), self._traffic
        arriving = {} if question.no_read else traffic.arriving(question.hashes)
        shares = _Shares(question, [] if question.no_read else traffic.sharers(question.hashes))
        loads = [link.report.load if link.report else NO_LOAD for link in links]
        fits = self._pooled(links, loads)
        works = traffic.recent_works_ms([(link.name, link.joined_at) for link in links])
        newer_than = max(min((link.joined_at for link in links), default=now) + LEAST_THERE_S, now - MEMORY_S)
        prices = Prices(question.prompt_tokens, question.block_size, shared_reads=self._fleet.record.shared_tier_reads)
        lacks = self._lacked_blocks(question, links, loads)
        candidates = []
        for link, load, fit, work_ms, lacked in zip(links, loads, fits, works, lacks, strict=True):
            name, report = link.name, link.report
            at, known = (report.at, report.known) if report else (-math.inf, NOTHING_KNOWN)
            held, coming = overlaps.get(name, NO_OVERLAP), arriving.get(name, 0)
            if load.pool_blocks and coming > load.pool_blocks:
                coming = load.pool_blocks  # of a longer prompt the rest cannot stay
            sent = traffic.unreported(name, known)
            active = load.running + load.waiting + sent.requests
            room = room_ms(load, lacked, active) if lacked > 0 or active >= load.slots else 0.0
            priced = prices.of(
                _at_least(held, coming) if coming else held,
                load,
                fit,
                queue_ms(load, fit, sent, now=now, reported_at=at, room=room),
                peers.depth(name) if TierName.PEER in load.reads else 0,
            )
            share = shares.of(priced.cached_tokens)
            new = link.joined_at > newer_than
            candidates.append(
                Candidate(
                    name,
                    priced,
                    share,
                    active,
                    work_ms,
                    held,
                    coming,
                    NO_BLOCK_LOAD,
                    load.decoding,
                    new,
                    link.role == DECODE,
                )
            )
        return self._with_blocks(question, links, candidates) if self._counts_blocks() else candidates

    def _lacked_blocks(self, question: Question, links: Sequence[WorkerLink], loads: Sequence[WorkerLoad]) -> list[int]:
        """By worker the blocks that its pool has too few for this prompt and all that are there.

        Which of its blocks others use already is asked only where that can matter: mostly pools have room.
        """
        names, own = [link.name for link in links], len(question.hashes)
        held = self._traffic.prompt_blocks(names)
        most = [blocks + own + load.answer_blocks - load.pool_blocks for blocks, load in zip(held, loads, strict=True)]
        if not any(load.answer_ms for lacked, load in zip(most, loads, strict=True) if lacked > 0):
            return [0] * len(most)
        used = self._traffic.active_blocks(question.hashes, names)
        return [lacked_blocks(load, blocks) for load, blocks in zip(loads, used, strict=True)]

    def _with_blocks(
        self, question: Question, links: Sequence[WorkerLink], candidates: Sequence[Candidate]
    ) -> list[Candidate]:
        """The candidates with their loads in blocks."""
        active = self._traffic.active_blocks(question.hashes, [link.name for link in links])
        counted = []
        for link, candidate, blocks in zip(links, candidates, active, strict=True):
            report = link.report
            reported, known = (report.load.pending_tokens, report.known) if report else (0, NOTHING_KNOWN)
            pending = reported / question.block_size + self._traffic.unreported_blocks(link.name, known)
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

    def _pooled(self, links: Sequence[WorkerLink], loads: Sequence[WorkerLoad]) -> list[PrefillFit]:
        """The fits to count with, as long as no worker reports another one than before."""
        names, fits = [link.name for link in links], [load.fit for load in loads]
        if self._fits[0] != names or self._fits[1] != fits:
            self._fits = (names, fits, list(pool_fits(dict(zip(names, fits, strict=True))).values()))
        return self._fits[2]

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
        """Share of these workers' time that prefills take: what routers sent, or what they report if it is more.

        Reports know how long it really took, but come after the fact: they count less.
        """
        shares = [link.report.load.prefill_share for link in links if link.report]
        told = [share for share in shares if share is not None]
        reported = _REPORTED * sum(told) / len(told) if told else 0.0
        return max(self._traffic.utilisation(len(links)), reported)


def _answering(links: Sequence[WorkerLink], candidates: list[Candidate]) -> list[Candidate]:
    """Those that give answers; where only workers are left that should prefill for others, they do everything."""
    found = [candidate for link, candidate in zip(links, candidates, strict=True) if link.role != PREFILL]
    return found or candidates


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
        self._known: dict[int, float] = {}  # most workers have equally many

    def of(self, cached_tokens: int) -> float:
        """For a worker that has this many tokens; 1: everything."""
        share = self._known.get(cached_tokens)
        if share is None:
            share = self._known[cached_tokens] = self._share(cached_tokens)
        return share

    def _share(self, cached_tokens: int) -> float:
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
    if len(candidates) < 2:
        return "", 0.0
    costs, place = list(decision.costs), next(n for n, c in enumerate(candidates) if c is decision.chosen)
    own, costs[place] = costs[place], math.inf
    least = min(costs)
    worker = min([c.worker for n, c in enumerate(candidates) if costs[n] == least and n != place])
    return worker, least - own if predicts else 0.0
