"""What more memory would give, held to replays in which the tiers are tiers: pool, host RAM, shared tier, reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from replay.capacity import FleetCapacity, Tiers, Timed
from replay.comparison import Fleet, Runner, Source, prepared, running
from replay.policy_space import Configuration
from replay.stack_distance import Curve, curves
from replay.traces import shipped

POOL = 24_000  # twice the longest prompt: what running requests hold is a small part
SOURCE = Source((shipped()["tau_airline"],), speed=3.0, first=500)
FLEETS = [
    Tiers({"device": POOL}),
    Tiers({"device": POOL, "host": POOL}),
    Tiers({"device": POOL, "host": 2 * POOL}),
    Tiers({"device": POOL, "host": 4 * POOL}),
    Tiers({"device": POOL}, redis=3 * POOL),
    Tiers({"device": POOL, "host": 2 * POOL}, redis=3 * POOL),
]


@pytest.fixture(scope="module")
def curve() -> Curve:
    (found,) = curves(prepared(SOURCE))
    return found


@pytest.fixture
def runner() -> Iterator[Runner]:
    with running(1) as made:
        yield made


def asked(curve: Curve, runner: Runner, engine: str, workers: int = 2) -> FleetCapacity:
    return FleetCapacity(curve, runner, SOURCE, Fleet(workers, 10**9, engine), Configuration("cache_aware"))


def test_sizes_of_caches_tell_what_tiers_would_find(curve: Curve, runner: Runner) -> None:
    answers, replayed = asked(curve, runner, "serial"), asked(curve, runner, "h100_8b").timed(FLEETS)
    told = [answers.hits(tiers).all for tiers in FLEETS]
    found = [timed.hit for timed in replayed if timed is not None]
    assert len(found) == len(FLEETS)
    assert told == pytest.approx(found, abs=0.03)
    # What a tier adds is the answer that is wanted, and the errors of two answers are alike.
    gains, found_gains = [each - told[0] for each in told], [each - found[0] for each in found]
    assert gains == pytest.approx(found_gains, abs=0.03)
    assert max(found_gains) > 0.01
    # Of tiers as large as those before nothing is gained, and that is no accident of the rule.
    assert told[1] == told[0]
    assert found[1] == pytest.approx(found[0], abs=0.01)


def test_more_of_a_tier_is_told_in_time_too(curve: Curve, runner: Runner) -> None:
    small, large = asked(curve, runner, "simulated").timed([FLEETS[0], FLEETS[3]])
    assert isinstance(small, Timed)
    assert isinstance(large, Timed)
    assert large.ttft_mean_s < small.ttft_mean_s
    assert large.hit > small.hit


def test_times_are_told_only_where_they_are_known(curve: Curve, runner: Runner) -> None:
    assert asked(curve, runner, "serial").timed([FLEETS[0]]) == [None]
    without_pool = replace(FLEETS[0], own={"host": POOL})
    with_disk = FLEETS[0].plus("disk", POOL)
    assert asked(curve, runner, "h100_8b").timed([without_pool, with_disk]) == [None, None]
    with pytest.raises(ValueError, match="no figures of a tier redis"):
        asked(curve, runner, "simulated").timed([FLEETS[4]])
