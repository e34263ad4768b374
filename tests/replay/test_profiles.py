"""Profiles: those that come with the project, and one made of what workers report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.events import TierName
from replay.profiles import PROFILES, Measured, find_profile, measured_profile
from replay.simulated_router import RouterSettings
from replay.simulation import Setup, simulate
from replay.tiers import Tiers
from tests.replay.made import made_work
from warmkv.v1 import common_pb2, worker_pb2
from workers.simulated_sequence import Timing

NBYTES = 1000


def load(token_ms: float, *, host: bool = True) -> worker_pb2.Load:
    tiers = [worker_pb2.TierLoad(tier=common_pb2.TIER_DEVICE, capacity_bytes=500 * NBYTES, healthy=True)]
    if host:
        tiers.append(
            worker_pb2.TierLoad(
                tier=common_pb2.TIER_HOST,
                capacity_bytes=2000 * NBYTES,
                read_latency_ms=0.5,
                read_block_ms=0.9,
                healthy=True,
            )
        )
    return worker_pb2.Load(prefill_fixed_ms=4.0, prefill_token_ms=token_ms, decode_step_ms=9.0, tiers=tiers)


def test_a_fleet_profile_is_the_median_of_what_its_workers_measured() -> None:
    loads = [load(0.2), load(0.3), load(7.0), worker_pb2.Load()]
    profile, tiers = measured_profile(Measured(loads, 16, NBYTES), max_running=8)
    assert profile.prefill == (4.0, 0.3, 0.0)
    assert (profile.decode_ms, profile.pool_tokens, profile.max_running) == (9.0, 8000, 8)
    assert tiers.host is not None
    assert (tiers.host.tokens, tiers.host.latency_ms) == (32_000, 0.5)
    assert tiers.host.token_ms == pytest.approx(0.4 / 16)
    assert (tiers.disk, tiers.redis) == (None, None)


def test_a_fleet_that_has_measured_nothing_gives_no_profile() -> None:
    with pytest.raises(ValueError, match="send the fleet some requests"):
        measured_profile(Measured([worker_pb2.Load()], 16, NBYTES))


def test_a_profile_that_there_is_not_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="h100_8b"):
        find_profile("h200")


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_the_profiles_run(name: str) -> None:
    found = find_profile(name)
    work = made_work([(n * 0.5, [n % 3] * 10) for n in range(12)], extra=3)
    figures = simulate(work, Setup(2, RouterSettings("cache_aware"), found.profile, tiers=found.tiers)).figures()
    assert figures.unanswered == 0
    assert figures.hit > 0.5
    assert figures.tiers[TierName.DEVICE] > 0.5
    assert figures.tpot_mean_s >= found.profile.decode_ms / 1e3


def test_the_h100_gives_the_measured_times() -> None:
    profile = find_profile("h100_8b").profile

    def prefill_ms(tokens: int) -> float:
        chunks = [(min(2048, tokens - at), at) for at in range(0, tokens, 2048)]
        return sum(profile.prefill.fixed_ms + profile.chunk_part_ms(n, before) for n, before in chunks)

    assert prefill_ms(2048) == pytest.approx(64, rel=0.1)
    assert prefill_ms(8192) == pytest.approx(300, rel=0.1)
    assert prefill_ms(16384) == pytest.approx(720, rel=0.1)
    assert profile.decode_step_ms(1, 1024) == pytest.approx(8.6, rel=0.03)
    assert profile.decode_step_ms(128, 128 * 1024) == pytest.approx(16.5, rel=0.03)


def test_the_simulated_engine_has_its_own_timing() -> None:
    profile, timing = find_profile("simulated").profile, Timing()
    assert profile.chunk_ms == timing.prefill_fixed_ms
    assert profile.prefill[1:] == (timing.prefill_token_ms, timing.prefill_pair_ms)
    assert profile.decode_ms == profile.mixed_ms == timing.decode_step_ms


def test_what_makes_no_sense_is_refused() -> None:
    profile = find_profile("h100_8b").profile
    with pytest.raises(ValueError, match="max_running"):
        replace(profile, max_running=0)
    with pytest.raises(ValueError, match="positive decode_ms"):
        replace(profile, decode_ms=0.0)
    tiers = find_profile("h100_8b").tiers
    assert tiers.host is not None
    with pytest.raises(ValueError, match="second_hit"):
        replace(tiers.host, admission="sometimes")
    with pytest.raises(ValueError, match="BatchedProfile"):
        simulate(made_work([(0.0, [1])]), Setup(1, RouterSettings("cache_aware"), tiers=Tiers(host=tiers.host)))
