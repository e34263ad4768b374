"""Several jobs over one prompt that come at once: the prompt's full blocks are computed once and held once."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.workers.engine_rig import BLOCK_SIZE, SHAPE, Rig, make_rig, prompts
from workers.protocol import Output


def _submit(rig: Rig, prompt: list[int], count: int, **options: object) -> None:
    asked = {"max_tokens": 20, "temperature": 1.0} | options
    for place in range(count):
        rig.engine.submit(rig.job(place, prompt, seed=70 + place, **asked))


def _step_until_all_decode(rig: Rig, count: int) -> list[Output]:
    outputs: list[Output] = []
    while {output.job_id for output in outputs} != set(range(count)):
        outputs += rig.engine.step().outputs
        assert len(outputs) < 1000
    return outputs


def _tables(rig: Rig) -> list[list[int]]:
    return [sequence.block_table for sequence in rig.engine._scheduler.running]


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    length=st.integers(2, 200),
    count=st.integers(2, 6),
    max_batch_tokens=st.sampled_from([8, 24, 64, 256]),
    seed=st.integers(0, 1000),
)
def test_full_blocks_of_the_prompt_are_held_once(length: int, count: int, max_batch_tokens: int, seed: int):
    rig, draw = make_rig(max_batch_tokens=max_batch_tokens), random.Random(seed)
    prompt = [draw.randrange(5, SHAPE.vocab) for _ in range(length)]
    _submit(rig, prompt, count, max_tokens=300, ignore_eos=True)
    _step_until_all_decode(rig, count)
    shared = (length - 1) // BLOCK_SIZE
    tables = _tables(rig)
    assert len(tables) == count
    for place in range(shared):
        (block,) = {table[place] for table in tables}
        assert rig.device.refs(block) == count
    own = [block for table in tables for block in table[shared:]]
    assert len(own) == len(set(own))
    assert all(rig.device.refs(block) == 1 for block in own)
    held = [block for block in range(rig.device.num_blocks) if rig.device.refs(block)]
    assert len(held) == shared + len(own)
    rig.store.check()
    for place in range(count):
        rig.engine.cancel(place)
    rig.engine.step()
    rig.assert_nothing_leaked()
    rig.close()


@pytest.mark.parametrize("max_batch_tokens", [16, 256])
def test_the_first_computes_the_prompt_and_the_others_their_last_tokens(max_batch_tokens: int):
    rig, (prompt,) = make_rig(max_batch_tokens=max_batch_tokens), prompts(1, lengths=[100])
    _submit(rig, prompt, 5)
    answers = rig.collect()
    assert answers[0].fates == {"computed": 100}
    assert [answers[place].fates for place in range(1, 5)] == [{"computed": 4, "device": 96}] * 4
    rig.close()


@pytest.mark.parametrize("max_batch_tokens", [64, 256])
def test_the_others_all_begin_in_the_step_after_the_prompt_was_computed(max_batch_tokens: int):
    rig, (prompt,) = make_rig(max_batch_tokens=max_batch_tokens), prompts(1, lengths=[100])
    _submit(rig, prompt, 8)
    while not (outputs := rig.engine.step().outputs):
        pass
    assert [output.job_id for output in outputs] == [0]
    assert {output.job_id for output in rig.engine.step().outputs} == set(range(8))
    while rig.engine.has_work():
        rig.engine.step()
    rig.assert_nothing_leaked()
    rig.close()


def test_each_answer_is_that_of_its_seed_alone():
    together, alone = make_rig(), make_rig()
    (prompt,) = prompts(1, lengths=[75])
    _submit(together, prompt, 4)
    found = together.collect()
    for place in range(4):
        (answer,) = alone.run(alone.job("one", prompt, max_tokens=20, temperature=1.0, seed=70 + place))
        assert found[place].token_ids == answer.token_ids
    assert len({tuple(answer.token_ids) for answer in found.values()}) == 4
    together.close()
    alone.close()


def test_one_that_is_cancelled_while_it_computes_leaves_the_work_to_the_next():
    rig, (prompt,) = make_rig(max_batch_tokens=32), prompts(1, lengths=[131])
    _submit(rig, prompt, 4)
    rig.engine.step()
    rig.engine.cancel(0)
    answers = rig.collect()
    # The second goes on behind what the first had made, and the others behind the second.
    assert answers[1].fates == {"device": 32, "computed": 99}
    assert [answers[place].fates["computed"] for place in (2, 3)] == [3, 3]
    rig.close()


@pytest.mark.parametrize("directive", ["no_store", "no_read"])
def test_without_the_cache_they_share_nothing(directive: str):
    rig, (prompt,) = make_rig(), prompts(1, lengths=[100])
    _submit(rig, prompt, 3, **{directive: True})
    answers = rig.collect()
    assert [answers[place].fates for place in range(3)] == [{"computed": 100}] * 3
    rig.close()


def test_a_pool_that_holds_the_prompt_twice_is_large_enough_for_many_answers():
    # 8 blocks of prompt; 6 answers of 2 blocks each: 8 + 12 fit where 6 prompts would not.
    rig, (prompt,) = make_rig(device_blocks=24), prompts(1, lengths=[130])
    _submit(rig, prompt, 6, max_tokens=20)
    answers = rig.collect()
    assert rig.engine.load().preemptions == 0
    assert Counter(len(answer.token_ids) for answer in answers.values()) == {20: 6}
    rig.close()
