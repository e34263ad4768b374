"""Steps that do not fit into the device's memory are tried again at half their size, and no answer is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.engine_rig import Rig, make_rig, prompts
from workers.protocol import FinishReason
from workers.step_budget import LEAST_TOKENS, STEPS_TO_GROW, StepBudget


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = make_rig(max_batch_tokens=256)
    yield made
    made.close()


class SmallDevice:
    """A forward that has room for so many rows only."""

    def __init__(self, rig: Rig, rows: int) -> None:
        self.rows, self.sizes = rows, []
        self._forward = rig.engine.runner.forward

    def __call__(self, kv: object, spans: object, token_ids: list[int], *rest: object) -> torch.Tensor:
        self.sizes.append(len(token_ids))
        if len(token_ids) > self.rows:
            # As a real one: some layers have written their part before there was no memory for the next.
            self._forward(kv, spans, [1] * len(token_ids), *rest)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._forward(kv, spans, token_ids, *rest)


def test_answers_are_those_of_a_device_with_enough_memory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = prompts(6, lengths=(131, 100, 64))
    wanted = rig.run(*(rig.job(("big", n), prompt, max_tokens=12, no_store=True) for n, prompt in enumerate(batch)))
    device = SmallDevice(rig, 40)
    monkeypatch.setattr(rig.engine.runner, "forward", device)
    answers = rig.run(*(rig.job(("small", n), prompt, max_tokens=12) for n, prompt in enumerate(batch)))
    assert [answer.finish for answer in answers] == [answer.finish for answer in wanted]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in wanted]
    assert device.sizes[:4] == [256, 128, 64, 32]
    assert max(device.sizes[3:]) <= 64
    assert all(
        answer.fates is not None and sum(answer.fates.values()) == len(p)
        for answer, p in zip(answers, batch, strict=True)
    )


def test_a_step_that_fits_in_no_size_ends_its_jobs_and_no_others(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.engine.runner, "forward", SmallDevice(rig, 0))
    (answer,) = rig.run(rig.job("a", prompts(1)[0]))
    assert answer.finish is FinishReason.ERROR
    assert answer.error is not None
    assert "out of memory" in answer.error.message
    monkeypatch.undo()
    (answer,) = rig.run(rig.job("b", prompts(1)[0], max_tokens=2))
    assert answer.finish in (FinishReason.LENGTH, FinishReason.STOP)


@given(st.lists(st.tuples(st.integers(1, 512), st.booleans()), max_size=300), st.integers(1, 512))
def test_the_budget_stays_between_its_bounds_and_comes_back(steps: list[tuple[int, bool]], most: int) -> None:
    budget = StepBudget(most)
    for tokens, fits in steps:
        tokens = min(tokens, budget.tokens)
        before = budget.tokens
        if fits:
            budget.fitted()
            assert budget.tokens >= before
        elif budget.out_of_memory(tokens):
            assert budget.tokens == tokens // 2 < tokens
        else:
            assert budget.tokens == before
            assert tokens < 2 * LEAST_TOKENS
        assert min(LEAST_TOKENS, most) <= budget.tokens <= most
    for _ in range(STEPS_TO_GROW * 10):
        budget.fitted()
    assert budget.tokens == most
