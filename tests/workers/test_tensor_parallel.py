"""Two ranks, each with half of the heads, give the answers of one, whatever either of them has lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.redis_server import PrivateRedis, find_redis_server
from kvstore.errors import InvariantError, TierError
from kvstore.events import RemovalCause, TierName
from tests.workers.engine_rig import BLOCK_SIZE, make_rig, near_ties, oracle, prompts, runner
from tests.workers.ranks_rig import cut_runners, end_rigs, make_ranks_rig, meet, on_all_ranks
from workers.attention.step import Span
from workers.protocol import Constraint, FinishReason
from workers.sampler import Sampled
from workers.tensor_parallel.agreement import TensorParallel
from workers.tensor_parallel.lost import RankLost

MAX_NEAR_TIES = 1
COUNT = 20
SOON_S = 30.0  # far below the deadline of a collective


@pytest.fixture(autouse=True)
def _rigs_end() -> Iterator[None]:
    yield
    end_rigs()


@pytest.fixture(scope="module")
def expected():
    return oracle().generate(prompts(COUNT))


def _lose(store, names) -> None:
    """A rank's device and host hold them no more."""
    store.device.remove(names, RemovalCause.EVICTED)
    if store.host is not None:
        store.host.remove(names, RemovalCause.EVICTED)


def _from(answers, *tiers: str) -> int:
    return sum(answer.fates.get(tier, 0) for answer in answers for tier in tiers)


def _cached(answer) -> int:
    return sum(count for tier, count in answer.fates.items() if tier != "computed")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_logits_of_two_ranks_are_those_of_one(architecture, tmp_path):
    models, proxies = cut_runners(architecture)
    whole = runner(architecture)
    ids = prompts(1, lengths=[100])[0]

    def pool(model):
        shape = model.layout
        return [
            (torch.zeros(9, 16, shape.kv_heads, shape.k_dim), torch.zeros(9, 16, shape.kv_heads, shape.v_dim))
            for _ in range(shape.layers)
        ]

    def forward(model):
        return model.forward(pool(model), [Span(0, 100, 100, list(range(7)))], ids, range(100), range(100))

    def on_rank(rank):
        proxies[rank].group = meet(tmp_path, rank)
        return forward(models[rank])

    of_ranks, of_one = on_all_ranks(on_rank), forward(whole)
    assert torch.equal(of_ranks[0], of_ranks[1]), "every rank must see the same logits"
    assert models[0].layout.kv_heads * 2 == whole.layout.kv_heads
    assert float((of_ranks[0] - of_one).abs().max()) < 1e-4 * float(of_one.abs().max())


