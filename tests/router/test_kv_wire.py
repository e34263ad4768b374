from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, RemovalCause, TierName
from router import kv_wire
from router.cost import PrefillFit, TierRead
from warmkv.v1 import common_pb2, kv_events_pb2, worker_pb2

A, B = b"a" * 16, b"b" * 16


def test_events_keep_order_tier_cause_and_ttl() -> None:
    wire = [
        kv_events_pb2.KvEvent(
            stored=kv_events_pb2.BlockStored(tier=common_pb2.TIER_REDIS, hashes=A + B, parent=B, ttl_ms=1500)
        ),
        kv_events_pb2.KvEvent(
            removed=kv_events_pb2.BlockRemoved(
                tier=common_pb2.TIER_HOST, hashes=A, cause=kv_events_pb2.REMOVAL_CAUSE_EXPIRED
            )
        ),
        kv_events_pb2.KvEvent(cleared=kv_events_pb2.AllBlocksCleared(tier=common_pb2.TIER_DEVICE)),
    ]
    assert list(kv_wire.events(wire)) == [
        BlockStored(TierName.REDIS, (A, B), B, 1.5),
        BlockRemoved(TierName.HOST, (A,), RemovalCause.EXPIRED),
        AllBlocksCleared(TierName.DEVICE),
    ]


def test_tiers_that_own_no_blocks_are_left_out() -> None:
    peer = kv_events_pb2.BlockStored(tier=common_pb2.TIER_PEER, hashes=A)
    assert list(kv_wire.events([kv_events_pb2.KvEvent(stored=peer), kv_events_pb2.KvEvent()])) == []


def test_a_report_without_a_fit_has_none_and_broken_tiers_cannot_be_read() -> None:
    tiers = [
        worker_pb2.TierLoad(tier=common_pb2.TIER_HOST, healthy=True, read_latency_ms=0.25, read_block_ms=1.0),
        worker_pb2.TierLoad(tier=common_pb2.TIER_REDIS, healthy=False, read_latency_ms=1, read_block_ms=2),
    ]
    load = kv_wire.worker_load(worker_pb2.Load(tiers=tiers, waiting=2, pending_prefill_tokens=7))
    assert load.fit is None
    assert load.reads == {TierName.HOST: TierRead(0.25, 0.75)}
    assert (load.waiting, load.pending_tokens) == (2, 7)
    fitted = kv_wire.worker_load(worker_pb2.Load(prefill_fixed_ms=1, prefill_token_ms=2, prefill_pair_ms=3))
    assert fitted.fit == PrefillFit(1, 2, 3)


def test_a_report_tells_what_room_there_is() -> None:
    device = worker_pb2.TierLoad(tier=common_pb2.TIER_DEVICE, capacity_bytes=4000)
    told = worker_pb2.Load(tiers=[device], answer_blocks=3, slots=8, answer_ms=1500.0, freed_blocks=2.5)
    load = kv_wire.worker_load(told, block_nbytes=40)
    assert (load.pool_blocks, load.answer_blocks, load.slots, load.answer_ms, load.freed_blocks) == (
        100,
        3,
        8,
        1500,
        2.5,
    )


def test_reading_from_other_workers_has_a_price_once_blocks_came_from_there() -> None:
    peer = worker_pb2.TierLoad(tier=common_pb2.TIER_PEER, healthy=True, read_latency_ms=1.0, read_block_ms=3.0)
    assert kv_wire.worker_load(worker_pb2.Load(tiers=[peer])).reads == {}, "a peer that failed was measured, too"
    peer.hits = 4
    assert kv_wire.worker_load(worker_pb2.Load(tiers=[peer])).reads == {TierName.PEER: TierRead(1.0, 2.0)}
    peer.healthy = False
    assert kv_wire.worker_load(worker_pb2.Load(tiers=[peer])).reads == {}


@given(st.one_of(st.integers(0, 70), st.integers(250, 260), st.integers(500, 800)), st.integers(0, 15))
def test_names_are_cut_in_order_and_what_is_no_whole_name_is_left_out(count: int, rest: int) -> None:
    names = tuple(number.to_bytes(16, "big") for number in range(count))
    event = kv_events_pb2.BlockStored(tier=common_pb2.TIER_DEVICE, hashes=b"".join(names) + b"x" * rest)
    assert [each.hashes for each in kv_wire.stored([event])] == [names]
