"""The share of a copy, and what is known of each worker. Decisions as a whole are tested through the router
(`test_core`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.cost import PrefillFit, WorkerLoad, pool_fits, price, queue_ms
from router.decide import Decider, Question, _Shares
from router.fleet_record import FleetRecord
from router.index import NO_OVERLAP, Overlap, PrefixIndex
from router.peers import Holders
from router.policy import checked_weights
from router.traffic import Traffic, Unreported


def question(tokens: int) -> Question:
    return Question([], tokens, 16, b"")


def test_a_block_that_others_in_flight_share_costs_its_part() -> None:
    shares = _Shares(question(64), [(3, 1), (1, 2)])
    assert shares.of(0) == pytest.approx((16 / 4 + 16 / 2 + 32) / 64)
    assert shares.of(16) == pytest.approx((16 / 2 + 32) / 48)
    assert shares.of(32) == 1.0
    assert _Shares(question(80), [(3, 1), (1, 4)]).of(48) == pytest.approx((16 / 2 + 16) / 32)


def test_a_private_prompt_is_charged_in_full() -> None:
    assert _Shares(question(64), []).of(0) == 1.0


@given(st.integers(1, 400), st.lists(st.integers(1, 40), max_size=30), st.integers(0, 30))
def test_a_share_is_what_its_blocks_add_up_to(tokens: int, sharers: list[int], cached_blocks: int) -> None:
    counts = sorted(sharers, reverse=True)[: tokens // 16]
    cached = min(cached_blocks, tokens // 16) * 16  # whole blocks, but for the one token that is always computed
    cached = min(cached, tokens - 1)
    runs = [(k, len(counts) - counts[::-1].index(k)) for k in sorted(set(counts), reverse=True)]
    share = _Shares(question(tokens), runs).of(cached)
    assert 0 < share <= 1.0
    first, missing = cached // 16, tokens - cached
    saved = sum(16 - 16 / (1 + k) for k in counts[first:]) if missing >= 16 else 0.0
    assert share == pytest.approx((missing - saved) / missing)


@dataclass
class Told:
    """What the decider reads of a worker's report."""

    load: WorkerLoad
    at: float
    knows_until: float


class Link(SimpleNamespace):
    name: str
    report: Told | None = None
    hello = None
    owes_clear = False
    joined_at = 0.0


class StillFleet:
    """What the decider reads of a fleet."""

    def __init__(self, names: str) -> None:
        self.record = FleetRecord(0, "test", "cache_aware")
        self._links = [Link(name=name, report=None) for name in names]

    def links(self) -> list[Link]:
        return list(self._links)

    def takes_requests(self, link: Link) -> bool:
        return True

    is_alive = takes_requests


class Fixture:
    """A decider on a clock that is set, and what was sent, as a list."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fleet = StillFleet("abcd")
        self.traffic = Traffic(lambda: self.now)
        self.index = PrefixIndex(lambda: self.now)
        self.decider = Decider(self.fleet, self.index, self.traffic, lambda: self.now)  # type: ignore[arg-type]
        self.sent: dict[int, tuple[str, float, float]] = {}  # in prefill: worker, milliseconds of work, when

    def by_one(self, asked: Question, link: Link, fits: dict[str, PrefillFit]) -> tuple[object, ...]:
        """(price, active, arriving) of one worker, worked out from nothing but its report and what was sent."""
        load, at = (link.report.load, link.report.at) if link.report else (WorkerLoad(), -math.inf)
        late = [(ms, when) for worker, ms, when in self.sent.values() if worker == link.name and when > at]
        work_ms, free = 0.0, -math.inf
        for ms, when in late:
            work_ms, free = work_ms + ms, max(free, when) + ms / 1000.0
        arriving = self.traffic.arriving_run(link.name, asked.hashes)
        unreported = Unreported(work_ms, len(late), free)
        queue = queue_ms(load, fits[link.name], now=self.now, at=at, unreported=unreported)
        overlap = Overlap(*(max(arriving, depth) for depth in NO_OVERLAP))
        priced = price(overlap, asked.prompt_tokens, 16, load, fits[link.name], queue=queue, shared_reads=True)
        return priced, load.running + load.waiting + len(late), arriving


def blocks(*path: int) -> list[bytes]:
    return [repr(path[: n + 1]).encode() for n in range(len(path))]


steps = st.lists(
    st.tuples(
        st.sampled_from(["report", "sent", "first_token", "wait", "ended"]),
        st.integers(0, 3),
        st.lists(st.integers(0, 1), min_size=1, max_size=4),
    ),
    max_size=25,
)


@given(steps)
def test_candidates_are_what_each_worker_alone_would_be(script: list[tuple[str, int, list[int]]]) -> None:
    it, reports = Fixture(), count()
    for what, number, path in script:
        link = it.fleet.links()[number]
        if what == "report":
            fit = PrefillFit(10.0, 0.1 * (1 + next(reports) % 7), 0.0)
            link.report = Told(
                WorkerLoad(fit, {}, 50 * len(path), waiting=len(path), running=number), it.now, knows_until=it.now
            )
        elif what == "wait":
            it.now += 0.03
        elif what == "sent" and number not in it.sent:
            it.sent[number] = ("abcd"[len(path) - 1], 10.0 * len(path), it.now)
            it.traffic.ended(number)
            it.traffic.sent(number, it.sent[number][0], blocks(*path), work_ms=10.0 * len(path), cached_blocks=0)
        elif what in ("first_token", "ended"):
            it.sent.pop(number, None)
            it.traffic.first_token(number) if what == "first_token" else it.traffic.ended(number)
        asked, links = Question(blocks(*path), 16 * len(path) + 3, 16, b"digest"), it.fleet.links()
        fits = pool_fits({link.name: link.report.load.fit if link.report else None for link in links})
        candidates = it.decider.candidates(asked, links, {}, Holders())  # type: ignore[arg-type]
        expected = [it.by_one(asked, link, fits) for link in links]
        assert [(c.price, c.active, c.arriving) for c in candidates] == expected
        assert [c.worker for c in candidates] == [link.name for link in links]


def test_another_record_is_in_force_at_once() -> None:
    it = Fixture()
    asked = Question([], 100, 16, b"digest")
    for policy, weights in (("cache_aware", {"queue": 2.0}), ("cache_aware", {"queue": 3.0}), ("round_robin", {})):
        it.fleet.record = FleetRecord(0, "test", policy, weights)
        choice = it.decider.decide(asked)
        assert choice is not None
        assert choice.policy.name == policy
        assert choice.weights == checked_weights(choice.policy, weights)