def test_bytes_of_both_ranks_are_those_of_one():
    models, _ = cut_runners()
    one = replace(runner().layout, block_size=BLOCK_SIZE)
    shares = [replace(model.layout, block_size=BLOCK_SIZE).block_nbytes for model in models]
    assert sum(shares) == one.block_nbytes
    rig = make_ranks_rig()
    assert rig.engine.info.block_nbytes == one.block_nbytes
    stats = rig.engine.load().tiers[TierName.DEVICE][0]
    assert stats.capacity_bytes == 400 * one.block_nbytes
    rig.close()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_cold_and_warm_answers_are_those_of_transformers(architecture):
    wanted = oracle(architecture).generate(prompts(COUNT))
    rig, batch = make_ranks_rig(architecture), prompts(COUNT)
    cold = rig.run(*(rig.job(("cold", i), prompt) for i, prompt in enumerate(batch)))
    warm = rig.run(*(rig.job(("warm", i), prompt) for i, prompt in enumerate(batch)))
    assert near_ties(cold, wanted) <= MAX_NEAR_TIES
    assert near_ties(warm, wanted) <= MAX_NEAR_TIES
    assert sum(map(_cached, warm)) == sum((len(prompt) - 1) // 16 * 16 for prompt in batch)
    assert len(rig.ranks[0].digests) > 60
    rig.close()


@pytest.mark.parametrize("loser", [0, 1])
@pytest.mark.parametrize("host_blocks", [0, 100])
def test_what_one_rank_has_lost_ends_the_prefix_on_both(expected, loser, host_blocks):
    rig, prompt = make_ranks_rig(host_blocks=host_blocks), prompts(5)[4]
    job = rig.job("cold", prompt)
    rig.run(job)
    assert len(job.block_hashes) == 8
    _lose(rig.stores[loser], [job.block_hashes[3]])
    [answer] = rig.run(rig.job("warm", prompt))
    assert _cached(answer) == 3 * BLOCK_SIZE
    assert near_ties([answer], expected[4:5]) == 0
    [again] = rig.run(rig.job("again", prompt))
    assert _cached(again) == 8 * BLOCK_SIZE, "what was lost is there again"
    assert near_ties([again], expected[4:5]) == 0
    rig.close()


def test_warm_from_host_where_the_pools_are_too_small(expected):
    rig, batch = make_ranks_rig(device_blocks=40, host_blocks=400, max_running=4), prompts(COUNT)
    rig.run(*(rig.job(("cold", i), prompt) for i, prompt in enumerate(batch)))
    warm = rig.run(*(rig.job(("warm", i), prompt) for i, prompt in enumerate(batch)))
    assert near_ties(warm, expected) <= MAX_NEAR_TIES
    assert _from(warm, "host") > 500
    rig.close()


@pytest.mark.skipif(find_redis_server() is None, reason="no redis-server was found")
def test_each_rank_spills_its_share_to_redis_and_finds_it_there(expected):
    batch = prompts(COUNT)
    with PrivateRedis() as server:
        writer = make_ranks_rig(host_blocks=400, redis_url=server.url)
        jobs = [writer.job(i, prompt, max_tokens=1) for i, prompt in enumerate(batch)]
        writer.run(*jobs)
        writer.close()
        client = redis.Redis.from_url(server.url)
        by_rank: dict[bytes, set[bytes]] = {}
        for key in client.keys("warmkv:*"):
            _, namespace, name = key.split(b":")
            by_rank.setdefault(namespace, set()).add(name)
        names = {name.hex().encode() for job in jobs for name in job.block_hashes}
        assert len(by_rank) == 2, "each rank has a namespace of its own"
        assert all(held == names for held in by_rank.values())
        values = [client.dump(b"warmkv:" + space + b":" + min(names)) for space in by_rank]
        assert values[0] != values[1]

        reader = make_ranks_rig(host_blocks=400, redis_url=server.url)
        answers = reader.run(*(reader.job(i, prompt) for i, prompt in enumerate(batch)))
        reader.close()
        assert near_ties(answers, expected) <= MAX_NEAR_TIES
        assert _from(answers, "redis", "host") > 700  # what came by a prefetch may count as found in host

        # One rank's share of a block is gone from the server: a shorter prefix, and the same answer.
        longest = jobs[4]
        for space in list(by_rank)[:1]:
            client.delete(b"warmkv:" + space + b":" + longest.block_hashes[2].hex().encode())
        client.close()
        late = make_ranks_rig(host_blocks=400, redis_url=server.url)
        [answer] = late.run(late.job("late", batch[4]))
        late.close()
        assert _cached(answer) == 2 * BLOCK_SIZE
        assert near_ties([answer], expected[4:5]) == 0


def test_a_restart_finds_both_shares_on_disk(expected, tmp_path):
    batch = prompts(COUNT)
    first = make_ranks_rig(disk=tmp_path, host_blocks=400)
    first.run(*(first.job(i, prompt, max_tokens=1) for i, prompt in enumerate(batch)))
    first.close()
    second = make_ranks_rig(disk=tmp_path, host_blocks=400)
    answers = second.run(*(second.job(i, prompt) for i, prompt in enumerate(batch)))
    second.close()
    assert near_ties(answers, expected) <= MAX_NEAR_TIES
    assert _from(answers, "disk", "host") > 700


def test_preempted_sequences_end_rightly(expected):
    rig, batch = make_ranks_rig(device_blocks=24, max_running=8), prompts(COUNT)
    answers = rig.run(*(rig.job(i, prompt) for i, prompt in enumerate(batch)))
    assert rig.engine.load().preemptions > 0
    assert near_ties(answers, expected) <= MAX_NEAR_TIES
    rig.close()


def test_a_rank_that_is_short_of_blocks_is_waited_for_by_all(expected):
    rig, batch = make_ranks_rig(device_blocks=60, fewer_on_rank_1=36, max_running=8), prompts(COUNT)
    answers = rig.run(*(rig.job(i, prompt) for i, prompt in enumerate(batch)))
    assert rig.engine.load().preemptions > 0, "rank 0 had room for all"
    assert near_ties(answers, expected) <= MAX_NEAR_TIES
    rig.close()


def test_tokens_are_those_of_rank_0(tmp_path):
    def talk(rank: int):
        ranks = TensorParallel(meet(tmp_path, rank))
        own = {"a": Sampled(5 + rank), "b": Sampled(None if rank == 0 else 7), "c": Sampled(9)}
        return {name: each.token_id for name, each in ranks.tokens(own).items()}

    assert on_all_ranks(talk) == [{"a": 5, "b": None, "c": 9}] * 2


def test_a_burst_over_one_prompt_computes_it_once(expected):
    rig, prompt = make_ranks_rig(max_batch_tokens=32), prompts(5)[4]
    answers = rig.run(*(rig.job(i, prompt) for i in range(4)))
    assert [_cached(answer) for answer in answers] == [0, 128, 128, 128]
    assert near_ties(answers, [expected[4]] * 4) == 0
    rig.close()


def test_who_waits_for_a_prompt_that_is_being_computed_is_the_same_on_both_ranks(expected):
    rig, prompt = make_ranks_rig(max_batch_tokens=16), prompts(5)[4]
    rig.run(rig.job("cold", prompt[:90], max_tokens=1))
    job = rig.job("first", prompt)
    rig.engine.submit(job)
    rig.settle()
    assert len(rig.engines[0]._scheduler._in_the_making) == 2
    rig.stores[1].device.remove([job.block_hashes[2]], RemovalCause.EVICTED)
    rig.engine.submit(rig.job("second", prompt))
    answers = rig.collect()
    assert near_ties([answers["second"]], expected[4:5]) == 0
    rig.close()


def test_a_prefix_that_is_longer_on_one_rank_while_the_rest_loads_makes_the_same_wait(expected, tmp_path):
    """A second one asks for it in the same step: whom it waits for follows from what the first one has on all ranks."""
    rig, prompt = make_ranks_rig(disk=tmp_path), prompts(5)[4]
    job = rig.job("cold", prompt)
    rig.run(job)
    for store, kept in zip(rig.stores, (3, 2), strict=True):
        assert store.flush(30)
        _lose(store, job.block_hashes[kept:])
        assert store.match(job.block_hashes) == [TierName.DEVICE] * kept
    answers = rig.run(rig.job("first", prompt), rig.job("second", prompt))
    assert near_ties(answers, [expected[4]] * 2) == 0
    assert [_cached(answer) for answer in answers] == [128, 128]
    rig.close()


def test_a_cancelled_job_ends_on_both_ranks():
    rig = make_ranks_rig()
    rig.engine.submit(rig.job("long", prompts(1)[0], max_tokens=500, ignore_eos=True))
    for _ in range(5):
        rig.engine.step()
    rig.settle()
    assert len(rig.engines[1]._scheduler) == 1
    rig.engine.cancel("long")
    outputs = rig.engine.step().outputs
    assert outputs[-1].finish is FinishReason.CANCELLED
    rig.assert_nothing_leaked()
    rig.close()


# --- constraints ---


def _gate_grammars(rig, *ranks: int) -> threading.Event:
    """What these ranks compile is not ready before the gate is open."""
    gate = threading.Event()
    for rank in ranks:
        grammars = rig.engines[rank].grammars
        compile_now = grammars._compile

        def slowly(constraint, compile_now=compile_now):
            gate.wait(60)
            return compile_now(constraint)

        grammars._compile = slowly
    return gate


@pytest.mark.parametrize("late", [0, 1])
def test_a_grammar_that_one_rank_compiles_slowly_holds_up_nobody_else(expected, late):
    rig, batch = make_ranks_rig(), prompts(COUNT)
    gate = _gate_grammars(rig, late)
    rig.engine.submit(rig.job("held", batch[0], constraint=Constraint("regex", "yes")))
    answers = {}
    rig.engine.submit(rig.job("other", batch[1]))
    until = time.monotonic() + SOON_S
    while "other" not in answers or answers["other"][-1].finish is None:
        _take(rig.engine.step().outputs, answers)
        assert time.monotonic() < until, "others wait for the constraint"
    assert [token for output in answers["other"] for token in output.token_ids] == expected[1].token_ids
    rig.settle()
    assert [len(engine._anteroom) for engine in rig.engines] == [1, 1], "it is compiled on one rank only"
    assert rig.engine.load().waiting == 1
    gate.set()
    assert rig.collect()["held"].text == "yes"
    rig.close()


def test_a_constraint_that_takes_too_long_is_refused_at_the_same_step_by_both_ranks():
    rig = make_ranks_rig()
    gate = _gate_grammars(rig, 1)
    rig.engine.submit(rig.job("endless", prompts(1)[0], constraint=Constraint("regex", "yes")))
    rig.engine.step()
    rig.clock.ahead_s += 100  # of rank 0; the other one's clock is not asked
    (output,) = rig.engine.step().outputs
    assert output.error.reason == "CONSTRAINT_TOO_COMPLEX"
    rig.assert_nothing_leaked()
    gate.set()
    rig.close()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_constraint_that_fails_on_one_rank_fails_its_job_on_both(expected, broken):
    rig, batch = make_ranks_rig(), prompts(COUNT)
    rig.engines[broken].grammars._compile = _cannot_compile
    refused, other = rig.run(
        rig.job("refused", batch[0], constraint=Constraint("regex", "yes")), rig.job("other", batch[1])
    )
    assert refused.error.reason == "CONSTRAINT_FAILED"
    assert other.token_ids == expected[1].token_ids
    rig.close()


@pytest.mark.parametrize("late", [0, 1])
def test_a_job_that_is_cancelled_while_one_rank_compiles_ends_on_both(late):
    rig = make_ranks_rig()
    gate = _gate_grammars(rig, late)
    rig.engine.submit(rig.job("left", prompts(1)[0], constraint=Constraint("regex", "yes")))
    rig.engine.step()
    rig.engine.cancel("left")
    assert [output.finish for output in rig.engine.step().outputs] == [FinishReason.CANCELLED]
    gate.set()
    rig.assert_nothing_leaked()
    assert [len(engine._anteroom) for engine in rig.engines] == [0, 0]
    rig.close()


def _cannot_compile(constraint):
    raise MemoryError("no room for its states")


def test_a_deadline_is_that_of_rank_0s_clock():
    rig = make_ranks_rig()
    late = rig.job("late", prompts(1)[0], max_tokens=500, ignore_eos=True, deadline=rig.clock() + 0.5)
    [answer] = rig.run(late)
    assert answer.finish is FinishReason.DEADLINE
    rig.close()


def test_sampled_answers_are_those_of_one_rank():
    options = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 24}
    batch = prompts(8, seed=3)
    one, two = make_rig(), make_ranks_rig()
    wanted = one.run(*(one.job(i, prompt, seed=i, **options) for i, prompt in enumerate(batch)))
    found = two.run(*(two.job(i, prompt, seed=i, **options) for i, prompt in enumerate(batch)))
    same = [mine.token_ids == theirs.token_ids for mine, theirs in zip(found, wanted, strict=True)]
    assert sum(same) >= len(same) - 1, "a draw may fall between two floats once, not twice"
    one.close()
    two.close()


