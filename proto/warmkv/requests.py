"""From Python values to the contract's messages. Pure; both clients use it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from warmkv.errors import InvalidOption
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation. `token_ids`: for an earlier answer, the ids that were streamed."""

    role: str
    content: str
    token_ids: Sequence[int] = ()


class InputOptions(TypedDict, total=False):
    """The prompt, where it is no plain text, and whom to ask.

    Attributes:
        messages: a conversation, rendered by the model's chat template; mappings with the fields of ChatMessage do too.
        token_ids: ready ids.
        add_generation_prompt: for conversations: end the prompt with the cue for an answer (the default).
        model: its name; the one that is served when left out.
    """

    messages: Sequence[ChatMessage | Mapping[str, Any]]
    token_ids: Sequence[int]
    add_generation_prompt: bool
    model: str


class LifetimeOptions(TypedDict, total=False):
    """How long blocks are to live. A block lives as long as the longest that was asked for it.

    Attributes:
        ttl: seconds after their last use. fixed_ttl: seconds from now instead; hits do not renew them.
        expires_at: instead of `ttl`: until when, used or not; seconds since the epoch, or an aware datetime.
        keep_priority: 0 to 100, worth when room is short, for the eviction policy `priority`.
    """

    ttl: int
    fixed_ttl: bool
    expires_at: int | datetime
    keep_priority: int


class CacheOptions(LifetimeOptions, total=False):
    """What a request asks of the cache.

    Attributes:
        no_store: do not keep the blocks that it computes. no_read: do not use cached blocks.
        affinity_key: requests with the same key tend to the same worker.
    """

    no_store: bool
    no_read: bool
    affinity_key: str


class ExplainOptions(InputOptions, CacheOptions, total=False):
    """What `explain` takes."""


class PromptOptions(TypedDict, total=False):
    """Which prompt's blocks operators mean.

    Attributes:
        text: a plain text. messages, token_ids, add_generation_prompt: as in InputOptions.
        tenant: whose; the caller's when left out.
    """

    text: str
    messages: Sequence[ChatMessage | Mapping[str, Any]]
    token_ids: Sequence[int]
    add_generation_prompt: bool
    tenant: str


class WarmOptions(PromptOptions, LifetimeOptions, total=False):
    """What `warm` takes besides where."""


class GenerateOptions(InputOptions, CacheOptions, total=False):
    """How to generate. What is left out, the router's defaults decide.

    Attributes:
        max_tokens: most tokens to generate. temperature: zero is greedy. top_p, top_k, min_p: filters.
        seed: makes sampling repeatable. stop: texts, stop_token_ids: ids at which to end.
        logprobs: return log-probabilities, with so many alternatives. ignore_eos: do not end at the model's end tokens.
        repetition_penalty, presence_penalty, frequency_penalty: against tokens that were there before. logit_bias: what
        is added to the logits of these token ids.
        json_schema, regex, grammar, json_object: what the answer is held to, one of them at most. A schema may be
        given as text or as a mapping; a grammar is in Lark syntax.
        n: independent answers to the prompt; see `Generation.samples`. adapter: a LoRA adapter, of which none are
        served yet.
        priority: higher runs first.
        timeout: seconds for the whole answer, attempts included.
        request_id, traceparent: sent along; the router makes them otherwise.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: int
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    json_schema: str | Mapping[str, Any]
    regex: str
    grammar: str
    json_object: bool
    n: int
    adapter: str
    priority: int
    timeout: float | None
    request_id: str
    traceparent: str


_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop_token_ids",
    "logprobs",
    "ignore_eos",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
_MOST_SHOWN = 60  # characters of a value in a message
_CONSTRAINTS = ("json_schema", "regex", "grammar", "json_object")


def generate_request(text: str | None, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The request of `generate`.

    Raises:
        TypeError: an option has no such name or type, or not exactly one prompt was given.
        InvalidOption: a number does not fit its field.
    """
    _check_names(options, GenerateOptions)
    given: Mapping[str, Any] = options
    _check_numbers(given)
    sampling = common_pb2.SamplingParams(**{name: given[name] for name in _SAMPLING if name in given})
    stop = options.get("stop", ())
    sampling.stop.extend([stop] if isinstance(stop, str) else stop)
    if (constraint := _constraint(given)) is not None:
        sampling.constraint.CopyFrom(constraint)
    return inference_pb2.GenerateRequest(
        model=options.get("model", ""),
        input=input_of(text, options),
        sampling=sampling,
        priority=options.get("priority", 0),
        cache=cache_directives(options),
        n=options.get("n"),
        adapter=options.get("adapter", ""),
    )


def explain_request(text: str | None, options: ExplainOptions) -> inference_pb2.ExplainRequest:
    """The request of `explain`. Raises as `generate_request` does."""
    _check_names(options, ExplainOptions)
    return inference_pb2.ExplainRequest(
        model=options.get("model", ""), input=input_of(text, options), cache=cache_directives(options)
    )


