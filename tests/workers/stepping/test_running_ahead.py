"""Steps launched behind the host give what steps taken one by one give, whatever ends, fails or is preempted."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.blocks import block_hashes
from tests.workers.engine_rig import BLOCK_SIZE, Answer, Rig, prompts
from tests.workers.stepping.late_device import LateDevice
from tests.workers.stepping.stepping_rig import late_rig, sync_rig
from workers.protocol import Constraint, FinishReason, Job
from workers.stepping import launch

PROMPTS = prompts(12, lengths=(5, 20, 37, 64, 100, 131))


def _tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.token_ids for answer in answers]


def test_a_step_is_launched_before_the_one_before_is_known():
    device = LateDevice(eagerness=0.0)
    rig = late_rig(device)
    rig.engine.submit(rig.job("a", PROMPTS[0], max_tokens=5, ignore_eos=True))
    reported = [len(rig.engine.step().outputs) for _ in range(6)]
    assert device.most_queued == 2
    assert reported == [0, 1, 1, 1, 1, 1]
    rig.assert_nothing_leaked()
    rig.close()


@pytest.mark.parametrize(
    ("graphs", "gather", "kv_dtype"),
    [
        (True, True, "auto"),
        (False, True, "auto"),
        (False, False, "auto"),
        (True, True, "int8"),
        (False, True, "fp8_e4m3"),
    ],
)
def test_answers_are_those_of_the_engine_that_waits(graphs: bool, gather: bool, kv_dtype: str):
    options = {"max_running": 8, "max_batch_tokens": 96, "kv_dtype": kv_dtype}
    late, sync = late_rig(graphs=graphs, gather=gather, **options), sync_rig(**options)

    def answers(rig: Rig) -> list[Answer]:
        return rig.run(*(rig.job(n, prompt, max_tokens=12, logprobs=n % 3) for n, prompt in enumerate(PROMPTS)))

    mine, theirs = answers(late), answers(sync)
    assert _tokens(mine) == _tokens(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one.text, one.finish, one.fates) == (other.text, other.finish, other.fates)
        assert [told.token_id for told in one.logprobs] == [told.token_id for told in other.logprobs]
        expected = [told.logprob for told in other.logprobs]
        assert [told.logprob for told in one.logprobs] == pytest.approx(expected, abs=1e-4)
    late.close()
    sync.close()


@dataclass
class Plan:
    """Jobs, and what happens to them at which of their tokens."""

    seed: int
    jobs: int
    blocks: int
    running: int
    cancels: dict[int, int] = field(default_factory=dict)


def _jobs(rig: Rig, plan: Plan) -> list[Job]:
    draw, made = random.Random(plan.seed), []
    for number in range(plan.jobs):
        prompt = draw.choice(PROMPTS)[: draw.randrange(1, 132)]
        options: dict[str, object] = {"max_tokens": draw.randrange(1, 20), "priority": draw.randrange(2)}
        options["ignore_eos"] = draw.random() < 0.7
        if draw.random() < 0.5:
            options |= {
                "temperature": 0.9,
                "seed": number,
                "top_k": draw.choice([0, 5]),
                "top_p": draw.choice([1, 0.8]),
            }
        if draw.random() < 0.3:
            options["stop_token_ids"] = frozenset(draw.sample(range(1024), 200))
        options["no_store"] = draw.random() < 0.2
        made.append(rig.job(number, prompt, **options))
    return made


def _drive(rig: Rig, plan: Plan) -> dict[int, Answer]:
    """Submit by and by; cancel a job as soon as it has so many tokens."""
    draw, waiting, answers = random.Random(plan.seed + 1), _jobs(rig, plan), {}
    for _ in range(5000):
        while waiting and draw.random() < 0.4:
            rig.engine.submit(waiting.pop())
        for output in rig.engine.step().outputs:
            answer = answers.setdefault(output.job_id, Answer())
            answer.add(output)
            if plan.cancels.get(output.job_id) == len(answer.token_ids):
                rig.engine.cancel(output.job_id)
        if not waiting and not rig.engine.has_work():
            break
    rig.assert_nothing_leaked()
    return answers


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    jobs = draw(st.integers(1, 8))
    cancelled = draw(st.dictionaries(st.integers(0, jobs - 1), st.integers(1, 6), max_size=3))
    return Plan(
        draw(st.integers(0, 10_000)), jobs, draw(st.sampled_from([12, 20, 60])), draw(st.integers(1, 6)), cancelled
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans(), eagerness=st.sampled_from([0.0, 0.3, 0.8]))
def test_random_jobs_with_stops_cancels_and_preemptions_end_as_without_running_ahead(plan: Plan, eagerness: float):
    options = {"device_blocks": plan.blocks, "max_running": plan.running, "max_batch_tokens": 64}
    late = late_rig(LateDevice(plan.seed, eagerness=eagerness), **options)
    sync = sync_rig(**options)
    mine, theirs = _drive(late, plan), _drive(sync, plan)
    assert mine.keys() == theirs.keys()
    for name, answer in mine.items():
        expected = theirs[name]
        assert answer.token_ids == expected.token_ids
        assert (answer.text, answer.finish) == (expected.text, expected.finish)
    late.close()
    sync.close()


def test_preemption_while_a_step_is_in_flight_waits_for_it():
    options = {"device_blocks": 20, "max_running": 4, "max_batch_tokens": 64}
    late, sync = late_rig(LateDevice(eagerness=0.0), **options), sync_rig(**options)

    def answers(rig: Rig) -> list[Answer]:
        made = [rig.job(n, PROMPTS[2 + n], max_tokens=60, ignore_eos=True) for n in range(4)]
        return rig.run(*made)

    assert _tokens(answers(late)) == _tokens(answers(sync))
    assert late.engine.load().preemptions > 0
    late.close()
    sync.close()


def test_who_needs_blocks_of_others_does_not_wait_while_they_run_ahead():
    """Two of low rank fill the pool; one of high rank must have its first token long before they end."""

    def first_token_at(rig: Rig) -> int:
        for name in ("low", "lower"):
            rig.engine.submit(rig.job(name, PROMPTS[3][:30], salt=name.encode(), max_tokens=60, ignore_eos=True))
        for _ in range(20):
            rig.engine.step()
        rig.engine.submit(rig.job("high", PROMPTS[5], priority=5, max_tokens=2, ignore_eos=True))
        for turn in range(200):
            if any(output.job_id == "high" and output.token_ids for output in rig.engine.step().outputs):
                return turn
        raise AssertionError("it never had a token")

    options = {"device_blocks": 10, "max_running": 4, "max_batch_tokens": 256}
    late, sync = late_rig(LateDevice(eagerness=0.0), **options), sync_rig(**options)
    assert first_token_at(late) <= first_token_at(sync) + 3
    late.close()
    sync.close()


def test_a_token_too_many_is_thrown_away_with_the_block_that_it_fills():
    """The prompt ends one short of a block: the last token's K/V would fill it, and must not be found."""
    rig = late_rig(LateDevice(eagerness=0.0))
    (first,) = rig.run(rig.job("probe", PROMPTS[3][:45], max_tokens=3, ignore_eos=True))
    stop = frozenset([first.token_ids[2]])
    assert first.token_ids[2] not in first.token_ids[:2]
    rig.store.clear()
    (answer,) = rig.run(rig.job("a", PROMPTS[3][:45], max_tokens=9, ignore_eos=True, stop_token_ids=stop))
    assert (answer.finish, answer.token_ids) == (FinishReason.STOP, first.token_ids)
    assert rig.store.device.stats().blocks == 2  # 45 + 2 tokens were computed rightly, and a third of one too many
    rig.close()


