"""What the router remembers of what it sent."""

from __future__ import annotations

import math
from collections import Counter
from itertools import takewhile

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.traffic import MEMORY_S, NOTHING_UNREPORTED, Known, Traffic


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def known(until: float) -> Known:
    """What a report knows that was made then."""
    return Known(until, 0)


def chain(*path: int) -> list[bytes]:
    return [repr(path[: n + 1]).encode() for n in range(len(path))]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def traffic(clock: Clock) -> Traffic:
    return Traffic(clock)


def test_work_is_forgotten_with_time(traffic: Traffic, clock: Clock) -> None:
    traffic.sent(1, "a", [], work_ms=100, cached_blocks=0)
    assert traffic.recent_work_ms("a") == 100
    clock.now += MEMORY_S
    assert traffic.recent_work_ms("a") == pytest.approx(100 / math.e)
    assert traffic.recent_work_ms("b") == 0


def test_utilisation_is_work_over_the_fleets_time(traffic: Traffic, clock: Clock) -> None:
    traffic.sent(1, "a", [], work_ms=0.0, cached_blocks=0)
    clock.now += 100 * MEMORY_S
    traffic.sent(2, "a", [], work_ms=MEMORY_S * 1000, cached_blocks=0)
    assert traffic.utilisation(2) == pytest.approx(0.5)
    assert traffic.utilisation(0) == 0


def test_a_prompt_on_its_way_counts_until_its_first_token(traffic: Traffic) -> None:
    traffic.sent(1, "a", chain(1, 2, 3), work_ms=1, cached_blocks=0)
    assert traffic.arriving_run("a", chain(1, 2, 4)) == 2
    assert traffic.arriving_run("b", chain(1, 2, 4)) == 0
    traffic.first_token(1)
    assert traffic.arriving_run("a", chain(1, 2, 3)) == 0


def test_only_cached_blocks_are_shared_and_computed_ones_once_they_are_there(traffic: Traffic) -> None:
    traffic.sent(1, "a", chain(1, 2, 3), work_ms=1, cached_blocks=1)
    assert traffic.sharers(chain(1, 2, 3)) == [(1, 1)]
    traffic.first_token(1)
    assert traffic.sharers(chain(1, 2, 3, 4)) == [(1, 3)]
    traffic.sent(2, "b", chain(1, 2, 9), work_ms=1, cached_blocks=2)
    assert traffic.sharers(chain(1, 2, 3)) == [(2, 2), (1, 3)]
    traffic.ended(1)
    traffic.ended(2)
    assert traffic.sharers(chain(1, 2, 3)) == []


def test_work_is_unreported_until_a_report_knows_of_it(traffic: Traffic, clock: Clock) -> None:
    traffic.sent(1, "a", [], work_ms=7, cached_blocks=0)
    assert traffic.unreported("a", known(clock.now - 1)) == (7, 1, clock.now + 0.007)
    assert traffic.unreported("a", known(clock.now)) == NOTHING_UNREPORTED
    assert traffic.unreported("b", known(clock.now - 1)) == NOTHING_UNREPORTED


def test_of_other_routers_requests_a_report_knows_up_to_a_place_in_the_workers_order(
    traffic: Traffic, clock: Clock
) -> None:
    """They are told the moment they come, and taken in by the engine when its step has ended."""
    traffic.sent(1, "a", chain(1), work_ms=10, cached_blocks=0)
    traffic.sent(("a", 4), "a", chain(2, 3), work_ms=20, cached_blocks=0, place=4)
    traffic.sent(("a", 5), "a", chain(4, 5, 6), work_ms=40, cached_blocks=0, place=5)
    sent_at = clock.now
    assert traffic.unreported("a", Known(sent_at - 1, 3))[:2] == (70, 3)
    assert traffic.unreported("a", Known(sent_at, 3))[:2] == (60, 2)
    assert traffic.unreported("a", Known(sent_at - 1, 4))[:2] == (50, 2)
    assert traffic.unreported("a", Known(sent_at, 5)) == NOTHING_UNREPORTED
    assert traffic.unreported_blocks("a", Known(sent_at + 9, 4)) == 3


def test_unreported_work_is_done_one_after_the_other_and_not_before_it_was_sent(traffic: Traffic, clock: Clock) -> None:
    start = clock.now
    for key, (at, ms) in enumerate([(0.0, 100.0), (0.03, 50.0), (1.0, 20.0)]):
        clock.now = start + at
        traffic.sent(key, "a", [], work_ms=ms, cached_blocks=0)
    assert traffic.unreported("a", known(start - 1)) == (170.0, 3, pytest.approx(start + 1.02))
    traffic.ended(2)
    assert traffic.unreported("a", known(start - 1)) == (150.0, 2, pytest.approx(start + 0.15))
    assert traffic.unreported("a", known(start)) == (50.0, 1, pytest.approx(start + 0.08))


