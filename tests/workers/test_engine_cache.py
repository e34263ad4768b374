"""What operators ask of the torch engine: its store, through the engine's protocol."""

from __future__ import annotations

import threading
import time

import pytest

from deploy.redis_server import PrivateRedis, find_redis_server
from kvstore.blocks import BlockHash
from kvstore.errors import InvariantError, StoreError
from kvstore.events import TierName
from tests.workers.engine_rig import Rig, make_rig
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
        assert mine[name] == CachedBlock(name, parent, job.root, tiers, ttl_s=60.0, position=position)
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
    assert paged == whole
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
    assert rig.engine.clear() == {TierName.DEVICE: 4, TierName.HOST: 4}
    clearing = rig.engine.shared_clearing()
    assert clearing is not None
    # The server has dropped nothing yet, and the engine goes on.
    (again,) = rig.run(rig.job("b", PROMPT, max_tokens=4))
    assert (again.token_ids, again.fates) == (cold.token_ids, {"computed": len(PROMPT)})
    dropped: list[dict[TierName, int]] = []
    thread = threading.Thread(target=lambda: dropped.append(clearing()))
    thread.start()
    thread.join(10.0)
    rig.engine.shared_cleared()
    rig.engine.step()
    assert dropped == [{TierName.REDIS: 4}]
    assert rig.engine.clear() == {TierName.DEVICE: 4, TierName.HOST: 4}
    rig.run(rig.job("c", PROMPT, max_tokens=1))
    assert rig.store.flush(10.0)
    assert rig.engine.clear() == {TierName.DEVICE: 4, TierName.HOST: 4}
    rig.clock.ahead_s += 10.0  # that it was not there is remembered for a moment
    (warm,) = rig.run(rig.job("d", PROMPT, max_tokens=1))
    assert warm.fates == {"computed": 6, "redis": 64}, "afterwards it is read again"
    rig.close()


def test_a_shared_tier_that_cannot_be_cleared_raises_a_store_error():
    with PrivateRedis() as server:
        rig = make_rig(redis_url=server.url)
    clearing = rig.engine.shared_clearing()
    assert clearing is not None
    with pytest.raises(StoreError, match="clear again"):
        clearing()
    rig.close()


def test_without_a_shared_tier_clearing_it_drops_nothing():
    rig = make_rig()
    clearing = rig.engine.shared_clearing()
    assert clearing is not None
    assert clearing() == {TierName.REDIS: 0}
    rig.close()


def test_the_load_tells_how_long_one_block_takes_latency_included(monkeypatch: pytest.MonkeyPatch):
    rig = make_rig(host_blocks=10)
    monkeypatch.setattr(rig.store, "read_ms", lambda: {TierName.HOST: (1.0, 2.0)})
    tiers = rig.engine.load().tiers
    assert (tiers[TierName.HOST][1:], tiers[TierName.DEVICE][1:]) == ((1.0, 3.0), (0.0, 0.0))
    rig.close()
