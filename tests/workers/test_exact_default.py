"""Default mode: cached and cold differ as two cold runs with other chunks do, no more. Prints both numbers."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from tests.workers.engine_rig import SHAPE, Answer
from tests.workers.exact_rig import (
    ARCHITECTURES,
    DTYPES,
    ModelRunner,
    default_runner,
    exact_folder,
    exact_rig,
    reference,
)

MODELS = [(architecture, dtype) for architecture in ARCHITECTURES for dtype in DTYPES]
LENGTH, ANSWER = 600, 12
CHUNKS = (33, 304, 592)
CACHED = (304, 592)  # what is left is then 296 tokens, or 8: so few that other kernels compute them


@pytest.mark.parametrize(("architecture", "dtype"), MODELS)
def test_cached_differs_from_cold_as_two_cold_runs_do(architecture, dtype, capsys):
    runner = default_runner(architecture, dtype)
    between_cold, with_cached, flips = 0.0, 0.0, 0
    for seed in range(2):
        prompt = _prompt(seed)
        whole, logits = _run(runner, prompt, chunk=2048)
        for chunk in CHUNKS:
            cold, cold_logits = _run(runner, prompt, chunk=chunk)
            between_cold = max(between_cold, _apart(logits, cold_logits))
            flips += _differs_at_a_near_tie(architecture, dtype, prompt, whole, cold)
        for cached in CACHED:
            warm, warm_logits = _run(runner, prompt, chunk=2048, cached=cached)
            assert warm.fates["device"] == cached
            with_cached = max(with_cached, _apart(logits, warm_logits))
            flips += _differs_at_a_near_tie(architecture, dtype, prompt, whole, warm)
    with capsys.disabled():
        print(
            f"\n{architecture} {dtype}: max |dlogit| cached to cold {with_cached:.2e}, cold to cold with other chunks "
            f"{between_cold:.2e}; answers that part at a near-tie: {flips} of {2 * len(CHUNKS + CACHED)}"
        )
    assert with_cached <= between_cold


def _run(runner: ModelRunner, prompt: list[int], *, chunk: int, cached: int = 0) -> tuple[Answer, torch.Tensor]:
    """An answer, and the logits of its first token."""
    with exact_rig(runner, max_batch_tokens=chunk) as rig:
        if cached:
            rig.run(rig.job("prefix", prompt[: cached + 1], max_tokens=1))
        (answer,) = rig.run(rig.job("a", prompt, max_tokens=ANSWER, ignore_eos=True))
        return answer, rig.logits["a", LENGTH]


def _apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max())


def _differs_at_a_near_tie(architecture: str, dtype: str, prompt: list[int], one: Answer, other: Answer) -> int:
    """Whether two answers part; the two tokens are then as likely as rounding can tell, by float32."""
    pairs = list(zip(one.token_ids, other.token_ids, strict=True))
    at = next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    if at is None:
        return 0
    tokens = [*prompt, *one.token_ids[:at]]
    exact = reference(_in_float32(architecture, dtype), tokens).logits[-1]
    rounding = _apart(reference(default_runner(architecture, dtype), tokens).logits[-1], exact)
    mine, theirs = pairs[at]
    assert abs(float(exact[mine] - exact[theirs])) <= 2 * rounding
    return 1


@functools.cache
def _in_float32(architecture: str, dtype: str) -> ModelRunner:
    return ModelRunner.load(exact_folder(architecture, dtype), dtype="float32")


def _prompt(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, SHAPE.vocab) for _ in range(LENGTH)]
