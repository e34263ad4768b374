"""Estimates in milliseconds: they find what made the measurements, and survive outliers and change."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.estimate import PrefillCost, PrefillFit, TransferEstimate, worth_loading

BLOCK = 1 << 18


def measured(latency_ms: float, bytes_per_ms: float, reads: int = 40, seed: int = 1) -> TransferEstimate:
    estimate, draw = TransferEstimate(), random.Random(seed)
    for _ in range(reads):
        nbytes = draw.choice([1, 4, 16, 64]) * BLOCK
        estimate.observe(nbytes, (latency_ms + nbytes / bytes_per_ms) * draw.uniform(0.95, 1.05))
    return estimate


def test_latency_and_bandwidth_are_told_apart() -> None:
    estimate = measured(2.0, 1e6)
    assert estimate.latency_ms == pytest.approx(2.0, rel=0.25)
    assert estimate.ms_per(BLOCK) == pytest.approx(BLOCK / 1e6, rel=0.1)
    assert estimate.predict_ms(16 * BLOCK) == pytest.approx(2.0 + 16 * BLOCK / 1e6, rel=0.1)


def test_nothing_is_predicted_before_the_first_measurement() -> None:
    assert TransferEstimate().predict_ms(1) is None
    assert PrefillFit().predict_ms(1, 0) is None
    assert PrefillFit().cost is None


def test_reads_of_one_size_are_predicted_at_that_size() -> None:
    estimate = TransferEstimate()
    for _ in range(5):
        estimate.observe(BLOCK, 3.0)
    assert estimate.predict_ms(BLOCK) == pytest.approx(3.0)


def test_reads_that_find_nothing_teach_the_latency() -> None:
    estimate = TransferEstimate()
    for _ in range(5):
        estimate.observe(0, 1.5)
    assert estimate.latency_ms == pytest.approx(1.5)


def test_one_stall_hardly_moves_the_estimate_and_lasting_slowness_is_believed() -> None:
    estimate = measured(0.5, 1e6)
    before = estimate.predict_ms(BLOCK)
    assert before is not None
    estimate.observe(BLOCK, 5000.0)
    assert estimate.predict_ms(BLOCK) < 2 * before  # type: ignore[operator]
    for _ in range(60):
        estimate.observe(BLOCK, 50.0)
    assert estimate.predict_ms(BLOCK) == pytest.approx(50.0, rel=0.2)


@given(st.lists(st.tuples(st.integers(0, 1 << 24), st.floats(0, 1e4)), min_size=1, max_size=30))
def test_a_transfer_estimate_is_never_negative(reads: list[tuple[int, float]]) -> None:
    estimate = TransferEstimate()
    for nbytes, ms in reads:
        estimate.observe(nbytes, ms)
    assert estimate.latency_ms >= 0
    assert estimate.ms_per(BLOCK) >= 0


def prefills(cost: PrefillCost, count: int = 60, noise: float = 0.03) -> PrefillFit:
    fit, draw = PrefillFit(), random.Random(2)
    for _ in range(count):
        new, cached = draw.choice([16, 64, 256, 1024, 2048]), draw.choice([0, 0, 512, 2048])
        fit.observe(new, cached, cost.predict_ms(new, cached) * draw.uniform(1 - noise, 1 + noise))
    return fit


@pytest.mark.parametrize(
    "cost",
    [PrefillCost(3.0, 0.5, 1e-4), PrefillCost(0.0, 0.5, 0.0), PrefillCost(10.0, 0.01, 5e-6), PrefillCost(0, 0.2, 1e-3)],
)
def test_the_prefill_fit_predicts_what_it_was_taught_and_beyond(cost: PrefillCost) -> None:
    fit = prefills(cost)
    for new, cached in [(32, 0), (512, 1024), (2048, 2048), (4096, 0)]:
        assert fit.predict_ms(new, cached) == pytest.approx(cost.predict_ms(new, cached), rel=0.15)


def test_the_prefill_fit_recovers_its_terms_without_noise() -> None:
    cost = PrefillCost(3.0, 0.5, 1e-4)
    fitted = prefills(cost, noise=0.0).cost
    assert fitted is not None
    assert fitted.fixed_ms == pytest.approx(3.0, rel=0.02)
    assert fitted.token_ms == pytest.approx(0.5, rel=0.02)
    assert fitted.pair_ms == pytest.approx(1e-4, rel=0.05)


def test_one_prefill_is_read_as_a_price_per_token() -> None:
    fit = PrefillFit()
    fit.observe(1000, 0, 500.0)
    assert fit.cost == PrefillCost(0.0, pytest.approx(0.5), 0.0)  # type: ignore[arg-type]


def test_one_stalled_prefill_hardly_moves_the_fit() -> None:
    fit = prefills(PrefillCost(3.0, 0.5, 1e-4))
    before = fit.predict_ms(256, 0)
    assert before is not None
    fit.observe(256, 0, 60_000.0)
    assert fit.predict_ms(256, 0) < 1.3 * before  # type: ignore[operator]


def test_the_fit_follows_a_machine_that_became_slower() -> None:
    fit = prefills(PrefillCost(3.0, 0.5, 1e-4))
    draw = random.Random(3)
    slower = PrefillCost(6.0, 1.0, 2e-4)
    for _ in range(80):
        new = draw.choice([16, 256, 1024])
        fit.observe(new, 0, slower.predict_ms(new, 0))
    assert fit.predict_ms(512, 0) == pytest.approx(slower.predict_ms(512, 0), rel=0.15)


@given(st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 8192), st.floats(0, 1e5)), min_size=1, max_size=25))
def test_no_term_of_a_prefill_fit_is_negative(measurements: list[tuple[int, int, float]]) -> None:
    fit = PrefillFit()
    for new, cached, ms in measurements:
        fit.observe(new, cached, ms)
    cost = fit.cost
    assert cost is not None
    assert min(cost.fixed_ms, cost.token_ms, cost.pair_ms) >= 0
    assert cost.predict_ms(100, 100) > 0


def test_no_tokens_take_no_time() -> None:
    assert PrefillCost(3.0, 0.5, 1e-4).predict_ms(0, 1000) == 0.0


@pytest.mark.parametrize(
    ("load_ms", "compute_ms", "expected"),
    [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.0, False), (None, 1.0, True), (5.0, None, True), (None, None, True)],
)
def test_loading_is_worth_it_when_it_is_faster_or_nobody_knows(
    load_ms: float | None, compute_ms: float | None, expected: bool
) -> None:
    assert worth_loading(load_ms, compute_ms) is expected


@pytest.mark.parametrize("module", ["kvstore.estimate", "kvstore.directory"])
def test_the_router_can_import_it_without_torch_or_numpy(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_a_tier_that_is_fast_again_is_believed_after_a_few_reads() -> None:
    fit = TransferEstimate()
    for _ in range(30):
        fit.observe(1 << 20, 1000.0)
    for _ in range(8):
        fit.observe(1 << 20, 2.0)
    predicted = fit.predict_ms(1 << 20)
    assert predicted is not None
    assert predicted < 20.0
