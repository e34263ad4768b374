"""The answer to Explain: every worker as the policy saw it, the choice, and why a block is missing.

Covers: turning a decision into its message. Does not cover: deciding (`decide`) or finding the cause of a miss
(`misses`). Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.beliefs import Beliefs
from router.decide import Choice, Decider
from router.fleet import Fleet
from router.index import PrefixIndex
from router.link import WorkerLink
from router.misses import ChangedTurn, Missing, explain_miss
from router.pairing import PREFILL
from router.policy import Candidate, checked_weights, find_policy
from router.request import PreparedPrompt
from warmkv.v1 import common_pb2, inference_pb2

_LOWER_BOUND = "who holds what changes too often along this prompt: it may hold more than was looked at"


def explained(
    prepared: PreparedPrompt,
    choice: Choice | None,
    *,
    fleet: Fleet,
    index: PrefixIndex,
    beliefs: Beliefs,
    decider: Decider,
    changed: ChangedTurn | None,
    router_wait_ms: float,
) -> inference_pb2.ExplainResponse:
    """The message. `choice` None: no worker is eligible."""
    record, question = fleet.record, prepared.question
    policy = find_policy(record.policy)
    missing = explain_miss(index, question.hashes, changed)
    candidates = [
        *(_eligible(choice, question.prompt_tokens) if choice else []),
        *_excluded(prepared, choice, fleet, beliefs, decider),
    ]
    pair = choice.pair if choice else None
    bounds = frozenset[str]() if question.no_read else index.lower_bounds(question.hashes)
    for candidate in candidates:
        credit = beliefs.credits.of(candidate.worker)
        whys = [f"{credit.why}; blocks count {credit.factor:.0%}"] if credit.why else []
        if candidate.worker in bounds:
            whys.append(_LOWER_BOUND)
        candidate.suspect = "; ".join(whys)
    return inference_pb2.ExplainResponse(
        prompt_tokens=question.prompt_tokens,
        block_size=question.block_size,
        blocks=len(question.hashes),
        policy=policy.name,
        weights=checked_weights(policy, record.weights),
        worker=choice.worker if choice else "",
        reason=choice.decision.reason if choice else "",
        cost_unit=policy.cost_unit,
        candidates=candidates,
        miss=_miss(missing) if missing else None,
        router_wait_ms=router_wait_ms,
        prefill_worker=pair.worker if pair else "",
        pair_cost_ms=pair.cost if pair else 0.0,
        alone_cost_ms=pair.alone_cost if pair else 0.0,
    )


def _eligible(choice: Choice, prompt_tokens: int) -> list[inference_pb2.Candidate]:
    """Best first; the chosen one stands first also where a near-tie made it so."""
    costs = zip(choice.decision.costs, choice.candidates, strict=True)
    order = sorted(costs, key=lambda pair: (pair[1] is not choice.decision.chosen, pair[0], pair[1].worker))
    messages = []
    for cost, candidate in order:
        message = _candidate(candidate, prompt_tokens)
        message.eligible, message.cost = True, cost
        if choice.policy.predicts:
            terms = choice.policy.terms(choice.request, choice.candidates, candidate, choice.weights)
            message.terms.extend(inference_pb2.CostTerm(name=t.name, ms=t.ms, weight=t.weight) for t in terms)
            message.cost_ms = cost
            message.predicted_ttft_ms = candidate.price.ttft_ms
        messages.append(message)
    return messages


def _excluded(
    prepared: PreparedPrompt, choice: Choice | None, fleet: Fleet, beliefs: Beliefs, decider: Decider
) -> list[inference_pb2.Candidate]:
    able = {candidate.worker for candidate in choice.candidates} if choice else set()
    links: Sequence[WorkerLink] = [link for link in fleet.links() if link.name not in able]
    overlaps = {} if prepared.question.no_read else beliefs.match(prepared.question.hashes)
    messages = []
    candidates = decider.candidates(prepared.question, links, overlaps, decider.peers(overlaps))
    for link, candidate in zip(links, candidates, strict=True):
        message = _candidate(candidate, prepared.question.prompt_tokens)
        only_prefills = "its role is prefill: other workers answer" if link.role == PREFILL else ""
        message.excluded_because = fleet.excluded_because(link) or only_prefills or "it refused this request"
        messages.append(message)
    return messages


def _candidate(candidate: Candidate, prompt_tokens: int) -> inference_pb2.Candidate:
    cached = {str(tier): tokens for tier, tokens in candidate.price.cached.items()}
    computed = prompt_tokens - candidate.price.cached_tokens
    return inference_pb2.Candidate(
        worker=candidate.worker,
        tokens=common_pb2.TokensByFate(computed=computed, **cached),
        active_requests=candidate.active,
    )


def _miss(missing: Missing) -> inference_pb2.Miss:
    return inference_pb2.Miss(reason=missing.reason, block=missing.block, detail=missing.detail)
