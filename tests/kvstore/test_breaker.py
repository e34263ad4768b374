"""The breaker's three states, on a clock that the tests move."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from kvstore.breaker import Breaker
from tests.kvstore.blocks_for_tests import ManualClock


def opened(clock: ManualClock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(3):
        assert breaker.admit()
        breaker.failed()
    return breaker


def test_two_failures_in_a_row_keep_it_closed_and_the_third_opens_it() -> None:
    breaker = Breaker(ManualClock())
    breaker.failed()
    breaker.failed()
    assert breaker.admit()
    breaker.failed()
    assert not breaker.admit()
    assert not breaker.is_closed


def test_a_success_in_between_starts_the_count_again() -> None:
    breaker = Breaker(ManualClock())
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert breaker.is_closed


def test_after_the_cooldown_one_caller_is_let_through_and_the_next_is_not() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.now += 0.99
    assert not breaker.admit()
    clock.now += 0.01
    assert breaker.admit()
    assert not breaker.admit()


def test_a_successful_probe_closes_it_and_a_later_opening_starts_with_the_first_cooldown() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.now += 1
    assert breaker.admit()
    breaker.failed()
    clock.now += 2
    assert breaker.admit()
    breaker.succeeded()
    assert breaker.is_closed
    for _ in range(3):
        breaker.failed()
    clock.now += 1
    assert breaker.admit()


def test_failed_probes_double_the_cooldown_up_to_its_limit() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    waits = []
    clock.now += 1
    for _ in range(4):
        assert breaker.admit()
        breaker.failed()
        start = clock.now
        while not breaker.admit():
            clock.now += 0.5
        waits.append(clock.now - start)
        clock.now += 10  # that probe never reported
    assert waits == [2, 4, 5, 5]


def test_a_probe_that_never_reports_delays_the_next_by_one_cooldown_only() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.now += 1
    assert breaker.admit()
    clock.now += 1
    assert breaker.admit()


def test_of_many_threads_exactly_one_is_the_probe() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.now += 1
    admitted: list[bool] = []
    threads = [threading.Thread(target=lambda: admitted.append(breaker.admit())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted) == 1


@given(st.lists(st.sampled_from(["succeeded", "failed", "wait"])))
def test_a_server_that_answers_again_is_found_within_the_longest_cooldown(history: list[str]) -> None:
    clock = ManualClock()
    breaker = Breaker(clock)
    for event in history:
        if event == "wait":
            clock.now += 0.7
            breaker.admit()
        else:
            getattr(breaker, event)()
    clock.now += 5.0
    assert breaker.admit()
