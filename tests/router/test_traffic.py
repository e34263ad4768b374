"""What the router remembers of what it sent."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.traffic import MEMORY_S, Traffic


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


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


def test_utilisation_is_work_over_the_fleets_time(traffic: Traffic) -> None:
    traffic.sent(1, "a", [], work_ms=MEMORY_S * 1000, cached_blocks=0)
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
    assert traffic.sharers(chain(1, 2, 3)) == [1]
    traffic.first_token(1)
    assert traffic.sharers(chain(1, 2, 3, 4)) == [1, 1, 1]
    traffic.sent(2, "b", chain(1, 2, 9), work_ms=1, cached_blocks=2)
    assert traffic.sharers(chain(1, 2, 3)) == [2, 2, 1]
    traffic.ended(1)
    traffic.ended(2)
    assert traffic.sharers(chain(1, 2, 3)) == []


def test_work_is_unreported_until_a_later_report(traffic: Traffic, clock: Clock) -> None:
    traffic.sent(1, "a", [], work_ms=7, cached_blocks=0)
    assert traffic.unreported("a", clock.now - 1) == (7, 1)
    assert traffic.unreported("a", clock.now + 0.01) == (7, 1)
    assert traffic.unreported("a", clock.now + 0.1) == (0, 0)
    assert traffic.unreported("b", clock.now) == (0, 0)


def test_a_request_that_has_its_first_token_waits_no_more(traffic: Traffic, clock: Clock) -> None:
    traffic.sent(1, "a", [], work_ms=7, cached_blocks=0)
    traffic.first_token(1)
    assert traffic.unreported("a", clock.now) == (0, 0)


steps = st.lists(
    st.tuples(
        st.sampled_from(["sent", "first_token", "ended"]), st.integers(0, 4), st.lists(st.integers(0, 2), max_size=6)
    ),
    max_size=40,
)


@given(steps)
def test_counts_match_a_naive_model_and_nothing_is_left_over(script: list[tuple[str, int, list[int]]]) -> None:
    traffic = Traffic(Clock())
    naive: dict[int, tuple[list[bytes], int, bool]] = {}
    for what, key, path in script:
        if what == "sent" and key not in naive:
            cached = len(path) // 2
            naive[key] = (chain(*path), cached, True)
            traffic.sent(key, f"w{key % 2}", chain(*path), work_ms=1, cached_blocks=cached)
        elif what == "first_token":
            traffic.first_token(key)
            if key in naive:
                naive[key] = (naive[key][0], len(naive[key][0]), False)
        elif what == "ended":
            traffic.ended(key)
            naive.pop(key, None)
        for probe in (chain(0, 1, 2, 0, 1, 2), chain(*path)):
            counts = [sum(h in c[:shared] for c, shared, _ in naive.values()) for h in probe]
            assert traffic.sharers(probe) == [k for n, k in enumerate(counts) if all(counts[: n + 1])]
            for w in (0, 1):
                expected = {h for key, (c, _, prefilling) in naive.items() if prefilling and key % 2 == w for h in c}
                run = next((n for n, h in enumerate(probe) if h not in expected), len(probe))
                assert traffic.arriving_run(f"w{w}", probe) == run
    for key in list(naive):
        traffic.ended(key)
    assert traffic.check()


def test_blocks_to_compute_are_unreported_until_a_report_can_contain_them(traffic: Traffic, clock: Clock) -> None:
    traffic.sent(1, "a", chain(1, 2, 3, 4), work_ms=10, cached_blocks=1)
    traffic.sent(2, "a", chain(5, 6), work_ms=10, cached_blocks=0)
    traffic.sent(3, "b", chain(7), work_ms=10, cached_blocks=0)
    assert traffic.unreported_blocks("a", clock.now) == 3 + 2
    assert traffic.unreported_blocks("a", clock.now + 1) == 0
    traffic.first_token(1)
    assert traffic.unreported_blocks("a", clock.now) == 2
    assert traffic.unreported_blocks("nobody", clock.now) == 0


def test_blocks_in_use_are_counted_once_from_sending_to_the_end(traffic: Traffic) -> None:
    assert traffic.active_blocks("a", chain(1, 2)) == 2
    traffic.sent(1, "a", chain(1, 2, 3), work_ms=10, cached_blocks=0)
    traffic.sent(2, "a", chain(1, 2, 4), work_ms=10, cached_blocks=2)
    traffic.sent(3, "b", chain(9, 9, 9), work_ms=10, cached_blocks=0)
    assert traffic.active_blocks("a", chain(1, 2)) == 4
    assert traffic.active_blocks("a", chain(1, 5, 6)) == 6
    traffic.first_token(1)
    assert traffic.active_blocks("a", []) == 4
    traffic.ended(1)
    assert traffic.active_blocks("a", []) == 3
    traffic.ended(2)
    assert traffic.active_blocks("a", chain(1)) == 1
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


def test_work_sent_shortly_before_a_report_is_doubtful(traffic: Traffic, clock: Clock) -> None:
    traffic.sent(1, "w", [], work_ms=5.0, cached_blocks=0)
    clock.now += 0.01
    reported_at = clock.now
    clock.now += 0.01
    traffic.sent(2, "w", [], work_ms=3.0, cached_blocks=0)
    assert traffic.unreported("w", reported_at) == (8.0, 2)
    assert traffic.doubtful_ms("w", reported_at) == 5.0
    assert traffic.doubtful_ms("w", reported_at + 1.0) == 0.0
