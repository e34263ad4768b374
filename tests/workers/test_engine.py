"""The life of a job: how it ends, what its outputs say, and what it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from deploy.redis_server import PrivateRedis, find_redis_server
from kvstore.blocks import block_hashes
from kvstore.events import AllBlocksCleared, BlockStored, TierName
from tests.workers.engine_rig import BLOCK_SIZE, Rig, make_rig, model_folder, oracle, prompts
from workers.protocol import FinishReason, Output, Promised
from workers.sampler import Row, sample

PROMPT = prompts(1, lengths=(50,))[0]


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = make_rig()
    yield made
    made.close()


def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


def _outputs(rig: Rig, steps: int) -> list[Output]:
    return [output for _ in range(steps) for output in rig.engine.step().outputs]


def test_every_token_comes_in_the_step_that_made_it_and_the_last_output_says_the_rest(rig: Rig):
    answer = rig.run(rig.job("a", PROMPT, max_tokens=5))[0]
    assert [len(output.token_ids) for output in answer.outputs] == [1] * 5
    assert [output.completion_tokens for output in answer.outputs] == [1, 2, 3, 4, 5]
    assert answer.finish is FinishReason.LENGTH
    assert answer.text == _tokenizer().decode(answer.token_ids)
    assert answer.fates == {"computed": 50}
    assert [output.fates for output in answer.outputs[:-1]] == [{"computed": 50}, None, None, None]
    assert all(output.resumed_fates is None for output in answer.outputs)


def test_the_first_output_says_how_long_it_took(rig: Rig):
    first, *others = rig.run(rig.job("a", PROMPT, max_tokens=3))[0].outputs
    assert first.worker_ttft_ms is not None
    assert first.worker_ttft_ms > 0
    assert 0 <= first.queue_ms + first.load_ms <= first.worker_ttft_ms
    assert all(output.worker_ttft_ms is None for output in others)


def test_a_seed_gives_the_same_answer_alone_in_a_batch_and_preempted():
    def jobs(rig: Rig):
        options = {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True, "max_tokens": 40}
        return [rig.job(n, prompt, seed=n, **options) for n, prompt in enumerate(prompts(6))]

    wide, narrow = make_rig(), make_rig(device_blocks=20, max_running=3, max_batch_tokens=48)
    together = [answer.token_ids for answer in wide.run(*jobs(wide))]
    preempted = [answer.token_ids for answer in narrow.run(*jobs(narrow))]
    alone = [wide.run(job)[0].token_ids for job in jobs(wide)]
    assert narrow.engine.load().preemptions > 0
    assert together == alone == preempted
    assert len({tuple(tokens[:10]) for tokens in together}) == 6
    wide.close()
    narrow.close()


def test_a_sampled_answer_is_what_the_sampler_makes_of_plain_logits_position_by_position(rig: Rig):
    job = rig.job("a", PROMPT, temperature=0.8, top_k=40, seed=3, max_tokens=30, ignore_eos=True)
    (answer,) = rig.run(job)
    logits = oracle().logits([*PROMPT, *answer.token_ids])[len(PROMPT) - 1 : -1]
    rows = [Row(job.sampling, len(PROMPT) + place) for place in range(30)]
    assert answer.token_ids == [sampled.token_id for sampled in sample(logits, rows)]


def test_other_seeds_give_other_answers(rig: Rig):
    options = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    answers = rig.run(*(rig.job(n, PROMPT, seed=n, **options) for n in range(5)))
    assert len({tuple(answer.token_ids) for answer in answers}) == 5


def test_text_ends_before_a_stop_string_that_spans_tokens(rig: Rig):
    options = {"temperature": 1.0, "seed": 5, "ignore_eos": True, "max_tokens": 40}
    free = rig.run(rig.job("free", PROMPT, **options))[0]
    shown = [output.text for output in free.outputs]
    place = next(n for n in range(10, 39) if len(shown[n]) > 1 and len(shown[n + 1]) > 1)
    stop = shown[place][-1] + shown[place + 1][0]
    cut = rig.run(rig.job("cut", PROMPT, stop=("no such text", stop), **options))[0]
    assert cut.finish is FinishReason.STOP
    assert cut.text == free.text.partition(stop)[0]
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) <= place + 2


def test_what_only_began_a_stop_string_is_given_at_the_end(rig: Rig):
    free = rig.run(rig.job("free", PROMPT, max_tokens=6))[0]
    held = rig.run(rig.job("held", PROMPT, max_tokens=6, stop=(free.text + "and more",)))[0]
    assert held.finish is FinishReason.LENGTH
    assert held.text == free.text
    assert [output.text for output in held.outputs[:-1]] == [""] * 5


def test_an_end_token_ends_is_counted_and_gives_no_text(rig: Rig):
    free = rig.run(rig.job("free", PROMPT, max_tokens=8))[0]
    last = free.token_ids[3]
    count = free.token_ids.index(last) + 1
    ended = rig.run(rig.job("ended", PROMPT, max_tokens=8, stop_token_ids=frozenset({last})))[0]
    assert ended.finish is FinishReason.STOP
    assert ended.token_ids == free.token_ids[:count]
    assert ended.text == _tokenizer().decode(ended.token_ids[:-1])


def test_the_models_own_end_tokens_end_unless_ignored(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    free = rig.run(rig.job("free", PROMPT, max_tokens=8))[0]
    object.__setattr__(rig.engine.info, "eos_token_ids", (1023, free.token_ids[2]))
    ended, ignoring = rig.run(
        rig.job("ended", PROMPT, max_tokens=8), rig.job("ignoring", PROMPT, max_tokens=8, ignore_eos=True)
    )
    assert ended.finish is FinishReason.STOP
    assert len(ended.token_ids) == free.token_ids.index(free.token_ids[2]) + 1
    assert ignoring.token_ids == free.token_ids


def test_a_cancelled_job_holds_nothing_before_the_next_forward(rig: Rig):
    rig.engine.submit(rig.job("a", PROMPT))
    _outputs(rig, 3)
    assert any(rig.device.refs(block) for block in range(rig.device.num_blocks))
    rig.engine.cancel("a")
    rig.assert_nothing_held()
    (last,) = _outputs(rig, 1)
    assert (last.finish, last.completion_tokens, last.token_ids) == (FinishReason.CANCELLED, 3, [])
    assert sum(last.fates.values()) == 50
    assert not rig.engine.has_work()
    rig.engine.cancel("a")  # unknown by now: nothing happens
    assert not rig.engine.has_work()


def test_a_deadline_ends_a_job_that_runs_and_one_that_waits():
    rig = make_rig(max_running=1)
    now = rig.clock()
    rig.engine.submit(rig.job("runs", PROMPT, deadline=now + 60))
    rig.engine.submit(rig.job("waits", PROMPT, deadline=now + 60))
    assert len(_outputs(rig, 2)) == 2
    rig.clock.ahead_s = 61
    outputs = _outputs(rig, 1)
    assert {output.job_id: output.finish for output in outputs} == dict.fromkeys(
        ("runs", "waits"), FinishReason.DEADLINE
    )
    rig.assert_nothing_leaked()
    rig.close()


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "EMPTY_PROMPT"),
        ([5] * 300, "CONTEXT_LENGTH_EXCEEDED"),
        ([5] * 200, "PROMPT_TOO_LARGE_FOR_WORKER"),
        ([5, 1024], "TOKEN_OUT_OF_RANGE"),
        ([5, -1], "TOKEN_OUT_OF_RANGE"),
    ],
)
def test_a_job_that_cannot_run_gets_an_error_and_others_go_on(prompt: list[int], reason: str):
    rig = make_rig(device_blocks=10, context_length=250)
    good = rig.job("good", PROMPT, max_tokens=3)
    bad = rig.job("bad", [5])
    object.__setattr__(bad, "token_ids", prompt)
    fine, refused = rig.run(good, bad)
    assert fine.finish is FinishReason.LENGTH
    assert refused.finish is FinishReason.ERROR
    assert refused.error.reason == reason
    assert ";" in refused.error.message  # what happened; what to do
    rig.close()


def test_a_second_job_of_the_same_id_is_refused_and_the_first_goes_on(rig: Rig):
    rig.engine.submit(rig.job("a", PROMPT, max_tokens=2))
    rig.engine.submit(rig.job("a", PROMPT, max_tokens=2))
    outputs = _outputs(rig, 3)
    assert [output.error.reason for output in outputs if output.error] == ["DUPLICATE_JOB"]
    assert outputs[-1].finish is FinishReason.LENGTH


def test_an_answer_ends_where_the_pool_or_the_context_ends():
    rig = make_rig(device_blocks=4, context_length=250)
    assert len(rig.run(rig.job("pool", PROMPT, ignore_eos=True))[0].token_ids) == 4 * 16 - 50
    rig.close()
    rig = make_rig(context_length=60)
    answer = rig.run(rig.job("context", PROMPT, ignore_eos=True))[0]
    assert (len(answer.token_ids), answer.finish) == (10, FinishReason.LENGTH)
    rig.close()


def test_no_store_leaves_no_block_behind(rig: Rig):
    rig.run(rig.job("a", PROMPT, max_tokens=20, no_store=True))
    assert rig.engine.snapshot() == []
    assert rig.run(rig.job("b", PROMPT, max_tokens=2))[0].fates == {"computed": 50}


def test_no_read_computes_all_but_stores(rig: Rig):
    first = rig.run(rig.job("a", PROMPT, max_tokens=4))[0]
    unread = rig.run(rig.job("b", PROMPT, max_tokens=4, no_read=True))[0]
    again = rig.run(rig.job("c", PROMPT, max_tokens=4))[0]
    assert unread.fates == {"computed": 50}
    assert again.fates == {"computed": 2, "device": 48}
    assert first.token_ids == unread.token_ids == again.token_ids


def test_tenants_share_nothing(rig: Rig):
    rig.run(rig.job("a", PROMPT, max_tokens=2, salt=b"one"))
    assert rig.run(rig.job("b", PROMPT, max_tokens=2, salt=b"two"))[0].fates == {"computed": 50}


def test_a_block_outlives_its_last_use_by_its_ttl():
    rig = make_rig()
    rig.run(rig.job("a", PROMPT, max_tokens=2, ttl_s=100.0))
    rig.clock.ahead_s = 90
    assert rig.run(rig.job("b", PROMPT, max_tokens=2, ttl_s=100.0))[0].fates["device"] == 48
    rig.clock.ahead_s = 180
    assert rig.run(rig.job("c", PROMPT, max_tokens=2, ttl_s=100.0))[0].fates["device"] == 48
    rig.clock.ahead_s = 281
    assert rig.run(rig.job("d", PROMPT, max_tokens=2, ttl_s=100.0))[0].fates == {"computed": 50}
    rig.close()


def test_fates_are_settled_at_first_admission():
    rig = make_rig(device_blocks=20, max_running=8)
    answers = rig.run(*(rig.job(n, prompt, ignore_eos=True) for n, prompt in enumerate(prompts(8, lengths=(90, 91)))))
    assert rig.engine.load().preemptions > 0
    # Preempted sequences found their own blocks again, and that is no hit.
    assert sum(answer.fates.get("device", 0) for answer in answers) <= 6 * 32
    assert [sum(answer.fates.values()) for answer in answers] == [90, 91] * 4
    rig.close()


def test_events_tell_what_was_stored_and_a_snapshot_includes_them(rig: Rig):
    rig.engine.submit(rig.job("a", PROMPT, max_tokens=1))
    events = rig.engine.step().events
    assert next(event for event in events if isinstance(event, BlockStored)).tier is TierName.DEVICE
    assert sum(len(event.hashes) for event in events) == 3
    rig.run(rig.job("b", [9, *PROMPT], max_tokens=1))
    assert sum(len(event.hashes) for event in rig.engine.snapshot()) == 6
    assert rig.engine.step().events == []


def test_clear_empties_the_cache_and_the_event_comes_with_the_next_step(rig: Rig):
    rig.run(rig.job("a", PROMPT, max_tokens=2))
    assert rig.engine.cache.clear() == {TierName.DEVICE: 3}
    assert rig.engine.has_work()
    assert rig.engine.step().events == [AllBlocksCleared(TierName.DEVICE)]
    assert not rig.engine.has_work()
    assert rig.run(rig.job("b", PROMPT, max_tokens=2))[0].fates == {"computed": 50}


def test_clearing_disturbs_no_running_sequence(rig: Rig):
    wanted = rig.run(rig.job("a", PROMPT, max_tokens=30, no_store=True))[0].token_ids
    rig.engine.submit(rig.job("b", PROMPT, max_tokens=30))
    outputs = _outputs(rig, 5)
    rig.engine.cache.clear()
    for number, prompt in enumerate(prompts(20)):  # what was cleared is written over
        rig.engine.submit(rig.job(number, prompt, max_tokens=10))
    outputs += _outputs(rig, 40)
    assert [token for output in outputs if output.job_id == "b" for token in output.token_ids] == wanted
    rig.assert_nothing_leaked()


def test_a_burst_over_one_document_is_one_document_of_work():
    rig = make_rig(max_running=4, max_batch_tokens=64)
    (document,) = prompts(1, lengths=(96,))
    for number in range(3):
        rig.engine.submit(rig.job(number, [*document, number + 1], max_tokens=2))
    blocks = 96 // rig.engine.info.scheme.block_size * rig.engine.info.scheme.block_size
    assert rig.engine.load().pending_prefill_tokens == 97 + 2 * (97 - blocks)
    assert rig.engine.load().prefill_share == 0
    _outputs(rig, 60)
    assert rig.engine.load().prefill_share > 0
    rig.close()


def test_load_says_what_runs_and_waits_and_how_fast_it_goes():
    rig = make_rig(max_running=2, max_batch_tokens=64)
    assert rig.engine.load().prefill_token_ms == 0
    for number in range(3):
        rig.engine.submit(rig.job(number, prompts(3, lengths=(100,))[number], max_tokens=20))
    load = rig.engine.load()
    assert (load.running, load.waiting, load.pending_prefill_tokens) == (0, 3, 252)  # the third begins like another
    _outputs(rig, 2)
    load = rig.engine.load()
    assert (load.running, load.waiting, load.decoding) == (2, 1, 1)
    assert load.pending_prefill_tokens == 124  # none of the first, 72 of the second, 52 of the third
    assert load.steps == 2
    assert load.prefill_fixed_ms + load.prefill_token_ms + load.prefill_pair_ms > 0
    _outputs(rig, 60)
    load = rig.engine.load()
    assert (load.running, load.waiting, load.pending_prefill_tokens) == (0, 0, 0)
    assert load.decode_step_ms > 0
    assert load.tiers[TierName.DEVICE][0].blocks > 0
    rig.close()


def test_load_says_what_answers_hold_and_what_their_ends_bring():
    rig = make_rig(max_running=3)
    size, (first, second) = rig.engine.info.scheme.block_size, prompts(2, lengths=(100,) * 2)
    rig.engine.submit(rig.job(0, first, max_tokens=size))
    rig.engine.submit(rig.job(1, second, max_tokens=3 * size))
    _outputs(rig, 1 + size // 2)
    load = rig.engine.load()
    assert (load.slots, load.answer_ms, load.freed_blocks) == (3, 0.0, 0.0)
    held = [-(-(100 + size // 2) // size) - 100 // size] * load.decoding
    assert load.answer_blocks == sum(held) > 0
    while rig.engine.load().answer_ms == 0:
        _outputs(rig, 1)
    assert rig.engine.load().freed_blocks == -(-(100 + size - 1) // size)  # of its last token nothing is computed
    rig.close()


def test_a_model_that_gives_no_numbers_fails_the_job_and_stores_nothing_of_that_step(rig: Rig, monkeypatch):
    forward = rig.engine.runner.forward
    monkeypatch.setattr(rig.engine.runner, "forward", lambda *step: forward(*step) * math.nan)
    (answer,) = rig.run(rig.job("a", PROMPT))
    assert (answer.finish, answer.error.reason) == (FinishReason.ERROR, "MODEL_OUTPUT_NOT_FINITE")
    assert rig.engine.snapshot() == []
    monkeypatch.undo()
    assert rig.run(rig.job("b", PROMPT, max_tokens=2))[0].finish is FinishReason.LENGTH


def test_a_forward_that_fails_ends_its_jobs_and_not_the_worker(rig: Rig, monkeypatch):
    def out_of_memory(*_: object):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(rig.engine.runner, "forward", out_of_memory)
    (answer,) = rig.run(rig.job("a", PROMPT))
    assert (answer.finish, answer.error.reason) == (FinishReason.ERROR, "OUT_OF_MEMORY")
    assert "no memory left" in answer.error.message
    monkeypatch.undo()
    assert rig.run(rig.job("b", PROMPT, max_tokens=2))[0].finish is FinishReason.LENGTH


def test_closing_cancels_what_runs(rig: Rig):
    made = make_rig()
    made.engine.submit(made.job("a", PROMPT))
    made.engine.step()
    made.engine.close(flush_s=0)
    assert not made.engine._sequences


def test_the_shared_tier_is_read_only_while_it_is_allowed():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        writer = make_rig(redis_url=server.url)
        writer.run(writer.job("a", PROMPT, max_tokens=1))
        writer.close()
        reader = make_rig(redis_url=server.url)
        reader.engine.cache.set_shared_reads(enabled=False)
        assert reader.run(reader.job("a", PROMPT, max_tokens=1, no_store=True))[0].fates == {"computed": 50}
        reader.engine.cache.set_shared_reads(enabled=True)
        assert reader.run(reader.job("b", PROMPT, max_tokens=1))[0].fates == {"computed": 2, "redis": 48}
        reader.close()


def test_what_waits_behind_others_is_prefetched_and_counts_where_it_came_from():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        writer = make_rig(redis_url=server.url)
        writer.run(writer.job("a", PROMPT, max_tokens=1))
        writer.close()
        reader = make_rig(redis_url=server.url, host_blocks=100, max_running=1)
        reader.engine.submit(reader.job("first", prompts(1, seed=9)[0], max_tokens=20))
        reader.engine.step()
        reader.engine.submit(reader.job("second", PROMPT, max_tokens=1))
        names = block_hashes(PROMPT, reader.engine.info.scheme.root(b""), BLOCK_SIZE)[:3]
        while not all(reader.store.host.holds(name) for name in names):
            reader.store.wait(0.05)
            reader.store.pump()
        assert [each.acquisition for each in reader.engine._scheduler._waiting] == [None], "it is not its turn yet"
        answers = reader.collect()
        assert answers["second"].fates == {"computed": 2, "redis": 48}
        reader.close()


def test_a_sequence_that_waits_for_redis_delays_nobody_and_wait_returns_when_it_came():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        writer = make_rig(redis_url=server.url)
        writer.run(writer.job("a", PROMPT, max_tokens=1))
        writer.close()
        reader = make_rig(redis_url=server.url)
        other = prompts(2, lengths=(33,), seed=8)[1]
        fetched, computed = reader.run(reader.job("a", PROMPT, max_tokens=4), reader.job("b", other, max_tokens=4))
        assert fetched.fates["redis"] == 48
        assert computed.fates == {"computed": 33}
        assert fetched.outputs[0].load_ms > 0
        reader.close()


def test_a_redis_that_is_gone_is_a_miss_and_no_failure():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        made = make_rig(redis_url=server.url)
    answer = made.run(made.job("a", PROMPT, max_tokens=4))[0]
    assert answer.finish is FinishReason.LENGTH
    assert answer.fates == {"computed": 50}
    made.close()


def _raise(error: Exception):
    raise error


def test_text_that_cannot_be_decoded_ends_its_job_and_no_other(rig: Rig, monkeypatch):
    for name in "ab":
        rig.engine.submit(rig.job(name, PROMPT, max_tokens=3, ignore_eos=True))
    text = rig.engine._sequences["a"].text
    monkeypatch.setattr(text, "_stream", None)
    monkeypatch.setattr(text, "_restart", lambda: _raise(Exception("Invalid prefix encountered")))
    answers = rig.collect()
    assert (answers["a"].finish, answers["a"].error.reason) == (FinishReason.ERROR, "DETOKENIZATION_FAILED")
    assert answers["b"].finish is FinishReason.LENGTH


def test_the_third_failed_step_in_a_row_ends_the_worker(rig: Rig, monkeypatch):
    monkeypatch.setattr(rig.engine.runner, "forward", lambda *_: _raise(RuntimeError("odd")))
    for name in "ab":
        assert rig.run(rig.job(name, PROMPT))[0].finish is FinishReason.ERROR
    rig.engine.submit(rig.job("c", PROMPT))
    with pytest.raises(RuntimeError, match="odd"):
        rig.engine.step()


def test_an_error_of_the_gpu_ends_the_worker_at_once_but_want_of_memory_never(rig: Rig, monkeypatch):
    monkeypatch.setattr(rig.engine.runner, "forward", lambda *_: _raise(torch.OutOfMemoryError("full")))
    assert all(rig.run(rig.job(n, PROMPT))[0].error.reason == "OUT_OF_MEMORY" for n in range(4))
    monkeypatch.setattr(rig.engine.runner, "forward", lambda *_: _raise(RuntimeError("CUDA error: unspecified")))
    rig.engine.submit(rig.job("c", PROMPT))
    with pytest.raises(RuntimeError, match="CUDA"):
        rig.engine.step()


def test_blocks_of_a_job_whose_numbers_went_wrong_later_are_dropped_and_what_it_had_found_stays(rig, monkeypatch):
    rig.run(rig.job("before", PROMPT[:33], max_tokens=1))
    rig.engine.submit(rig.job("a", PROMPT, max_tokens=5, ignore_eos=True))
    _outputs(rig, 1)
    assert len(rig.store.match(rig.job("x", PROMPT).block_hashes)) == 3
    forward = rig.engine.runner.forward
    monkeypatch.setattr(rig.engine.runner, "forward", lambda *step: forward(*step) * math.nan)
    (output,) = _outputs(rig, 1)
    assert output.error.reason == "MODEL_OUTPUT_NOT_FINITE"
    assert len(rig.store.match(rig.job("x", PROMPT).block_hashes)) == 2


def test_a_job_that_ends_before_it_was_admitted_has_no_fates(rig: Rig):
    rig.engine.submit(rig.job("a", PROMPT))
    rig.engine.cancel("a")
    (output,) = rig.engine.step().outputs
    assert (output.finish, output.fates) == (FinishReason.CANCELLED, None)


def test_what_is_promised_is_work_of_a_worker_that_reads_from_no_other_one():
    rig, prompt = make_rig(), prompts(3)[2]
    promise = Promised("127.0.0.1:1", len(prompt) // BLOCK_SIZE, ready_ms=1.0, margin_ms=1.0)
    rig.engine.submit(replace(rig.job("a", prompt, max_tokens=1), promise=promise))
    assert rig.engine.load().pending_prefill_tokens == len(prompt)
    rig.collect()
    rig.close()
