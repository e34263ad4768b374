"""What operators ask of the torch engine: its store, through the engine's protocol."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

import pytest

from deploy.redis_server import PrivateRedis, find_redis_server
from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError, StoreError
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from tests.workers.engine_rig import Rig, make_rig, prompts
from workers.cache_commands import Check, ListBlocks, Pin, Selection, Unpin, Warm, carry_out
from workers.protocol import CachedBlock

PROMPT = [7 + n % 50 for n in range(70)]  # four full blocks


def listed(rig: Rig, root: BlockHash | None = None, prefix: BlockHash | None = None) -> list[CachedBlock]:
    return list(carry_out(rig.engine, ListBlocks(root, prefix, None, None, 1000)).blocks)


def test_blocks_are_listed_with_their_place_in_the_prompt_and_their_tiers():
    rig = make_rig(host_blocks=100)
    job = rig.job("a", PROMPT, max_tokens=1, ttl_s=60.0)
    rig.run(job)
    rig.run(rig.job("b", PROMPT[:40], max_tokens=1, salt=b"other"))
    mine = {block.hash: block for block in listed(rig, job.root)}
    assert set(mine) == set(job.block_hashes)
    for position, name in enumerate(job.block_hashes):
        parent = job.block_hashes[position - 1] if position else None
        tiers = (TierName.DEVICE, TierName.HOST)
        assert mine[name] == CachedBlock(
            name, parent, job.root, tiers, ttl_s=60.0, ttl_left_s=mine[name].ttl_left_s, position=position
        )
        assert 0 < mine[name].ttl_left_s <= 60.0
    assert [block.hash for block in listed(rig, job.root, job.block_hashes[2])] == sorted(job.block_hashes[2:])
    whole = listed(rig)
    assert len(whole) == 6
    paged = []
    after = None
    while True:
        answer = carry_out(rig.engine, ListBlocks(None, None, TierName.HOST, after, 4))
        paged += answer.blocks
        if (after := answer.next) is None:
            break
    assert [replace(block, ttl_left_s=None) for block in paged] == [replace(block, ttl_left_s=None) for block in whole]
    rig.close()


def test_pinned_blocks_stay_in_host_when_others_take_their_room():
    rig = make_rig(device_blocks=40, host_blocks=12)
    job = rig.job("a", PROMPT, max_tokens=1)
    rig.run(job)
    answer = carry_out(rig.engine, Pin(Selection(job.block_hashes, None, None), 600.0))
    assert answer.counts == {TierName.HOST: 4}
    assert all(block.leased for block in listed(rig))
    for seed in range(10):
        rig.run(rig.job(seed, [5 + (seed * 13 + n * 3) % 90 for n in range(100)], max_tokens=1))
    assert [rig.store.host.holds(name) for name in job.block_hashes] == [True] * 4
    assert carry_out(rig.engine, Unpin(Selection([], job.root, None))).counts == {TierName.HOST: 4}
    assert not any(block.leased for block in listed(rig))
    rig.close()


def test_an_audit_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch):
    rig = make_rig(host_blocks=10)
    assert carry_out(rig.engine, Check()).wrong == ""

    def broken() -> None:
        raise InvariantError("slot 3 is held twice")

    monkeypatch.setattr(rig.store, "check", broken)
    assert carry_out(rig.engine, Check()).wrong == "slot 3 is held twice"
    monkeypatch.undo()
    rig.close()


@pytest.fixture
def redis_url():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        yield server.url


def test_warming_reads_what_only_redis_holds_into_host(redis_url: str):
    writer = make_rig(redis_url=redis_url)
    job = writer.job("a", PROMPT, max_tokens=1)
    writer.run(job)
    writer.close()
    reader = make_rig(redis_url=redis_url, host_blocks=100)
    assert carry_out(reader.engine, Warm(job.block_hashes, job.root, None)).started == 4
    give_up = time.monotonic() + 60.0
    while not all(reader.store.host.holds(name) for name in job.block_hashes):
        assert time.monotonic() < give_up
        reader.store.wait(0.05)
        reader.engine.step()
    reader.close()


def test_what_is_being_cleared_from_the_shared_tier_is_not_brought_back_meanwhile(redis_url: str):
    rig = make_rig(redis_url=redis_url, host_blocks=100)
    (cold,) = rig.run(rig.job("a", PROMPT, max_tokens=4))
    assert rig.store.flush(10.0)
    assert rig.engine.cache.clear() == {TierName.DEVICE: 4, TierName.HOST: 4}
    clearing = rig.engine.cache.shared_clearing()
    assert clearing is not None
    # The server has dropped nothing yet, and the engine goes on.
    (again,) = rig.run(rig.job("b", PROMPT, max_tokens=4))
    assert (again.token_ids, again.fates) == (cold.token_ids, {"computed": len(PROMPT)})
    dropped: list[dict[TierName, int]] = []
    thread = threading.Thread(target=lambda: dropped.append(clearing()))
    thread.start()
    thread.join(10.0)
    rig.engine.cache.shared_cleared()
    rig.engine.step()
    assert dropped == [{TierName.REDIS: 4}]
    assert rig.engine.cache.clear() == {TierName.DEVICE: 4, TierName.HOST: 4}
    rig.run(rig.job("c", PROMPT, max_tokens=1))
    assert rig.store.flush(10.0)
    assert rig.engine.cache.clear() == {TierName.DEVICE: 4, TierName.HOST: 4}
    rig.clock.ahead_s += 10.0  # that it was not there is remembered for a moment
    (warm,) = rig.run(rig.job("d", PROMPT, max_tokens=1))
    assert warm.fates == {"computed": 6, "redis": 64}, "afterwards it is read again"
    rig.close()


def test_a_shared_tier_that_cannot_be_cleared_raises_a_store_error():
    with PrivateRedis() as server:
        rig = make_rig(redis_url=server.url)
    clearing = rig.engine.cache.shared_clearing()
    assert clearing is not None
    with pytest.raises(StoreError, match="clear again"):
        clearing()
    rig.close()


def test_without_a_shared_tier_clearing_it_drops_nothing():
    rig = make_rig()
    clearing = rig.engine.cache.shared_clearing()
    assert clearing is not None
    assert clearing() == {TierName.REDIS: 0}
    rig.close()


def test_what_a_job_says_of_its_blocks_reaches_every_tier_and_the_list():
    rig = make_rig(host_blocks=100)
    ends = time.time() + 500.0
    job = rig.job("a", PROMPT, max_tokens=1, lifetime=Lifetime(0.0, ends), keep_priority=40, turn=2)
    rig.run(job)
    for tier in (rig.store.device, rig.store.host):
        for name in job.block_hashes:
            meta = tier.find(name)
            assert (meta.ttl_s, meta.until, meta.priority, meta.turn) == (0.0, ends, 40, 2)
    for block in listed(rig):
        assert (block.ttl_s, block.priority) == (0.0, 40)
        assert 400.0 < block.ttl_left_s <= 500.0


def test_a_job_that_names_no_lifetime_leaves_blocks_with_a_fixed_end_as_they_are():
    rig = make_rig(host_blocks=100)
    ends = time.time() + 500.0
    job = rig.job("a", PROMPT, max_tokens=1, lifetime=Lifetime(0.0, ends))
    rig.run(job)
    rig.run(rig.job("b", PROMPT, max_tokens=1))  # the default of this engine is: until it is evicted
    assert {rig.store.host.find(name).lifetime for name in job.block_hashes} == {Lifetime(0.0, ends)}
    rig.run(rig.job("c", PROMPT, max_tokens=1, ttl_s=60.0))
    assert {rig.store.host.find(name).lifetime for name in job.block_hashes} == {Lifetime(60.0, ends)}
    assert carry_out(rig.engine, Warm(job.block_hashes, job.root, Lifetime(90.0))).started == 0
    assert {rig.store.host.find(name).lifetime for name in job.block_hashes} == {Lifetime(90.0, ends)}


def test_blocks_that_went_wrong_leave_redis_and_a_redis_that_stalls_delays_no_step(monkeypatch: pytest.MonkeyPatch):
    with PrivateRedis() as server:
        rig = make_rig(host_blocks=100, redis_url=server.url)
        rig.run(rig.job("before", PROMPT[:33], max_tokens=1))
        rig.engine.submit(rig.job("a", PROMPT, max_tokens=5, ignore_eos=True))
        while not rig.engine.step().outputs:
            pass
        assert rig.store.flush(30)
        shared = rig.store._shared
        assert shared.match(rig.job("x", PROMPT).block_hashes) == 4
        forward, go, asked = rig.engine.runner.forward, threading.Event(), threading.Event()
        remove = shared.remove
        monkeypatch.setattr(shared, "clear", None)
        monkeypatch.setattr(shared, "remove", lambda *what: (asked.set(), go.wait(60), remove(*what))[2])
        monkeypatch.setattr(rig.store._lanes[TierName.REDIS]._writer, "_tier", shared)
        monkeypatch.setattr(rig.engine.runner, "forward", lambda *step: forward(*step) * math.nan)
        while not (outputs := rig.engine.step().outputs):
            pass
        assert outputs[0].error.reason == "MODEL_OUTPUT_NOT_FINITE"
        assert not go.is_set()
        assert asked.wait(30)
        go.set()
        assert rig.store.flush(30)
        assert shared.match(rig.job("x", PROMPT).block_hashes) == 2
        rig.close()


def test_sequences_whose_blocks_come_from_host_one_a_step_all_end_with_the_same_tokens():
    rig = make_rig(host_blocks=200)
    batch = prompts(3, lengths=(64, 131))
    cold = rig.run(*(rig.job(number, prompt, max_tokens=4) for number, prompt in enumerate(batch)))
    rig.device.clear()
    rig.store._promoter._copies_a_step = 1
    warm = rig.run(*(rig.job(number, prompt, max_tokens=4) for number, prompt in enumerate(batch)))
    assert [answer.token_ids for answer in warm] == [answer.token_ids for answer in cold]
    assert all(answer.fates and answer.fates["host"] >= 48 for answer in warm)
    rig.close()


def test_the_load_tells_how_long_one_block_takes_latency_included(monkeypatch: pytest.MonkeyPatch):
    rig = make_rig(host_blocks=10)
    monkeypatch.setattr(rig.store, "read_ms", lambda: {TierName.HOST: (1.0, 2.0)})
    tiers = rig.engine.load().tiers
    assert (tiers[TierName.HOST][1:], tiers[TierName.DEVICE][1:]) == ((1.0, 3.0), (0.0, 0.0))
    rig.close()
