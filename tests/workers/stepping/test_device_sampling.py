"""The device chooses the tokens that the host's sampler would, and leaves to the host what it does not know."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.protocol import SamplingParams
from workers.sampler import Row, sample
from workers.stepping.sampling import plan_draws, read_rows, sample_rows, samples_on_device


def _params() -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        max_tokens=st.just(9),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        top_k=st.sampled_from([0, 1, 7, 1024, 1500, 2999, 3000, 9999]),
        min_p=st.sampled_from([0.0, 0.02, 0.5]),
        seed=st.integers(0, 1 << 63),
        logprobs=st.sampled_from([None, 0, 3]),
    )


@settings(max_examples=120, deadline=None)
@given(
    st.lists(_params(), min_size=1, max_size=6), st.sampled_from([50, 3000]), st.integers(0, 1000), st.floats(0.1, 8)
)
def test_tokens_and_logprobs_are_the_samplers(params: list[SamplingParams], vocab: int, seed: int, spread: float):
    logits = torch.randn(len(params), vocab, generator=torch.Generator().manual_seed(seed)) * spread
    rows = [Row(each, seed + place) for place, each in enumerate(params)]
    plan = plan_draws(rows, vocab)
    tokens, packed = sample_rows(logits, torch.from_numpy(plan.numbers), plan)
    found, expected = read_rows(packed, rows), sample(logits, rows)
    assert [each.token_id for each in found] == [each.token_id for each in expected] == tokens.tolist()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.logprob is None) == (theirs.logprob is None)
        if mine.logprob is not None and theirs.logprob is not None:
            assert mine.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-5)
            assert [token for token, _ in mine.logprob.top] == [token for token, _ in theirs.logprob.top]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gives_no_token_and_feeds_one_that_exists(bad: float, temperature: float):
    logits = torch.randn(3, 40)
    logits[1, 7] = bad
    rows = [Row(SamplingParams(1, temperature=temperature, top_k=5), place) for place in range(3)]
    plan = plan_draws(rows, 40)
    tokens, packed = sample_rows(logits, torch.from_numpy(plan.numbers), plan)
    assert [each.token_id is None for each in read_rows(packed, rows)] == [False, True, False]
    assert all(0 <= token < 40 for token in tokens.tolist())


def test_greedy_rows_ask_for_nothing_but_the_largest():
    plan = plan_draws([Row(SamplingParams(1, temperature=0.0, top_p=0.5), 3)], 100)
    assert (plan.draws, plan.plain, plan.candidates, plan.alternatives) == (False, False, 0, None)


def test_what_the_device_has_never_heard_of_is_the_hosts():
    assert samples_on_device(SamplingParams(1, top_k=3, stop=("x",), logprobs=2))
    wider = make_dataclass(
        "Wider",
        [("presence_penalty", float, 0.0), ("logit_bias", dict, field(default_factory=dict))],
        bases=(SamplingParams,),
        frozen=True,
    )
    assert samples_on_device(wider(1))
    assert not samples_on_device(wider(1, presence_penalty=0.5))
    assert not samples_on_device(wider(1, logit_bias={3: 1.0}))


def test_a_penalty_whose_default_is_one_is_the_hosts_only_where_it_is_another():
    @dataclass(frozen=True)
    class Wider(SamplingParams):
        repetition_penalty: float = 1.0

    assert samples_on_device(Wider(1))
    assert not samples_on_device(Wider(1, repetition_penalty=1.2))
