"""Simulated workers that prefill for others: what comes when, what is a hit, and what a failure costs."""

from __future__ import annotations

import random

import pytest

from kvstore.events import TierName
from replay.batched_profile import BatchedProfile
from replay.outcome import Outcome
from replay.simulated_router import RouterSettings
from replay.simulation import Failure, RouterRestart, Setup, Simulation
from replay.tiers import TierProfile, Tiers
from replay.workload import Workload
from router.cost import PrefillFit
from tests.replay.made import BLOCK, made_work

PROFILE = BatchedProfile(PrefillFit(1.0, 1.0), decode_ms=5.0, max_batch_tokens=200, max_running=50, pool_tokens=50_000)
WAY = Tiers(peer=TierProfile(0, latency_ms=1.0, token_ms=0.1))
ALWAYS = RouterSettings("cache_aware", {"interference": 10.0})


def work(count: int = 60, *, every_s: float = 0.3, blocks: int = 40, output: int = 100) -> Workload:
    """Long prompts over a few documents, so that somebody always decodes."""
    rng = random.Random(7)
    prompts = [(n * every_s, [rng.randrange(4), *(1000 * n + k for k in range(blocks - 1))]) for n in range(count)]
    return made_work(prompts, output=output, extra=3)


def run(workload: Workload, **settings: object) -> tuple[Outcome, Simulation]:
    told = {"workers": 3, "router": ALWAYS, "profile": PROFILE, "tiers": WAY, "roles": "prefill=1,decode=2"} | settings
    simulation = Simulation(workload, Setup(**told))  # type: ignore[arg-type]
    outcome = simulation.run()
    simulation.check()
    for engine in simulation._engines.values():
        engine.check()  # type: ignore[attr-defined]
    assert not simulation._pairs._flights
    return outcome, simulation


def test_the_first_token_comes_when_the_prefill_and_its_last_piece_have() -> None:
    # One that decodes for long, so that the second one is prefilled elsewhere.
    workload = made_work([(0.0, [*range(50, 60)]), (1.0, [*range(2, 42)])], output=1000, extra=3)
    outcome, _ = run(workload, workers=2, roles="prefill=1,decode=1")
    second = outcome.fates[1]
    prefill_s = (3 * 1.0 + 403 * 1.0) / 1e3  # steps of 200, 200 and 3
    way_s = (1.0 + 0.1 * 400) / 1e3  # all of it is a piece
    tail_s = (1.0 + 3.0) / 1e3
    decode_steps_s = 3 * 5.0 / 1e3
    assert second.worker == "worker-1"
    assert second.ttft_s == pytest.approx(prefill_s + way_s + tail_s, abs=decode_steps_s)
    assert (second.cached, second.computed) == (0, 403)


def test_what_the_maker_had_is_a_hit_and_every_token_is_counted_once() -> None:
    document = [*range(2, 42)]
    workload = made_work([(0.0, [1]), (1.0, document), (4.0, [*document, 90, 91])], output=3000, extra=3)
    outcome, _ = run(workload, workers=3)
    third = outcome.fates[2]
    assert third.cached + third.computed == 423
    assert sum(third.tiers.values()) == third.cached
    if third.worker != outcome.fates[1].worker:
        assert third.tiers[TierName.PEER] == 400


def test_with_roles_answers_are_held_up_less() -> None:
    workload = work(every_s=0.42, output=600)
    pairs, _ = run(workload)
    mixed, _ = run(workload, roles="both=3")
    apart, together = pairs.figures(warm_up=0), mixed.figures(warm_up=0)
    assert set(apart.split) == {"worker-1", "worker-2"}
    assert apart.tpot_p50_s == pytest.approx(0.005, rel=0.1), "nobody is held up by a prompt"
    assert apart.tpot_p50_s < 0.8 * together.tpot_p50_s
    assert apart.unanswered == together.unanswered == 0


def test_the_same_arguments_give_the_same_figures() -> None:
    one, two = run(work())[0], run(work())[0]
    assert one.fates == two.fates
    assert one.gaps == two.gaps


@pytest.mark.parametrize("worker", [0, 1, 2])
@pytest.mark.parametrize("at_s", [0.95, 2.1, 7.45])
def test_a_worker_that_dies_costs_no_request_that_had_no_token(worker: int, at_s: float) -> None:
    outcome, _ = run(work(), failures=[Failure(worker, at_s, 3.0)])
    assert all(fate.first_token_s is not None for fate in outcome.fates)
    cut_off = sum(fate.failed for fate in outcome.fates)
    assert cut_off == 0 or worker > 0, "who only prefills cuts off no answer"


def test_a_router_that_restarts_calls_both_halves_off() -> None:
    outcome, _ = run(work(), restarts=[RouterRestart(0, 3.1, 0.5)], routers=2)
    assert all(fate.first_token_s is not None or fate.failed for fate in outcome.fates)


def test_roles_need_a_way_between_workers() -> None:
    from replay.simulation import simulate

    with pytest.raises(ValueError, match=r"tiers\.peer"):
        simulate(work(3), Setup(2, ALWAYS, PROFILE, roles="prefill=1,decode=1"))


def test_a_prompt_of_a_block_is_one_of_many() -> None:
    outcome, _ = run(work(10, blocks=1))
    assert BLOCK == 10
    assert all(fate.first_token_s is not None for fate in outcome.fates)
