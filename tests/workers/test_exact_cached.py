"""Default mode, tier by tier: the bytes that come back, resuming from them, and proof that these tests can fail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import redis
import torch

from deploy.redis_server import PrivateRedis, find_redis_server
from kvstore.events import RemovalCause
from tests.workers.engine_rig import BLOCK_SIZE, SHAPE
from tests.workers.exact_rig import ARCHITECTURES, DTYPES, TIERS, ExactRig, default_runner, exact_rig, reference

MODELS = [(architecture, dtype) for architecture in ARCHITECTURES for dtype in DTYPES]
LOWER = [tier for tier in TIERS if tier != "device"]
LENGTH = 300


@pytest.fixture(scope="module")
def server():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as running:
        yield running


@pytest.fixture
def places(server, tmp_path: Path):
    """Where lower tiers lie."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    return {"folder": tmp_path / "disk", "redis_url": server.url}


@pytest.mark.parametrize("tier", LOWER)
@pytest.mark.parametrize(("architecture", "dtype"), MODELS)
def test_a_block_comes_back_from_every_tier_byte_for_byte(architecture, dtype, tier, places):
    prompt = _prompt()
    with exact_rig(default_runner(architecture, dtype), tier, **places) as rig:
        job = rig.job("cold", prompt, max_tokens=1)
        rig.run(job)
        before = rig.stored(job.block_hashes)
        assert [len(set(copies)) for copies in before.values()] == [1] * (LENGTH // BLOCK_SIZE)
        assert all(len(copies) == 2 for copies in before.values()), "one on the device, one below"
        rig.keep_only_below()
        (warm,) = rig.run(rig.job("warm", prompt, max_tokens=1))
        assert warm.fates[tier] == LENGTH // BLOCK_SIZE * BLOCK_SIZE
        assert rig.stored(job.block_hashes) == before


@pytest.mark.parametrize("tier", ["disk", "redis"])
def test_a_byte_that_turned_at_rest_is_a_miss_by_its_checksum(tier, places, server):
    prompt = _prompt()
    with exact_rig(default_runner("llama", "float32"), tier, **places) as rig:
        job = rig.job("cold", prompt, max_tokens=4)
        (cold,) = rig.run(job)
        payload = rig.stored(job.block_hashes[:1])[job.block_hashes[0]][0]
        rig.keep_only_below()
        turned = _turn_at_rest(tier, payload, places)
        assert turned == 1
        (warm,) = rig.run(rig.job("warm", prompt, max_tokens=4))
        assert (warm.fates, warm.token_ids) == ({"computed": LENGTH}, cold.token_ids)
        assert rig.lower.stats().misses["corrupt"] == 1


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("architecture", "dtype"), MODELS)
def test_a_resumed_run_is_the_uncached_run_that_was_cut_there(architecture, dtype, tier, places):
    runner = default_runner(architecture, dtype)
    for cut in (1, 2, 5, 9, 13, 18):
        with exact_rig(runner, tier, **{**places, "folder": places["folder"] / str(cut)}) as rig:
            assert resumes_exactly(rig, runner, cut * BLOCK_SIZE, seed=cut)


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize("byte", [1, 3])
def test_one_byte_turned_in_a_cached_block_is_seen(tier, byte):
    # Shows that the test above can fail.
    def turn(rig: ExactRig, names):
        payload = _writable(rig, tier, names[2])
        payload[4 * 33 + byte] ^= 0x10

    runner = default_runner("llama", "float32")
    with exact_rig(runner, tier) as rig:
        assert not resumes_exactly(rig, runner, 160, poison=turn)


