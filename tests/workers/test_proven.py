"""Which blocks are dropped when logits are not finite: whoever wrote them, the next request gets its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from kvstore.blocks import BlockHash
from kvstore.events import RemovalCause
from kvstore.tier import BlockMeta
from tests.kvstore.redis.redis_for_tests import PrivateRedis
from tests.workers.engine_rig import Rig, make_rig, prompts
from workers.protocol import FinishReason
from workers.proven import Proven

(PROMPT,) = prompts(1, lengths=(72, 73))
NAMES = [BlockHash(bytes([number]) * 32) for number in range(6)]


def metas(rig: Rig, count: int) -> list[BlockMeta]:
    job = rig.job("names", PROMPT)
    before = [job.root, *job.block_hashes]
    return [BlockMeta(job.block_hashes[place], before[place], job.root, 300.0) for place in range(count)]


def wrong(rig: Rig, count: int) -> list[memoryview]:
    return [memoryview(b"\xff" * rig.store.layout.block_nbytes)] * count  # each number a NaN


def go(rig: Rig, name: str, **options: object) -> tuple[FinishReason | None, Sequence[int], dict[str, int] | None]:
    (answer,) = rig.run(rig.job(name, PROMPT, max_tokens=3, ignore_eos=True, **options))
    return answer.finish, answer.token_ids, answer.fates


def right() -> Sequence[int]:
    rig = make_rig()
    finish, token_ids, _ = go(rig, "cold")
    assert finish is FinishReason.LENGTH
    rig.close()
    return token_ids


def test_wrong_blocks_that_another_worker_wrote_to_redis_spoil_one_request() -> None:
    with PrivateRedis() as server:
        rig = make_rig(host_blocks=100, redis_url=server.url)
        shared = rig.store._shared
        assert shared is not None
        assert shared.write(metas(rig, 3), wrong(rig, 3)) == 3
        finish, _, fates = go(rig, "a", no_store=True)
        assert (finish, fates) == (FinishReason.ERROR, {"computed": len(PROMPT) - 48, "redis": 48})
        finish, token_ids, fates = go(rig, "b")
        assert (finish, token_ids, fates) == (FinishReason.LENGTH, right(), {"computed": len(PROMPT)})
        assert rig.store.flush(30)
        for _ in range(3):
            rig.store.pump()
            assert rig.store.flush(30)
        rig.device.clear()
        assert rig.store.host is not None
        rig.store.host.clear()
        finish, token_ids, fates = go(rig, "c")
        assert (finish, token_ids) == (FinishReason.LENGTH, right()), "what lies there now is right"
        assert fates is None or set(fates) <= {"computed", "redis"}
        rig.close()


def test_blocks_of_redis_over_which_a_request_had_tokens_stay_when_it_goes_wrong_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with PrivateRedis() as server:
        rig = make_rig(host_blocks=100, redis_url=server.url)
        assert rig.store.host is not None
        rig.run(rig.job("before", PROMPT[:33], max_tokens=1))
        assert rig.store.flush(30)
        rig.device.clear()
        rig.store.host.clear()
        rig.engine._proven = Proven()  # as in another worker
        rig.engine.submit(rig.job("a", PROMPT, max_tokens=5, ignore_eos=True))
        while not rig.engine.step().outputs:
            rig.engine.wait(0.05)
        forward = rig.engine.runner.forward
        monkeypatch.setattr(rig.engine.runner, "forward", lambda *step: forward(*step) * math.nan)
        while not (outputs := rig.engine.step().outputs):
            pass
        assert (outputs[0].finish, outputs[0].fates) == (
            FinishReason.ERROR,
            {"computed": len(PROMPT) - 32, "redis": 32},
        )
        assert len(rig.store.match(rig.job("x", PROMPT).block_hashes)) == 2
        rig.close()


def test_wrong_blocks_that_a_prefetch_brought_spoil_one_request() -> None:
    rig = make_rig(host_blocks=100)
    assert rig.store.host is not None
    rig.store.host.write(metas(rig, 3), wrong(rig, 3))
    assert go(rig, "a")[::2] == (FinishReason.ERROR, {"computed": len(PROMPT) - 48, "host": 48})
    assert go(rig, "b") == (FinishReason.LENGTH, right(), {"computed": len(PROMPT)})
    rig.close()


def test_blocks_that_were_right_once_and_are_wrong_now_spoil_two_requests() -> None:
    rig = make_rig(host_blocks=100)
    host = rig.store.host
    assert host is not None
    assert go(rig, "a")[0] is FinishReason.LENGTH
    rig.device.clear()
    host.remove([meta.hash for meta in metas(rig, 4)], RemovalCause.EVICTED)
    host.write(metas(rig, 3), wrong(rig, 3))
    assert [go(rig, name)[0] for name in "bc"] == [FinishReason.ERROR] * 2
    assert go(rig, "d") == (FinishReason.LENGTH, right(), {"computed": len(PROMPT)})
    rig.close()


def test_what_is_proven_is_forgotten_from_the_oldest_on_and_when_it_went_wrong() -> None:
    proven = Proven(max_blocks=4)
    proven.add(NAMES[:3])
    assert [proven.leading(NAMES), proven.leading(NAMES[1:]), proven.leading([])] == [3, 2, 0]
    proven.add(NAMES[:1])
    proven.add(NAMES[3:5])
    assert [proven.leading([name]) for name in NAMES] == [1, 0, 1, 1, 1, 0]
    proven.discard([NAMES[3], NAMES[5]])
    assert [proven.leading([name]) for name in NAMES] == [1, 0, 1, 0, 1, 0]
