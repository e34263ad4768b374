from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from tests.workers.engine_rig import make_rig, near_ties, oracle, prompts
from workers.logits import adjust
from workers.protocol import SamplingParams
from workers.row_state import RowState, row_state
from workers.sampler import Row, sample

VOCAB = 60
_tokens = st.lists(st.integers(0, VOCAB - 1), max_size=30)
_params = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7, 5.0]),
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.0, 2.0]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -0.5, 3.0, 100.0])).map(
        lambda bias: tuple(bias.items())
    ),
)


def _naive(logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> torch.Tensor:
    changed, counts, bias = logits.tolist(), Counter(output), dict(params.logit_bias)
    for token in range(len(changed)):
        value = changed[token] + bias.get(token, 0.0)
        if token in prompt or token in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0)
        changed[token] = value
    return torch.tensor(changed)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(_params, _tokens, _tokens, st.integers(0, 30)), min_size=1, max_size=5), st.integers(0, 10**6)
)
def test_each_row_is_what_a_loop_over_its_tokens_makes_of_it(rows, seed: int):
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    states = []
    for params, prompt, output, replayed in rows:
        # What is replayed and what is appended one by one must come to the same.
        state = RowState(params, prompt, output[:replayed])
        for token in output[replayed:]:
            state.append(token)
        states.append(state)
    changed = logits.clone()
    assert adjust(changed, states) == {}
    for index, (params, prompt, output, _) in enumerate(rows):
        torch.testing.assert_close(changed[index], _naive(logits[index], params, prompt, output), rtol=1e-5, atol=1e-5)


def test_repetition_and_bias_are_those_of_transformers():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 4
    prompt, output = [1, 2, 2, 9], [9, 30, 31]
    ids = torch.tensor([prompt + output])
    biased = SequenceBiasLogitsProcessor({(4,): 1.5, (9,): -3.0})(ids, logits.clone())
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(ids, biased)
    params = SamplingParams(1, repetition_penalty=1.7, logit_bias=((4, 1.5), (9, -3.0)))
    changed = logits.clone()
    adjust(changed, [RowState(params, prompt, output)])
    torch.testing.assert_close(changed, wanted)


def test_rows_without_any_of_it_have_no_state_and_their_logits_are_not_copied(monkeypatch):
    plain = SamplingParams(1, temperature=0.7, top_k=5)
    assert row_state(plain, [1, 2]) is None
    assert not plain.needs_last_token
    assert not SamplingParams(1, logit_bias=((1, 2.0),)).needs_last_token
    assert SamplingParams(1, frequency_penalty=0.1).needs_last_token
    monkeypatch.setattr("workers.sampler.adjust", None)
    assert sample(torch.zeros(2, VOCAB), [Row(plain, 1), Row(plain, 2)])[0].token_id is not None


def test_a_penalised_row_changes_no_other_row_and_logprobs_stay_those_of_the_raw_logits():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))
    best = logits.argmax(-1).tolist()
    banned = SamplingParams(1, temperature=0.0, logprobs=2, logit_bias=((best[1], -100.0),))
    greedy = SamplingParams(1, temperature=0.0, logprobs=2)
    before = logits.clone()
    rows = [Row(greedy, 0), Row(banned, 0, row_state(banned, [])), Row(greedy, 0)]
    found = sample(logits, rows)
    assert torch.equal(logits, before)
    assert [found[0].token_id, found[2].token_id] == [best[0], best[2]]
    second = logits[1].topk(2).indices[1].item()
    assert found[1].token_id == second
    raw = torch.log_softmax(logits, -1)
    assert found[1].logprob.logprob == pytest.approx(raw[1, second].item(), abs=1e-6)
    assert [token for token, _ in found[1].logprob.top] == [best[1], second]


def test_a_bias_of_100_decides_a_drawn_token_and_of_minus_100_rules_it_out():
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(6))
    wanted = SamplingParams(1, top_p=0.9, logit_bias=((7, 100.0),))
    unwanted = SamplingParams(1, logit_bias=((7, -100.0),))
    state, other = row_state(wanted, []), row_state(unwanted, [])
    assert {each.token_id for each in sample(logits, [Row(wanted, i, state) for i in range(200)])} == {7}
    assert 7 not in {each.token_id for each in sample(logits, [Row(unwanted, i, other) for i in range(200)])}


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_greedy_answers_with_a_repetition_penalty_are_those_of_generate(architecture: str):
    rig, batch = make_rig(architecture), prompts(6)
    model = oracle(architecture)
    expected = model.generate(batch, 40, repetition_penalty=1.4)
    answers = rig.run(*(rig.job(n, prompt, max_tokens=40, repetition_penalty=1.4) for n, prompt in enumerate(batch)))
    assert near_ties(answers, expected) <= 1
    plain = rig.run(*(rig.job(f"plain{n}", prompt, max_tokens=40) for n, prompt in enumerate(batch)))
    assert [answer.token_ids for answer in plain] != [answer.token_ids for answer in answers]
    rig.close()


def test_a_preempted_answer_goes_on_with_its_counts():
    options = {"max_tokens": 60, "temperature": 0.9, "frequency_penalty": 1.0, "repetition_penalty": 1.2, "seed": 5}
    batch = prompts(6, lengths=[60])
    alone = []
    for prompt in batch:
        roomy = make_rig()
        alone += roomy.run(roomy.job("one", prompt, **options))
        roomy.close()
    tight = make_rig(device_blocks=20)
    together = tight.run(*(tight.job(n, prompt, **options) for n, prompt in enumerate(batch)))
    assert tight.engine.load().preemptions > 0
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert max(Counter(alone[0].token_ids).values()) <= 6  # a frequency penalty at work
    tight.close()


def test_a_state_built_from_the_tokens_is_the_state_that_made_them():
    rig, (prompt,) = make_rig(), prompts(1)
    options = {"max_tokens": 40, "temperature": 1.0, "presence_penalty": 0.8, "frequency_penalty": 0.4, "seed": 8}
    whole = rig.run(rig.job("whole", prompt, **options))[0].token_ids
    params = rig.job("x", prompt, **options).sampling
    for cut in (1, 17, 39):
        state = row_state(params, prompt, whole[:cut])
        logits = oracle().logits([*prompt, *whole[:cut]])[-1:]
        assert sample(logits, [Row(params, len(prompt) + cut, state)])[0].token_id == whole[cut]
    rig.close()
