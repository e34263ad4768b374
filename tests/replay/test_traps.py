"""Known traps of routing as small simulations: what `cache_aware` does over time, held against a bound or an oracle."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from replay.outcome import Outcome
from replay.serial_engine import SerialProfile
from replay.simulated_router import RouterSettings
from replay.simulation import Failure, Setup, simulate
from replay.traces import Request, Trace
from replay.workload import Workload, workload

BLOCK = 16
PROFILE = SerialProfile(pool_tokens=200_000)


class Text:
    """Block ids that nobody has used."""

    def __init__(self) -> None:
        self._next = 0

    def fresh(self, blocks: int) -> tuple[int, int]:
        self._next += blocks
        return self._next - blocks, blocks


def request(at: float, runs: Sequence[tuple[int, int]], *, output: int = 20, session: str | None = None) -> Request:
    tokens = sum(count for _, count in runs) * BLOCK + 3
    return Request(at, tokens, output, tuple(runs), session, None, None, None, None)


def work_of(requests: Sequence[Request]) -> Workload:
    return workload(Trace("made", BLOCK, tuple(sorted(requests, key=lambda r: r.time_s))))


def played(work: Workload, workers: int, *, profile: SerialProfile = PROFILE, **setup: object) -> Outcome:
    policy = str(setup.pop("policy", "cache_aware"))
    return simulate(work, replace(Setup(workers, RouterSettings(policy), profile), **setup))  # type: ignore[arg-type]


def hot_prompt(per_s: float, *, seconds: float, root: int = 256, seed: int = 1) -> list[Request]:
    """One system prompt for everybody, and 16 to 256 own tokens; by chance, `per_s` a second."""
    rng, text = random.Random(seed), Text()
    shared, requests, at = text.fresh(root), [], 0.0
    while (at := at + rng.expovariate(per_s)) < seconds:
        requests.append(request(at, [shared, text.fresh(rng.randint(1, 16))]))
    return requests


def computed_copies(outcome: Outcome, tokens: int) -> int:
    return sum(fate.computed >= tokens for fate in outcome.fates)


def test_a_hot_prompt_is_replicated_once_a_worker_at_most_and_shared_evenly() -> None:
    """At 120 requests a second its load is three times what one worker can do."""
    outcome = played(work_of(hot_prompt(120.0, seconds=10)), 8)
    figures = outcome.figures()
    assert computed_copies(outcome, 4096) <= 8
    assert max(figures.split.values()) < 0.2 * figures.requests
    # An M/D/1 queue at this load, with the mean service time, waits less than half of it.
    service_s = 0.01 + 8.5 * BLOCK / 8000
    assert figures.ttft_mean_s < 2 * service_s


def test_a_hot_prompt_whose_load_is_small_has_few_copies() -> None:
    """At two requests a second one worker has less than a tenth of its time to give."""
    outcome = played(work_of(hot_prompt(2.0, seconds=60)), 8)
    assert computed_copies(outcome, 4096) <= 3


def test_one_request_in_flight_uses_all_workers() -> None:
    text = Text()
    outcome = played(work_of([request(2.0 * n, [text.fresh(60)], output=5) for n in range(16)]), 4)
    assert sorted(outcome.figures(warm_up=0).split.values()) == [4, 4, 4, 4]


@pytest.mark.parametrize("doc", [400, 3000])
def test_a_burst_of_one_prompt_computes_it_once_or_where_that_is_sooner(doc: int) -> None:
    """Thirty identical prompts at once: waiting for the first is sooner than computing, for every one of them."""
    text = Text()
    shared = text.fresh(doc)
    outcome = played(work_of([request(0.01 * n, [shared]) for n in range(30)]), 4)
    assert computed_copies(outcome, doc * BLOCK) == 1
    alone_s = 0.01 + doc * BLOCK / 8000
    assert max(fate.ttft_s or 0.0 for fate in outcome.fates) < alone_s + 30 * 0.011


def test_long_sessions_stay_where_they_are() -> None:
    """Ten sessions of 100,000 tokens on eight workers that also answer short prompts."""
    rng, text, requests = random.Random(3), Text(), []
    for number in range(10):
        runs = [text.fresh(6250)]
        for turn in range(6):
            requests.append(request(30.0 * number + 40.0 * turn, list(runs), output=400, session=f"s{number}"))
            runs.append(text.fresh(rng.randint(5, 30)))
    requests += [request(rng.uniform(0, 500), [text.fresh(rng.randint(5, 60))], output=400) for _ in range(600)]
    work = work_of(requests)
    outcome = played(work, 8, profile=replace(PROFILE, pool_tokens=800_000))
    where: dict[str, Counter[str]] = {}
    for asked, fate in zip(work.requests, outcome.fates, strict=True):
        if asked.session:
            where.setdefault(asked.session, Counter())[str(fate.worker)] += 1
    assert [len(workers) for workers in where.values()] == [1] * 10


def chats(seconds: float, sessions_per_s: float) -> list[Request]:
    rng, text, requests, at = random.Random(5), Text(), [], 0.0
    while (at := at + rng.expovariate(sessions_per_s)) < seconds:
        runs, turn_at = [text.fresh(rng.randint(20, 300))], at
        for _ in range(rng.choice((1, 2, 4, 6))):
            requests.append(request(turn_at, list(runs), output=100))
            runs, turn_at = [*runs, text.fresh(rng.randint(10, 60))], turn_at + rng.uniform(4, 12)
    return requests


@pytest.mark.parametrize(("sessions_per_s", "margin", "at_most"), [(6.0, 0.02, 0.9), (8.0, 0.04, 0.7)])
def test_overload_keeps_the_hits_that_greedy_routing_gives_up(
    sessions_per_s: float, margin: float, at_most: float
) -> None:
    """Far more than the fleet can compute without any hit; the second is more than it can with all of them, too."""
    work = work_of(chats(60, sessions_per_s))
    ours, greedy = played(work, 4).figures(), played(work, 4, policy="lowest_ttft").figures()
    assert ours.hit > greedy.hit + margin
    assert ours.ttft_mean_s < at_most * greedy.ttft_mean_s


def test_a_worker_that_joins_gets_its_share_of_new_prompts_and_not_all_of_them() -> None:
    """Prompts without reuse in a quiet fleet, where all costs are the same; the last worker joins after a minute."""
    rng, text, requests, at = random.Random(7), Text(), [], 0.0
    while (at := at + rng.expovariate(4.0)) < 120:
        requests.append(request(at, [text.fresh(rng.randint(30, 120))]))
    outcome = played(work_of(requests), 4, failures=[Failure(3, 0.0, 60.0)])
    soon = Counter(fate.worker for fate in outcome.fates if 60 <= fate.arrived_s < 68)
    assert 0.15 < soon["worker-3"] / soon.total() < 0.5


def test_a_worker_that_comes_back_serves_at_once_where_all_prompts_are_cached_elsewhere() -> None:
    """Eight system prompts in a fleet of which a tenth is asked for; one worker is away for five seconds."""
    rng, text, requests, at = random.Random(11), Text(), [], 0.0
    roots = [text.fresh(62) for _ in range(8)]
    while (at := at + rng.expovariate(12.0)) < 60:
        requests.append(request(at, [rng.choice(roots), text.fresh(12)]))
    outcome = played(work_of(requests), 4, failures=[Failure(1, 20.0, 5.0)])
    after = [fate for fate in outcome.fates if fate.arrived_s >= 25.0]
    back = [fate for fate in after if fate.worker == "worker-1"]
    assert min(fate.arrived_s for fate in back) < 25.5
    # All that it computes beyond the prompts' own ends: no more than once each root.
    assert sum(fate.computed - 12 * BLOCK - 3 for fate in back) <= 8 * 62 * BLOCK
    soon = [fate for fate in after if fate.arrived_s < 35.0]
    assert sum(fate.worker == "worker-1" for fate in soon) < 0.4 * len(soon)


def test_a_prompt_longer_than_the_pool_is_not_expected_to_stay() -> None:
    text = Text()
    long = text.fresh(1000)
    work = work_of([request(0.0, [long]), request(0.1, [long, text.fresh(10)]), request(0.2, [long, text.fresh(10)])])
    outcome = played(work, 2, profile=replace(PROFILE, pool_tokens=500 * BLOCK))
    assert all(fate.predicted_tokens <= 500 * BLOCK for fate in outcome.fates)


@pytest.mark.parametrize("fit_error", [0.5, 2.0])
def test_a_wrong_rate_costs_little_when_workers_say_how_busy_they_are(fit_error: float) -> None:
    work = work_of(chats(60, 4.0))
    right = played(work, 4).figures()
    wrong = played(work, 4, profile=replace(PROFILE, fit_error=fit_error)).figures()
    assert wrong.ttft_mean_s < 1.25 * right.ttft_mean_s