def test_a_request_that_has_its_first_token_waits_no_more(traffic: Traffic, clock: Clock) -> None:
    traffic.sent(1, "a", [], work_ms=7, cached_blocks=0)
    traffic.first_token(1)
    assert traffic.unreported("a", known(clock.now - 1)) == NOTHING_UNREPORTED


class Counted:
    """The same memory with a counter of blocks for each question: what `Traffic` must answer."""

    def __init__(self) -> None:
        self.flights: dict[int, tuple[str, list[bytes], int, bool]] = {}

    def sharers(self, hashes: list[bytes]) -> list[int]:
        counts = Counter(block for _, c, shared, _ in self.flights.values() for block in c[:shared])
        return [counts[block] for block in takewhile(counts.__getitem__, hashes)]

    def arriving_run(self, worker: str, hashes: list[bytes]) -> int:
        flights = self.flights.values()
        expected = {block for w, c, _, prefilling in flights if w == worker and prefilling for block in c}
        return sum(1 for _ in takewhile(expected.__contains__, hashes))

    def active_blocks(self, worker: str, hashes: list[bytes]) -> int:
        return len({block for w, c, _, _ in self.flights.values() if w == worker for block in c} | set(hashes))


def by_block(runs: list[tuple[int, int]]) -> list[int]:
    counts: list[int] = []
    for uses, end in runs:
        counts.extend([uses] * (end - len(counts)))
    return counts


steps = st.lists(
    st.tuples(
        st.sampled_from(["sent", "sent", "first_token", "ended"]),
        st.integers(0, 6),
        st.lists(st.integers(0, 2), max_size=6),
    ),
    max_size=40,
)


@given(steps)
def test_answers_are_those_of_counters_of_blocks_and_nothing_is_left_over(
    script: list[tuple[str, int, list[int]]],
) -> None:
    traffic, naive = Traffic(Clock()), Counted()
    for what, key, path in script:
        if what == "sent" and key not in naive.flights:
            cached = len(path) // 2
            naive.flights[key] = (f"w{key % 2}", chain(*path), cached, True)
            traffic.sent(key, f"w{key % 2}", chain(*path), work_ms=1, cached_blocks=cached)
        elif what == "first_token":
            traffic.first_token(key)
            if key in naive.flights:
                worker, blocks, _, _ = naive.flights[key]
                naive.flights[key] = (worker, blocks, len(blocks), False)
        elif what == "ended":
            traffic.ended(key)
            naive.flights.pop(key, None)
        for probe in (chain(0, 1, 2, 0, 1, 2), chain(*path)):
            runs = traffic.sharers(probe)
            assert by_block(runs) == naive.sharers(probe)
            assert len({uses for uses, _ in runs}) == len(runs)  # each run differs from its neighbours
            for w in ("w0", "w1"):
                assert traffic.arriving_run(w, probe) == naive.arriving_run(w, probe)
                assert traffic.active_blocks(probe, [w]) == [naive.active_blocks(w, probe)]
    for key in list(naive.flights):
        traffic.ended(key)
    assert traffic.check()


def test_a_prompt_costs_its_forks_and_not_its_blocks_however_many_came_and_went() -> None:
    class Read(list[bytes]):
        reads = 0

        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            Read.reads += 1
            return super().__getitem__(at)

    long = [n.to_bytes(4, "big") for n in range(50_000)]
    traffic = Traffic(Clock())
    traffic.sent(0, "a", long, work_ms=1, cached_blocks=0)
    for key in range(1, 300):  # each parts from the long one elsewhere
        traffic.sent(key, "a", [*long[: key * 100], b"own"], work_ms=1, cached_blocks=key * 50)
        traffic.first_token(key)
    for key in range(1, 300):
        traffic.ended(key)
    Read.reads = 0
    traffic.sent(300, "b", Read([*long, b"other"]), work_ms=1, cached_blocks=49_000)
    traffic.first_token(300)
    assert traffic.arriving(Read(long)) == {"a": 50_000}
    assert traffic.sharers(Read(long)) == [(1, 50_000)]
    traffic.ended(300)
    assert Read.reads < 300


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_worker_that_is_gone_may_have_requests_that_end_later(traffic: Traffic, blocks: int) -> None:
    for key in (1, 2):
        traffic.sent(key, "a", chain(*range(blocks)), work_ms=10, cached_blocks=0)
    traffic.first_token(1)
    traffic.forget("a")
    assert traffic.recent_work_ms("a") == 0
    traffic.sent(3, "a", chain(*range(blocks)), work_ms=10, cached_blocks=0)  # it is back
    for key in (1, 2):
        traffic.ended(key)
    assert traffic.active_blocks([], ["a"]) == [blocks]
    traffic.ended(3)
    traffic.forget("a")
    assert traffic.active_blocks([], ["a"]) == [0]
    assert traffic.check()