# --- operators' orders ---


def test_a_clear_reaches_every_rank():
    rig, batch = make_ranks_rig(host_blocks=100), prompts(4)
    jobs = [rig.job(i, prompt) for i, prompt in enumerate(batch)]
    rig.run(*jobs)
    held = [len(store.snapshot()) for store in rig.stores]
    assert min(held) > 0
    dropped = rig.engine.cache.clear()
    assert dropped[TierName.DEVICE] > 0
    assert [store.snapshot() for store in rig.stores] == [[], []]
    [answer] = rig.run(rig.job("cold", batch[3]))
    assert _cached(answer) == 0
    prefix = jobs[3].block_hashes[1]
    rig.engine.cache.clear(prefix=prefix)
    assert [store.device.holds(prefix) for store in rig.stores] == [False, False]
    assert [store.device.holds(jobs[3].block_hashes[0]) for store in rig.stores] == [True, True]
    rig.close()


@pytest.mark.skipif(find_redis_server() is None, reason="no redis-server was found")
def test_the_shared_tier_is_cleared_of_every_ranks_share():
    batch = prompts(4)
    with PrivateRedis() as server:
        rig = make_ranks_rig(host_blocks=100, redis_url=server.url)
        rig.run(*(rig.job(i, prompt, max_tokens=1) for i, prompt in enumerate(batch)))
        for store in rig.stores:
            assert store.flush(10)
        client = redis.Redis.from_url(server.url)
        assert len(client.keys("warmkv:*")) > 10
        own = rig.stores[1].clear_shared

        def slow(**what):
            time.sleep(0.5)
            return own(**what)

        rig.stores[1].clear_shared = slow
        rig.engine.cache.clear()
        assert _clear_shared(rig)[TierName.REDIS] > 0
        assert client.keys("warmkv:*") == []

        rig.run(*(rig.job(("again", i), prompt, max_tokens=1) for i, prompt in enumerate(batch)))
        rig.stores[1].clear_shared = _cannot
        with pytest.raises(TierError, match="another rank"):
            _clear_shared(rig)
        client.close()
        rig.close()


