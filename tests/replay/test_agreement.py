"""Routers side by side choose as one that sees all traffic; and comparing them is no change to what they do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replay.agreement import ComparedSimulation, compare
from replay.serial_engine import SerialProfile
from replay.simulated_router import RouterSettings, SimulatedRouter
from replay.simulation import RouterRestart, Setup, simulate
from replay.traces import load, shipped
from replay.workload import Workload, part, workload

TRUE_LOAD = RouterSettings("cache_aware", delay_s=0.005, load_delay_s=0.0)
AS_BAR = 0.97


def beginning(name: str, requests: int, *, speed: float, closed_loop: bool = False) -> Workload:
    trace = part(load(shipped()[name]))
    return workload(replace(trace, requests=trace.requests[:requests]), speed=speed, closed_loop=closed_loop)


WORKS = {
    "sessions that share a system prompt": lambda: beginning("tau_airline", 500, speed=20.0, closed_loop=True),
    "documents, some of them asked for together": lambda: beginning("mooncake_synthetic", 500, speed=1.0),
    "bursts": lambda: beginning("ragpulse", 500, speed=600.0),
}


def setup(routers: int = 2, **settings: object) -> Setup:
    return replace(Setup(8, TRUE_LOAD, SerialProfile(report_s=0.0), routers=routers), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("routers", [2, 4])
@pytest.mark.parametrize("name", WORKS)
def test_each_router_chooses_as_one_would_that_sees_all_traffic(name: str, routers: int) -> None:
    agreement = compare(WORKS[name](), setup(routers))
    assert agreement.asked >= 500
    assert agreement.share >= AS_BAR


def test_routers_that_know_only_their_own_traffic_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    monkeypatch.setattr(SimulatedRouter, "heard_of", lambda self, number, given: None)
    assert all(compare(make(), setup()).share < 0.95 for make in WORKS.values())


def test_a_restarted_router_goes_on_as_if_it_had_never_been_away(monkeypatch: pytest.MonkeyPatch) -> None:
    work = WORKS["sessions that share a system prompt"]()
    restarted = setup(1, restarts=(RouterRestart(0, 10.0, 1.0),))
    assert compare(work, restarted, since_s=10.0).share >= AS_BAR
    monkeypatch.setattr(SimulatedRouter, "met", lambda self, worker, recent_work_ms, up_s: None)
    assert compare(work, restarted, since_s=10.0).share < AS_BAR


class _Restarted(ComparedSimulation):
    """Notes how busy the fleet is to the restarted router, and to the one that was never away."""

    def __init__(self, work: Workload, setup: Setup) -> None:
        super().__init__(work, setup)
        self.seen: list[tuple[float, float]] = []

    def _tell_all(self, router: SimulatedRouter) -> None:
        super()._tell_all(router)
        for later_s in (0.0, 1.0, 5.0, 20.0):
            self._timeline.after(later_s, lambda: self.seen.append((_busy(router), _busy(self._seer))))


def _busy(router: SimulatedRouter) -> float:
    return router._traffic.utilisation(8)


def test_a_restarted_router_does_not_take_the_work_of_half_a_minute_for_that_of_a_moment() -> None:
    work = WORKS["sessions that share a system prompt"]()
    simulation = _Restarted(work, setup(1, restarts=(RouterRestart(0, 10.0, 1.0),)))
    simulation.run()
    assert len(simulation.seen) == 4
    for restarted, never_away in simulation.seen:
        assert restarted == pytest.approx(never_away, rel=0.02)


def test_the_seer_changes_nothing_and_nothing_is_left_in_anybodys_books() -> None:
    work = WORKS["documents, some of them asked for together"]()
    plain = simulate(work, setup())
    watched = ComparedSimulation(work, setup())
    assert [fate.worker for fate in watched.run().fates] == [fate.worker for fate in plain.fates]
    watched.check()


def test_one_router_agrees_with_itself() -> None:
    agreement = compare(WORKS["bursts"](), setup(1))
    assert agreement.share == 1.0
    assert agreement.extra_ms == []
    assert agreement.dearer_ms == 0.0
