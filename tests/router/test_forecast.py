"""Rates, margins and lateness, on a clock of the test's."""

from __future__ import annotations

import pytest

from router.forecast import DrainRate, Forecast
from router.pace import Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def drain(rate: DrainRate, clock: Clock, *, seconds: float, per_second: float, every: float = 0.1) -> None:
    for _ in range(round(seconds / every)):
        clock.now += every
        rate.served(per_second * every)


def test_the_rate_is_that_of_the_time_with_a_queue() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    rate.began()
    assert rate.per_second() is None
    drain(rate, clock, seconds=5, per_second=1000)
    assert rate.per_second() == pytest.approx(1000, rel=0.05)
    rate.ended()
    clock.now += 20  # nothing to do says nothing of how fast it is done
    assert rate.per_second() == pytest.approx(1000, rel=0.05)
    rate.began()
    clock.now += 5
    assert (rate.per_second() or 0) < 700  # a queue that does not move does


def test_the_rate_follows_the_fleet_and_is_forgotten_after_a_long_calm() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    rate.began()
    drain(rate, clock, seconds=20, per_second=1000)
    drain(rate, clock, seconds=30, per_second=4000)
    assert rate.per_second() == pytest.approx(4000, rel=0.1)
    rate.ended()
    clock.now += 31
    rate.began()
    assert rate.per_second() is None


def test_waits_are_zero_until_the_rate_is_known() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    assert forecast.wait_ms(1e9) == 0
    forecast.rate.began()
    drain(forecast.rate, clock, seconds=5, per_second=1000)
    assert forecast.wait_ms(2000) == pytest.approx(2000, rel=0.05)


def test_nothing_is_hopeless_before_forecasts_were_held_against_what_came() -> None:
    forecast = Forecast(Clock())
    for _ in range(7):
        forecast.came(1000, 1000)
    assert forecast.at_least_ms(1e9) == 0
    forecast.came(1000, 1000)
    assert forecast.at_least_ms(1000) == pytest.approx(950)


def test_the_margin_is_what_one_in_ten_forecasts_was_too_high_by() -> None:
    forecast = Forecast(Clock())
    for _ in range(80):
        forecast.came(10_000, 10_000)
    for _ in range(20):
        forecast.came(10_000, 4_950)
    assert forecast.at_least_ms(10_000) == pytest.approx(4_950)


def test_forecasts_that_were_too_low_make_nothing_hopeless_sooner() -> None:
    forecast = Forecast(Clock())
    for _ in range(100):
        forecast.came(100, 5000)
    assert forecast.at_least_ms(1000) == 950


def test_old_errors_are_forgotten_so_that_refusing_everybody_ends() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    for _ in range(100):
        forecast.came(1000, 1000)
    clock.now += 121
    assert forecast.at_least_ms(1e9) == 0


def test_requests_that_were_predicted_nothing_say_nothing() -> None:
    forecast = Forecast(Clock())
    for _ in range(20):
        forecast.came(0, 1000)
    assert forecast.at_least_ms(1e9) == 0


def test_a_worker_is_late_when_its_oldest_silent_request_is_over_its_own_work_and_the_limit() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.sent(1, "w0", own_ms=1000)
    pace.sent(2, "w1", own_ms=0)
    clock.now = 2.5
    pace.sent(3, "w0", own_ms=0)
    assert pace.late(2.0) == {"w1"}
    clock.now = 4.1
    assert pace.late(2.0) == {"w0", "w1"}
    pace.spoke(1, "w0")
    pace.spoke(1, "w0")
    assert pace.late(2.0) == {"w1"}
    pace.spoke(2, "w1")
    pace.spoke(9, "w9")
    assert pace.late(2.0) == set()
    pace.spoke(3, "w0")
    assert not pace._silent
