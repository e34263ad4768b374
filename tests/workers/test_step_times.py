from __future__ import annotations

import math

import pytest

from workers.step_times import StepTimes


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
