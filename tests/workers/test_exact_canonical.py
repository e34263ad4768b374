"""Canonical mode: the same bits for any cut, companions, cached prefix, tier, preemption, and of decoded tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from deploy.redis_server import PrivateRedis, find_redis_server
from tests.workers.engine_rig import SHAPE
from tests.workers.exact_rig import (
    ARCHITECTURES,
    DTYPES,
    TIERS,
    ExactRig,
    assert_exact,
    canonical_runner,
    default_runner,
    exact_rig,
    reference,
)
from workers.step_budget import StepBudget

MODELS = [(architecture, dtype) for architecture in ARCHITECTURES for dtype in DTYPES]


@dataclass(frozen=True)
class Plan:
    """What happens to a conversation of two turns, and beside it.

    Attributes:
        first, more: tokens of the first turn's prompt, and of what the second adds to prompt and answer.
        shared: of the second turn, tokens that another request had before; beyond that nothing is cached.
        budgets: of a step's tokens, in the first turn and in the second. companions: prompt lengths of others.
        tier: where the second turn finds the first. device_blocks: few of them make sequences preempted.
    """

    first: int
    answer: int
    more: int
    budgets: tuple[int, int]
    companions: tuple[int, ...]
    tier: str
    device_blocks: int
    seed: int


budgets = st.sampled_from([7, 16, 33, 100, 512, 2048])
plans = st.builds(
    Plan,
    first=st.integers(1, 560),
    answer=st.integers(1, 40),
    more=st.integers(1, 60),
    budgets=st.tuples(budgets, budgets),
    companions=st.lists(st.integers(1, 120), max_size=5).map(tuple),
    tier=st.sampled_from(TIERS),
    device_blocks=st.sampled_from([48, 56, 200]),
    seed=st.integers(0, 1 << 20),
)


# The second turn's steps are larger than the first's; its prompt lies in host; all five beside it cannot have blocks.
CROWDED = Plan(400, 20, 60, (33, 512), (120,) * 5, "host", 48, 1)


@pytest.fixture(scope="module")
def redis_url():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        yield server.url


@pytest.mark.parametrize(("architecture", "dtype"), MODELS)
def test_any_history_gives_the_bits_of_one_cold_forward(architecture, dtype, redis_url, tmp_path_factory):
    # Not shrunk: an example takes a second, and says what went wrong as it is.
    runner = canonical_runner(architecture, dtype)
    seen = {"preempted": 0, "cached": 0, "blocks": 0, "larger": 0}

    @settings(
        max_examples=6,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    @given(plans)
    @example(CROWDED)
    def holds(plan: Plan):
        folder = tmp_path_factory.mktemp("disk")
        options = {"folder": folder, "redis_url": redis_url, "device_blocks": plan.device_blocks}
        draw = random.Random(plan.seed)
        with exact_rig(runner, plan.tier, max_batch_tokens=plan.budgets[0], **options) as rig:
            first = rig.job("first", _tokens(draw, plan.first), max_tokens=plan.answer, ignore_eos=True)
            (said,) = rig.run(first)
            seen["blocks"] += assert_exact(rig, runner, first, said)
            rig.keep_only_below()
            launched = _with_steps_of(rig, plan.budgets[1])
            prompt = [*first.token_ids, *said.token_ids, *_tokens(draw, plan.more)]
            jobs = [rig.job("second", prompt, max_tokens=plan.answer, ignore_eos=True)]
            for number, length in enumerate(plan.companions):
                jobs.insert(
                    draw.randrange(len(jobs) + 1),
                    rig.job(number, _tokens(draw, length), max_tokens=plan.answer, ignore_eos=True),
                )
            for job, answer in zip(jobs, rig.run(*jobs), strict=True):
                seen["blocks"] += assert_exact(rig, runner, job, answer)
                if job.job_id == "second":
                    seen["cached"] += answer.fates.get(plan.tier, 0)
            seen["preempted"] += rig.engine.load().preemptions
            assert max(launched) <= plan.budgets[1]
            seen["larger"] += max(launched) > plan.budgets[0]

    holds()
    assert min(seen.values()) > 0, seen


def test_preempted_sequences_come_back_to_the_same_bits():
    runner, draw = canonical_runner("llama", "float32"), random.Random(5)
    with exact_rig(runner, "host", device_blocks=24, max_running=8, max_batch_tokens=100) as rig:
        prompts = [_tokens(draw, length) for length in (20, 100, 37, 131, 64, 90, 120, 50)]
        jobs = [rig.job(n, prompt, max_tokens=40, ignore_eos=True) for n, prompt in enumerate(prompts)]
        answers = rig.run(*jobs)
        assert rig.engine.load().preemptions > 3
        assert sum(assert_exact(rig, runner, job, answer) for job, answer in zip(jobs, answers, strict=True)) > 60


@pytest.mark.parametrize(("architecture", "dtype"), MODELS)
def test_blocks_that_decoding_wrote_are_those_of_a_prefill(architecture, dtype):
    runner, prompt = canonical_runner(architecture, dtype), _tokens(random.Random(2), 20)
    with exact_rig(runner) as rig:
        job = rig.job("a", prompt, max_tokens=100, ignore_eos=True)
        (answer,) = rig.run(job)
        assert assert_exact(rig, runner, job, answer) == (20 + 99) // 16, "one of them is of the prompt alone"


@pytest.mark.parametrize(("architecture", "dtype"), MODELS)
def test_cuts_change_no_bit_of_a_forward(architecture, dtype):
    runner, draw = canonical_runner(architecture, dtype), random.Random(3)
    tokens = _tokens(draw, 700)
    whole = reference(runner, tokens)
    for cuts in ([1], [16], [511], [512], [513], [699], [3, 5, 100, 612, 640], list(range(37, 700, 37))):
        cut = reference(runner, tokens, cuts)
        assert torch.equal(cut.logits, whole.logits), cuts
        assert cut.blocks == whole.blocks, cuts


def test_what_is_said_is_what_the_default_mode_says_but_for_rounding():
    # Exact must not mean exactly wrong.
    for architecture in ARCHITECTURES:
        tokens = _tokens(random.Random(4), 600)
        exact = reference(canonical_runner(architecture, "float32"), tokens)
        default = reference(default_runner(architecture, "float32"), tokens)
        assert float((exact.logits - default.logits).abs().max()) < 1e-4 * float(default.logits.abs().max())


def _with_steps_of(rig: ExactRig, tokens: int) -> list[int]:
    """From now on, steps of so many tokens at most; the list grows by the size of each that is launched."""
    rig.engine._budget = StepBudget(tokens, rig.engine._scheduler.max_running)
    rig.engine._scheduler.max_batch_tokens = tokens
    launch, launched = rig.engine._pipeline.launch, list[int]()

    def watched(chunks, *others):
        launched.append(sum(chunk.length for chunk in chunks))
        return launch(chunks, *others)

    rig.engine._pipeline.launch = watched
    return launched


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(5, SHAPE.vocab) for _ in range(count)]
