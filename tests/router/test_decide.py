"""The share of a copy, and what is known of each worker. Decisions as a whole are tested through the router
(`test_core`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count, product
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.events import TierName
from router.cost import PrefillFit, Price, Prices, TierRead, WorkerLoad, pool_fits, price
from router.decide import Decider, Question, _Shares
from router.fleet import Fleet
from router.fleet_record import FleetRecord
from router.index import NO_OVERLAP, Overlap, PrefixIndex
from router.peers import Holders
from router.policy import checked_weights
from router.traffic import NOTHING_KNOWN, Known, Traffic
from warmkv.v1 import admin_pb2


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
    known: Known


class Link(SimpleNamespace):
    name: str
    report: Told | None = None
    hello = None
    role = 0
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

    def by_one(self, asked: Question, link: Link, fits: dict[str, PrefillFit]) -> tuple[Price, int, int]:
        """(price, active, arriving) of one worker, worked out from nothing but its report and what was sent."""
        report = link.report
        load, at, known = (report.load, report.at, report.known) if report else (WorkerLoad(), -math.inf, NOTHING_KNOWN)
        own = [(when, ms) for worker, ms, when in self.sent.values() if worker == link.name and when > known.until]
        arriving = self.traffic.arriving_run(link.name, asked.hashes)
        fit = fits[link.name]
        backlog = fit.token_ms * load.pending_tokens + fit.fixed_ms * load.waiting
        queue = left_ms([(at, backlog), *own] if report else own, self.now)
        queue = max(queue, left_ms(own, self.now), 0.2 * backlog)
        overlap = Overlap(*(max(arriving, depth) for depth in NO_OVERLAP))
        priced = price(overlap, asked.prompt_tokens, 16, load, fit, queue=queue, shared_reads=True)
        return priced, load.running + load.waiting + len(own), arriving


def left_ms(work: list[tuple[float, float]], now: float) -> float:
    """What a worker has left at a time, that was given so many milliseconds of work at these times: step by step."""
    left, at = 0.0, 0.0
    for when, ms in sorted(work, key=lambda each: each[0]):
        left, at = max(0.0, left - (when - at) * 1000.0) + ms, when
    return max(0.0, left - (now - at) * 1000.0)


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
                WorkerLoad(fit, {}, 50 * len(path), waiting=len(path), running=number), it.now, Known(it.now, 0)
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
        for candidate, (priced, active, arriving) in zip(candidates, expected, strict=True):
            assert candidate.price.queue_ms == pytest.approx(priced.queue_ms, abs=1e-6)
            assert candidate.price == priced._replace(queue_ms=candidate.price.queue_ms)
            assert (candidate.active, candidate.arriving) == (active, arriving)
        assert [c.worker for c in candidates] == [link.name for link in links]


def test_room_is_waited_for_by_what_all_prompts_need_together_and_by_nobody_where_there_is_some() -> None:
    it = Fixture()
    load = WorkerLoad(pool_blocks=6, answer_blocks=1, running=2, answer_ms=800.0, freed_blocks=1.0)
    for link in it.fleet.links():
        link.report = Told(load, it.now, Known(it.now, 0))

    def waits(*path: int) -> list[float]:
        asked = Question(blocks(*path), 16 * len(path) + 3, 16, b"digest")
        candidates = it.decider.candidates(asked, it.fleet.links(), {}, Holders())  # type: ignore[arg-type]
        return [candidate.price.queue_ms for candidate in candidates]

    assert waits(0, 0, 0, 0, 0) == [0.0] * 4  # it just fits
    it.traffic.sent(1, "a", blocks(0, 0, 0), work_ms=0.0, cached_blocks=0)
    it.traffic.sent(2, "b", blocks(1, 1, 1), work_ms=0.0, cached_blocks=0)
    # Known to no report yet; what is used already is not needed again.
    assert waits(0, 0, 0, 0, 0) == [0.0, 3 * 400.0, 0.0, 0.0]
    it.traffic.first_token(2)
    assert waits(0, 0, 0, 0, 0)[1] == 3 * 400.0
    it.traffic.ended(2)
    assert waits(0, 0, 0, 0, 0) == [0.0] * 4


def test_another_record_is_in_force_at_once() -> None:
    it = Fixture()
    asked = Question([], 100, 16, b"digest")
    for policy, weights in (("cache_aware", {"queue": 2.0}), ("cache_aware", {"queue": 3.0}), ("round_robin", {})):
        it.fleet.record = FleetRecord(0, "test", policy, weights)
        choice = it.decider.decide(asked)
        assert choice is not None
        assert choice.policy.name == policy
        assert choice.weights == checked_weights(choice.policy, weights)


depths = st.lists(st.integers(0, 12), min_size=4, max_size=4).map(lambda found: Overlap(*sorted(found)))
fits = st.sampled_from([PrefillFit(10.0, 0.125), PrefillFit(5.0, 0.5), PrefillFit(10.0, 0.1, 1e-4)])
reads = st.dictionaries(
    st.sampled_from(list(TierName)), st.builds(TierRead, st.floats(0, 9), st.floats(0, 9)), max_size=5
)


@given(st.lists(st.tuples(depths, fits, reads, st.integers(0, 12)), max_size=12), st.integers(1, 200), st.booleans())
def test_prices_of_many_workers_are_those_of_each_alone(
    workers: list[tuple[Overlap, PrefillFit, dict[TierName, TierRead], int]], tokens: int, shared_reads: bool
) -> None:
    prices = Prices(tokens, 16, shared_reads=shared_reads)
    for overlap, fit, tier_reads, peers in workers:
        load = WorkerLoad(reads=tier_reads)
        alone = price(overlap, tokens, 16, load, fit, queue=3.0, shared_reads=shared_reads, peers=peers)
        assert prices.of(overlap, load, fit, 3.0, peers) == alone
        assert sum(alone.cached.values()) == alone.cached_tokens < tokens


@pytest.mark.parametrize("flags", list(product([False, True], repeat=5)))
def test_requests_go_to_whom_the_fleet_calls_ready(flags: tuple[bool, ...]) -> None:
    connected, synced, suspect, refused, drained = flags
    record = FleetRecord(0, "test", "cache_aware", {}, frozenset({"w"} if drained else ()))
    fleet = Fleet.__new__(Fleet)
    fleet.record = record
    link = SimpleNamespace(name="w", connected=connected, synced=synced, suspect=suspect, refused=refused, was_up=False)
    ready = fleet.state(link) == admin_pb2.WORKER_STATE_READY  # type: ignore[arg-type]
    assert fleet.takes_requests(link) == ready  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("joined_at", "new"),
    [
        ([0.0, 0.0, 0.0, 99.0], "d"),  # it is 100 now
        ([0.0, 0.0, 0.0, 60.0], ""),  # that is longer than the memory of work
        ([99.0, 99.1, 99.5, 99.9], ""),  # the router found them all when it started
        ([90.0, 90.1, 95.0, 99.0], "cd"),
    ],
)
def test_a_worker_is_new_that_joined_lately_and_after_others(joined_at: list[float], new: str) -> None:
    it = Fixture()
    for link, at in zip(it.fleet.links(), joined_at, strict=True):
        link.joined_at = at
    candidates = it.decider.candidates(question(64), it.fleet.links(), {}, Holders())  # type: ignore[arg-type]
    assert "".join(c.worker for c in candidates if c.new) == new
