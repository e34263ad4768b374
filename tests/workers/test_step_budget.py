"""Steps that do not fit into the device's memory are tried again: smaller, then with fewer sequences.

Only a job that does not fit alone ends."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.engine_rig import Rig, make_rig, prompts
from tests.workers.test_engine_machine import Rig as ArithmeticRig
from workers import step_budget
from workers.attention.step import Span
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


@given(
    st.lists(st.tuples(st.integers(1, 512), st.integers(1, 32), st.booleans()), max_size=300),
    st.integers(1, 512),
    st.integers(1, 32),
)
def test_the_budget_stays_between_its_bounds_and_comes_back(
    steps: list[tuple[int, int, bool]], most_tokens: int, most_sequences: int
) -> None:
    budget = StepBudget(most_tokens, most_sequences)
    for tokens, sequences, fits in steps:
        tokens = min(tokens, budget.tokens)
        sequences = min(sequences, tokens, budget.sequences)
        before = budget.tokens, budget.sequences
        if fits:
            budget.fitted()
            assert budget.tokens >= before[0]
            assert budget.sequences >= before[1]
        elif budget.out_of_memory(tokens, sequences):
            assert budget.tokens < tokens or budget.sequences < sequences
        else:
            assert (budget.tokens, budget.sequences) == before
            assert tokens <= LEAST_TOKENS
            assert sequences == 1
        assert min(LEAST_TOKENS, most_tokens) <= budget.tokens <= most_tokens
        assert 1 <= budget.sequences <= most_sequences
    for _ in range(STEPS_TO_GROW * 10):
        budget.fitted()
    assert (budget.tokens, budget.sequences) == (most_tokens, most_sequences)


class _Roulette:
    """What `ArithmeticRunner` computes, but for steps of some sequences that chance finds too large.

    Attributes:
        failed: how many were.
    """

    def __init__(self, rig: ArithmeticRig, draw: random.Random, odds: float, *, spares_one: bool) -> None:
        self.failed = 0
        self._rig, self._draw, self._odds, self._spares_one = rig, draw, odds, spares_one
        self._forward = rig.runner.forward
        rig.runner.forward = self.forward

    def forward(self, kv: object, spans: list[Span], token_ids: list[int], *rest: object) -> torch.Tensor:
        logits = self._forward(kv, spans, token_ids, *rest)
        if self._draw.random() >= self._odds or (self._spares_one and len(spans) == 1):
            return logits
        self.failed += 1
        self._rig.runner.wrong.add(("OUT_OF_MEMORY", self._rig.runner.step))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _jobs_at_random(rig: ArithmeticRig, draw: random.Random) -> None:
    for _ in range(14):
        prompt = [20 + draw.randrange(3)] * draw.randrange(20) + [30 + draw.randrange(900)]
        rig.submit(prompt, max_tokens=draw.randrange(1, 14), priority=draw.choice([0, 0, 1]))
        for _ in range(draw.randrange(4)):
            rig.step()
        if rig.copier is not None and rig.copier.running and draw.random() < 0.5:
            rig.copier.make_one()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("at_once", [True, False])
def test_steps_without_memory_end_nobody_who_has_companions(
    seed: int, ahead: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers are those of a device with room, and no block is lost; `Rig.finish` judges."""
    monkeypatch.setattr(step_budget, "STEPS_TO_GROW", 2)
    rig, draw = ArithmeticRig(ahead=ahead), random.Random(seed)
    if ahead:
        rig.gpu.fails_at_once = at_once
    chance = _Roulette(rig, draw, 0.5, spares_one=True)
    _jobs_at_random(rig, draw)
    rig.finish()
    assert chance.failed > 1
    assert {answer.finish for answer in rig.answers.values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ahead", [False, True])
def test_who_does_not_fit_alone_ends_with_that_reason_and_takes_nobody_along(
    seed: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_budget, "STEPS_TO_GROW", 2)
    rig, draw = ArithmeticRig(ahead=ahead), random.Random(seed)
    chance = _Roulette(rig, draw, 0.15, spares_one=False)
    _jobs_at_random(rig, draw)
    rig.finish()
    assert chance.failed > 1
    reasons = {answer.error.reason for answer in rig.answers.values() if answer.error is not None}
    assert reasons <= {"OUT_OF_MEMORY"}


def test_where_nothing_fits_all_end_one_after_the_other(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.engine.runner, "forward", SmallDevice(rig, 0))
    answers = rig.run(*(rig.job(n, prompt, max_tokens=4) for n, prompt in enumerate(prompts(5))))
    assert {answer.error.reason for answer in answers if answer.error is not None} == {"OUT_OF_MEMORY"}
    assert {answer.finish for answer in answers} == {FinishReason.ERROR}


def test_a_device_with_room_for_few_sequences_serves_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than `LEAST_TOKENS` decode, so no step gets small by its tokens alone."""
    rig = make_rig(max_batch_tokens=256, max_running=32)
    batch = prompts(24, lengths=(20, 37))
    wanted = rig.run(*(rig.job(("big", n), prompt, max_tokens=12, no_store=True) for n, prompt in enumerate(batch)))
    forward = rig.engine.runner.forward

    def small(kv: object, spans: list[Span], *rest: object) -> torch.Tensor:
        if len(spans) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(kv, spans, *rest)

    monkeypatch.setattr(rig.engine.runner, "forward", small)
    answers = rig.run(*(rig.job(("small", n), prompt, max_tokens=12) for n, prompt in enumerate(batch)))
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in wanted]
    assert [answer.finish for answer in answers] == [answer.finish for answer in wanted]
    rig.close()
