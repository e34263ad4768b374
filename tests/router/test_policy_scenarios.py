"""The decisions in `policy_scenarios.txt`, which is written to be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from router.cost import Price
from router.index import Overlap
from router.policy import BlockLoad, Candidate, RouteRequest, checked_weights, find_policy

TIERS = ("device", "host", "disk", "shared")


@dataclass
class Scenario:
    title: str
    policy: str
    weights: dict[str, float]
    request: RouteRequest
    expected: str
    candidates: list[Candidate] = field(default_factory=list)


def read_scenarios(text: str) -> list[Scenario]:
    """Paragraphs that do not begin with `#`."""
    return [_scenario(part.splitlines()) for part in text.strip().split("\n\n") if not part.startswith("#")]


def _scenario(lines: list[str]) -> Scenario:
    title, rule, request, *workers, expected = lines
    policy, *weights = rule.split()
    numbers = {name: float(value) for name, value in (pair.split("=") for pair in weights)}
    asked = _request(request.removeprefix("prompt ").split())
    return Scenario(
        title, policy, numbers, asked, expected.removeprefix("=> "), [_candidate(*w.split()) for w in workers]
    )


def _request(words: list[str]) -> RouteRequest:
    tokens, facts = int(words[0]), dict(pair.split("=") for pair in words[1:])
    hashes = [b"block %d" % n for n in range(tokens // 16)]
    turn, utilisation = int(facts.pop("turn", 0)), float(facts.pop("utilisation", 0))
    request = RouteRequest(hashes, 16, b"digest", facts.pop("affinity", ""), turn, utilisation, tokens)
    assert not facts, f"unknown words {facts}"
    return request


def _candidate(worker: str, *pairs: str) -> Candidate:
    facts = {name: float(value) for name, value in (pair.split("=") for pair in pairs)}
    take = facts.pop
    price = Price(take("queue", 0), take("load", 0), take("compute", 100), 1000, {}, int(take("cached", 0)))
    own = [int(take(tier, 0)) for tier in TIERS]
    overlap = Overlap(*(sum(own[: n + 1]) for n in range(4)))
    blocks = BlockLoad(take("pending", 0), int(take("in_use", 0)))
    share, active, recent = take("share", 1), int(take("active", 0)), take("recent", 0)
    candidate = Candidate(worker, price, share, active, recent, overlap, int(take("arriving", 0)), blocks)
    assert not facts, f"unknown words {facts}"
    return candidate


SCENARIOS = read_scenarios(Path(__file__).with_name("policy_scenarios.txt").read_text())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: f"{s.policy}: {s.title}")
def test_a_scenario(scenario: Scenario) -> None:
    policy = find_policy(scenario.policy)
    weights = checked_weights(policy, scenario.weights)
    for candidates in (scenario.candidates, scenario.candidates[::-1]):
        decision = policy.choose(scenario.request, candidates, weights)
        assert f"{decision.chosen.worker} {decision.reason}" == scenario.expected
        assert policy.choose(scenario.request, candidates, weights) == decision
