"""Rates, margins and lateness, on a clock of the test's."""

from __future__ import annotations

import pytest

from router.drain_rate import DrainRate
from router.forecast import AnswerPace, Errors, Forecast, Parts
from router.lateness import Lateness


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


def test_nothing_is_likely_before_forecasts_were_held_against_what_came() -> None:
    errors = Errors(Clock())
    for _ in range(7):
        errors.came(1000, 1000)
    assert errors.likely_ms(1e9) == 0
    errors.came(1000, 1000)
    assert errors.likely_ms(1e9) == 1e9


def test_forecasts_are_corrected_by_what_half_of_the_predicted_time_came_to() -> None:
    errors = Errors(Clock())
    for _ in range(60):
        errors.came(10_000, 4_000)
    for _ in range(40):
        errors.came(10_000, 12_000)
    assert errors.likely_ms(5_000) == pytest.approx(2_000)


def test_what_small_predictions_miss_by_says_nothing_of_large_ones() -> None:
    errors = Errors(Clock())
    for _ in range(200):
        errors.came(5, 55)
    for _ in range(8):
        errors.came(2000, 2000)
    assert errors.likely_ms(3000) == pytest.approx(3000)


def test_no_error_is_carried_on_beyond_half_as_much_again() -> None:
    errors = Errors(Clock())
    for _ in range(100):
        errors.came(100, 5000)
    assert errors.likely_ms(1000) == 1500


def test_what_had_not_come_by_its_deadline_counts_as_late_as_that_at_least() -> None:
    errors = Errors(Clock())
    for _ in range(20):
        errors.cut_short(1000, 1300)
    assert errors.likely_ms(1000) == pytest.approx(1300)
    errors = Errors(Clock())
    for _ in range(20):
        errors.cut_short(1000, 300)  # it was sent too late to show more
    assert errors.likely_ms(1000) == pytest.approx(1000)


def test_old_errors_are_forgotten_so_that_refusing_everybody_ends() -> None:
    clock = Clock()
    errors = Errors(clock)
    for _ in range(100):
        errors.came(1000, 1000)
    clock.now += 121
    assert errors.likely_ms(1e9) == 0


def test_requests_that_were_predicted_nothing_say_nothing() -> None:
    errors = Errors(Clock())
    for _ in range(20):
        errors.came(0, 1000)
    assert errors.likely_ms(1e9) == 0


def test_each_part_of_a_forecast_is_corrected_by_its_own_errors() -> None:
    forecast = Forecast(Clock())
    for _ in range(10):
        forecast.waits.came(1000, 500)
        forecast.firsts.came(100, 120)
    assert forecast.likely_ms(Parts(2000, 200, 400)) == pytest.approx(1000 + 240)
    for _ in range(10):
        forecast.answers.came(400, 400)
    assert forecast.likely_ms(Parts(2000, 200, 400)) == pytest.approx(1000 + 240 + 400)


def test_the_pace_of_answers_is_that_of_now() -> None:
    clock = Clock()
    forecast = Forecast(clock)
    assert forecast.answer_ms(100) == 0
    for _ in range(50):
        forecast.pace.came(0.1, 1)
    assert forecast.answer_ms(101) == pytest.approx(10_000)
    assert forecast.answer_ms(1) == forecast.answer_ms(0) == 0  # the first token is not its business
    clock.now += 10
    for _ in range(50):
        forecast.pace.came(0.02, 2)
    assert forecast.answer_ms(101) < 2500
    clock.now += 20
    assert forecast.answer_ms(101) == 0  # so long after a load nobody knows what the pace is


def test_an_answer_pace_of_few_tokens_is_none() -> None:
    pace = AnswerPace(Clock())
    for _ in range(7):
        pace.came(1.0, 1)
    assert pace.token_ms() == 0
    pace.came(1.0, 1)
    assert pace.token_ms() == pytest.approx(1000)


def test_a_worker_is_late_when_its_oldest_silent_request_is_over_its_own_work_and_the_limit() -> None:
    clock = Clock()
    pace = Lateness(clock)
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
    assert not pace.silent()


def test_a_worker_that_is_gone_is_forgotten() -> None:
    pace = Lateness(Clock())
    for key in range(20):
        pace.sent(key, "w0", own_ms=10)
    assert pace.silent() == 20
    pace.forget("w0")
    pace.spoke(15, "w0")
    assert pace.silent() == 0
