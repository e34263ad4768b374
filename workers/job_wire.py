"""Jobs as they come over the wire: into the engine's plain data, or refused. Pure.

Covers: every field of a job and of its sampling, the chain that the worker derives again, and the refusal of jobs that
cannot be meant for this worker. Does not cover: what the worker says (`wire`), refusals by the engine (`refusal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

from kvstore.blocks import SHORT_HASH_BYTES, BlockHash, block_hashes, short
from kvstore.lifetime import Lifetime
from kvstore.token_ids import unpacked
from warmkv.v1 import common_pb2, worker_pb2
from workers.protocol import Constraint, EngineInfo, Job, JobError, JobId, PeerHint, Promised, SamplingParams

MAX_KEEP_PRIORITY = 100
MAX_PEERS = 3  # of a job; what follows is left out


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