def tokenize_request(text: str | None, options: InputOptions) -> inference_pb2.TokenizeRequest:
    """The request of `tokenize`. Raises as `generate_request` does."""
    _check_names(options, InputOptions)
    return inference_pb2.TokenizeRequest(model=options.get("model", ""), input=input_of(text, options))


def input_of(text: str | None, options: InputOptions) -> inference_pb2.Input:
    """The prompt: exactly one of a text, messages and token ids.

    Raises:
        TypeError: none or several were given. InvalidOption: an id that is none.
    """
    if (text is not None) + ("messages" in options) + ("token_ids" in options) != 1:
        raise TypeError("give exactly one prompt: a text, messages=[...] or token_ids=[...].")
    if text is not None:
        return inference_pb2.Input(text=text)
    if "token_ids" in options:
        ids = options["token_ids"]
        try:
            return inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=ids))
        except ValueError:
            raise _unfit("token_ids", ids, inference_pb2.TokenIds.DESCRIPTOR.fields_by_name["ids"]) from None
    chat = inference_pb2.Chat(
        messages=[_message(message) for message in options["messages"]],
        add_generation_prompt=options.get("add_generation_prompt"),
    )
    return inference_pb2.Input(chat=chat)


def cache_directives(options: CacheOptions) -> common_pb2.CacheDirectives:
    """The cache's part of a request."""
    return common_pb2.CacheDirectives(
        ttl_seconds=options.get("ttl"),
        no_store=options.get("no_store", False),
        no_read=options.get("no_read", False),
        affinity_key=options.get("affinity_key", ""),
        expires_at=_epoch_seconds(options.get("expires_at")),
        fixed_ttl=options.get("fixed_ttl", False),
        keep_priority=options.get("keep_priority"),
    )


def list_blocks_request(
    options: PromptOptions, *, worker: str, tier: str, page_size: int, page_token: str
) -> admin_pb2.ListBlocksRequest:
    """The request of `list_blocks`.

    Raises:
        TypeError: several prompts were given, or an option has no such name. ValueError: there is no such tier.
    """
    return admin_pb2.ListBlocksRequest(
        tenant=options.get("tenant", ""),
        prompt=prompt_of(options),
        worker=worker,
        tier=tier_of(tier),
        page_size=page_size,
        page_token=page_token,
    )


def warm_request(options: WarmOptions, *, workers: Sequence[str], compute: bool) -> admin_pb2.WarmRequest:
    """The request of `warm`. Raises as `list_blocks_request` does."""
    _check_names(options, WarmOptions)
    prompt = {name: value for name, value in options.items() if name not in LifetimeOptions.__optional_keys__}
    return admin_pb2.WarmRequest(
        prompt=prompt_of(cast("PromptOptions", prompt)),
        tenant=options.get("tenant", ""),
        workers=workers,
        compute=compute,
        ttl_seconds=options.get("ttl"),
        expires_at=_epoch_seconds(options.get("expires_at")),
        fixed_ttl=options.get("fixed_ttl", False),
        keep_priority=options.get("keep_priority"),
    )


def pin_request(options: PromptOptions, *, seconds: int | None, workers: Sequence[str]) -> admin_pb2.PinRequest:
    """The request of `pin`. Raises as `list_blocks_request` does."""
    return admin_pb2.PinRequest(
        tenant=options.get("tenant", ""), prompt=prompt_of(options), seconds=seconds, workers=workers
    )


def _check_numbers(given: Mapping[str, Any]) -> None:
    """The messages refuse what does not fit without a word of where."""
    for name in _SAMPLING:
        _check_fits(common_pb2.SamplingParams, name, given, name)
    for name in ("n", "priority"):
        _check_fits(inference_pb2.GenerateRequest, name, given, name)
    _check_fits(common_pb2.CacheDirectives, "ttl_seconds", given, "ttl")
    _check_fits(common_pb2.CacheDirectives, "keep_priority", given, "keep_priority")
    timeout = given.get("timeout")
    if timeout is not None and not timeout > 0:
        raise InvalidOption(f"timeout is {timeout!r}; give seconds above 0, or leave it out for no limit.")


def _check_fits(kind: type[Message], field: str, given: Mapping[str, Any], name: str) -> None:
    if name not in given:
        return
    try:
        kind(**{field: given[name]})
    except ValueError:
        raise _unfit(name, given[name], kind.DESCRIPTOR.fields_by_name[field]) from None


def _unfit(name: str, value: object, field: FieldDescriptor) -> InvalidOption:
    text = repr(value)
    shown = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return InvalidOption(f"{name} is {shown}; give {_span(field)}.")


