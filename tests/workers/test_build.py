from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import redis

from deploy.redis_server import PrivateRedis, find_redis_server
from kvstore.blocks import block_hashes
from kvstore.errors import TierError
from kvstore.events import TierName
from tests.workers.engine_rig import SHAPE, model_folder, prompts
from tests.workers.ranks_rig import meet, on_all_ranks, one_at_a_time
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.protocol import FinishReason, Job, SamplingParams
from workers.simulated_info import info_for
from workers.tensor_parallel.agreement import TensorParallel

CONFIG = WorkerConfig(
    name="w0", model_dir=str(model_folder()), model_name="tiny", device="cpu", device_bytes=4 << 20, host_bytes=8 << 20
)


def _run(engine: TorchEngine, prompt: list[int]):
    root = engine.info.scheme.root(b"")
    names = block_hashes(prompt, root, engine.info.scheme.block_size)
    engine.submit(Job("a", prompt, root, names, SamplingParams(max_tokens=3, temperature=0.0)))
    outputs = []
    while engine.has_work():
        outputs += engine.step().outputs
        engine.wait(0.01)
    return outputs[-1]


def test_settings_become_an_engine_with_its_tiers():
    engine = build_engine(CONFIG)
    info = engine.info
    assert (info.model, info.device, info.context_length, info.vocab_size) == ("tiny", "cpu", 1024, SHAPE.vocab)
    assert info.scheme.block_size == 64  # blocks of so small a model would be smaller than 256 KiB
    assert info.scheme.layout == "L2 KVH2 K16 V16 float32 B64"
    assert info.block_nbytes == 64 * 2 * 2 * 32 * 4
    assert info.eos_token_ids == (2, 0)
    assert info.shared_tier_id == ""
    tiers = engine.load().tiers
    assert {name: stats.capacity_bytes for name, (stats, _, _) in tiers.items()} == {
        TierName.DEVICE: 4 << 20,
        TierName.HOST: 8 << 20,
    }
    assert _run(engine, prompts(1, lengths=(100,))[0]).finish is FinishReason.LENGTH
    engine.close(flush_s=0)


def test_a_tenant_with_a_quota_keeps_its_blocks_in_host_while_another_fills_it(tmp_path):
    salts = {"own": b"a" * 32, "other": b"b" * 32}
    config = replace(CONFIG, host_bytes=8 * 64 * 2 * 2 * 32 * 4, quotas={salts["own"].hex(): 0.25}, disk_bytes=8 << 20)
    engine = build_engine(replace(config, disk_dir=str(tmp_path)))
    scheme = engine.info.scheme
    roots = {name: scheme.root(salt) for name, salt in salts.items()}
    for number, name in enumerate(["own", *["other"] * 6]):
        prompt = prompts(1, lengths=(130,), seed=number)[0]
        names = block_hashes(prompt, roots[name], scheme.block_size)
        engine.submit(Job(number, prompt, roots[name], names, SamplingParams(max_tokens=1, temperature=0.0)))
        while engine.has_work():
            engine.step()
            engine.wait(0.01)
    in_host = [meta.root for meta in engine.store.host.metas()]
    assert (in_host.count(roots["own"]), in_host.count(roots["other"])) == (2, 6)
    assert engine.store.disk.honours.quota
    engine.close(flush_s=0)


def test_ranks_share_out_the_tiers_and_keep_what_they_store_apart(tmp_path: Path):
    salt = b"a" * 32
    config = replace(CONFIG, disk_bytes=8 << 20, disk_dir=str(tmp_path), quotas={salt.hex(): 0.25}, peers=True)
    config = replace(config, fleet_secret="s")

    def build(rank: int) -> TorchEngine:
        group = meet(tmp_path, rank)
        return build_engine(config, group=group, ranks=TensorParallel(group))

    with one_at_a_time():
        engines = on_all_ranks(build)
    first, second = engines
    assert first.info == replace(second.info, peer_address=first.info.peer_address)
    assert first.info.peer_address != second.info.peer_address, "each rank serves its own share"
    assert (first.info.scheme.tp_size, first.info.scheme.tp_rank) == (2, 0)
    assert first.info.block_nbytes == 2 * first.store.layout.block_nbytes
    capacities = [{tier: stats.capacity_bytes for tier, stats in engine.store.stats().items()} for engine in engines]
    assert capacities[0] == capacities[1]
    assert capacities[0][TierName.DEVICE] == 2 << 20
    assert capacities[0][TierName.HOST] == 4 << 20
    slabs = [sorted(path.stem for path in (tmp_path / name).glob("*.slab")) for name in ("w0", "w0.rank1")]
    assert all(slabs)
    assert slabs[0] != slabs[1], "what a rank stores has a namespace of its own"
    for engine in engines:
        engine.close(flush_s=0)


