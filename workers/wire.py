"""Between the wire's messages and the engine's plain data. Pure.

Covers: every message of `WorkerService.Connect` in the direction in which the worker needs it, and the refusal of jobs
that cannot be meant for this worker. Does not cover: when messages are sent (`outbox`, `streams`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import version

from google.protobuf.message import Message

from kvstore.blocks import SHORT_HASH_BYTES, BlockHash, block_hashes, short
from kvstore.events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, RemovalCause, TierName
from kvstore.lifetime import Lifetime
from kvstore.tier import TierStats
from kvstore.token_ids import unpacked
from warmkv.v1 import common_pb2, kv_events_pb2, worker_pb2
from workers.protocol import (
    Constraint,
    EngineInfo,
    FinishReason,
    Job,
    JobError,
    JobId,
    Load,
    Output,
    PeerHint,
    Promised,
    SamplingParams,
    TokenLogprob,
)
from workers.roles import Role

MAX_KEEP_PRIORITY = 100
MAX_PEERS = 3  # of a job; what follows is left out

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


class Refusal(StrEnum):
    """Reasons that the server itself gives for not running a job; engines have more."""

    CHAIN_ROOT_MISMATCH = "CHAIN_ROOT_MISMATCH"
    BLOCK_HASH_MISMATCH = "BLOCK_HASH_MISMATCH"
    EMPTY_PROMPT = "EMPTY_PROMPT"
    TOKEN_OUT_OF_RANGE = "TOKEN_OUT_OF_RANGE"
    INVALID_SAMPLING = "INVALID_SAMPLING"
    INVALID_RESUMPTION = "INVALID_RESUMPTION"
    WORKER_DRAINING = "WORKER_DRAINING"
    ENGINE_FAILED = "ENGINE_FAILED"


class JobRefused(Exception):
    """A job that this worker will not run; `error` goes back as its only output."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.error = JobError(reason.value, message)


def package_version() -> str:
    """Of the installed warmkv."""
    return version("warmkv")


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
        package_version=package_version(),
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


def job_from_wire(message: worker_pb2.Job, *, job_id: JobId, info: EngineInfo, now: float) -> Job:
    """The engine's job. `now`: seconds on the engine's clock, from which the deadline counts.

    Raises:
        JobRefused: the job is malformed, or its chain is not one of this worker.
    """
    prompt = _prompt_of(message)
    token_ids = list(prompt)
    _check_tokens(token_ids, info)
    root, hashes = _derive_chain(message, prompt, info)
    cache, num_prompt = message.cache, len(token_ids) - message.resumed_tokens
    sampling = _sampling_of(message.sampling, num_prompt, info)
    _check_resumed(message, num_prompt, sampling)
    return Job(
        job_id=job_id,
        token_ids=token_ids,
        root=root,
        block_hashes=hashes,
        sampling=sampling,
        priority=message.priority,
        lifetime=_lifetime(cache),
        no_store=cache.no_store,
        no_read=cache.no_read,
        keep_priority=min(MAX_KEEP_PRIORITY, cache.keep_priority),
        turn=message.turn or None,
        deadline=now + message.deadline_ms / 1000 if message.HasField("deadline_ms") else None,
        request_id=message.request_id,
        peers=tuple(PeerHint(hint.address, hint.blocks) for hint in message.peers[:MAX_PEERS]),
        resumed=message.resumed_tokens,
        promise=_promise(message),
        prefill_only=message.prefill_only,
    )


def _sampling_of(message: common_pb2.SamplingParams, prompt_tokens: int, info: EngineInfo) -> SamplingParams:
    room = max(1, info.context_length - prompt_tokens)
    return sampling_from_wire(message, room=room, vocab_size=info.vocab_size)


def _check_resumed(message: worker_pb2.Job, num_prompt: int, sampling: SamplingParams) -> None:
    resumed = message.resumed_tokens
    if resumed and (num_prompt < 1 or resumed >= sampling.max_tokens):
        raise JobRefused(
            Refusal.INVALID_RESUMPTION,
            f"resumed_tokens is {resumed} of {num_prompt + resumed} tokens, and max_tokens is {sampling.max_tokens}: a "
            "token of the prompt must be left, and one to generate; run the same version on router and worker",
        )


def _promise(message: worker_pb2.Job) -> Promised | None:
    told = message.promise
    return Promised(told.address, told.blocks, told.ready_ms, told.margin_ms) if message.HasField("promise") else None


