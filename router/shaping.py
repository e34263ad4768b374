"""What a request may ask of its answers besides the draw: how many, penalties, bias, an adapter. Pure: raises."""

from __future__ import annotations

from router.errors import AdapterNotFound, InvalidRequest
from warmkv.v1 import common_pb2, inference_pb2

MAX_SAMPLES = 64
_MAX_REPETITION = 10.0
_MAX_PENALTY = 2.0
_MAX_BIAS = 100.0
_MAX_BIASED = 1024


def check_adapter(adapter: str) -> None:
    """Raises AdapterNotFound unless it is empty: no adapters are served yet, and none is ever ignored."""
    if adapter:
        raise AdapterNotFound(
            f"This fleet serves no LoRA adapter, so not {adapter!r} either; leave adapter empty, or merge it into the"
            " model and serve that.",
            adapter=adapter[:256],
        )


def samples_of(request: inference_pb2.GenerateRequest) -> int:
    """How many answers it wants.

    Raises:
        InvalidRequest: too many or none, or several that would all be the same.
    """
    if not request.HasField("n"):
        return 1
    if not 1 <= request.n <= MAX_SAMPLES:
        raise InvalidRequest(f"n is {request.n}; set it from 1 to {MAX_SAMPLES}, or leave it out.", field="n")
    if request.n > 1 and request.sampling.HasField("temperature") and request.sampling.temperature == 0.0:
        raise InvalidRequest(
            f"n is {request.n} and temperature 0: all answers would be the same; set n to 1, or a temperature above 0.",
            field="n",
        )
    return request.n


def check_penalties(sampling: common_pb2.SamplingParams) -> None:
    """Raises InvalidRequest. Written so that NaN fails."""
    if not 0.0 < sampling.repetition_penalty <= _MAX_REPETITION:
        raise InvalidRequest(
            f"repetition_penalty is {sampling.repetition_penalty:g}; set it above 0 and up to {_MAX_REPETITION:g}"
            " (1: none).",
            field="repetition_penalty",
        )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        if not -_MAX_PENALTY <= value <= _MAX_PENALTY:
            raise InvalidRequest(
                f"{name} is {value:g}; set it from -{_MAX_PENALTY:g} to {_MAX_PENALTY:g} (0: none).", field=name
            )


def check_bias(sampling: common_pb2.SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest. A `vocab_size` of zero is not known yet and is not checked."""
    if len(sampling.logit_bias) > _MAX_BIASED:
        raise InvalidRequest(
            f"logit_bias names {len(sampling.logit_bias):,} tokens; send at most {_MAX_BIASED:,}.", field="logit_bias"
        )
    for token, bias in sampling.logit_bias.items():
        if vocab_size and token >= vocab_size:
            raise InvalidRequest(
                f"logit_bias names token {token}, which is out of range; ids must be below {vocab_size}.",
                field="logit_bias",
            )
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise InvalidRequest(
                f"logit_bias of token {token} is {bias:g}; set it from -{_MAX_BIAS:g} to {_MAX_BIAS:g}.",
                field="logit_bias",
            )