def test_nan_in_the_logits_ends_its_sequence_alone_and_leaves_no_block():
    rig = late_rig(LateDevice(eagerness=0.0))
    rig.engine.submit(rig.job("bad", PROMPTS[3], max_tokens=9, ignore_eos=True))
    rig.engine.submit(rig.job("good", PROMPTS[4], max_tokens=9, ignore_eos=True))
    answers: dict[object, Answer] = {}
    for turn in range(30):
        if turn == 4:
            bad = rig.engine._sequences["bad"]
            rig.engine._pipeline._launcher.settle()
            keys, _ = rig.device.kv(0)
            keys[bad.block_table[0]] = float("nan")
        for output in rig.engine.step().outputs:
            answers.setdefault(output.job_id, Answer()).add(output)
    assert answers["bad"].finish is FinishReason.ERROR
    assert answers["bad"].error.reason == "MODEL_OUTPUT_NOT_FINITE"
    assert (answers["good"].finish, len(answers["good"].token_ids)) == (FinishReason.LENGTH, 9)
    assert rig.store.match(rig.job("x", PROMPTS[3]).block_hashes) == []
    rig.assert_nothing_leaked()
    rig.close()


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3, 4])
def test_out_of_memory_in_a_step_in_flight_ends_a_job_only_if_that_was_alone_in_a_small_one(fails_at: int):
    device = LateDevice(eagerness=0.0)
    rig = late_rig(device)
    rig.engine.submit(rig.job("a", PROMPTS[3], max_tokens=20, ignore_eos=True))
    answers: dict[object, Answer] = {}
    device.failures = [None] * fails_at + [torch.OutOfMemoryError("out of memory")]
    for turn in range(60):
        if turn == fails_at + 3:
            rig.engine.submit(rig.job("b", PROMPTS[5], max_tokens=3, ignore_eos=True))
        for output in rig.engine.step().outputs:
            answers.setdefault(output.job_id, Answer()).add(output)
    if fails_at:
        assert answers["a"].error.reason == "OUT_OF_MEMORY"
        assert len(answers["a"].token_ids) == fails_at
    else:  # its prompt is tried again in smaller pieces
        assert (answers["a"].finish, len(answers["a"].token_ids)) == (FinishReason.LENGTH, 20)
    assert (answers["b"].finish, len(answers["b"].token_ids)) == (FinishReason.LENGTH, 3)
    rig.assert_nothing_leaked()
    rig.close()