@pytest.mark.parametrize("name", [TierName.HOST, TierName.DISK])
@pytest.mark.parametrize(("threshold_s", "left"), [(0.2, [3, 1, 2, 2]), (0.1, [3, 2, 1, 2])])
def test_tail_optimized_keeps_by_the_threshold_and_the_measured_prefill_what_would_make_a_turn_late(
    tmp_path: Path, name: TierName, threshold_s: float, left: list[int]
):
    nbytes = 64 * 2 * 2 * 32 * 4
    sizes = {"host_bytes": 8 * nbytes} if name is TierName.HOST else {"host_bytes": 0, "disk_bytes": 8 * nbytes + 40960}
    config = replace(CONFIG, eviction="tail_optimized", tail_threshold_s=threshold_s, disk_dir=str(tmp_path), **sizes)
    engine = build_engine(config, clock=lambda: 1.0)  # at which the first prefill that is told settles the spare
    engine._times.observe([(1000, 0)], 1500.0)  # 96 ms a block
    tier = engine.store.host if name is TierName.HOST else engine.store.disk
    assert tier.num_slots == 8
    chats = [prompts(1, lengths=(64 * blocks + 1,), seed=blocks)[0] for blocks in (5, 3)]
    chats += [prompts(1, lengths=(129,), seed=seed)[0] for seed in (10, 11)]
    for chat in chats:
        _run(engine, chat)
        assert engine.store.flush(30)
    root, held = engine.info.scheme.root(b""), {meta.hash for meta in tier.metas()}
    assert [sum(block in held for block in block_hashes(chat, root, 64)) for chat in chats] == left
    engine.close(flush_s=0)


def test_blocks_of_a_worker_that_writes_back_are_on_disk_when_it_has_ended(tmp_path):
    config = replace(CONFIG, disk_bytes=8 << 20, disk_dir=str(tmp_path), admission="on_eviction")
    engine = build_engine(config)
    prompt = prompts(1, lengths=(200,))[0]
    _run(engine, prompt)
    assert engine.store.disk.metas() == []
    engine.close(flush_s=30)
    engine = build_engine(config)
    assert _run(engine, prompt).fates["disk"] == 192
    engine.close(flush_s=0)


def test_two_engines_of_one_model_share_a_scheme_and_other_settings_do_not():
    one, two = build_engine(CONFIG), build_engine(replace(CONFIG, name="w1", host_bytes=0))
    other = build_engine(replace(CONFIG, dtype="bfloat16", block_size=8))
    assert one.info.scheme == two.info.scheme
    assert one.info.scheme.differences(other.info.scheme) == ["layout", "block_size"]
    assert TierName.HOST not in two.load().tiers
    for engine in (one, two, other):
        engine.close(flush_s=0)


def test_a_quantised_store_of_the_same_bytes_holds_more_blocks_and_workers_that_differ_in_it_share_none():
    plain, quantised = (build_engine(replace(CONFIG, kv_dtype=kv, block_size=16)) for kv in ("auto", "int8"))
    assert quantised.info.scheme.layout == "L2 KVH2 K16 V16 float32 B16 int8/row"
    assert plain.info.scheme.differences(quantised.info.scheme) == ["layout"]
    assert quantised.info.block_nbytes == 2 * 2 * 16 * (2 * 16 + 2 * 2)
    assert quantised.store.device.num_blocks == (4 << 20) // quantised.info.block_nbytes
    assert info_for(replace(CONFIG, kv_dtype="int8", block_size=16)).block_nbytes == quantised.info.block_nbytes
    assert info_for(replace(CONFIG, kv_dtype="int8", block_size=16)).scheme.layout == quantised.info.scheme.layout
    prompt = prompts(1, lengths=(100,))[0]
    assert [_run(quantised, prompt).fates for _ in range(2)] == [{"computed": 100}, {"device": 96, "computed": 4}]
    for engine in (plain, quantised):
        engine.close(flush_s=0)


def test_a_redis_url_gives_a_shared_tier():
    if find_redis_server() is None:
        pytest.skip("no redis-server was found")
    with PrivateRedis() as server:
        engine = build_engine(replace(CONFIG, redis_url=server.url))
        with redis.Redis.from_url(server.url) as client:
            assert engine.info.shared_tier_id == client.info("server")["run_id"]
        assert TierName.REDIS in engine.load().tiers
        engine.close(flush_s=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads"),
        ({"dtype": "int3"}, "dtype"),
        ({"kv_dtype": "int3"}, "kv_dtype.*auto, fp8_e4m3, int8"),
        ({"device": "tpu"}, "device"),
        ({"deterministic": True, "threads": 3}, "at most 2"),
        ({"deterministic": True, "cuda_graphs": "on"}, "engine.cuda_graphs to auto"),
        ({"context_length": 4096}, "context_length"),
        ({"context_length": 1}, "context_length"),
        ({"max_running": 0}, "max_running"),
    ],
)
def test_a_setting_out_of_range_is_named(change: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        build_engine(replace(CONFIG, **change))


def test_a_tier_without_room_for_a_block_is_named():
    with pytest.raises(TierError, match="device tier"):
        build_engine(replace(CONFIG, device_bytes=100))
