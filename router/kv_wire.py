"""From a worker's messages to the router's plain data. Pure. Covers: K/V events, snapshots, load reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from struct import Struct

from kvstore.blocks import SHORT_HASH_BYTES
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from router.cost import PrefillFit, TierRead, WorkerLoad
from warmkv.v1 import common_pb2, kv_events_pb2, worker_pb2

# Tier `peer` is a way to read, not a place: nobody owns blocks there, and no event tells of it.
_TIERS = {
    common_pb2.TIER_DEVICE: TierName.DEVICE,
    common_pb2.TIER_HOST: TierName.HOST,
    common_pb2.TIER_DISK: TierName.DISK,
    common_pb2.TIER_REDIS: TierName.REDIS,
}
_READABLE = {**_TIERS, common_pb2.TIER_PEER: TierName.PEER}
_CAUSES = {
    kv_events_pb2.REMOVAL_CAUSE_EVICTED: RemovalCause.EVICTED,
    kv_events_pb2.REMOVAL_CAUSE_EXPIRED: RemovalCause.EXPIRED,
    kv_events_pb2.REMOVAL_CAUSE_CLEARED: RemovalCause.CLEARED,
    kv_events_pb2.REMOVAL_CAUSE_INVALID: RemovalCause.INVALID,
    kv_events_pb2.REMOVAL_CAUSE_ABSENT: RemovalCause.ABSENT,
}
_TOGETHER = 256  # names
_FATES = ("computed", "device", "host", "disk", "redis", "peer")


def events(wire: Iterable[kv_events_pb2.KvEvent]) -> Iterator[KvEvent]:
    """K/V events in order; those of tiers that this version does not know are left out."""
    for event in wire:
        match event.WhichOneof("kind"):
            case "stored":
                yield from stored((event.stored,))
            case "removed":
                if tier := _TIERS.get(event.removed.tier):
                    cause = _CAUSES.get(event.removed.cause, RemovalCause.EVICTED)
                    yield BlockRemoved(tier, short_hashes(event.removed.hashes), cause)
            case "cleared":
                if tier := _TIERS.get(event.cleared.tier):
                    yield AllBlocksCleared(tier)


def stored(wire: Iterable[kv_events_pb2.BlockStored]) -> Iterator[BlockStored]:
    """Stored blocks, of a step or of a snapshot."""
    for event in wire:
        if tier := _TIERS.get(event.tier):
            ttl_s = event.ttl_ms / 1000.0 if event.ttl_ms else None
            yield BlockStored(tier, short_hashes(event.hashes), event.parent or None, ttl_s)


def worker_load(load: worker_pb2.Load, block_nbytes: int = 0) -> WorkerLoad:
    """What decisions read of a report. `block_nbytes`: of one block, as the worker's greeting says; zero: not known."""
    return WorkerLoad(
        fit=prefill_fit(load),
        reads=tier_reads(load),
        pending_tokens=load.pending_prefill_tokens,
        waiting=load.waiting,
        running=load.running,
        decoding=load.decoding,
        decode_step_ms=load.decode_step_ms,
        prefill_share=load.prefill_share if load.HasField("prefill_share") else None,
        pool_blocks=_pool_bytes(load) // block_nbytes if block_nbytes else 0,
        answer_blocks=load.answer_blocks,
        slots=load.slots,
        answer_ms=load.answer_ms,
        freed_blocks=load.freed_blocks,
    )


def prefill_fit(load: worker_pb2.Load) -> PrefillFit | None:
    """The worker's fit; None before it measured one."""
    if load.prefill_token_ms <= 0 and load.prefill_pair_ms <= 0:
        return None
    return PrefillFit(load.prefill_fixed_ms, load.prefill_token_ms, load.prefill_pair_ms)


def tier_reads(load: worker_pb2.Load) -> dict[TierName, TierRead]:
    """What reading costs, of the tiers that work; from other workers only once blocks came from there."""
    return {
        _READABLE[tier.tier]: TierRead(tier.read_latency_ms, max(0.0, tier.read_block_ms - tier.read_latency_ms))
        for tier in load.tiers
        if tier.healthy and tier.tier in _READABLE and (tier.tier != common_pb2.TIER_PEER or tier.hits)
    }


def fates(wire: common_pb2.TokensByFate) -> dict[str, int]:
    """Tokens by fate."""
    return {fate: getattr(wire, fate) for fate in _FATES}


def short_hashes(hashes: bytes) -> tuple[bytes, ...]:
    """Of 16 bytes each, joined. What is left at the end and is no whole name names nothing."""
    count = len(hashes) // SHORT_HASH_BYTES
    if count <= _TOGETHER:
        return _names(count).unpack_from(hashes)
    starts = range(0, count * SHORT_HASH_BYTES, _TOGETHER * SHORT_HASH_BYTES)
    return tuple(name for at in starts for name in short_hashes(hashes[at : at + _TOGETHER * SHORT_HASH_BYTES]))


@lru_cache(maxsize=_TOGETHER + 1)
def _names(count: int) -> Struct:
    """So many names, cut in one call: a quarter of what slices cost."""
    return Struct(f"{SHORT_HASH_BYTES}s" * count)


def _pool_bytes(load: worker_pb2.Load) -> int:
    return next((tier.capacity_bytes for tier in load.tiers if tier.tier == common_pb2.TIER_DEVICE), 0)
