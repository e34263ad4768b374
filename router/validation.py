"""What a request must look like before it may cost anything. Pure: raises, or fills the defaults in.

Covers: model, input, sampling, priority, cache directives, lengths. Does not cover: penalties, bias and samples
(`shaping`), constraints (`constraints`), templates (`tokenizer`) or quotas (`admission`). Every message says which
value to send instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from router.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from router.shaping import check_bias, check_penalties
from warmkv.v1 import common_pb2, inference_pb2

_MAX_STOPS, _MAX_STOP_BYTES = 16, 256
_MAX_LOGPROBS = 20
_MAX_TEMPERATURE = 100.0
_MAX_PRIORITY = 100
_MAX_KEEP_PRIORITY = 100
_MAX_LIFE_S = 100 * 365 * 86400
_MAX_AFFINITY_BYTES = 1024
_MAX_SEED = 2**63


def check_model(asked: str, served: str) -> None:
    """Raises ModelNotFound unless the name is empty or the one that is served."""
    if asked not in ("", served):
        raise ModelNotFound(f"This fleet does not serve {asked!r}; ask for {served!r}, or leave the name empty.")


def check_input(prompt: inference_pb2.Input, max_bytes: int) -> None:
    """Raises InvalidRequest for no input, and for one over the limit, before anything is encoded."""
    if prompt.WhichOneof("kind") is None:
        raise InvalidRequest("The request has no input; set text, chat or token_ids.")
    size = prompt.ByteSize()
    if size > max_bytes:
        raise InvalidRequest(
            f"The input has {size:,} bytes and this router takes {max_bytes:,}; send less, or raise max_prompt_bytes.",
            limit="max_prompt_bytes",
        )


def check_cache(cache: common_pb2.CacheDirectives, *, wall: float) -> None:
    """Raises InvalidRequest. `wall`: seconds since the epoch."""
    if cache.HasField("ttl_seconds") and not cache.ttl_seconds:
        raise InvalidRequest("ttl_seconds is 0; leave it out for the default, or set no_store to keep nothing.")
    if cache.fixed_ttl and not cache.HasField("ttl_seconds"):
        raise InvalidRequest("fixed_ttl says how ttl_seconds counts; set ttl_seconds too, or leave fixed_ttl out.")
    if cache.HasField("expires_at"):
        _check_expiry(cache, wall)
    if cache.keep_priority > _MAX_KEEP_PRIORITY:
        raise InvalidRequest(f"keep_priority is {cache.keep_priority}; set it from 0 to {_MAX_KEEP_PRIORITY}.")
    if len(cache.affinity_key.encode()) > _MAX_AFFINITY_BYTES:
        raise InvalidRequest(f"affinity_key is longer than {_MAX_AFFINITY_BYTES} bytes; send a shorter one.")


def filled_cache(cache: common_pb2.CacheDirectives, *, wall: float) -> common_pb2.CacheDirectives:
    """A copy in which a fixed time to live is a time at which it ends, so that it ends everywhere at once."""
    filled = common_pb2.CacheDirectives()
    filled.CopyFrom(cache)
    if cache.fixed_ttl:
        filled.expires_at = math.ceil(wall + cache.ttl_seconds)
        filled.ClearField("ttl_seconds")
        filled.ClearField("fixed_ttl")
    return filled


def _check_expiry(cache: common_pb2.CacheDirectives, wall: float) -> None:
    if cache.HasField("ttl_seconds"):
        raise InvalidRequest("Both expires_at and ttl_seconds are set; send one of them.")
    if cache.expires_at <= wall:
        raise InvalidRequest(
            f"expires_at is {cache.expires_at}, which is in the past; send a later time, in seconds since 1970 (UTC; "
            f"now is {int(wall)})."
        )
    if cache.expires_at > wall + _MAX_LIFE_S:
        raise InvalidRequest(
            f"expires_at is {cache.expires_at}, more than a century away; send seconds since 1970 (UTC; now is "
            f"{int(wall)}), not milliseconds."
        )


def check_priority(priority: int) -> None:
    """Raises InvalidRequest."""
    if not -_MAX_PRIORITY <= priority <= _MAX_PRIORITY:
        raise InvalidRequest(f"priority is {priority}; set it from -{_MAX_PRIORITY} to {_MAX_PRIORITY}.")


def check_prompt(
    token_ids: Sequence[int], vocab_size: int, context_length: int, *, largest_id: int | None = None
) -> None:
    """Raises InvalidRequest for an empty prompt or an id out of range, ContextLengthExceeded for one that is too long.

    A limit of zero is not known yet and is not checked. `largest_id`: of the ids, where it is known already.
    """
    if not token_ids:
        raise InvalidRequest("The prompt is empty; send at least one token.")
    largest = max(token_ids) if largest_id is None else largest_id
    if vocab_size and largest >= vocab_size:
        raise InvalidRequest(f"Token id {largest} is out of range; ids must be below {vocab_size}.")
    if context_length and len(token_ids) >= context_length:
        raise ContextLengthExceeded(
            f"The prompt has {len(token_ids):,} tokens and the model takes {context_length:,}, with the answer; send at"
            f" most {context_length - 1:,} tokens.",
            prompt_tokens=str(len(token_ids)),
            context_length=str(context_length),
        )


def filled_sampling(
    given: common_pb2.SamplingParams,
    *,
    prompt_tokens: int,
    context_length: int,
    vocab_size: int,
    draw_seed: Callable[[], int],
) -> common_pb2.SamplingParams:
    """A copy with every default filled in.

    Raises:
        InvalidRequest: a value is out of range; names the range. ContextLengthExceeded: max_tokens do not fit.
    """
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(given)
    _fill(sampling, "temperature", 1.0)
    _fill(sampling, "top_p", 1.0)
    _fill(sampling, "top_k", 0)
    _fill(sampling, "min_p", 0.0)
    _fill(sampling, "repetition_penalty", 1.0)
    _fill(sampling, "presence_penalty", 0.0)
    _fill(sampling, "frequency_penalty", 0.0)
    _fill(sampling, "max_tokens", max(1, context_length - prompt_tokens))
    if not sampling.HasField("seed"):
        sampling.seed = draw_seed() % _MAX_SEED
    _check_numbers(sampling)
    check_penalties(sampling)
    check_bias(sampling, vocab_size)
    _check_stops(sampling, vocab_size)
    _check_fits(sampling.max_tokens, prompt_tokens, context_length)
    return sampling


def _fill(sampling: common_pb2.SamplingParams, name: str, value: float) -> None:
    if not sampling.HasField(name):  # type: ignore[arg-type]
        setattr(sampling, name, value)


def _check_numbers(sampling: common_pb2.SamplingParams) -> None:
    # Written so that NaN fails.
    if not 0.0 <= sampling.temperature <= _MAX_TEMPERATURE:
        raise InvalidRequest(
            f"temperature is {sampling.temperature:g}; set it from 0 (greedy) to {_MAX_TEMPERATURE:g}."
        )
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest(f"top_p is {sampling.top_p:g}; set it above 0 and up to 1.")
    if not 0.0 <= sampling.min_p <= 1.0:
        raise InvalidRequest(f"min_p is {sampling.min_p:g}; set it from 0 to 1.")
    if sampling.HasField("logprobs") and sampling.logprobs > _MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs is {sampling.logprobs}; set it from 0 to {_MAX_LOGPROBS}.")
    if not sampling.max_tokens:
        raise InvalidRequest("max_tokens is 0; set it to at least 1, or leave it out for as many as fit.")


def _check_stops(sampling: common_pb2.SamplingParams, vocab_size: int) -> None:
    if len(sampling.stop) > _MAX_STOPS:
        raise InvalidRequest(f"There are {len(sampling.stop)} stop strings; send at most {_MAX_STOPS}.")
    if any(not 1 <= len(stop.encode()) <= _MAX_STOP_BYTES for stop in sampling.stop):
        raise InvalidRequest(f"A stop string is empty or too long; each must have 1 to {_MAX_STOP_BYTES} bytes.")
    if vocab_size and any(i >= vocab_size for i in sampling.stop_token_ids):
        raise InvalidRequest(f"A stop token id is out of range; ids must be below {vocab_size}.")


def _check_fits(max_tokens: int, prompt_tokens: int, context_length: int) -> None:
    if context_length and prompt_tokens + max_tokens > context_length:
        raise ContextLengthExceeded(
            f"{prompt_tokens:,} prompt tokens and max_tokens {max_tokens:,} exceed the model's {context_length:,}; set"
            f" max_tokens to at most {context_length - prompt_tokens:,}, or leave it out.",
            prompt_tokens=str(prompt_tokens),
            context_length=str(context_length),
        )