def _span(field: FieldDescriptor) -> str:
    """What fits it, in words."""
    if field.message_type is not None:  # a map: values are floating-point numbers, so its keys do not fit
        return f"token ids as keys, {_span(field.message_type.fields_by_name['key'])}"
    bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
    if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64):
        return f"whole numbers from {-(1 << bits - 1):,} to {(1 << bits - 1) - 1:,}"
    return f"whole numbers from 0 to {(1 << bits) - 1:,}"


def drain_request(worker: str, hand_over_after_s: float | None) -> admin_pb2.DrainWorkerRequest:
    """The request of `drain`.

    Raises:
        InvalidOption: a negative time.
    """
    request = admin_pb2.DrainWorkerRequest(worker=worker)
    if hand_over_after_s is not None:
        if not 0 <= hand_over_after_s < 1e9:
            raise InvalidOption(f"hand_over_after_s is {hand_over_after_s!r}; give seconds from 0")
        request.hand_over_after_ms = round(hand_over_after_s * 1000)
    return request


def unpin_request(options: PromptOptions, *, workers: Sequence[str]) -> admin_pb2.UnpinRequest:
    """The request of `unpin`. Raises as `list_blocks_request` does."""
    return admin_pb2.UnpinRequest(tenant=options.get("tenant", ""), prompt=prompt_of(options), workers=workers)


def prompt_of(options: PromptOptions) -> inference_pb2.Input | None:
    """The prompt that operators name; None where they name none.

    Raises:
        TypeError: several were given, or an option has no such name.
    """
    _check_names(options, PromptOptions)
    given: Mapping[str, Any] = options
    if not {"text", "messages", "token_ids"} & given.keys():
        return None
    prompt = {name: given[name] for name in ("messages", "token_ids", "add_generation_prompt") if name in given}
    return input_of(given.get("text"), cast("InputOptions", prompt))


def tier_of(name: str) -> common_pb2.Tier.ValueType:
    """`device`, `host`, `disk`, `redis` or `peer`; empty: any.

    Raises:
        ValueError: there is none of that name.
    """
    if not name:
        return common_pb2.TIER_UNSPECIFIED
    tiers = [each.removeprefix("TIER_").lower() for each in common_pb2.Tier.keys()[1:]]
    if name not in tiers:
        raise ValueError(f"there is no tier {name!r}; use one of {', '.join(tiers)}.")
    return common_pb2.Tier.Value(f"TIER_{name.upper()}")


def set_policy_request(
    name: str, weights: Mapping[str, float] | None, shared_tier_reads: bool | None
) -> admin_pb2.SetPolicyRequest:
    """The request of `set_policy`; what is left out stays as it is."""
    request = admin_pb2.SetPolicyRequest(shared_tier_reads=shared_tier_reads)
    if name or weights:
        request.policy.CopyFrom(admin_pb2.Policy(name=name, weights=weights or {}))
    return request


def set_shadow_policy_request(name: str, weights: Mapping[str, float] | None) -> admin_pb2.SetShadowPolicyRequest:
    """The request of `set_shadow_policy`; an empty name ends it.

    Raises:
        ValueError: weights without a name.
    """
    if not name:
        if weights:
            raise ValueError("weights were given and no policy; name the policy that shall score.")
        return admin_pb2.SetShadowPolicyRequest()
    return admin_pb2.SetShadowPolicyRequest(policy=admin_pb2.Policy(name=name, weights=weights or {}))


def _constraint(given: Mapping[str, Any]) -> common_pb2.Constraint | None:
    """What the answer is held to; None: nothing.

    Raises:
        TypeError: several were given, or a schema that is no JSON.
    """
    kinds = [kind for kind in _CONSTRAINTS if kind in given]
    if len(kinds) > 1:
        raise TypeError(f"give one constraint at most, and not {' and '.join(kinds)}.")
    if not kinds:
        return None
    value = given[kinds[0]]
    if kinds[0] == "json_schema" and isinstance(value, Mapping):
        value = json.dumps(value, ensure_ascii=False)
    return common_pb2.Constraint(**{kinds[0]: value})


def _message(message: ChatMessage | Mapping[str, Any]) -> inference_pb2.ChatMessage:
    if isinstance(message, Mapping):
        message = ChatMessage(**message)
    return inference_pb2.ChatMessage(role=message.role, content=message.content, token_ids=message.token_ids)


def _epoch_seconds(time: int | datetime | None) -> int | None:
    """Rounded up.

    Raises:
        ValueError: a datetime without a time zone.
    """
    if not isinstance(time, datetime):
        return time
    if time.tzinfo is None:
        raise ValueError("expires_at has no time zone; give datetime(..., tzinfo=UTC) or seconds since the epoch.")
    return math.ceil(time.timestamp())


def _check_names(options: Mapping[str, object], known: Any) -> None:
    """Refuse misspelt options, which type checkers find and the interpreter does not."""
    if unknown := options.keys() - known.__optional_keys__:
        raise TypeError(f"unknown options {sorted(unknown)}. Use {sorted(known.__optional_keys__)}.")
