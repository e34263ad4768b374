"""Which constraints are refused before anything is encoded, and that good ones are looked at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router import constraints
from router.constraints import MAX_BYTES, ConstraintChecks
from router.errors import InvalidRequest
from warmkv.v1 import common_pb2


def sampling(ignore_eos: bool = False, **kind: Any) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(constraint=common_pb2.Constraint(**kind), ignore_eos=ignore_eos)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "kind",
    [
        {"json_schema": '{"type": "object", "properties": {"a": {"type": "integer"}}}'},
        {"regex": "(yes|no)"},
        {"grammar": 'start: "a" | "b"'},
        {"json_object": True},
    ],
)
async def test_good_ones_pass(kind: dict[str, Any]) -> None:
    await ConstraintChecks().check(sampling(**kind))
    await ConstraintChecks().check(common_pb2.SamplingParams())


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({}, "is empty; set one of"),
        ({"json_object": False}, "json_object is false; set it to true"),
        ({"regex": ""}, r"\.regex has 0 bytes; send 1 to 65,536"),
        ({"regex": "a" * (MAX_BYTES + 1)}, "65,537 bytes"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a(?!b)"}, "look-around"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": "begin: /a/"}, "start"),
        ({"json_schema": "{"}, "JSON"),
        ({"json_schema": "[]"}, "no JSON object"),
        ({"json_schema": '{"type": "nonsense"}'}, "nonsense"),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "uniqueItems"),
        ({"json_schema": "[" * 30000}, "json_schema cannot be used"),
    ],
)
async def test_bad_ones_are_refused_with_what_is_wrong(kind: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        await ConstraintChecks().check(sampling(**kind))
    assert caught.value.metadata["field"] == "sampling.constraint"


@pytest.mark.asyncio
async def test_an_end_token_that_does_not_end_is_no_match_for_a_constraint() -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        await ConstraintChecks().check(sampling(ignore_eos=True, regex="a+"))


@pytest.mark.asyncio
async def test_one_that_was_right_is_not_looked_at_again_and_a_wrong_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    problem = constraints._problem
    monkeypatch.setattr(constraints, "_problem", lambda kind, text: (looked.append(text), problem(kind, text))[1])
    checks = ConstraintChecks()
    for _ in range(3):
        await checks.check(sampling(regex="yes"))
        with pytest.raises(InvalidRequest):
            await checks.check(sampling(regex="("))
    assert looked == ["yes", "(", "(", "("]
    for number in range(300):
        await checks.check(sampling(json_schema=json.dumps({"const": number})))
    assert len(checks._right) == 256
