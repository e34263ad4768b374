"""The index's memory: never above its bound, never a wrong claim for it, and counted as the process feels it."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from itertools import pairwise

import pytest

from kvstore.events import BlockRemoved, BlockStored, RemovalCause, TierName
from router.holders import HolderSets
from router.index import Overlap, PrefixIndex
from router.run import Run
from router.runs import LEAST_BYTES, Runs
from router.tombstones import Tombstones
from tests.router.test_index import Clock, joined

DEVICE, HOST, REDIS = TierName.DEVICE, TierName.HOST, TierName.REDIS


def new_chain(rng: random.Random, blocks: int) -> tuple[bytes, ...]:
    return tuple(rng.randbytes(16) for _ in range(blocks))


@pytest.fixture
def index() -> PrefixIndex:
    index = PrefixIndex(Clock(), limit_bytes=LEAST_BYTES)
    joined(index, "a")
    joined(index, "b")
    return index


def fill(index: PrefixIndex, rng: random.Random, blocks: int) -> None:
    for _ in range(blocks // 50):
        index.apply("b", 1, [BlockStored(DEVICE, new_chain(rng, 50))])


def test_too_little_memory_is_refused_with_what_to_give() -> None:
    with pytest.raises(ValueError, match=f"give it at least {LEAST_BYTES}"):
        PrefixIndex(Clock(), limit_bytes=LEAST_BYTES - 1)


def test_unique_prompts_stay_within_the_bound_after_every_event(index: PrefixIndex) -> None:
    rng = random.Random(1)
    kept = []
    for number in range(1000):
        chain = new_chain(rng, 62)
        index.apply("ab"[number % 2], 1, [BlockStored(DEVICE, chain)])
        assert index.nbytes <= index.limit_bytes
        assert index.match(chain)["ab"[number % 2]].device == 62
        kept.append(chain)
    assert index.nbytes > 0.9 * index.limit_bytes
    assert index.evicted_blocks == 1000 * 62 - len(index)
    assert index.gone(kept[0][0]) is None, "it was forgotten; whether it is gone is not known"
    index.check()


def test_what_was_placed_longest_ago_is_forgotten_first(index: PrefixIndex) -> None:
    rng = random.Random(2)
    used, unused = new_chain(rng, 700), new_chain(rng, 700)
    for chain in (used, unused):
        index.apply("a", 1, [BlockStored(DEVICE, chain)])
    for _ in range(12):
        fill(index, rng, 5000)
        index.placed(used)
    assert index.evicted_blocks > 30_000
    assert index.match(used)["a"].device == 700
    assert index.match(unused)["a"].device == 0


def test_a_chain_that_grows_is_not_forgotten_from_its_head(index: PrefixIndex) -> None:
    rng = random.Random(3)
    chain = new_chain(rng, 4000)
    for at in range(0, 4000, 50):
        index.apply("a", 1, [BlockStored(DEVICE, chain[at : at + 50], chain[at - 1] if at else None)])
        fill(index, rng, 500)
        assert index.match(chain)["a"].device == at + 50


@pytest.mark.parametrize("seed", range(2))
def test_an_index_that_forgets_only_underestimates(index: PrefixIndex, seed: int) -> None:
    rng = random.Random(seed)
    chains = [new_chain(rng, 300) for _ in range(150)]
    holds: dict[tuple[str, TierName], set[bytes]] = {(w, t): set() for w in "ab" for t in (DEVICE, HOST)}
    for _ in range(1200):
        chain, worker, tier = rng.choice(chains), rng.choice("ab"), rng.choice((DEVICE, HOST))
        at = rng.randrange(300)
        part = chain[at : at + rng.choice((1, 40, 300))]
        if rng.random() < 0.7:
            index.apply(worker, 1, [BlockStored(tier, part, chain[at - 1] if at else None)])
            holds[worker, tier] |= set(part)
        else:
            index.apply(worker, 1, [BlockRemoved(tier, part, RemovalCause.EVICTED)])
            holds[worker, tier] -= set(part)
        assert index.nbytes <= index.limit_bytes
        for name, found in index.match(chain).items():
            device, host = holds[name, DEVICE], holds[name, HOST]
            assert all(block in device for block in chain[: found.device])
            assert all(block in device or block in host for block in chain[: found.host])
    assert index.evicted_blocks > 0
    index.check()


def test_tombstones_count_into_the_bound(index: PrefixIndex) -> None:
    rng = random.Random(5)
    empty = index.nbytes
    for _ in range(200):
        chain = new_chain(rng, 50)
        index.apply("a", 1, [BlockStored(DEVICE, chain), BlockRemoved(DEVICE, chain, RemovalCause.EVICTED)])
    assert len(index) == 0
    assert 0.04 * index.limit_bytes < index.nbytes - empty < 0.08 * index.limit_bytes
    index.check()


def test_lives_take_memory_by_the_set_and_not_by_the_block() -> None:
    clock = Clock()
    index = PrefixIndex(clock, limit_bytes=64 << 20)
    joined(index, "a")
    rng = random.Random(6)
    plain, mortal = (new_chain(rng, 20_000) for _ in range(2))
    sizes = [index.nbytes]
    for chain, ttl in ((plain, None), (mortal, 3600.0)):
        for at in range(0, 20_000, 50):
            clock.now += 0.01
            index.apply("a", 1, [BlockStored(REDIS, chain[at : at + 50], chain[at - 1] if at else None, ttl)])
        sizes.append(index.nbytes)
    without, within = (after - before for before, after in pairwise(sizes))
    assert within < 1.3 * without
    assert index.match(mortal)["a"] == Overlap(0, 0, 0, 20_000)
    clock.now += 3600.0
    assert index.match(mortal)["a"] == Overlap(0, 0, 0, 0)
    assert index.shared_blocks() == 20_000


def test_a_sweep_goes_on_where_runs_are_cut_meanwhile() -> None:
    index = PrefixIndex(Clock(), limit_bytes=64 << 20)
    joined(index, "a")
    joined(index, "b")
    rng = random.Random(7)
    chains = [new_chain(rng, 100) for _ in range(50)]
    for chain in chains:
        index.apply("a", 1, [BlockStored(DEVICE, chain)])
    index.drop("a")
    for chain in chains:
        index.apply("b", 1, [BlockStored(DEVICE, chain[10:60])])
        index.sweep(30)
    while index.sweep(100):
        index.check()
    assert len(index) == 50 * 50


_FILL = """
import gc, sys
from bench.router_index import fill
found = fill(6000, 32 << 20)
print(found["rss_ratio"], found["counted_ratio"], found["blocks"])
"""


def test_the_process_grows_by_what_is_counted() -> None:
    done = subprocess.run([sys.executable, "-c", _FILL], capture_output=True, text=True, check=True)
    rss, counted, blocks = map(float, done.stdout.split())
    assert 0.9 < counted <= 1.0
    assert 0.75 < rss < 1.25, "bytes of an entry differ from those in router/run_table.py; measure them again"
    assert blocks > 190_000


def test_an_index_at_its_bound_makes_no_objects_that_a_collection_would_have_to_look_at(index: PrefixIndex) -> None:
    rng = random.Random(8)
    fill(index, rng, 60_000)
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()  # what is made from here on stays young
    try:
        fill(index, rng, 20_000)
        young = sum(isinstance(each, Run) for each in gc.get_objects(generation=0))
    finally:
        if was_on:
            gc.enable()
    assert index.evicted_blocks > 40_000
    assert young < 10, "each of 400 events made a run and freed another"


def test_runs_that_live_are_settled_by_the_thousand() -> None:
    calls: list[int] = []
    index = PrefixIndex(Clock(), limit_bytes=64 << 20, settle=lambda: calls.append(index.runs if calls else 0))
    joined(index, "a")
    rng = random.Random(9)
    assert calls == [0], "what was there before the index is"
    for _ in range(5000):
        index.apply("a", 1, [BlockStored(DEVICE, new_chain(rng, 1))])
    index.snapshot("a", 1, [BlockStored(DEVICE, new_chain(rng, 1)) for _ in range(5000)])
    assert calls == [0, 4096, 10_000]


def test_of_a_chain_told_at_once_the_head_is_forgotten_last(index: PrefixIndex) -> None:
    rng = random.Random(10)
    chain = new_chain(rng, 2000)
    index.apply("a", 1, [BlockStored(DEVICE, chain)])
    held = 2000
    while held:
        fill(index, rng, 50)
        held = sum(map(index.held, chain))
        assert index.match(chain)["a"].device == held


def test_what_others_take_of_the_memory_is_made_room_for_at_once() -> None:
    sets = HolderSets()
    runs = Runs(sets, Tombstones(10), limit=LEAST_BYTES)
    rng = random.Random(11)
    for _ in range(1000):
        runs.store(new_chain(rng, 50), None, lambda _: sets.get(1 << 4))
    runs.aside = LEAST_BYTES // 2
    runs.store(new_chain(rng, 50), None, lambda _: sets.get(1 << 4))
    assert 0.9 * LEAST_BYTES < runs.nbytes <= LEAST_BYTES