def _cannot(**_what):
    raise TierError("the server is gone; look for it")


def _clear_shared(rig) -> dict[TierName, int]:
    """As the engine's thread and that for clears do it."""
    clearing = rig.engine.cache.shared_clearing()
    assert rig.engines[0]._scheduler.reads.shared is False
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(clearing)
        while not found.done():
            rig.engine.step()
    rig.engine.cache.shared_cleared()
    rig.settle()
    assert [engine._scheduler.reads.shared for engine in rig.engines] == [True, True]
    return found.result()


def test_blocks_are_pinned_warmed_and_audited_on_every_rank():
    rig, prompt = make_ranks_rig(host_blocks=100), prompts(5)[4]
    job = rig.job(0, prompt)
    rig.run(job)
    _lose(rig.stores[1], job.block_hashes[6:])
    assert rig.engine.cache.lease(job.block_hashes, None) == {TierName.HOST: 6}
    assert [store.host.stats().leased for store in rig.stores] == [8, 6]
    assert rig.engine.cache.end_leases(job.block_hashes)[TierName.HOST] == 8
    assert rig.engine.cache.prefetch(job.block_hashes, root=job.root, lifetime=None) == 0
    rig.engine.cache.check()
    rig.stores[1].device._refs[0] += 1
    with pytest.raises(InvariantError, match="rank 1: "):
        rig.engine.cache.check()
    rig.stores[1].device._refs[0] -= 1
    rig.engine.cache.check()
    rig.close()