def test_a_launch_that_fails_at_once_spares_the_step_before(monkeypatch: pytest.MonkeyPatch):
    device = LateDevice(eagerness=0.0)
    rig = late_rig(device)
    rig.engine.submit(rig.job("a", PROMPTS[3], max_tokens=20, ignore_eos=True))
    rig.engine.step()
    launcher = rig.engine._pipeline._launcher
    with monkeypatch.context() as patch:

        def fail(work: object) -> None:
            raise torch.OutOfMemoryError("out of memory")

        patch.setattr(launcher, "launch", fail)
        outputs = rig.engine.step().outputs
    assert [len(output.token_ids) for output in outputs] == [1, 0]
    assert outputs[1].error is not None
    (again,) = rig.run(rig.job("b", PROMPTS[3], max_tokens=3, ignore_eos=True))
    assert again.finish is FinishReason.LENGTH
    rig.close()


def test_a_deadline_in_flight_ends_the_job_and_frees_its_blocks_when_the_step_has_ended():
    rig = late_rig(LateDevice(eagerness=0.0))
    rig.engine.submit(rig.job("a", PROMPTS[3], max_tokens=20, deadline=rig.clock() + 100))
    rig.engine.submit(rig.job("b", PROMPTS[4], max_tokens=20, ignore_eos=True))
    rig.engine.step()
    rig.engine.step()
    used = rig.engine._sequences["a"].block_table[:]
    rig.clock.ahead_s = 200.0
    outputs = rig.engine.step().outputs
    assert [output.finish for output in outputs if output.job_id == "a"] == [FinishReason.DEADLINE]
    rest = [output for _ in range(30) for output in rig.engine.step().outputs]
    assert {output.job_id for output in rest} == {"b"}
    assert rest[-1].completion_tokens == 20
    rig.assert_nothing_leaked()
    assert all(rig.device.refs(block) == 0 for block in used)
    rig.close()


