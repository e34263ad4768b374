"""Prices in milliseconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.events import TierName
from router.cost import (
    DEFAULT_FIT,
    NO_LOAD,
    PrefillFit,
    TierRead,
    WorkerLoad,
    lacked_blocks,
    pool_fits,
    price,
    queue_ms,
    room_ms,
)
from router.index import NO_OVERLAP, Overlap
from router.traffic import Unreported

FIT = PrefillFit(10.0, 0.1, 0.0001)
READS = {TierName.HOST: TierRead(0.1, 0.05), TierName.DISK: TierRead(1.0, 0.2), TierName.REDIS: TierRead(2.0, 0.5)}


def cost_of(overlap: Overlap, tokens: int = 1600, *, shared_reads: bool = True, load: WorkerLoad | None = None):
    return price(overlap, tokens, 16, load or WorkerLoad(reads=READS), FIT, queue=3.0, shared_reads=shared_reads)


def test_prefill_is_charged_for_new_tokens_after_cached_ones() -> None:
    assert FIT.ms(100, 300) == pytest.approx(10 + 10 + 0.0001 * 100 * 350)


def test_a_cold_prompt_costs_its_computing() -> None:
    cold = cost_of(NO_OVERLAP)
    assert (cold.load_ms, cold.compute_ms, cold.cached_tokens) == (0.0, FIT.ms(1600), 0)
    assert cold.cold_ms == cold.compute_ms


def test_tiers_are_read_where_that_beats_computing() -> None:
    warm = cost_of(Overlap(20, 40, 60, 80))
    assert warm.cached == {TierName.DEVICE: 320, TierName.HOST: 320, TierName.DISK: 320, TierName.REDIS: 320}
    assert warm.load_ms == pytest.approx((0.1 + 20 * 0.05) + (1.0 + 20 * 0.2) + (2.0 + 20 * 0.5))
    assert warm.compute_ms == pytest.approx(FIT.ms(320, 1280))


def test_a_tier_that_is_slower_than_computing_is_left_alone() -> None:
    slow = WorkerLoad(reads={TierName.REDIS: TierRead(5.0, 50.0)})
    assert cost_of(Overlap(10, 10, 10, 90), load=slow).cached_tokens == 160


def test_a_tier_that_cannot_be_read_gives_nothing() -> None:
    assert cost_of(Overlap(10, 50, 50, 50), load=WorkerLoad(reads={})).cached_tokens == 160


def test_the_shared_tier_counts_only_while_its_reads_are_on() -> None:
    assert cost_of(Overlap(0, 0, 0, 50), shared_reads=False).cached_tokens == 0
    assert cost_of(Overlap(0, 0, 0, 50)).cached_tokens == 800


def test_one_token_is_always_computed() -> None:
    full = cost_of(Overlap(100, 100, 100, 100))
    assert full.cached_tokens == 1599
    assert full.compute_ms == pytest.approx(FIT.ms(1, 1599))


def queue_of(load: WorkerLoad = NO_LOAD, *, age_ms: float = 0.0, **sent: float) -> float:
    """Of a report that is so old, at 100 s on the clock."""
    unreported = Unreported(**sent)  # type: ignore[arg-type]
    return queue_ms(load, FIT, unreported, now=100.0, reported_at=100.0 - age_ms / 1000.0)


def test_a_reported_backlog_shrinks_with_time_but_not_to_nothing() -> None:
    load = WorkerLoad(pending_tokens=1000, waiting=2)
    assert queue_of(load) == pytest.approx(120)
    assert queue_of(load, age_ms=50) == pytest.approx(70)
    assert queue_of(load, age_ms=10_000) == pytest.approx(24)


def test_what_was_sent_and_not_reported_waits_behind_the_backlog() -> None:
    load = WorkerLoad(pending_tokens=1000)
    assert queue_of(ms=33.0, ends_at=100.033) == pytest.approx(33.0)
    assert queue_of(load, ms=33.0, ends_at=100.033) == pytest.approx(133.0)
    assert queue_of(load, age_ms=50, ms=33.0, ends_at=100.0) == pytest.approx(83.0)


def test_work_that_an_idle_worker_has_had_time_for_is_no_queue() -> None:
    assert queue_of(age_ms=15, ms=5.0, ends_at=99.995) == 0.0
    assert queue_of(age_ms=15, ms=20.0, ends_at=100.005) == pytest.approx(5.0)


def test_later_work_is_not_forgotten_when_the_backlog_is_thought_done() -> None:
    load = WorkerLoad(pending_tokens=1000)
    assert queue_of(load, age_ms=10_000, ms=70.0, ends_at=100.07) == pytest.approx(70.0)


def test_a_full_pool_is_waited_for_until_enough_answers_have_ended() -> None:
    load = WorkerLoad(pool_blocks=100, answer_blocks=20, running=4, answer_ms=1000.0, freed_blocks=30.0)
    assert room_ms(load, lacked_blocks(load, 80), 4) == 0.0
    assert room_ms(load, lacked_blocks(load, 81), 4) == pytest.approx(250)
    assert room_ms(load, lacked_blocks(load, 110), 4) == pytest.approx(250)
    assert room_ms(load, lacked_blocks(load, 111), 4) == pytest.approx(500)


def test_a_full_batch_is_waited_for() -> None:
    load = WorkerLoad(slots=4, running=4, answer_ms=1000.0)
    assert [room_ms(load, 0, requests) for requests in (3, 4, 6)] == [0.0, 250.0, 750.0]


def test_nobody_waits_for_room_at_a_worker_that_tells_nothing_of_it() -> None:
    assert lacked_blocks(WorkerLoad(pool_blocks=100), 500) == 0  # no answer has ended yet
    assert lacked_blocks(WorkerLoad(answer_ms=1000.0), 500) == 0
    assert room_ms(WorkerLoad(answer_ms=1000.0), 0, 500) == 0.0


def test_prompts_before_are_computed_while_one_waits_for_room() -> None:
    load = WorkerLoad(pending_tokens=1000, decoding=1, decode_step_ms=8.0)
    waits = [
        queue_ms(load, FIT, Unreported(), now=100.0, reported_at=100.0, room=room_of) for room_of in (0.0, 60.0, 250.0)
    ]
    assert waits == pytest.approx([108, 108, 258])


def test_fits_that_differ_by_noise_are_pooled_and_slow_machines_keep_their_own() -> None:
    slow = PrefillFit(10, 1.0)
    fits = pool_fits(
        {"a": PrefillFit(10, 0.10), "b": PrefillFit(10, 0.12), "c": slow, "d": None, "e": PrefillFit(9, 0.11)}
    )
    assert fits["a"] == fits["b"] == fits["d"] == fits["e"]
    assert fits["c"] == slow
    assert pool_fits({"a": None}) == {"a": DEFAULT_FIT}


overlaps = st.lists(st.integers(0, 60), min_size=4, max_size=4).map(lambda depths: Overlap(*sorted(depths)))


@given(overlaps, st.integers(1, 1000), st.booleans())
def test_knowing_more_blocks_never_costs_more_and_tokens_add_up(
    overlap: Overlap, tokens: int, shared_reads: bool
) -> None:
    blocks = tokens // 16
    overlap = Overlap(*(min(depth, blocks) for depth in overlap))
    priced, cold = cost_of(overlap, tokens, shared_reads=shared_reads), cost_of(NO_OVERLAP, tokens)
    assert priced.load_ms + priced.compute_ms <= cold.compute_ms + 1e-9
    assert 0 <= priced.cached_tokens == sum(priced.cached.values()) < tokens
    assert all(count >= 0 for count in priced.cached.values())
    assert priced.ttft_ms == pytest.approx(priced.queue_ms + priced.load_ms + priced.compute_ms)


# Blocks of other workers.

PEER = TierName.PEER
WITH_PEER = WorkerLoad(reads={**READS, PEER: TierRead(1.5, 0.3)})


def with_peers(overlap: Overlap, peers: int, load: WorkerLoad = WITH_PEER, *, shared_reads: bool = True):
    return price(overlap, 1600, 16, load, FIT, queue=3.0, shared_reads=shared_reads, peers=peers)


def test_a_peer_gives_what_the_worker_has_not_at_hand() -> None:
    warm = with_peers(Overlap(20, 40, 40, 40), 60)
    assert warm.cached == {TierName.DEVICE: 320, TierName.HOST: 320, PEER: 320}
    assert warm.load_ms == pytest.approx((0.1 + 20 * 0.05) + (1.5 + 20 * 0.3))
    assert warm.compute_ms == pytest.approx(FIT.ms(640, 960))


def test_a_peer_is_not_counted_on_before_it_was_measured() -> None:
    assert with_peers(Overlap(20, 40, 40, 40), 60, WorkerLoad(reads=READS)) == cost_of(Overlap(20, 40, 40, 40))


def test_the_cheaper_one_of_peer_and_disk_and_redis_is_counted_on() -> None:
    fast, slow = TierRead(0.1, 0.01), TierRead(9.0, 0.9)
    all_hold = Overlap(0, 0, 50, 50)
    assert with_peers(all_hold, 50, WorkerLoad(reads={**READS, PEER: fast})).cached == {TierName.DEVICE: 0, PEER: 800}
    of_disk = with_peers(all_hold, 50, WorkerLoad(reads={**READS, PEER: slow}))
    assert of_disk.cached == {TierName.DEVICE: 0, TierName.DISK: 800}
    deeper = with_peers(all_hold, 60, WorkerLoad(reads={**READS, PEER: TierRead(1.5, 0.3)}))
    assert deeper.cached == {TierName.DEVICE: 0, TierName.DISK: 800, PEER: 160}
    on_redis = Overlap(0, 0, 0, 50)
    assert with_peers(on_redis, 50).cached == {TierName.DEVICE: 0, PEER: 800}
    assert with_peers(on_redis, 50, WorkerLoad(reads={**READS, PEER: slow})).cached[TierName.REDIS] == 800
    assert with_peers(Overlap(0, 0, 0, 80), 50).cached == {TierName.DEVICE: 0, PEER: 800, TierName.REDIS: 480}


def test_the_switch_of_the_shared_tier_is_none_of_peers() -> None:
    assert with_peers(Overlap(0, 0, 0, 80), 50, shared_reads=False).cached == {TierName.DEVICE: 0, PEER: 800}


@given(overlaps, st.integers(0, 60), st.floats(0.0, 20.0), st.floats(0.0, 2.0), st.booleans())
def test_a_peer_never_costs_more_than_none(
    overlap: Overlap, peers: int, latency_ms: float, block_ms: float, shared_reads: bool
) -> None:
    load = WorkerLoad(reads={**READS, PEER: TierRead(latency_ms, block_ms)})
    priced = with_peers(overlap, peers, load, shared_reads=shared_reads)
    alone = with_peers(overlap, 0, load, shared_reads=shared_reads)
    assert priced.ttft_ms <= alone.ttft_ms + 1e-9
    assert priced.cached_tokens == sum(priced.cached.values())
    assert priced.cached.get(PEER, 0) <= max(0, peers - overlap.host) * 16
    deepest = max(overlap.shared if shared_reads else overlap.disk, peers)
    assert priced.cached_tokens <= deepest * 16