def test_shared_reads_are_switched_on_every_rank():
    rig = make_ranks_rig()
    rig.engine.cache.set_shared_reads(enabled=False)
    rig.settle()
    assert [engine._scheduler.reads.shared for engine in rig.engines] == [False, False]
    rig.close()


# --- any schedule ---

_STEP = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 9), st.integers(1, 12), st.integers(0, 2)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("lose"), st.integers(0, 1), st.randoms(use_true_random=False)),
    st.tuples(st.just("steps"), st.integers(1, 6)),
    st.tuples(st.just("clear"), st.none()),
)


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(st.lists(_STEP, min_size=5, max_size=30), st.integers(14, 40))
def test_any_schedule_is_the_same_on_both_ranks_and_its_answers_are_right(script, device_blocks):
    rig = make_ranks_rig(device_blocks=device_blocks, host_blocks=20, max_running=4, max_batch_tokens=64)
    answers, asked = {}, {}
    batch = prompts(10)
    for action, *arguments in script:
        if action == "submit":
            which, max_tokens, priority = arguments
            name = len(asked)
            asked[name] = (which, max_tokens)
            rig.engine.submit(rig.job(name, batch[which], max_tokens=max_tokens, priority=priority))
        elif action == "cancel":
            rig.engine.cancel(arguments[0])
        elif action == "lose":
            _lose_some(rig.stores[arguments[0]], arguments[1])
        elif action == "clear":
            rig.engine.cache.clear()
        else:
            for _ in range(arguments[0]):
                _take(rig.engine.step().outputs, answers)
    for _ in range(10_000):
        if not rig.engine.has_work():
            break
        _take(rig.engine.step().outputs, answers)
    rig.assert_nothing_leaked()
    wanted = _expected_ten()
    for name, (which, max_tokens) in asked.items():
        outputs = answers[name]
        tokens = [token for output in outputs for token in output.token_ids]
        assert outputs[-1].finish is not None
        assert tokens == wanted[which].token_ids[: len(tokens)] or wanted[which].near_tie(0)
        if outputs[-1].finish is FinishReason.LENGTH:
            assert len(tokens) == max_tokens
    rig.close()


