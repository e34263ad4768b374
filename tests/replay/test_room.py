"""Waiting for room in a pool, in replays: hits that cost next to nothing must not fill one worker."""

from __future__ import annotations

import pytest

from replay.comparison import Fleet, Run, Source, run_once
from replay.policy_space import Configuration
from replay.traces import shipped

POOL = 24_000  # twice the longest prompt: five answers under way fill it
SOURCE = Source((shipped()["tau_airline"],), speed=3.0, first=500)


def mean_ms(policy: str, host_tokens: int) -> float:
    outcome = run_once(Run(SOURCE, Fleet(2, POOL, "h100_8b", host_tokens=host_tokens), Configuration(policy)))
    return 1e3 * outcome.figures.ttft_mean_s


@pytest.mark.parametrize("copies", [2, 4])
def test_cheap_hits_do_not_draw_requests_to_a_pool_that_is_full(copies: int) -> None:
    # Prefill takes 3 % of the time, so no queue but that for room tells the two workers apart.
    assert mean_ms("cache_aware", copies * POOL) < 1.2 * mean_ms("sticky", copies * POOL)
