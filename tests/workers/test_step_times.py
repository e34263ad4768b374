from __future__ import annotations

import math

import pytest

from workers.step_times import Answers, BusyShare, StepTimes


def _ms(new: int, cached: int) -> float:
    return 3.0 + 0.2 * new + 0.0001 * new * (cached + new / 2)


def test_prefill_cost_is_learnt_from_steps_of_one_and_of_several_chunks():
    times = StepTimes(16)
    for new, cached in [(100, 0), (400, 0), (30, 900), (1000, 2000), (700, 100), (16, 4000), (250, 1000)] * 4:
        times.observe([(new, cached)], _ms(new, cached))
        # A step of two chunks costs its tokens and its attention work, and its fixed part once.
        times.observe([(new, cached), (50, 10)], _ms(new, cached) + _ms(50, 10) - 3.0)
    assert times.prefill.predict_ms(500, 500) == pytest.approx(_ms(500, 500), rel=0.02)
    assert times.compute_ms(10, 20) == pytest.approx(_ms(320, 160) - 3.0, rel=0.05)


def test_each_prefill_is_told_and_no_decode_step() -> None:
    told: list[float] = []
    times = StepTimes(16, on_prefill=lambda cost: told.append(cost.predict_ms(100, 0)))
    times.observe([(1, 50)], 4.0)
    assert told == []
    times.observe([(100, 0)], 30.0)
    times.observe([(100, 0), (1, 50)], 30.3)
    assert told == [pytest.approx(30.0, rel=0.05)] * 2


def test_nothing_is_known_before_the_first_prefill():
    times = StepTimes(16)
    times.observe([(1, 50)], 4.0)
    assert times.compute_ms(0, 1) == math.inf
    assert times.prefill.predict_ms(10, 0) == 0


def test_decode_steps_are_averaged_and_prefills_do_not_count():
    times = StepTimes(16)
    for _ in range(60):
        times.observe([(1, 50), (1, 80)], 4.0)
    times.observe([(500, 0), (1, 80)], 400.0)
    assert times.decode_step_ms == pytest.approx(4.0)
    for _ in range(60):
        times.observe([(1, 50)], 8.0)
    assert times.decode_step_ms == pytest.approx(8.0, rel=0.01)


def test_the_fits_error_is_that_of_predictions_made_before_they_were_learnt_from() -> None:
    times = StepTimes(16)
    for _ in range(80):
        times.observe([(100, 0)], 50.0)
    assert times.prefill_error == pytest.approx(0.0, abs=1e-3)
    times.observe([(100, 0)], 100.0)  # twice as long as foretold: half of it was not
    assert times.prefill_error == pytest.approx(0.05, abs=2e-3)


def test_answers_are_what_those_were_that_ended_lately() -> None:
    answers = Answers(16)
    assert (answers.ms, answers.blocks, answers.growth_blocks) == (0.0, 0.0, 0)
    answers.ended(0.0, 1, 0)
    answers.ended(1000.0, 101, 10)
    assert (answers.ms, answers.blocks, answers.growth_blocks) == (pytest.approx(100), pytest.approx(1), 1)
    for _ in range(60):
        answers.ended(1000.0, 101, 10)
    assert (answers.ms, answers.blocks) == (pytest.approx(1000, rel=0.01), pytest.approx(10, rel=0.01))
    assert answers.growth_blocks == 7


def test_a_busy_share_is_the_share_of_the_last_half_minute() -> None:
    share = BusyShare()
    assert share.value(5.0) == 0.0
    for second in range(300):
        share.add(0.4, second + 0.4)  # four tenths of each second
    assert share.value(299.4) == pytest.approx(0.4, abs=0.02)
    assert share.value(329.4) == pytest.approx(0.4 / 2.718, abs=0.02)
    share.add(600.0, 1000.0)
    assert share.value(1000.0) == pytest.approx(1.0)