_TEN = []


def _expected_ten():
    if not _TEN:
        _TEN.extend(oracle().generate(prompts(10), max_tokens=12))
    return _TEN


def _lose_some(store, draw: random.Random) -> None:
    names = [meta.hash for meta in store.device.metas()]
    store.device.remove([name for name in names if draw.random() < 0.4], RemovalCause.EVICTED)
    if store.host is not None:
        kept = [name for name in names if store.host.holds(name) and draw.random() < 0.4]
        store.host.remove(kept, RemovalCause.EVICTED)


def _take(outputs, answers) -> None:
    for output in outputs:
        answers.setdefault(output.job_id, []).append(output)


def test_ranks_that_part_end_the_worker_and_never_mix():
    rig = make_ranks_rig()
    rig.run(rig.job(0, prompts(1)[0], max_tokens=2))
    rig.engines[1].submit(rig.job("only here", prompts(1)[0]))
    with pytest.raises(RankLost, match="defect"):
        rig.engine.step()
    with pytest.raises(RankLost):
        rig.engine.step()
    deadline = time.monotonic() + 10
    while rig.follower.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not rig.follower.is_alive()
    assert "defect" in str(rig.failures[0])
    rig.engine.close(flush_s=0)
    rig.engines[1].close(flush_s=0)


def test_a_forward_fails_on_one_rank_and_the_worker_ends(monkeypatch: pytest.MonkeyPatch):
    rig = make_ranks_rig()
    rig.run(rig.job(0, prompts(1)[0], max_tokens=2))

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rig.engines[0].runner, "forward", fail)
    rig.engine.submit(rig.job(1, prompts(1)[0], max_tokens=2))
    with pytest.raises(RankLost, match="rank 0 of 2 could not compute a step: out of memory"):
        rig.engine.step()
    rig.engine.close(flush_s=0)
    rig.follower.join(SOON_S)  # it waited for a tensor that never comes
    assert not rig.follower.is_alive()
    assert "adding up" in str(rig.failures[0])