def test_what_was_answered_before_is_not_answered_after_a_change(traffic: Traffic, clock: Clock) -> None:
    before = clock.now - 1
    traffic.sent(1, "a", [], work_ms=7, cached_blocks=0)
    assert traffic.unreported("a", known(before))[:2] == (7, 1)
    traffic.sent(2, "a", [], work_ms=5, cached_blocks=0)
    assert traffic.unreported("a", known(before))[:2] == (12, 2)
    traffic.first_token(1)
    assert traffic.unreported("a", known(before))[:2] == (5, 1)
    assert traffic.unreported("a", known(clock.now)) == NOTHING_UNREPORTED
    traffic.ended(2)
    assert traffic.unreported("a", known(before)) == NOTHING_UNREPORTED


def test_blocks_to_compute_are_unreported_until_a_report_knows_of_them(traffic: Traffic, clock: Clock) -> None:
    before = clock.now - 1
    traffic.sent(1, "a", chain(1, 2, 3, 4), work_ms=10, cached_blocks=1)
    traffic.sent(2, "a", chain(5, 6), work_ms=10, cached_blocks=0)
    traffic.sent(3, "b", chain(7), work_ms=10, cached_blocks=0)
    assert traffic.unreported_blocks("a", known(before)) == 3 + 2
    assert traffic.unreported_blocks("a", known(clock.now)) == 0
    traffic.first_token(1)
    assert traffic.unreported_blocks("a", known(before)) == 2
    assert traffic.unreported_blocks("nobody", known(before)) == 0


def test_blocks_in_use_are_counted_once_from_sending_to_the_end(traffic: Traffic) -> None:
    assert traffic.active_blocks(chain(1, 2), ["a"]) == [2]
    traffic.sent(1, "a", chain(1, 2, 3), work_ms=10, cached_blocks=0)
    traffic.sent(2, "a", chain(1, 2, 4), work_ms=10, cached_blocks=2)
    traffic.sent(3, "b", chain(9, 9, 9), work_ms=10, cached_blocks=0)
    assert traffic.active_blocks(chain(1, 2), ["a", "b"]) == [4, 5]
    assert traffic.active_blocks(chain(1, 5, 6), ["a"]) == [6]
    traffic.first_token(1)
    assert traffic.active_blocks([], ["a"]) == [4]
    traffic.ended(1)
    assert traffic.active_blocks([], ["a"]) == [3]
    traffic.ended(2)
    assert traffic.active_blocks(chain(1), ["a"]) == [1]
    traffic.ended(3)
    assert traffic.check()


def test_a_new_worker_is_judged_by_the_rate_of_what_it_was_given(traffic: Traffic, clock: Clock) -> None:
    """Both are given ten milliseconds a second, one of them for a long time."""
    for second in range(120):
        clock.now += 1.0
        for worker in ("old", "new") if second >= 110 else ("old",):
            traffic.sent(1000 * second + len(worker), worker, [], work_ms=10.0, cached_blocks=0)
    joined_at = clock.now - 10.0
    assert traffic.recent_work_ms("new", joined_at=joined_at) == pytest.approx(traffic.recent_work_ms("old"), rel=0.1)
    assert traffic.recent_work_ms("new") < 0.4 * traffic.recent_work_ms("old")


def test_a_worker_that_is_gone_leaves_nothing_when_its_last_request_ends(traffic: Traffic, clock: Clock) -> None:
    for number in range(20):
        traffic.sent(number, f"pod-{number}", chain(1, 2), work_ms=1, cached_blocks=0)
        traffic.forget(f"pod-{number}")
        traffic.ended(number)
    books = (traffic._work, traffic._in_flight, traffic._active_blocks, traffic._prefilling, traffic._unreported)
    assert [len(book) for book in books] == [0] * 5


def test_a_fleet_that_is_busy_from_the_first_second_is_not_taken_for_idle(traffic: Traffic, clock: Clock) -> None:
    """Two workers, half of whose time is asked for, from the start on and after minutes."""
    seen = []
    for tick in range(3000):
        clock.now += 0.1
        traffic.sent(tick, "w", [], work_ms=100.0, cached_blocks=0)
        seen.append(traffic.utilisation(2))
    assert all(share == pytest.approx(0.5, abs=0.02) for share in seen[60:])
    assert max(seen) < 0.55