def _prompt_of(message: worker_pb2.Job) -> Sequence[int]:
    if not message.packed_token_ids:
        return message.token_ids
    try:
        return unpacked(message.packed_token_ids)
    except ValueError as error:
        what = f"packed_token_ids: {error}; run the same version on router and worker"
        raise JobRefused(Refusal.BLOCK_HASH_MISMATCH, what) from error


def _lifetime(cache: common_pb2.CacheDirectives) -> Lifetime | None:
    if cache.HasField("expires_at"):
        return Lifetime(float(cache.ttl_seconds), float(cache.expires_at))
    return Lifetime(float(cache.ttl_seconds)) if cache.HasField("ttl_seconds") else None


def _check_tokens(token_ids: list[int], info: EngineInfo) -> None:
    if not token_ids:
        raise JobRefused(Refusal.EMPTY_PROMPT, "the prompt has no tokens; send at least one")
    if (largest := max(token_ids)) >= info.vocab_size:
        raise JobRefused(
            Refusal.TOKEN_OUT_OF_RANGE,
            f"token id {largest} is outside of the vocabulary of {info.vocab_size}; use the tokenizer of {info.model}",
        )


def _derive_chain(
    message: worker_pb2.Job, token_ids: Sequence[int], info: EngineInfo
) -> tuple[BlockHash, list[BlockHash]]:
    root = info.scheme.root(message.tenant_salt)
    if root != message.chain_root:
        raise JobRefused(
            Refusal.CHAIN_ROOT_MISMATCH,
            f"chain root {message.chain_root.hex()[:16]} is not {root.hex()[:16]}, which this worker derived: "
            "router and worker disagree on the hash scheme; reconnect, and run the same version on both",
        )
    hashes = block_hashes(token_ids, root, info.scheme.block_size)
    if b"".join(map(short, hashes)) != message.block_hashes:
        raise JobRefused(
            Refusal.BLOCK_HASH_MISMATCH,
            f"the job's {len(message.block_hashes) // SHORT_HASH_BYTES} block hashes are not those of its "
            f"{len(token_ids)} tokens; run the same version on router and worker",
        )
    return root, hashes


_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "logprobs",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def sampling_from_wire(message: common_pb2.SamplingParams, *, room: int, vocab_size: int) -> SamplingParams:
    """Sampling with every default filled in. `room`: tokens that fit the context, for an unset `max_tokens`.

    Raises:
        JobRefused: a value is out of range (the router refuses such before; this is the second lock).
    """
    filled = replace(
        SamplingParams(max_tokens=room),
        **{name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)},  # type: ignore[arg-type]
        stop=tuple(message.stop),
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        constraint=_constraint_of(message) if message.HasField("constraint") else None,
    )
    _check_sampling(filled, vocab_size)
    return filled


def _constraint_of(message: common_pb2.SamplingParams) -> Constraint:
    kind = message.constraint.WhichOneof("kind")
    if kind is None:
        raise JobRefused(Refusal.INVALID_SAMPLING, "a constraint of a kind that this worker does not know; upgrade it")
    return Constraint(kind, "" if kind == "json_object" else getattr(message.constraint, kind))


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    # Written so that NaN fails too.
    rules = {
        "max_tokens must be at least 1": sampling.max_tokens >= 1,
        "temperature must be within 0 and 100": 0 <= sampling.temperature <= 100,
        "top_p must be above 0 and at most 1": 0 < sampling.top_p <= 1,
        "min_p must be within 0 and 1": 0 <= sampling.min_p <= 1,
        "logprobs must be at most 20": sampling.logprobs is None or sampling.logprobs <= 20,
        "repetition_penalty must be above 0 and at most 10": 0 < sampling.repetition_penalty <= 10,
        "presence_penalty must be within -2 and 2": -2 <= sampling.presence_penalty <= 2,
        "frequency_penalty must be within -2 and 2": -2 <= sampling.frequency_penalty <= 2,
        "logit_bias must be within -100 and 100": all(-100 <= value <= 100 for _, value in sampling.logit_bias),
        f"logit_bias must name tokens below {vocab_size}": all(token < vocab_size for token, _ in sampling.logit_bias),
        "ignore_eos and a constraint exclude one another": not (sampling.ignore_eos and sampling.constraint),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise JobRefused(Refusal.INVALID_SAMPLING, "; ".join(broken))


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