@pytest.mark.parametrize("tier", LOWER)
def test_a_block_of_another_request_under_the_name_is_seen(tier, places):
    # Every checksum is right here: whoever wrote it lied about what it is.
    def swap(rig: ExactRig, names):
        other = rig.job("other", _prompt(1), max_tokens=1)
        rig.run(other)
        assert rig.store.flush(60)
        into = bytearray(rig.device.block_nbytes)
        assert rig.lower.read(other.block_hashes[2:3], [memoryview(into)]).count == 1
        meta = rig.device.find(names[2]) or rig.lower.find(names[2])
        assert rig.lower.remove([names[2]], RemovalCause.CLEARED) == 1
        assert rig.lower.write([meta], [memoryview(into)]) == 1

    runner = default_runner("llama", "float32")
    with exact_rig(runner, tier, **places) as rig:
        assert not resumes_exactly(rig, runner, 160, poison=swap)


def test_what_is_free_in_the_pool_is_not_a_number_before_and_after_use():
    # So a read of anything that this sequence did not write shows in all that these tests compare.
    runner = default_runner("llama", "float32")
    with exact_rig(runner) as rig:
        keys, values = rig.device.kv(0)
        keys, values = keys[: rig.device.num_blocks], values[: rig.device.num_blocks]
        assert bool(torch.stack([keys, values]).isnan().all())
        rig.run(rig.job("a", _prompt(), max_tokens=20, no_store=True))
        assert bool(torch.stack([keys, values]).isnan().all())
        rig.run(rig.job("b", _prompt(1), max_tokens=1))
        assert int((~keys.isnan()).all(-1).all(-1).sum()) == LENGTH // BLOCK_SIZE * BLOCK_SIZE
        assert resumes_exactly(rig, runner, 160)


def resumes_exactly(rig: ExactRig, runner, cut: int, *, seed: int = 7, poison=None) -> bool:
    """Whether a run whose first `cut` tokens are cached has the bits of the uncached run that is cut there."""
    prompt = _prompt(seed)
    wanted = reference(runner, prompt, [cut], last_only=True)
    rig.run(rig.job("prefix", prompt[: cut + 1], max_tokens=1))
    job = rig.job("resumed", prompt, max_tokens=1)
    if poison is not None:
        assert rig.store.flush(60)
        poison(rig, job.block_hashes)
    rig.keep_only_below()
    (answer,) = rig.run(job)
    tier = "device" if rig.lower is None else rig.lower.name.value
    assert answer.fates == {tier: cut, "computed": LENGTH - cut}
    stored = rig.stored(job.block_hashes)
    same = all(
        held == block for name, block in zip(job.block_hashes, wanted.blocks, strict=True) for held in stored[name]
    )
    return same and torch.equal(rig.logits["resumed", LENGTH], wanted.logits[-1])


def _prompt(seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, SHAPE.vocab) for _ in range(LENGTH)]


def _writable(rig: ExactRig, tier: str, name) -> memoryview:
    """A block's own bytes."""
    if tier == "device":
        held = rig.device.acquire([name])
        rig.device.release(held)
        return rig.device.payloads(held)[0]
    with rig.lower.view([name])[0] as view:
        return memoryview(rig.lower._slab.row(view.slot.index))


def _turn_at_rest(tier: str, payload: bytes, places) -> int:
    """Turn one bit of the only copy that a tier holds of these bytes; how many were found."""
    if tier == "disk":
        found = 0
        for file in (path for path in places["folder"].rglob("*") if path.is_file()):
            data = bytearray(file.read_bytes())
            at = data.find(payload)
            if at >= 0:
                found += 1
                with file.open("r+b") as slab:
                    slab.seek(at + 100)
                    slab.write(bytes([payload[100] ^ 1]))
        return found
    with redis.Redis.from_url(places["redis_url"]) as client:
        return sum(_turn_in_redis(client, key, payload) for key in client.scan_iter(_type="hash"))


def _turn_in_redis(client: redis.Redis, key: bytes, payload: bytes) -> bool:
    data = client.hget(key, "d")  # the payload but for its end
    if data is None or not payload.startswith(data):
        return False
    client.hset(key, "d", data[:100] + bytes([data[100] ^ 1]) + data[101:])
    return True
