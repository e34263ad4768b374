"""The simulated engine on a virtual clock: its promises, and its accounting against a naive LRU model."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockHash, block_hashes, short
from kvstore.events import BlockRemoved, BlockStored, TierName
from kvstore.layout import KVLayout
from kvstore.lifetime import Lifetime
from tests.workers.stream_client import held
from workers.config import WorkerConfig
from workers.protocol import FinishReason, Job, Output, SamplingParams
from workers.simulated import SimulatedEngine, build_engine
from workers.simulated_info import simulated_info
from workers.simulated_sequence import Timing

SIZE = 4
INFO = simulated_info(fingerprint=b"f" * 32, layout=KVLayout(1, 1, 4, 4, "float32", SIZE), context_length=64)
ROOT = INFO.scheme.root(b"tenant")
TIMING = Timing(
    prefill_fixed_ms=1.0,
    prefill_token_ms=1.0,
    prefill_pair_ms=0.0,
    decode_step_ms=5.0,
    host_latency_ms=0.1,
    host_block_ms=0.1,
)


class VirtualTime:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def sleep(self, seconds: float) -> None:
        self.s += seconds


def engine_of(**settings_: object) -> tuple[SimulatedEngine, VirtualTime]:
    now = VirtualTime()
    chosen = {"device_blocks": 64, "host_blocks": 64, "timing": TIMING, **settings_}
    return SimulatedEngine(INFO, clock=now, wall_clock=now, sleep=now.sleep, **chosen), now  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(1000) for _ in range(length)] if length else []


def job(number: object, token_ids: list[int], *, max_tokens: int = 1, **fields: object) -> Job:
    return Job(
        job_id=number,  # type: ignore[arg-type]
        token_ids=token_ids,
        root=ROOT,
        block_hashes=block_hashes(token_ids, ROOT, SIZE),
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        **fields,  # type: ignore[arg-type]
    )


def run(engine: SimulatedEngine, *jobs: Job) -> dict[object, list[Output]]:
    """Until nothing is left to do; the outputs by job."""
    for each in jobs:
        engine.submit(each)
    outputs: dict[object, list[Output]] = {each.job_id: [] for each in jobs}
    for _ in range(10_000):
        if not engine.has_work():
            break
        report = engine.step()
        engine.cache.check()
        for output in report.outputs:
            outputs[output.job_id].append(output)
        if not report.outputs:
            engine.wait(1.0)
    assert not engine.has_work()
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def used_blocks(engine: SimulatedEngine, tier: TierName = TierName.DEVICE) -> int:
    return engine.load().tiers[tier][0].used_bytes // INFO.block_nbytes


def test_a_prompt_computed_once_is_found_on_the_device_except_its_last_token() -> None:
    engine, _ = engine_of()
    cold = run(engine, job("cold", prompt(16)))["cold"][-1]
    warm = run(engine, job("warm", prompt(16)))["warm"][-1]
    longer = run(engine, job("longer", [*prompt(16), 1, 2, 3]))["longer"][-1]
    assert cold.fates == {"device": 0, "host": 0, "computed": 16}
    assert warm.fates == {"device": 15, "host": 0, "computed": 1}
    assert longer.fates == {"device": 16, "host": 0, "computed": 3}


def test_blocks_that_the_device_evicted_come_from_host() -> None:
    engine, _ = engine_of(device_blocks=6)
    run(engine, job(1, prompt(16, seed=1)))
    run(engine, job(2, prompt(16, seed=2)))
    (again,) = run(engine, job(3, prompt(16, seed=1)))[3]
    assert again.fates == {"device": 8, "host": 7, "computed": 1}
    assert again.load_ms == pytest.approx(0.3)


def test_host_is_not_read_where_computing_is_faster() -> None:
    engine, _ = engine_of(device_blocks=6, timing=replace(TIMING, host_block_ms=100.0))
    run(engine, job(1, prompt(16, seed=1)))
    run(engine, job(2, prompt(16, seed=2)))
    (again,) = run(engine, job(3, prompt(16, seed=1)))[3]
    assert again.fates == {"device": 8, "host": 0, "computed": 8}


def test_time_passes_as_the_timing_model_says() -> None:
    engine, now = engine_of()
    outputs = run(engine, job(1, prompt(10), max_tokens=3))[1]
    assert now.s == pytest.approx((1 + 10 + 2 * 5) / 1000)
    assert outputs[0].worker_ttft_ms == pytest.approx(11.0)
    assert [output.worker_ttft_ms for output in outputs[1:]] == [None, None]


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_ones() -> None:
    engine, _ = engine_of(max_batch_tokens=5)
    engine.submit(job(1, prompt(4, seed=1), max_tokens=30))
    engine.step()
    engine.submit(job(2, prompt(16, seed=2)))
    made: list[list[object]] = []
    while [2] not in made and [1, 2] not in made:
        made.append([output.job_id for output in engine.step().outputs])
    assert made == [[1], [1], [1], [1, 2]]


def test_an_answer_is_the_same_cold_warm_batched_and_preempted() -> None:
    # Of different lengths, so that they need their next blocks in different steps.
    jobs = [job(number, prompt(12 + number, seed=number), max_tokens=20) for number in range(4)]
    alone = {each.job_id: tokens(run(engine_of()[0], each)[each.job_id]) for each in jobs}
    engine, _ = engine_of(device_blocks=16)  # room for two of them
    together = run(engine, *jobs)
    warm = run(engine, *jobs)
    assert {number: tokens(outputs) for number, outputs in together.items()} == alone
    assert {number: tokens(outputs) for number, outputs in warm.items()} == alone
    assert engine.load().preemptions > 0


def test_a_preempted_sequence_counts_its_prompts_fates_once() -> None:
    engine, _ = engine_of(device_blocks=16)
    outputs = run(engine, *(job(number, prompt(12, seed=number), max_tokens=20) for number in range(4)))
    assert [outputs[number][-1].fates for number in range(4)] == [{"device": 0, "host": 0, "computed": 12}] * 4


def test_blocks_of_generated_tokens_are_found_by_the_next_turn() -> None:
    engine, _ = engine_of()
    answer = tokens(run(engine, job(1, prompt(6), max_tokens=11))[1])
    turn = prompt(6) + answer + [7, 8]
    (next_turn,) = run(engine, job(2, turn))[2]
    assert next_turn.fates == {"device": 16, "host": 0, "computed": 3}


def test_no_store_keeps_nothing_and_no_read_uses_nothing() -> None:
    engine, _ = engine_of()
    run(engine, job(1, prompt(16), no_store=True))
    assert engine.snapshot() == []
    assert used_blocks(engine) == 0
    run(engine, job(2, prompt(16)))
    (unread,) = run(engine, job(3, prompt(16), no_read=True))[3]
    assert unread.fates == {"device": 0, "host": 0, "computed": 16}
    assert used_blocks(engine) == 4


def test_blocks_expire_after_their_last_use() -> None:
    engine, now = engine_of(default_ttl_s=10.0)
    run(engine, job(1, prompt(16)))
    now.s += 8.0
    run(engine, job(2, prompt(16)))
    now.s += 8.0
    assert engine.step().events == []
    now.s += 3.0
    causes = {event.cause.value for event in engine.step().events if isinstance(event, BlockRemoved)}
    assert causes == {"expired"}
    assert engine.snapshot() == []


def test_a_jobs_own_ttl_overrides_the_default() -> None:
    engine, now = engine_of(default_ttl_s=10.0)
    run(engine, job(1, prompt(16), lifetime=Lifetime(100.0)))
    now.s += 50.0
    engine.step()
    assert len(held(engine.snapshot())) == 8


def test_a_fixed_end_holds_against_hits_and_gives_way_to_a_later_one() -> None:
    engine, now = engine_of(default_ttl_s=10.0, host_blocks=64)
    ends = now.s + 20.0
    run(engine, job(1, prompt(16), lifetime=Lifetime(0.0, ends), keep_priority=30, turn=2))
    blocks = engine.cache.list_blocks(root=None, prefix=None, after=None, limit=9)
    assert {(b.ttl_s, b.priority) for b in blocks} == {(0.0, 30)}
    assert [b.ttl_left_s for b in blocks] == pytest.approx([ends - now.s] * len(blocks))
    for number in range(2, 5):
        now.s = ends - 20.0 + 6.0 * (number - 1)
        (answer,) = run(engine, job(number, prompt(16)))[number]
        assert answer.fates["computed"] == 1
    now.s = ends
    engine.step()
    assert engine.snapshot() == []
    run(engine, job(5, prompt(16), lifetime=Lifetime(0.0, now.s + 20.0)))
    run(engine, job(6, prompt(16), lifetime=Lifetime(0.0, now.s + 50.0)))
    now.s += 45.0
    engine.step()
    assert len(held(engine.snapshot())) == 8


def test_cancel_frees_the_blocks_before_the_next_step_and_says_so_in_it() -> None:
    engine, _ = engine_of()
    engine.submit(job(1, prompt(16), max_tokens=40, no_store=True))
    engine.step()
    assert used_blocks(engine) > 0
    engine.cancel(1)
    engine.cancel("unknown")
    assert used_blocks(engine) == 0
    (output,) = engine.step().outputs
    assert (output.finish, output.completion_tokens) == (FinishReason.CANCELLED, 1)
    assert output.fates is not None
    assert sum(output.fates.values()) == 16


def test_a_deadline_ends_a_job_whether_it_runs_or_waits() -> None:
    engine, now = engine_of(max_running=1)
    engine.submit(job(1, prompt(8, seed=1), max_tokens=50, deadline=0.05))
    engine.submit(job(2, prompt(8, seed=2), deadline=0.02))
    finishes = {}
    while engine.has_work():
        finishes |= {output.job_id: (output.finish, now.s) for output in engine.step().outputs if output.finish}
    assert finishes[1][0] == finishes[2][0] == FinishReason.DEADLINE
    assert finishes[2][1] < finishes[1][1]


def test_a_higher_priority_is_admitted_first_and_equals_in_order() -> None:
    engine, _ = engine_of(max_running=1)
    engine.submit(job("first", prompt(4, seed=0), max_tokens=2))
    engine.step()
    for number, priority in enumerate([0, 5, 0]):
        engine.submit(job(number, prompt(4, seed=number + 1), priority=priority))
    order = []
    while engine.has_work():
        order += [output.job_id for output in engine.step().outputs if output.finish]
    assert order == ["first", 1, 0, 2]


@pytest.mark.parametrize(("length", "reason"), [(0, "EMPTY_PROMPT"), (64, "CONTEXT_LENGTH_EXCEEDED")])
def test_a_prompt_that_cannot_run_is_refused_by_the_next_step(length: int, reason: str) -> None:
    engine, _ = engine_of()
    engine.submit(job(1, prompt(length)))
    (output,) = engine.step().outputs
    assert output.error is not None
    assert (output.finish, output.error.reason) == (FinishReason.ERROR, reason)


def test_a_sequence_ends_at_the_context_length() -> None:
    engine, _ = engine_of()
    outputs = run(engine, job(1, prompt(60), max_tokens=100))[1]
    assert (len(tokens(outputs)), outputs[-1].finish) == (4, FinishReason.LENGTH)


def test_a_stop_token_ends_a_sequence() -> None:
    engine, _ = engine_of()
    third = tokens(run(engine, job(1, prompt(8), max_tokens=5))[1])[2]
    stopping = replace(job(2, prompt(8)), sampling=SamplingParams(max_tokens=5, stop_token_ids=frozenset({third})))
    outputs = run(engine, stopping)[2]
    assert (len(tokens(outputs)), outputs[-1].finish) == (3, FinishReason.STOP)


def test_clear_drops_one_tenants_blocks_and_leaves_the_others() -> None:
    engine, _ = engine_of()
    run(engine, job(1, prompt(16, seed=1)))
    before = held(engine.snapshot())
    other = INFO.scheme.root(b"other")
    theirs = prompt(8, seed=2)
    run(engine, replace(job(2, theirs), root=other, block_hashes=block_hashes(theirs, other, SIZE)))
    assert engine.cache.clear(root=other) == {TierName.DEVICE: 2, TierName.HOST: 2}
    assert held(engine.snapshot()) == before


def test_clear_while_a_sequence_runs_leaves_it_its_blocks_and_frees_them_at_its_end() -> None:
    engine, _ = engine_of()
    engine.submit(job(1, prompt(16), max_tokens=3))
    engine.step()
    engine.cache.clear()
    assert used_blocks(engine) > 0
    while engine.has_work():
        engine.step()
    engine.cache.check()
    assert used_blocks(engine) == 0


def test_prefetching_brings_a_chain_from_host_to_device_and_the_next_request_finds_it_there() -> None:
    engine, _ = engine_of(device_blocks=6)
    first = job(1, prompt(16, seed=1))
    run(engine, first)
    run(engine, job(2, prompt(20, seed=2)))  # takes the device from it
    assert engine.cache.prefetch(first.block_hashes, root=ROOT, lifetime=None) > 0
    engine.cache.check()
    assert engine.cache.prefetch(first.block_hashes, root=ROOT, lifetime=None) == 0
    fates = run(engine, job(3, prompt(16, seed=1)))[3][-1].fates
    assert fates == {"device": 15, "host": 0, "computed": 1}


def test_leased_blocks_outlive_others_and_requests_still_find_room() -> None:
    engine, now = engine_of(device_blocks=16, host_blocks=16, default_ttl_s=10.0)
    kept = job(1, prompt(16, seed=1))
    run(engine, kept)
    assert engine.cache.lease(kept.block_hashes, 100.0) == {TierName.HOST: 4}
    for seed in range(2, 20):
        run(engine, job(seed, prompt(40, seed=seed), max_tokens=8))
    now.s += 50.0
    engine.step()
    listed = engine.cache.list_blocks(root=ROOT, prefix=None, after=None, limit=99)
    assert {block.hash for block in listed} == set(kept.block_hashes)
    assert all(block.leased for block in listed)
    assert engine.cache.end_leases(kept.block_hashes) == {TierName.HOST: 4}
    now.s += 11.0
    engine.step()
    assert engine.cache.list_blocks(root=None, prefix=None, after=None, limit=99) == []
    engine.cache.check()


def test_load_counts_what_waits_runs_and_decodes() -> None:
    engine, _ = engine_of(max_running=2)
    run(engine, job("warm", prompt(16, seed=0)))
    for number in range(3):
        engine.submit(job(number, prompt(16, seed=number), max_tokens=9))
    load = engine.load()
    assert (load.running, load.waiting, load.decoding, load.pending_prefill_tokens) == (0, 3, 0, 32)
    engine.step()
    load = engine.load()
    assert (load.running, load.waiting, load.decoding, load.pending_prefill_tokens) == (2, 1, 2, 16)


def test_load_tells_what_answers_hold_and_what_their_ends_bring() -> None:
    engine, _ = engine_of(max_running=3)
    shared = prompt(16, seed=1)  # four blocks of four
    for number in range(2):
        engine.submit(job(number, [*shared, *prompt(6, seed=number + 2)], max_tokens=7 + 10 * number))
    engine.step()
    engine.step()
    load = engine.load()
    assert (load.slots, load.decoding, load.answer_ms, load.freed_blocks) == (3, 2, 0.0, 0.0)
    assert load.answer_blocks == 2  # of each the block that prompt and answer share
    while not any(output.finish for output in engine.step().outputs):
        pass
    load = engine.load()
    # Six steps, in one of which the second prompt was computed: it waited for the blocks of the first.
    assert load.answer_ms == pytest.approx(6 * TIMING.decode_step_ms + TIMING.prefill_ms(6, 16))
    assert load.freed_blocks == 3  # one of its own prompt, two of its answer: the other one still uses the first four
    assert load.answer_blocks == 2 + 2  # of that; and as many as an answer of seven tokens takes
    while engine.has_work():
        engine.step()
    assert engine.load().answer_blocks == 0


def test_a_burst_of_one_prompt_computes_it_once_and_counts_it_once() -> None:
    engine, _ = engine_of(max_batch_tokens=8)
    burst = [job(number, [*prompt(32), number, number, number], max_tokens=3) for number in range(5)]
    for each in burst:
        engine.submit(each)
    assert engine.load().pending_prefill_tokens == 35 + 4 * 3
    ends: dict[object, Output] = {}
    while engine.has_work():
        ends.update({output.job_id: output for output in engine.step().outputs})
    assert [(ends[number].fates or {})["computed"] for number in range(5)] == [35, 3, 3, 3, 3]


def test_load_tells_the_share_of_time_in_prefill() -> None:
    engine, now = engine_of()
    run(engine, job(1, prompt(40)))
    assert engine.load().prefill_share == pytest.approx(now() / 30.0, rel=0.01)
    now.s += 30.0
    assert engine.load().prefill_share == pytest.approx(0.041 / 30.0 / 2.718, rel=0.02)


def test_a_snapshot_takes_no_event_away_from_those_who_got_none() -> None:
    engine, _ = engine_of()
    run(engine, job(1, prompt(16)))
    engine.cache.clear()
    assert engine.snapshot() == []
    assert engine.step().events != []


def test_wait_sleeps_until_blocks_from_host_have_arrived() -> None:
    engine, now = engine_of(device_blocks=6, timing=replace(TIMING, host_latency_ms=5.0))
    run(engine, job(1, prompt(16, seed=1)))
    run(engine, job(2, prompt(16, seed=2)))
    engine.submit(job(3, prompt(16, seed=1)))
    before = now.s
    assert engine.step().outputs == []
    engine.wait(1.0)
    assert now.s - before == pytest.approx(0.0052)


def test_wait_returns_at_once_while_a_sequence_can_run() -> None:
    engine, now = engine_of(max_batch_tokens=4)
    engine.submit(job(1, prompt(16)))
    engine.step()
    before = now.s
    engine.wait(1.0)
    assert now.s == before


class NaiveCaches:
    """Device and host as lists from the least to the most recently used, for jobs that run one after the other."""

    def __init__(self, device: int, host: int) -> None:
        self.capacity = {"device": device, "host": host}
        self.order: dict[str, list[bytes]] = {"device": [], "host": []}

    def use(self, tier: str, names: list[BlockHash]) -> None:
        for name in reversed(names):
            if name in self.order[tier]:
                self.order[tier].remove(name)
                self.order[tier].append(name)

    def store_in_host(self, name: BlockHash) -> None:
        order = self.order["host"]
        if name in order:
            order.remove(name)
        elif len(order) >= self.capacity["host"]:
            order.pop(0)
        order.append(name)

    def run(self, token_ids: list[int]) -> dict[str, int]:
        names = block_hashes(token_ids, ROOT, SIZE)
        on_device = leading(names, self.order["device"])
        in_host = leading(names[on_device:], self.order["host"])
        needed = -(-len(token_ids) // SIZE) - on_device
        pinned = set(names[:on_device])
        while len(self.order["device"]) + needed > self.capacity["device"]:
            victim = next(name for name in self.order["device"] if name not in pinned)
            self.order["device"].remove(victim)
        self.use("host", names[: on_device + in_host])
        for name in names[on_device + in_host :]:
            self.store_in_host(name)
        self.order["device"] += [name for name in names if name not in self.order["device"]]
        self.use("device", names)
        cached = min((on_device + in_host) * SIZE, len(token_ids) - 1)
        device = min(on_device * SIZE, cached)
        return {"device": device, "host": cached - device, "computed": len(token_ids) - cached}


def leading(names: list[BlockHash], held_names: list[bytes]) -> int:
    return next((at for at, name in enumerate(names) if name not in held_names), len(names))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=20, max_size=60))
def test_fates_and_holdings_are_those_of_a_naive_lru_model(asked: list[tuple[int, int]]) -> None:
    engine, _ = engine_of(device_blocks=10, host_blocks=14, timing=replace(TIMING, host_latency_ms=0, host_block_ms=0))
    naive = NaiveCaches(10, 14)
    mirror: set[tuple[str, bytes]] = set()
    for number, (family, length) in enumerate(asked):
        token_ids = prompt(30, seed=family)[:length]
        engine.submit(job(number, token_ids))
        while engine.has_work():
            report = engine.step()
            for event in report.events:
                names = {(event.tier.value, name) for name in event.hashes}  # type: ignore[union-attr]
                mirror = mirror | names if isinstance(event, BlockStored) else mirror - names
            for output in report.outputs:
                assert output.fates == naive.run(token_ids)
    expected = {(tier, short(BlockHash(name))) for tier, order in naive.order.items() for name in order}
    assert mirror == expected
    assert held(engine.snapshot()) == expected
    engine.cache.check()


def test_the_simulated_worker_needs_no_torch() -> None:
    program = "import sys, workers.simulated, workers.server, workers.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_worker_of_a_folder_without_weights_takes_sizes_from_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,'
        ' "vocab_size": 300, "max_position_embeddings": 512, "eos_token_id": [2, 3]}'
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    config = WorkerConfig("w0", str(tmp_path), "m", engine="simulated", device_bytes=1 << 20, host_bytes=0)
    info = build_engine(config).info
    assert (info.vocab_size, info.context_length, info.eos_token_ids) == (300, 512, (2, 3))
    assert info.scheme.layout == "L2 KVH2 K16 V16 float32 B64"
    assert len(info.tokenizer_sha256) == 32
    assert TierName.HOST not in build_engine(config).load().tiers


def test_a_device_tier_without_room_for_a_block_is_refused_with_the_remedy(tmp_path: Path) -> None:
    config = WorkerConfig("w0", str(tmp_path), "m", engine="simulated", device_bytes=10)
    with pytest.raises(ValueError, match="raise device_bytes"):
        build_engine(config)


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("seed", [0, 9])
def test_what_another_worker_began_goes_on_as_it_would_have(cut: int, seed: int) -> None:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, seed=seed, temperature=float(bool(seed)))
    asked = replace(job("a", prompt(10), max_tokens=12), sampling=sampling)
    whole = run(engine_of()[0], asked)["a"]
    ids = [i for output in whole for i in output.token_ids]
    longer = [*asked.token_ids, *ids[:cut]]
    again = replace(asked, token_ids=longer, block_hashes=block_hashes(longer, ROOT, SIZE), resumed=cut)
    engine, _ = engine_of()
    for warm in (False, True):  # the second time its blocks are cached
        rest = run(engine, again)["a"]
        assert [(o.token_ids, o.text, o.completion_tokens) for o in rest] == [
            (o.token_ids, o.text, o.completion_tokens) for o in whole[cut:]
        ]
        assert rest[-1].finish is FinishReason.LENGTH
        assert sum((rest[0].fates or {}).values()) == 10
        assert sum((rest[0].resumed_fates or {}).values()) == 10 + cut
        assert ((rest[0].fates or {})["device"] > 0) is warm
        engine.cache.check()
