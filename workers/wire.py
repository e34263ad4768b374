"""Between the wire's messages and the engine's plain data. Pure.

Covers: what a worker says in `WorkerService.Connect`. Does not cover: jobs, which it is told (`job_wire`), operators'
orders (`cache_wire`), when messages are sent (`outbox`, `streams`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from google.protobuf.message import Message

from kvstore.blocks import SHORT_HASH_BYTES
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.tier import TierStats
from warmkv import versions
from warmkv.v1 import common_pb2, kv_events_pb2, worker_pb2
from workers.protocol import (
    EngineInfo,
    FinishReason,
    Load,
    Output,
    TokenLogprob,
)
from workers.roles import Role

# A law of the stream is at most 1 MiB; smaller pieces let tokens pass between them sooner.
SNAPSHOT_PIECE_BYTES = 256 << 10

TIERS = {
    TierName.DEVICE: common_pb2.TIER_DEVICE,
    TierName.HOST: common_pb2.TIER_HOST,
    TierName.DISK: common_pb2.TIER_DISK,
    TierName.REDIS: common_pb2.TIER_REDIS,
    TierName.PEER: common_pb2.TIER_PEER,
}
_CAUSES = {
    RemovalCause.EVICTED: kv_events_pb2.REMOVAL_CAUSE_EVICTED,
    RemovalCause.EXPIRED: kv_events_pb2.REMOVAL_CAUSE_EXPIRED,
    RemovalCause.CLEARED: kv_events_pb2.REMOVAL_CAUSE_CLEARED,
    RemovalCause.INVALID: kv_events_pb2.REMOVAL_CAUSE_INVALID,
    RemovalCause.ABSENT: kv_events_pb2.REMOVAL_CAUSE_ABSENT,
}
_FINISHES = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: common_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}


_ROLES = {
    Role.BOTH: worker_pb2.WORKER_ROLE_BOTH,
    Role.PREFILL: worker_pb2.WORKER_ROLE_PREFILL,
    Role.DECODE: worker_pb2.WORKER_ROLE_DECODE,
}


def hello_to_wire(
    info: EngineInfo,
    *,
    worker: str,
    incarnation: int,
    protocol_version: int,
    kv_events_off: bool = False,
    role: Role = Role.BOTH,
) -> worker_pb2.WorkerHello:
    """What the worker says of itself, once a stream.

    `protocol_version`: of the stream. `kv_events_off`: it will not tell which blocks it holds.
    """
    scheme = info.scheme
    return worker_pb2.WorkerHello(
        protocol_version=protocol_version,
        package_version=versions.VERSION,
        worker=worker,
        incarnation=incarnation,
        scheme=worker_pb2.HashScheme(
            model_fingerprint=scheme.model_fingerprint,
            layout=scheme.layout,
            block_size=scheme.block_size,
            adapter=scheme.adapter,
            canonical=scheme.canonical,
            tp_size=scheme.tp_size,
            tp_rank=scheme.tp_rank,
            version=scheme.version,
        ),
        model=info.model,
        tokenizer_sha256=info.tokenizer_sha256,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        block_nbytes=info.block_nbytes,
        device=info.device,
        shared_tier_id=info.shared_tier_id,
        eos_token_ids=info.eos_token_ids,
        peer_address=info.peer_address,
        kv_events_off=kv_events_off,
        role=_ROLES[role],
    )


def output_to_wire(output: Output, number: int) -> worker_pb2.SequenceOutput:
    """What a step made for the job that its router calls `number`."""
    message = worker_pb2.SequenceOutput(
        job_id=number,
        token_ids=output.token_ids,
        text=output.text,
        completion_tokens=output.completion_tokens,
    )
    if output.logprobs:
        message.logprobs.extend(map(_logprob_to_wire, output.logprobs))
    if output.worker_ttft_ms is not None:
        message.worker_ttft_ms = output.worker_ttft_ms
        message.queue_ms = output.queue_ms
        message.load_ms = output.load_ms
    if output.finish is not None:
        message.finish_reason = _FINISHES[output.finish]
    if output.fates is not None:
        message.fates.CopyFrom(common_pb2.TokensByFate(**output.fates))
    if output.resumed_fates is not None:
        message.resumed_fates.CopyFrom(common_pb2.TokensByFate(**output.resumed_fates))
    if output.error is not None:
        message.error.reason, message.error.message = output.error.reason, output.error.message
    return message


def _logprob_to_wire(logprob: TokenLogprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        top=[common_pb2.TopLogprob(token_id=token, logprob=value) for token, value in logprob.top],
    )


def event_to_wire(event: KvEvent) -> kv_events_pb2.KvEvent:
    """One change of the store."""
    match event:
        case BlockStored():
            return kv_events_pb2.KvEvent(stored=stored_to_wire(event))
        case BlockRemoved():
            removed = kv_events_pb2.BlockRemoved(
                tier=TIERS[event.tier], hashes=b"".join(event.hashes), cause=_CAUSES[event.cause]
            )
            return kv_events_pb2.KvEvent(removed=removed)
        case AllBlocksCleared():
            return kv_events_pb2.KvEvent(cleared=kv_events_pb2.AllBlocksCleared(tier=TIERS[event.tier]))


def stored_to_wire(event: BlockStored) -> kv_events_pb2.BlockStored:
    """Blocks that became readable."""
    return kv_events_pb2.BlockStored(
        tier=TIERS[event.tier],
        hashes=b"".join(event.hashes),
        parent=event.parent or b"",
        # Zero means never, so the shortest rest of a life is one millisecond.
        ttl_ms=0 if event.ttl_s is None else max(1, round(event.ttl_s * 1000)),
    )


def snapshot_pieces(
    blocks: Sequence[BlockStored], *, piece_bytes: int = SNAPSHOT_PIECE_BYTES
) -> Iterator[worker_pb2.Snapshot]:
    """All that a worker holds as messages of at most about `piece_bytes`; made lazily. The last may be the first."""
    piece, nbytes = worker_pb2.Snapshot(first=True), 0
    for run in _bounded_runs(blocks, piece_bytes // (2 * SHORT_HASH_BYTES)):
        message = stored_to_wire(run)
        size = _field_nbytes(message)
        if piece.blocks and nbytes + size > piece_bytes:
            yield piece
            piece, nbytes = worker_pb2.Snapshot(), 0
        piece.blocks.append(message)
        nbytes += size
    piece.last = True
    yield piece


def _bounded_runs(blocks: Sequence[BlockStored], longest: int) -> Iterator[BlockStored]:
    for run in blocks:
        for start in range(0, len(run.hashes), longest):
            parent = run.hashes[start - 1] if start else run.parent
            yield replace(run, hashes=run.hashes[start : start + longest], parent=parent)


def _field_nbytes(message: Message) -> int:
    return message.ByteSize() + 5  # tag and length


def load_to_wire(load: Load) -> worker_pb2.Load:
    """How busy the worker is."""
    return worker_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        pending_prefill_tokens=load.pending_prefill_tokens,
        decoding=load.decoding,
        prefill_fixed_ms=load.prefill_fixed_ms,
        prefill_token_ms=load.prefill_token_ms,
        prefill_pair_ms=load.prefill_pair_ms,
        decode_step_ms=load.decode_step_ms,
        steps=load.steps,
        preemptions=load.preemptions,
        prefill_share=load.prefill_share,
        prefill_error=load.prefill_error,
        answer_blocks=load.answer_blocks,
        slots=load.slots,
        answer_ms=load.answer_ms,
        freed_blocks=load.freed_blocks,
        tiers=[
            _tier_to_wire(tier, stats, latency_ms, block_ms)
            for tier, (stats, latency_ms, block_ms) in load.tiers.items()
        ],
    )


def _tier_to_wire(tier: TierName, stats: TierStats, latency_ms: float, block_ms: float) -> worker_pb2.TierLoad:
    return worker_pb2.TierLoad(
        tier=TIERS[tier],
        used_bytes=stats.used_bytes,
        capacity_bytes=stats.capacity_bytes,
        blocks=stats.blocks,
        read_block_ms=block_ms,
        read_latency_ms=latency_ms,
        healthy=stats.healthy,
        hits=stats.hits,
        misses=stats.misses,
        removals=stats.removals,
        stores=stats.stores,
        store_failures=stats.store_failures,
        read_bytes=stats.read_bytes,
        written_bytes=stats.written_bytes,
        problem=stats.problem,
        leased=stats.leased,
        loads=stats.loads,
        bad_hits=stats.bad_hits,
        load_ms=stats.load_ms,
        compute_ms=stats.compute_ms,
    )


def clear_done_to_wire(clear_id: int, dropped: dict[TierName, int], error: str) -> worker_pb2.ClearDone:
    """What a Clear dropped."""
    return worker_pb2.ClearDone(
        clear_id=clear_id,
        device=dropped.get(TierName.DEVICE, 0),
        host=dropped.get(TierName.HOST, 0),
        disk=dropped.get(TierName.DISK, 0),
        redis=dropped.get(TierName.REDIS, 0),
        error=error,
    )
