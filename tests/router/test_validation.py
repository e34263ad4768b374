from __future__ import annotations

from typing import Any

import pytest

from router.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from router.validation import (
    check_cache,
    check_input,
    check_model,
    check_priority,
    check_prompt,
    filled_cache,
    filled_sampling,
)
from warmkv.v1 import common_pb2, inference_pb2


def filled(context_length: int = 100, **given: Any) -> common_pb2.SamplingParams:
    return filled_sampling(
        common_pb2.SamplingParams(**given),
        prompt_tokens=40,
        context_length=context_length,
        vocab_size=50,
        draw_seed=lambda: 7,
    )


def test_defaults_are_filled_in() -> None:
    sampling = filled()
    assert sampling.max_tokens == 60
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (
        1.0,
        1.0,
        0,
        0.0,
        7,
    )
    assert not sampling.HasField("logprobs")


def test_what_was_given_stays() -> None:
    sampling = filled(max_tokens=3, temperature=0.0, top_p=0.5, seed=9, logprobs=0)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (3, 0.0, 0.5, 9)
    assert sampling.HasField("logprobs")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -0.1}, "from 0"),
        ({"temperature": float("nan")}, "from 0"),
        ({"temperature": 101.0}, "to 100"),
        ({"top_p": 0.0}, "above 0"),
        ({"top_p": float("nan")}, "above 0"),
        ({"min_p": 1.5}, "from 0 to 1"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"max_tokens": 0}, "at least 1"),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"stop": [""]}, "1 to 256 bytes"),
        ({"stop": ["é" * 129]}, "1 to 256 bytes"),
        ({"stop_token_ids": [50]}, "below 50"),
        ({"repetition_penalty": 0.0}, "above 0 and up to 10"),
        ({"repetition_penalty": float("nan")}, "above 0 and up to 10"),
        ({"repetition_penalty": 10.5}, "above 0 and up to 10"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; set it from -2 to 2"),
        ({"presence_penalty": float("nan")}, "from -2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5; set it from -2 to 2"),
        ({"logit_bias": {50: 1.0}}, "logit_bias names token 50.* below 50"),
        ({"logit_bias": {7: 101.0}}, "logit_bias of token 7 is 101; set it from -100 to 100"),
        ({"logit_bias": {7: float("nan")}}, "from -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "at most 1,024"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        filled(**given)


def test_each_of_these_names_its_field() -> None:
    given = {"repetition_penalty": -1.0, "presence_penalty": 9.0, "frequency_penalty": 9.0, "logit_bias": {50: 1.0}}
    for name, value in given.items():
        with pytest.raises(InvalidRequest) as caught:
            filled(**{name: value})
        assert caught.value.metadata["field"] == name


def test_without_penalties_they_are_filled_in_as_none() -> None:
    sampling = filled()
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    assert penalties == (1.0, 0.0, 0.0)
    assert not sampling.logit_bias
    assert not sampling.HasField("constraint")


def test_an_answer_that_does_not_fit_is_refused_with_what_fits() -> None:
    with pytest.raises(ContextLengthExceeded, match="at most 60"):
        filled(max_tokens=61)
    assert filled(max_tokens=60).max_tokens == 60


def test_prompts_are_checked_for_emptiness_range_and_length() -> None:
    with pytest.raises(InvalidRequest, match="at least one token"):
        check_prompt([], 50, 100)
    with pytest.raises(InvalidRequest, match="below 50"):
        check_prompt([1, 50], 50, 100)
    with pytest.raises(ContextLengthExceeded, match="at most 99 tokens"):
        check_prompt([1] * 100, 50, 100)
    check_prompt([1] * 99, 50, 100)
    check_prompt([99], 0, 0)


def test_inputs_are_checked_before_anything_is_encoded() -> None:
    with pytest.raises(InvalidRequest, match="set text, chat or token_ids"):
        check_input(inference_pb2.Input(), 100)
    with pytest.raises(InvalidRequest, match="max_prompt_bytes"):
        check_input(inference_pb2.Input(text="x" * 101), 100)


def test_other_fields_are_checked() -> None:
    check_model("", "m")
    check_model("m", "m")
    with pytest.raises(ModelNotFound, match="ask for 'm'"):
        check_model("x", "m")
    check_priority(-100)
    with pytest.raises(InvalidRequest, match="from -100 to 100"):
        check_priority(101)
    with pytest.raises(InvalidRequest, match="no_store"):
        check_cache(common_pb2.CacheDirectives(ttl_seconds=0), wall=0.0)
    with pytest.raises(InvalidRequest, match="affinity_key"):
        check_cache(common_pb2.CacheDirectives(affinity_key="x" * 2000), wall=0.0)


NOW = 1_800_000_000.5


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (common_pb2.CacheDirectives(expires_at=1_800_000_000), "in the past; send a later time"),
        (common_pb2.CacheDirectives(expires_at=0), "in the past; send a later time"),
        (common_pb2.CacheDirectives(expires_at=1_900_000_000_000), "not milliseconds"),
        (common_pb2.CacheDirectives(expires_at=1_900_000_000, ttl_seconds=5), "send one of them"),
        (common_pb2.CacheDirectives(fixed_ttl=True), "set ttl_seconds too"),
        (common_pb2.CacheDirectives(fixed_ttl=True, expires_at=1_900_000_000), "set ttl_seconds too"),
        (common_pb2.CacheDirectives(keep_priority=101), "from 0 to 100"),
    ],
)
def test_lifetimes_that_make_no_sense_are_refused_with_what_to_send(
    cache: common_pb2.CacheDirectives, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        check_cache(cache, wall=NOW)


@pytest.mark.parametrize(
    "cache",
    [
        common_pb2.CacheDirectives(),
        common_pb2.CacheDirectives(expires_at=1_800_000_001, keep_priority=100),
        common_pb2.CacheDirectives(ttl_seconds=5, keep_priority=0),
        common_pb2.CacheDirectives(ttl_seconds=5, fixed_ttl=True),
    ],
)
def test_lifetimes_that_make_sense_pass(cache: common_pb2.CacheDirectives) -> None:
    check_cache(cache, wall=NOW)


def test_a_fixed_time_to_live_becomes_an_end_and_nothing_else_changes() -> None:
    asked = common_pb2.CacheDirectives(ttl_seconds=60, fixed_ttl=True, keep_priority=7, no_read=True)
    expected = common_pb2.CacheDirectives(expires_at=1_800_000_061, keep_priority=7, no_read=True)
    assert filled_cache(asked, wall=NOW) == expected
    assert asked.fixed_ttl, "the request itself stays as it was"
    sliding = common_pb2.CacheDirectives(ttl_seconds=60, affinity_key="k")
    assert filled_cache(sliding, wall=NOW) == sliding
