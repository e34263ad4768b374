"""Jobs that another worker began: what comes is what the uninterrupted run gives behind the cut, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deploy.redis_server import PrivateRedis, find_redis_server
from kvstore.admission import OnEviction
from kvstore.blocks import block_hashes
from tests.workers.engine_rig import BLOCK_SIZE, Answer, Rig, make_rig, model_folder, prompts
from workers.detokenize import TextStream
from workers.protocol import FinishReason, Job, Output, SamplingParams

PROMPT = prompts(1, lengths=(37,))[0]
TOKENS = 44  # of an answer: four blocks end in it
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 7},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 11},
}


def rest_of(whole: Answer, cut: int) -> tuple[list[int], str, FinishReason | None]:
    """What is to come behind the first `cut` tokens."""
    later = whole.outputs[cut:]
    return [i for o in later for i in o.token_ids], "".join(o.text for o in later), whole.finish


def resumed(rig: Rig, job: Job, generated: Sequence[int]) -> Job:
    """The job as the next worker gets it."""
    token_ids = [*job.token_ids, *generated]
    hashes = block_hashes(token_ids, job.root, BLOCK_SIZE)
    return Job(
        job_id=(job.job_id, len(generated)),
        token_ids=token_ids,
        root=job.root,
        block_hashes=hashes,
        sampling=job.sampling,
        no_store=job.no_store,
        no_read=job.no_read,
        turn=job.turn,
        resumed=len(generated),
    )


def run(rig: Rig, *jobs: Job) -> list[list[Output]]:
    """Outputs of each."""
    for job in jobs:
        rig.engine.submit(job)
    outputs: dict[object, list[Output]] = {job.job_id: [] for job in jobs}
    while rig.engine.has_work():
        made = rig.engine.step().outputs
        for output in made:
            outputs[output.job_id].append(output)
        if not made:
            rig.engine.wait(0.05)
    rig.assert_nothing_leaked()
    return list(outputs.values())


def check(rig: Rig, job: Job, whole: Answer, cuts: Sequence[int]) -> None:
    jobs = [resumed(rig, job, whole.token_ids[:cut]) for cut in cuts]
    for cut, outputs in zip(cuts, run(rig, *jobs), strict=True):
        got = [i for o in outputs for i in o.token_ids], "".join(o.text for o in outputs), outputs[-1].finish
        assert got == rest_of(whole, cut), cut
        assert [o.completion_tokens for o in outputs if o.token_ids] == list(range(cut + 1, len(whole.token_ids) + 1))
        assert sum((outputs[0].fates or {}).values()) == len(job.token_ids)
        assert outputs[-1].fates == outputs[0].fates
        assert sum((outputs[0].resumed_fates or {}).values()) == len(job.token_ids) + cut


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("is_warm", [False, True])
def test_behind_any_cut_comes_what_would_have_come(sampling: str, is_warm: bool):
    first, second = make_rig(), make_rig(device_blocks=900)
    job = first.job("a", PROMPT, max_tokens=TOKENS, ignore_eos=True, logprobs=2, **SAMPLINGS[sampling])
    (whole,) = first.run(job)
    assert len(whole.token_ids) == TOKENS
    check(first if is_warm else second, job, whole, range(1, TOKENS))


def test_log_probabilities_of_told_tokens_are_not_told_again():
    rig = make_rig()
    job = rig.job("a", PROMPT, max_tokens=12, ignore_eos=True, logprobs=3, temperature=1.0, seed=3)
    (whole,) = rig.run(job)
    (outputs,) = run(rig, resumed(rig, job, whole.token_ids[:5]))
    told = [logprob for output in outputs for logprob in output.logprobs]
    assert [each.token_id for each in told] == [each.token_id for each in whole.logprobs[5:]]
    assert [each.logprob for each in told] == pytest.approx([each.logprob for each in whole.logprobs[5:]], abs=1e-4)


@pytest.mark.parametrize("sampling", ["seeded", "filtered"])  # greedy, so small a model repeats itself
def test_a_stop_string_is_found_wherever_it_is_cut(sampling: str):
    rig = make_rig(device_blocks=900)
    options = {"max_tokens": TOKENS, "ignore_eos": True, **SAMPLINGS[sampling]}
    (free,) = rig.run(rig.job("a", PROMPT, **options))
    stop = free.text[len(free.text) // 2 :][:6]  # of several tokens
    job = rig.job("b", PROMPT, stop=(stop, "zzzz"), **options)
    (whole,) = rig.run(job)
    assert whole.finish is FinishReason.STOP
    assert whole.text == free.text.partition(stop)[0]
    assert 6 < len(whole.token_ids) < TOKENS
    check(make_rig(device_blocks=900), job, whole, range(1, len(whole.token_ids)))


def test_an_end_token_ends_it_and_the_answer_is_no_longer_than_was_asked():
    rig = make_rig()
    options = {"temperature": 1.0, "seed": 5}
    (free,) = rig.run(rig.job("a", PROMPT, max_tokens=30, ignore_eos=True, **options))
    job = rig.job("b", PROMPT, max_tokens=30, stop_token_ids=frozenset({free.token_ids[20]}), **options)
    (whole,) = rig.run(job)
    assert whole.finish is FinishReason.STOP
    check(rig, job, whole, range(1, len(whole.token_ids)))
    short = rig.job("c", PROMPT, max_tokens=18, ignore_eos=True, **options)
    (whole,) = rig.run(short)
    assert whole.finish is FinishReason.LENGTH
    check(rig, short, whole, [1, 16, 17])


def test_a_resumed_job_is_resumed_again_and_preempted_and_stays_the_same():
    whole_rig, rig = make_rig(), make_rig(device_blocks=14)  # two of them do not fit
    jobs = [
        whole_rig.job(n, prompt, max_tokens=60, ignore_eos=True, temperature=0.9, seed=n)
        for n, prompt in enumerate(prompts(4, lengths=(40, 50)))
    ]
    wholes = whole_rig.run(*jobs)
    again = [
        resumed(rig, job, whole.token_ids[: 3 + 8 * n]) for n, (job, whole) in enumerate(zip(jobs, wholes, strict=True))
    ]
    for n, outputs in enumerate(run(rig, *again)):
        assert [i for o in outputs for i in o.token_ids] == wholes[n].token_ids[3 + 8 * n :]
    assert rig.engine.load().preemptions > 0


def test_what_the_first_worker_spilled_of_prompt_and_answer_is_loaded_by_the_next():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        first, second = make_rig(redis_url=server.url), make_rig(redis_url=server.url)
        job = first.job("a", PROMPT, max_tokens=TOKENS, ignore_eos=True, temperature=1.0, seed=2)
        (whole,) = first.run(job)
        first.store.flush(10)
        (outputs,) = run(second, resumed(second, job, whole.token_ids[:40]))
        assert [i for o in outputs for i in o.token_ids] == whole.token_ids[40:]
        # 77 tokens, four full blocks: of the prompt's 37 tokens all lie in them.
        assert outputs[0].resumed_fates == {"computed": 13, "redis": 64}
        assert outputs[0].fates == {"computed": 0, "redis": 37}
        first.close()
        second.close()


def test_blocks_that_write_back_keeps_are_shared_before_a_worker_leaves():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        first, second = make_rig(redis_url=server.url, host_blocks=50), make_rig(redis_url=server.url)
        store = first.store
        for lane in store._lanes.values():
            lane._moment = OnEviction.moment
        store._rules = dict.fromkeys(store._rules, OnEviction())
        job = first.job("a", PROMPT, max_tokens=60, ignore_eos=True)
        first.engine.submit(job)
        told: list[int] = []
        while len(told) < 40:
            told += [i for o in first.engine.step().outputs for i in o.token_ids]
            first.engine.wait(0.01)
        assert store.stats()["redis"].stores == 0
        for _ in range(200):
            if first.engine.cache.share_running():
                break
            store.flush(1)
            first.engine.step()
        assert store.stats()["redis"].stores >= 4
        (outputs,) = run(second, resumed(second, job, told))
        assert (outputs[0].resumed_fates or {})["redis"] == 64
        first.close()
        second.close()


def test_directives_hold_for_what_is_resumed():
    rig = make_rig()
    job = rig.job("a", PROMPT, max_tokens=30, ignore_eos=True)
    (whole,) = rig.run(job)
    for directives in ({"no_read": True}, {"no_store": True}):
        asked = rig.job("b", PROMPT, max_tokens=30, ignore_eos=True, **directives)
        (outputs,) = run(rig, resumed(rig, asked, whole.token_ids[:20]))
        assert [i for o in outputs for i in o.token_ids] == whole.token_ids[20:]
        cached = (outputs[0].resumed_fates or {}).get("device", 0)
        assert cached == (0 if "no_read" in directives else 48)


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


TEXT = "A naïve café: 你好, 世界! 😀👍🏽 — done."


@pytest.mark.parametrize("stops", [(), ("世界", "👍🏽"), ("— don",), ("nowhere",)])
def test_text_of_several_bytes_a_character_goes_on_from_any_cut(stops: tuple[str, ...]):
    ids = _tokenizer().encode(TEXT).ids
    for cut in range(len(ids) + 1):
        _same_text(ids, cut, stops)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.integers(0, 1023), max_size=50), st.integers(0, 50), st.sampled_from([(), ("a",), ("e ", "th")]))
def test_any_tokens_go_on_from_any_cut(ids: list[int], cut: int, stops: tuple[str, ...]):
    _same_text(ids, min(cut, len(ids)), stops)


def _same_text(ids: list[int], cut: int, stops: tuple[str, ...]) -> None:
    whole, second = (TextStream(_tokenizer(), PROMPT, stops) for _ in range(2))
    pieces = [*(whole.push(i) for i in ids), whole.flush()]
    second.replay(ids[:cut])
    assert [*(second.push(i) for i in ids[cut:]), second.flush()] == pieces[cut:]
    assert second.stopped == whole.stopped


def test_the_ids_that_were_generated_are_easy_to_get():
    rig = make_rig()
    job = rig.job("a", PROMPT, max_tokens=9, ignore_eos=True)
    (whole,) = rig.run(job)
    again = resumed(rig, job, whole.token_ids[:4])
    rig.engine.submit(again)
    (sequence,) = rig.engine._sequences.values()
    assert (sequence.num_prompt, sequence.num_generated) == (37, 4)
    assert sequence.generated_ids == whole.token_ids[:4]
    rig.engine.step()
    assert sequence.generated_ids == whole.token_ids[:5]
    rig.engine.cancel(again.job_id)
    (last,) = rig.engine.step().outputs
    assert (last.finish, last.completion_tokens) == (FinishReason.CANCELLED, 5)


def test_a_job_as_it_was_asked():
    asked = Job("a", PROMPT, b"r" * 32, [b"h" * 32] * 2, SamplingParams(max_tokens=9))  # type: ignore[arg-type]
    assert asked.as_asked(BLOCK_SIZE) is asked
    later = Job("a", [*PROMPT, *range(30)], b"r" * 32, [b"h" * 32] * 4, asked.sampling, resumed=30)  # type: ignore[arg-type]
    assert later.as_asked(BLOCK_SIZE) == asked