def test_a_row_that_needs_the_host_makes_the_next_step_wait(monkeypatch: pytest.MonkeyPatch):
    """As a grammar or a penalty does: the engine's own `_sample` chooses its token, and nothing runs ahead of it."""

    def on_host(params: object) -> bool:
        return getattr(params, "seed", 0) != 7

    monkeypatch.setattr(launch, "samples_on_device", on_host)
    device = LateDevice(eagerness=0.0)
    rig, sync = late_rig(device), sync_rig()

    def answers(rig: Rig) -> list[Answer]:
        return rig.run(
            rig.job("grammar", PROMPTS[3], seed=7, max_tokens=6, ignore_eos=True),
            rig.job("free", PROMPTS[4], max_tokens=6, ignore_eos=True),
        )

    assert _tokens(answers(rig)) == _tokens(answers(sync))
    assert device.most_queued == 1
    rig.close()
    sync.close()


def test_closing_with_a_step_in_flight_gives_everything_back():
    rig = late_rig(LateDevice(eagerness=0.0))
    rig.engine.submit(rig.job("a", PROMPTS[3], max_tokens=20))
    rig.engine.step()
    rig.close()
    assert [block for block in range(rig.device.num_blocks) if rig.device.refs(block)] == []
    assert not rig.engine._pipeline.is_flying


def test_a_device_that_is_broken_when_the_engine_ends_does_not_keep_the_store_from_being_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What was queued for disk is written, and the folder is free for the process that comes next."""
    device = LateDevice(eagerness=0.0)
    rig = late_rig(device, disk=tmp_path / "disk")
    rig.run(rig.job("a", PROMPTS[3], max_tokens=3))

    def broken() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device, "synchronise", broken)
    with pytest.raises(torch.AcceleratorError):
        rig.engine.close(flush_s=5)
    after = sync_rig(disk=tmp_path / "disk")
    (answer,) = after.run(after.job("a", PROMPTS[3], max_tokens=3))
    assert answer.fates is not None
    assert answer.fates["disk"] == 48
    after.close()


def test_rows_that_the_host_samples_beside_others_are_as_without_running_ahead():
    """Constraints, penalties, bias, stop strings and log-probabilities, of answers that begin here and elsewhere."""
    options = [
        {"constraint": Constraint("regex", "[a-z ]{3,60}")},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "ignore_eos": True},
        {"logit_bias": ((40, 3.0),), "logprobs": 2, "ignore_eos": True},
        {"temperature": 0.8, "seed": 5, "ignore_eos": True, "stop": ("e", "qq")},
        {"ignore_eos": True, "logprobs": 1},
    ]

    def answers(rig: Rig) -> list[Answer]:
        fresh = [rig.job(n, PROMPTS[n], max_tokens=14, **each) for n, each in enumerate(options)]
        first = rig.run(*fresh)
        again = [_resumed(rig, job, answer) for job, answer in zip(fresh, first, strict=True)]
        for job in again:
            rig.engine.submit(job)
        rest = {job.job_id: Answer(resumed=job.resumed) for job in again}
        while rig.engine.has_work():
            for output in rig.engine.step().outputs:
                rest[output.job_id].add(output)
        for one, other, job in zip(first, rest.values(), again, strict=True):
            assert one.token_ids[job.resumed :] == other.token_ids
            assert one.finish is other.finish
            assert one.text.endswith(other.text)
        return [*first, *rest.values()]

    late, sync = late_rig(LateDevice(eagerness=0.0)), sync_rig()
    mine, theirs = answers(late), answers(sync)
    assert _tokens(mine) == _tokens(theirs)
    assert [(each.text, each.finish) for each in mine] == [(each.text, each.finish) for each in theirs]
    assert any(each.text for each in mine[:1]), "the constrained answer is no empty one"
    late.assert_nothing_leaked()
    late.close()
    sync.close()


def _resumed(rig: Rig, job: Job, answer: Answer) -> Job:
    """The job as a worker gets it that goes on with the answer."""
    told = len(answer.token_ids) // 2
    tokens = [*job.token_ids, *answer.token_ids[:told]]
    names = block_hashes(tokens, job.root, BLOCK_SIZE)
    return replace(job, job_id=("again", job.job_id), token_ids=tokens, block_hashes=names, resumed=told)
