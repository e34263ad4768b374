from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.protocol import SamplingParams
from workers.sampler import Row, sample, uniform

torch.set_num_threads(1)


def _params(**options: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, **options})


def _naive(logits: torch.Tensor, params: SamplingParams) -> tuple[list[int], list[float]]:
    """Candidates in order and their probabilities, by sorting everything in float64."""
    scaled = logits.double() / params.temperature
    mass, order = torch.softmax(scaled, -1).sort(descending=True, stable=True)
    weights = mass.tolist()
    if params.top_k:
        weights = weights[: params.top_k]
    total = sum(weights)
    kept, through = [], 0.0
    for weight in weights:
        if params.top_p < 1 and through >= params.top_p * total:
            break
        kept.append(weight)
        through += weight
    kept = [weight for weight in kept if weight >= params.min_p * kept[0]]
    return order[: len(kept)].tolist(), [weight / sum(kept) for weight in kept]


def _naive_token(logits: torch.Tensor, row: Row) -> set[int]:
    """The token that the row's draw falls on; two where it falls on the border of both."""
    ids, weights = _naive(logits, row.params)
    pairs = list(zip(ids, weights, strict=True))
    if not row.params.top_k and row.params.top_p == 1:
        pairs.sort()
    target, through, found = uniform(row.params.seed, row.position), 0.0, set()
    for token, weight in pairs:
        if through - 1e-6 <= target <= through + weight + 1e-6:
            found.add(token)
        through += weight
    return found


_sampling = st.builds(
    _params,
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.8]),
    top_k=st.sampled_from([0, 0, 1, 3, 20, 45, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.1, 0.6, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(_sampling, st.integers(0, 5000)), min_size=1, max_size=5), st.integers(0, 10**6))
def test_the_drawn_token_is_that_of_a_full_sort(rows: list[tuple[SamplingParams, int]], seed: int):
    # Few candidates, so that many rows need the fallback.
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(seed)) * 3
    wanted = [Row(params, position) for params, position in rows]
    found = sample(logits, wanted, candidates=40)
    for index, row in enumerate(wanted):
        assert found[index].token_id in _naive_token(logits[index], row)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "top_k": 7},
        {"top_p": 0.8},
        {"top_p": 0.9, "top_k": 12, "min_p": 0.05},
        {"min_p": 0.1, "temperature": 1.5},
    ],
)
def test_frequencies_follow_the_filtered_distribution(options: dict[str, float]):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    params, draws = _params(seed=11, **options), 20_000
    rows = [Row(params, position) for position in range(draws)]
    found = torch.bincount(
        torch.tensor([each.token_id for each in sample(logits.expand(draws, -1), rows)]), minlength=60
    )
    expected = torch.zeros(60, dtype=torch.float64)
    ids, weights = _naive(logits, params)
    expected[ids] = torch.tensor(weights, dtype=torch.float64)
    assert (found[expected == 0] == 0).all()
    deviation = (found / draws - expected).abs()
    assert (deviation <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-4).all()


def test_a_row_draws_the_same_alone_and_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 2000, generator=generator)
    rows = [
        Row(_params(seed=n, temperature=0.5 + n / 10, top_p=[1.0, 0.9][n % 2], top_k=[0, 50, 0][n % 3]), 100 + n)
        for n in range(12)
    ]
    together = [each.token_id for each in sample(logits, rows)]
    alone = [sample(logits[n : n + 1], [rows[n]])[0].token_id for n in range(12)]
    backwards = [each.token_id for each in sample(logits.flip(0), rows[::-1])][::-1]
    assert together == alone == backwards


def test_seed_and_position_alone_decide_the_draw():
    draws = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(draws) == 2500
    assert all(0 <= draw < 1 for draw in draws)
    assert uniform(7, 9) == uniform(7, 9) == pytest.approx(0.903633561977923, abs=1e-12)  # the same on every machine
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02


def test_greedy_and_drawn_rows_share_a_batch():
    logits = torch.zeros(3, 50)
    logits[0, 7] = logits[1, 8] = logits[2, 9] = 100.0
    rows = [Row(_params(temperature=0.0), 0), Row(_params(), 0), Row(_params(top_k=1), 0)]
    assert [each.token_id for each in sample(logits, rows)] == [7, 8, 9]


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(2)) * 10
    rows = [Row(_params(temperature=1e-38, top_p=top_p), n) for n, top_p in enumerate([1.0, 0.5, 1.0, 0.9])]
    assert [each.token_id for each in sample(logits, rows)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-48])
@pytest.mark.parametrize("options", [{"min_p": 0.5}, {"top_k": 2}, {"top_p": 0.3}])
def test_the_outermost_draws_fall_on_tokens_that_may_be_drawn(
    monkeypatch: pytest.MonkeyPatch, draw: float, options: dict[str, float]
):
    monkeypatch.setattr("workers.sampler.uniform", lambda seed, position: draw)
    logits = torch.full((1, 9), -3.0)
    logits[0, 4] = logits[0, 6] = 2.0
    assert sample(logits, [Row(_params(**options), 0)])[0].token_id in (4, 6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(bad: float, temperature: float):
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(3))
    logits[0, 4] = bad
    rows = [Row(_params(temperature=temperature, logprobs=2), 5)] * 2
    found = sample(logits, rows)
    assert found[0].token_id is None
    assert found[1].token_id == sample(logits[1:], rows[1:])[0].token_id is not None


def test_log_probabilities_come_from_the_raw_logits_and_only_where_asked_for():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(4)) * 5
    before = logits.clone()
    wanted = logits.log_softmax(-1)
    rows = [
        Row(_params(temperature=0.3, top_k=3, logprobs=4), 1),
        Row(_params(temperature=0.0), 1),
        Row(_params(temperature=0.0, logprobs=0), 1),
    ]
    first, second, third = sample(logits, rows)
    assert first.logprob is not None
    assert first.logprob.logprob == pytest.approx(float(wanted[0, first.token_id]), abs=1e-5)
    assert [token for token, _ in first.logprob.top] == wanted[0].topk(4).indices.tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(wanted[0].topk(4).values.tolist(), abs=1e-5)
    assert second.logprob is None
    assert third.logprob is not None
    assert third.logprob.top == ()
    assert torch.equal(logits, before)
