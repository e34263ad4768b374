"""Greedy answers equal plain transformers `generate()`, token for token, wherever the prompt's K/V came from."""

from __future__ import annotations

import functools

import pytest

from deploy.redis_server import PrivateRedis, find_redis_server
from tests.workers.engine_rig import SHAPE, Expected, make_rig, near_ties, oracle, prompts

ARCHITECTURES = ["llama", "qwen3"]
PROMPTS = 104  # of each architecture
MAX_NEAR_TIES = 2


@functools.cache
def _expected(architecture: str) -> list[Expected]:
    return oracle(architecture).generate(prompts(PROMPTS))


def _cached(answers, tier: str) -> int:
    return sum(answer.fates.get(tier, 0) for answer in answers)


def test_the_oracle_says_different_things():
    # Else the comparisons below would prove little.
    answers = {tuple(expected.token_ids) for expected in _expected("llama")}
    assert len(answers) == PROMPTS
    assert sum(len(set(answer)) for answer in answers) > PROMPTS * 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cold_and_warm_from_device_in_a_batch(architecture):
    rig, batch = make_rig(architecture, device_blocks=1500), prompts(PROMPTS)
    cold = rig.run(*(rig.job(("cold", i), prompt) for i, prompt in enumerate(batch)))
    warm = rig.run(*(rig.job(("warm", i), prompt) for i, prompt in enumerate(batch)))
    assert near_ties(cold, _expected(architecture)) <= MAX_NEAR_TIES
    assert near_ties(warm, _expected(architecture)) <= MAX_NEAR_TIES
    assert _cached(warm, "device") == sum((len(prompt) - 1) // 16 * 16 for prompt in batch)
    rig.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_at_a_time(architecture):
    rig, count = make_rig(architecture, max_running=1), 12
    answers = [rig.run(rig.job(i, prompt))[0] for i, prompt in enumerate(prompts(count))]
    assert near_ties(answers, _expected(architecture)[:count]) <= MAX_NEAR_TIES
    rig.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_warm_from_host_when_the_device_tier_is_too_small(architecture):
    rig, batch = make_rig(architecture, device_blocks=60, host_blocks=2000, max_running=4), prompts(PROMPTS)
    rig.run(*(rig.job(("cold", i), prompt) for i, prompt in enumerate(batch)))
    warm = rig.run(*(rig.job(("warm", i), prompt) for i, prompt in enumerate(batch)))
    assert near_ties(warm, _expected(architecture)) <= MAX_NEAR_TIES
    assert _cached(warm, "host") > 3000
    rig.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_warm_from_redis_after_the_worker_that_wrote_it_is_gone(architecture):
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    batch = prompts(PROMPTS)
    with PrivateRedis() as server:
        writer = make_rig(architecture, host_blocks=1500, redis_url=server.url)
        writer.run(*(writer.job(i, prompt, max_tokens=1) for i, prompt in enumerate(batch)))
        writer.close()
        reader = make_rig(architecture, host_blocks=1500, redis_url=server.url)
        answers = reader.run(*(reader.job(i, prompt) for i, prompt in enumerate(batch)))
        reader.close()
    assert near_ties(answers, _expected(architecture)) <= MAX_NEAR_TIES
    assert _cached(answers, "redis") > 2000


@pytest.mark.parametrize("max_batch_tokens", [5, 16, 33, 2048])
def test_however_prompts_are_cut_into_chunks(max_batch_tokens):
    count = 20
    rig = make_rig(max_batch_tokens=max_batch_tokens, max_running=5)
    answers = rig.run(*(rig.job(i, prompt) for i, prompt in enumerate(prompts(count))))
    assert near_ties(answers, _expected("llama")[:count]) <= MAX_NEAR_TIES
    rig.close()


def test_when_blocks_run_out_and_sequences_are_preempted():
    count = 20
    rig = make_rig(device_blocks=24, max_running=8)
    answers = rig.run(*(rig.job(i, prompt) for i, prompt in enumerate(prompts(count))))
    assert rig.engine.load().preemptions > 3
    assert near_ties(answers, _expected("llama")[:count]) <= MAX_NEAR_TIES
    for answer, prompt in zip(answers, prompts(count), strict=True):
        assert sum(answer.fates.values()) == len(prompt)
    rig.close()


def test_the_next_turn_finds_the_blocks_of_the_answer():
    rig, prompt = make_rig(), prompts(1, lengths=(50,), seed=3)[0]
    answer = rig.run(rig.job("turn 1", prompt, ignore_eos=True))[0]
    longer = [*prompt, *answer.token_ids, *range(5, 25)]
    second = rig.run(rig.job("turn 2", longer))[0]
    # All tokens but the last sampled one have K/V.
    assert second.fates["device"] == (50 + 64 - 1) // 16 * 16
    assert near_ties([second], oracle("llama").generate([longer])) == 0
    rig.close()


def test_a_wrong_byte_in_a_cached_block_changes_the_answer():
    # Shows that the comparisons above can fail: what is read from the cache is really used.
    rig, prompt = make_rig(), prompts(1, lengths=(100,))[0]
    before = rig.run(rig.job("before", prompt, max_tokens=8, logprobs=0))[0]
    block = rig.device.acquire(rig.job("names", prompt).block_hashes[:1])
    payload = rig.device.payloads(block)[0]
    payload[7] ^= 0x40  # the exponent of one K element of the first layer
    rig.device.release(block)
    after = rig.run(rig.job("after", prompt, max_tokens=8, logprobs=0))[0]
    assert after.fates["device"] == 96
    assert [each.logprob for each in after.logprobs] != [each.logprob for each in before.logprobs]
    rig.close()


def test_log_probabilities_are_those_of_the_raw_logits():
    rig, batch = make_rig(), prompts(10)
    answers = rig.run(*(rig.job(i, prompt, logprobs=5, max_tokens=12) for i, prompt in enumerate(batch)))
    for answer, expected in zip(answers, oracle("llama").generate(batch, 12), strict=True):
        assert answer.token_ids == expected.token_ids
        wanted = expected.logits.float().log_softmax(-1)
        for place, found in enumerate(answer.logprobs):
            assert found.token_id == answer.token_ids[place]
            assert found.logprob == pytest.approx(float(wanted[place, found.token_id]), abs=1e-4)
            best = wanted[place].topk(5)
            assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert found.top[0] == (found.token_id, pytest.approx(found.logprob))
    assert SHAPE.vocab > 5
    rig.close()
