"""The comparison of routers with and without events: what it claims holds on a short trace, every time."""

from __future__ import annotations

import pytest

from bench.beliefs import Figures, replay, shortened

TRACE = shortened(600)


def hit(case: str, mode: str, seed: int = 1) -> float:
    figures = replay(case, mode, TRACE, seed)
    assert figures.requests == len(TRACE.requests)
    return figures.reused / figures.prompt


def test_alone_and_without_evictions_a_router_without_events_finds_as_much() -> None:
    assert hit("roomy", "approximate") == pytest.approx(hit("roomy", "exact"), abs=0.005)


@pytest.mark.parametrize("seed", [1, 2])
def test_of_two_routers_those_that_hear_events_find_more(seed: int) -> None:
    assert hit("pressed_two", "exact", seed) > hit("pressed_two", "approximate", seed) + 0.02


def test_learning_from_answers_makes_predictions_truer() -> None:
    def phantom(figures: Figures) -> float:
        return figures.phantom / figures.believed

    trace = shortened(1500)
    corrected, never = (replay("tight_two", mode, trace, 1) for mode in ("approximate", "never_corrected"))
    assert phantom(corrected) < 0.7 * phantom(never)


def test_it_is_the_same_every_time() -> None:
    assert replay("tight_two", "approximate", TRACE, 3) == replay("tight_two", "approximate", TRACE, 3)
