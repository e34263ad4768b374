"""Which constraints are refused before anything is encoded, and that good ones are looked at once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from router import constraints
from router.config import DEFAULT_CONSTRAINT_BYTES, MOST_CONSTRAINT_BYTES
from router.constraints import ConstraintChecks
from router.errors import InvalidRequest, NotSupported
from tests.deep_constraints import NAMES
from tests.router.rig import all_ready, generate, request, rig, tokens
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
        ({"regex": ""}, r"\.regex is empty; send a regular expression"),
        (
            {"regex": "a" * (DEFAULT_CONSTRAINT_BYTES + 1)},
            "16,385 bytes and this router takes 16,384; .* router.max_constraint_bytes",
        ),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a(?!b)"}, "look-around"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": "begin: /a/"}, "start"),
        ({"json_schema": "{"}, "JSON"),
        ({"json_schema": "[]"}, "no JSON object"),
        ({"json_schema": '{"type": "nonsense"}'}, "nonsense"),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "uniqueItems"),
        ({"json_schema": "[" * 15000}, "json_schema cannot be used"),
    ],
)
async def test_bad_ones_are_refused_with_what_is_wrong(kind: dict[str, Any], words: str) -> None:
    told: list[tuple[str, str]] = []
    with pytest.raises(InvalidRequest, match=words) as caught:
        await ConstraintChecks(lambda kind, verdict: told.append((kind, verdict))).check(sampling(**kind))
    verdict = "too_large" if "bytes" in words else "wrong"
    assert told == [(name, verdict) for name in kind if name != "json_object"]
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


@pytest.mark.asyncio
async def test_the_bound_is_a_setting_and_counts_bytes() -> None:
    checks = ConstraintChecks(max_bytes=10)
    await checks.check(sampling(regex="é" * 5))
    with pytest.raises(InvalidRequest, match="11 bytes and this router takes 10"):
        await checks.check(sampling(regex="é" * 5 + "a"))


@pytest.mark.asyncio
async def test_a_router_refuses_by_its_setting_before_any_worker_is_asked() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router(max_constraint_bytes=20)
        await all_ready(router, 1)
        body = request(tokens(1, 20), 4)
        body.sampling.ignore_eos = False
        body.sampling.constraint.regex = "a{1,3}" * 4
        with pytest.raises(InvalidRequest, match="24 bytes and this router takes 20"):
            await generate(router, body)
        assert router.metrics.constraints.labels("regex", "too_large")._value.get() == 1
        body.sampling.constraint.regex = "a{1,3}"
        with pytest.raises(NotSupported, match="simulated"):
            await generate(router, body)
        assert router.metrics.constraints.labels("regex", "right")._value.get() == 1


_LOOK_AT_ALL = """
import asyncio
from router.config import MOST_CONSTRAINT_BYTES
from router.constraints import ConstraintChecks
from router.errors import InvalidRequest
from tests.deep_constraints import NAMES, deep
from warmkv.v1 import common_pb2

async def look() -> None:
    checks = ConstraintChecks(max_bytes=MOST_CONSTRAINT_BYTES)
    for name in NAMES:
        print(name, flush=True)
        kind, text = deep(name, MOST_CONSTRAINT_BYTES)
        try:
            await checks.check(common_pb2.SamplingParams(constraint=common_pb2.Constraint(**{kind: text})))
        except InvalidRequest as error:
            print("refused:", error, flush=True)
    checks.close()

asyncio.run(look())
"""


def test_what_nests_as_deeply_as_its_size_allows_ends_no_router() -> None:
    done = subprocess.run([sys.executable, "-c", _LOOK_AT_ALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]} {done.stderr[-2000:]}"
    looked = done.stdout.splitlines()
    assert [line for line in looked if not line.startswith("refused:")] == [*NAMES]
    assert sum(line.startswith("refused:") for line in looked) < len(NAMES) // 2  # most were parsed to their depths


def test_no_bound_beyond_what_stacks_hold() -> None:
    with pytest.raises(ValueError, match="65,537; set at most 65,536"):
        ConstraintChecks(max_bytes=MOST_CONSTRAINT_BYTES + 1)
