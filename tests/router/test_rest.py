"""How long a link rests before it tries again."""

from __future__ import annotations

import pytest

from router.rest import FIRST_S, LIKELY_BACK_S, Rest


def pauses(rest: Rest, *, start: float, until: float) -> list[float]:
    """Of a worker that is not there, from one time to another."""
    now, taken = start, []
    while now < until:
        taken.append(rest.after_failure(now, was_there=False))
        now += taken[-1]
    return taken


def test_a_worker_that_was_there_is_tried_several_times_a_second_for_a_minute() -> None:
    rest = Rest()
    assert rest.after_failure(100.0, was_there=True) == FIRST_S
    soon = pauses(rest, start=100.0, until=100.0 + LIKELY_BACK_S - 1)
    assert max(soon) <= 0.25
    assert pauses(rest, start=100.0 + LIKELY_BACK_S, until=200.0)[-1] == 1.0


def test_one_that_never_was_there_is_tried_once_a_second() -> None:
    taken = pauses(Rest(), start=100.0, until=120.0)
    assert taken == sorted(taken)
    assert taken[-1] == 1.0
    assert sum(taken) / len(taken) == pytest.approx(1.0, abs=0.2)


def test_each_time_it_was_there_it_begins_anew() -> None:
    rest = Rest()
    pauses(rest, start=0.0, until=10.0)
    assert rest.after_failure(10.0, was_there=True) == FIRST_S
    assert rest.after_failure(10.1, was_there=False) == 0.2
