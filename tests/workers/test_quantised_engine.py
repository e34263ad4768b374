"""The engine over quantised blocks: from every tier the same numbers, through preemption, restarts and wrong bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.redis_server import PrivateRedis, find_redis_server
from kvstore.blocks import HashScheme
from kvstore.codec import BlockCodec
from kvstore.device import DeviceTier
from kvstore.errors import CodecError, MissReason
from kvstore.quantised import QuantisedRows
from tests.kvstore.blocks_for_tests import ManualClock, chain
from tests.workers.engine_rig import BLOCK_SIZE, Answer, Rig, make_rig, model_folder, prompts, runner
from workers.attention.step import Span
from workers.models import ModelRunner
from workers.protocol import FinishReason

KINDS = ["fp8_e4m3", "int8"]
PROMPT = prompts(1, lengths=(100,))[0]  # six blocks and four tokens
CUT = 96
TOP = {"logprobs": 5, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server() -> Iterator[PrivateRedis]:
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as started:
        yield started


@functools.cache
def _runner(dtype: str) -> ModelRunner:
    return runner() if dtype == "float32" else ModelRunner.load(model_folder(), dtype=dtype)


class Pool:
    """A device tier of a few blocks, and forwards over it without an engine."""

    def __init__(self, kind: str, dtype: str = "float32") -> None:
        self.runner = _runner(dtype)
        self.layout = replace(self.runner.layout, block_size=BLOCK_SIZE, kv_dtype=kind)
        self.tier = DeviceTier(self.layout, 12 * self.layout.block_nbytes, clock=ManualClock(), poison=True)
        blocks = self.tier.allocate(9)
        assert blocks is not None
        self.blocks = blocks
        self.kv = [self.tier.kv(layer) for layer in range(self.layout.layers)]

    def forward(self, ids: list[int], start: int, stop: int) -> torch.Tensor:
        """Logits [stop - start, vocab] of a chunk."""
        table = self.blocks[: -(-stop // BLOCK_SIZE)]
        count = stop - start
        return self.runner.forward(
            self.kv, [Span(0, count, stop, table)], ids[start:stop], range(start, stop), range(count)
        )

    def bytes_of(self, count: int) -> list[bytes]:
        return [bytes(payload) for payload in self.tier.payloads(self.blocks[:count])]


def _run(rig: Rig, name: str, **options: object) -> Answer:
    (answer,) = rig.run(rig.job(name, PROMPT, **{**TOP, **options}))
    return answer


def _same(one: Answer, other: Answer) -> bool:
    """Bit by bit: tokens, their logarithms of probability, and those of the five best."""
    return (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs) and len(one.logprobs) == 12


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(KINDS), blocks=st.integers(1, 6), seed=st.integers(0, 50))
def test_a_run_over_stored_blocks_equals_bit_for_bit_one_that_was_cut_there(kind: str, blocks: int, seed: int):
    (ids,) = prompts(1, lengths=(100,), seed=seed)
    cut = blocks * BLOCK_SIZE
    cold, warm = Pool(kind), Pool(kind)
    cold.forward(ids, 0, cut)
    codec, metas = BlockCodec(cold.layout, b"n" * 32), chain(blocks)
    stored = [codec.encode(meta, payload, 0.0) for meta, payload in zip(metas, cold.bytes_of(blocks), strict=True)]
    fetched = [memoryview(bytearray(payload)) for _, payload in stored]
    for meta, (header, _), payload in zip(metas, stored, fetched, strict=True):
        codec.decode(header, payload, expect=meta.hash)
    warm.tier.inject(warm.blocks[:blocks], fetched)
    assert torch.equal(warm.forward(ids, cut, 100), cold.forward(ids, cut, 100))
    assert warm.bytes_of(6) == cold.bytes_of(6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_holds_of_models_in_half_precision(kind: str, dtype: str):
    cold, warm = Pool(kind, dtype), Pool(kind, dtype)
    cold.forward(PROMPT, 0, CUT)
    warm.tier.inject(warm.blocks[:6], cold.tier.payloads(cold.blocks[:6]))
    found = warm.forward(PROMPT, CUT, 100)
    assert torch.equal(found, cold.forward(PROMPT, CUT, 100))
    plain = Pool("auto", dtype).forward(PROMPT, 0, 100)[CUT:]
    assert 0 < (found - plain).norm() / plain.norm() < 0.1


@pytest.mark.parametrize(("kind", "lost"), [("int8", 3e-3), ("fp8_e4m3", 3e-2)])
def test_where_a_prompt_is_cut_matters_less_than_what_quantisation_costs(kind: str, lost: float):
    """A fresh chunk attends over what it stored: else a cut would cost what the rounding of the rows before it does."""
    whole = Pool(kind).forward(PROMPT, 0, 100)[CUT:]
    pool = Pool(kind)
    pool.forward(PROMPT, 0, CUT)
    cut = pool.forward(PROMPT, CUT, 100)
    plain = Pool("auto").forward(PROMPT, 0, 100)[CUT:]
    cost, difference = ((one - whole).norm() / whole.norm() for one in (plain, cut))
    assert lost / 5 < cost < lost * 5
    assert difference < cost / 20


def test_from_every_tier_comes_the_answer_of_a_run_that_was_cut_there(kind: str, server: PrivateRedis, tmp_path: Path):
    first = make_rig(kv_dtype=kind, host_blocks=40, redis_url=server.url, disk=tmp_path, max_batch_tokens=CUT)
    cold = _run(first, "cold")
    assert cold.fates == {"computed": 100}
    again = _run(first, "again")
    assert again.fates == {"device": CUT, "computed": 4}
    assert _same(cold, again)
    first.device.clear()
    from_host = _run(first, "host")
    assert from_host.fates == {"host": CUT, "computed": 4}
    assert _same(cold, from_host)
    assert first.store.flush(30)
    first.close()
    for tier, options in (("disk", {"disk": tmp_path}), ("redis", {"redis_url": server.url})):
        second = make_rig(kv_dtype=kind, **options)
        answer = _run(second, "after a restart")
        assert answer.fates == {tier: CUT, "computed": 4}
        assert _same(cold, answer)
        second.close()


def test_another_kv_dtype_finds_nothing_in_the_same_tiers(server: PrivateRedis, tmp_path: Path):
    where = {"redis_url": server.url, "disk": tmp_path}
    for kind in ("int8", "auto", "fp8_e4m3"):
        rig = make_rig(kv_dtype=kind, **where)
        assert _run(rig, kind).fates == {"computed": 100}
        assert rig.store.flush(30)
        rig.close()
    for kind in ("auto", "int8", "fp8_e4m3"):
        rig = make_rig(kv_dtype=kind, redis_url=server.url)
        assert _run(rig, kind).fates == {"redis": CUT, "computed": 4}
        rig.close()


def test_preempted_answers_are_those_of_the_quantised_model(kind: str):
    """Greedy tokens against a forward over the whole answer; a code may round otherwise after another cut."""
    narrow = make_rig(kv_dtype=kind, device_blocks=12, max_running=3, max_batch_tokens=48)
    asked = prompts(6, lengths=(40, 60, 80))
    answers = narrow.run(*(narrow.job(n, prompt, ignore_eos=True, max_tokens=40) for n, prompt in enumerate(asked)))
    assert narrow.engine.load().preemptions > 0
    narrow.close()
    for prompt, answer in zip(asked, answers, strict=True):
        ids = [*prompt, *answer.token_ids]
        logits = Pool(kind).forward(ids, 0, len(ids))[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert len(answer.token_ids) == 40
        assert (logits.amax(1) - chosen).max() < 0.05


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_scale_that_is_not_finite_is_an_error_of_its_request_and_the_next_computes(kind: str, wrong: float):
    rig = make_rig(kv_dtype=kind)
    good = _run(rig, "good")
    (block,) = rig.device.acquire(rig.job("x", PROMPT).block_hashes[:1])
    keys, _ = rig.device.kv(1)
    assert isinstance(keys, QuantisedRows)
    keys.scales[block, 3, 1] = wrong
    rig.device.release([block])
    other = rig.job("other", prompts(1, lengths=(70,), seed=5)[0], max_tokens=3)
    bad, fine = rig.run(rig.job("bad", PROMPT, max_tokens=3), other)
    assert (bad.finish, bad.error.reason) == (FinishReason.ERROR, "MODEL_OUTPUT_NOT_FINITE")
    assert fine.finish is FinishReason.LENGTH
    for _ in range(2):  # what cannot be trusted goes in two steps: what it made, then all that it stood on
        after = _run(rig, "after")
    assert after.token_ids == good.token_ids
    rig.close()


def test_weights_that_overflow_are_told_as_they_are_without_quantisation(kind: str, monkeypatch: pytest.MonkeyPatch):
    rig = make_rig(kv_dtype=kind)
    attend = rig.engine.runner._backend.attend

    def overflowing(step, layer, query, key, value, **options):
        return attend(step, layer, query, key * float("inf"), value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rig.engine.runner._backend, "attend", overflowing)
        answer = _run(rig, "bad")
    assert answer.error.reason == "MODEL_OUTPUT_NOT_FINITE"
    assert _run(rig, "good").finish is FinishReason.LENGTH
    rig.close()


def test_one_wrong_bit_of_a_scale_is_found_by_the_checksum(kind: str):
    pool = Pool(kind)
    pool.forward(PROMPT, 0, 16)
    codec, meta = BlockCodec(pool.layout, b"n" * 32), chain(1)[0]
    header, payload = codec.encode(meta, pool.bytes_of(1)[0], 0.0)
    codec.decode(header, memoryview(bytearray(payload)), expect=meta.hash)
    scales = pool.layout.areas.v_scales
    assert scales is not None
    for at in range(scales.start, scales.start + scales.nbytes):
        wrong = bytearray(payload)
        wrong[at] ^= 0x40
        with pytest.raises(CodecError) as told:
            codec.decode(header, memoryview(wrong), expect=meta.hash)
        assert told.value.reason is MissReason.CORRUPT


def test_a_wrong_scale_in_redis_is_a_miss_and_never_an_answer(kind: str, server: PrivateRedis):
    first = make_rig(kv_dtype=kind, redis_url=server.url, max_batch_tokens=CUT)
    cold = _run(first, "cold")
    assert first.store.flush(30)
    layout = first.store.layout
    first.close()
    scales = layout.areas.k_scales
    assert scales is not None
    with redis.Redis.from_url(server.url) as client:
        for key in client.keys("*"):
            if client.type(key) != b"hash":
                continue
            for field, value in client.hgetall(key).items():
                if len(value) > layout.block_nbytes // 2:
                    at = scales.start + 1
                    client.hset(key, field, value[:at] + bytes([value[at] ^ 0x40]) + value[at + 1 :])
    second = make_rig(kv_dtype=kind, redis_url=server.url, max_batch_tokens=CUT)
    answer = _run(second, "after")
    assert answer.fates == {"computed": 100}
    assert _same(cold, answer)
    second.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_scheme_of_a_quantised_engine_says_so(kind: str, architecture: str):
    rig = make_rig(architecture, kv_dtype=kind)
    plain = make_rig(architecture)
    assert rig.engine.info.scheme.layout == f"{plain.engine.info.scheme.layout} {kind}/row"
    assert rig.engine.info.scheme.differences(plain.engine.info.scheme) == ["layout"]
    assert isinstance(rig.engine.info.scheme, HashScheme)
    assert rig.engine.info.block_nbytes == 2 * 2 * 16 * (2 * 16 + 2 * 2)
    for each in (rig, plain):
        each.close()
