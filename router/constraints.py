"""Whether a constraint on an answer can be used at all, told before anything is encoded.

Covers: its size, what it must not go with, and its syntax by the library that workers compile it with. Does not cover:
whether it fits the model's tokens, which its worker finds out. Most take a millisecond or two; as large ones take a
hundred, they are looked at in a thread, and those that were right lately are not looked at again.

Why there is a bound: to compile one takes up to 10 ms of a core for each KiB on its worker, and half as much here, and
on a worker whose model computes on the CPU steps last up to twice as long meanwhile (measured, see docs/sampling.md).
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum

from llguidance import LLMatcher

from kvstore.deep_threads import deep_threads
from router.config import DEFAULT_CONSTRAINT_BYTES, MOST_CONSTRAINT_BYTES
from router.errors import InvalidRequest
from warmkv.v1 import common_pb2

_MOST_REMEMBERED = 256
_THREADS = 2  # one that takes long does not hold up all others
# The library recurses over rules that name rules: 64 KiB of them, nested as deeply as it allows, take nearly 60 MiB.
_STACK_BYTES = 256 << 20
_NAMES = {"json_schema": "a JSON Schema", "regex": "a regular expression", "grammar": "a grammar in Lark syntax"}


class Verdict(StrEnum):
    """What came of looking at a constraint."""

    RIGHT = "right"
    WRONG = "wrong"
    TOO_LARGE = "too_large"


class ConstraintChecks:
    """Checks, and remembers what was right. Owned by one event loop."""

    def __init__(
        self,
        count: Callable[[str, Verdict], None] = lambda kind, verdict: None,
        *,
        max_bytes: int = DEFAULT_CONSTRAINT_BYTES,
    ) -> None:
        """`count` is told of each constraint of a known kind. `max_bytes`: of the text of one, in UTF-8.

        Raises:
            ValueError: more than `MOST_CONSTRAINT_BYTES`.
        """
        if max_bytes > MOST_CONSTRAINT_BYTES:
            raise ValueError(f"max_constraint_bytes is {max_bytes:,}; set at most {MOST_CONSTRAINT_BYTES:,}")
        self._count, self._max_bytes = count, max_bytes
        self._right: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    async def check(self, sampling: common_pb2.SamplingParams) -> None:
        """Raises InvalidRequest unless its constraint, if it has one, can be used."""
        if not sampling.HasField("constraint"):
            return
        kind = sampling.constraint.WhichOneof("kind")
        if kind is None:
            raise _wrong("is empty; set one of json_schema, regex, grammar and json_object, or leave it out.")
        if sampling.ignore_eos:
            raise _wrong("and ignore_eos exclude one another, as the end token tells where it ends; leave one out.")
        if kind == "json_object":
            if not sampling.constraint.json_object:
                raise _wrong(".json_object is false; set it to true, or leave the constraint out.")
            self._count(kind, Verdict.RIGHT)
            return
        await self._check_text(kind, getattr(sampling.constraint, kind))
        self._count(kind, Verdict.RIGHT)

    async def _check_text(self, kind: str, text: str) -> None:
        size = len(text.encode())
        if not size:
            self._count(kind, Verdict.WRONG)
            raise _wrong(f".{kind} is empty; send {_NAMES[kind]}, or leave the constraint out.")
        if size > self._max_bytes:
            self._count(kind, Verdict.TOO_LARGE)
            raise _wrong(
                f".{kind} has {size:,} bytes and this router takes {self._max_bytes:,}; leave out descriptions and"
                " what repeats, or have the operator raise router.max_constraint_bytes."
            )
        if (kind, text) not in self._right:
            problem = await asyncio.get_running_loop().run_in_executor(self._threads(), _problem, kind, text)
            if problem:
                self._count(kind, Verdict.WRONG)
                raise _wrong(f".{kind} cannot be used: {problem}. Send {_NAMES[kind]} that the library takes.")
        self._right[kind, text] = None
        self._right.move_to_end((kind, text))
        if len(self._right) > _MOST_REMEMBERED:
            self._right.popitem(last=False)

    def close(self) -> None:
        """Look at nothing more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = deep_threads(_THREADS, stack_bytes=_STACK_BYTES, name="constraints")
        return self._pool


def _problem(kind: str, text: str) -> str:
    """What is wrong with it; empty: nothing that shows without the model's tokens."""
    try:
        if kind == "json_schema" and not isinstance(json.loads(text), dict):
            return "the schema is no JSON object"
        source = _source(kind, text)
    except (ValueError, RecursionError) as error:
        return str(error)
    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(source)
    return " ".join(" ".join(messages).split())[:500] if is_wrong else ""


def _source(kind: str, text: str) -> str:
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(text)
    return LLMatcher.grammar_from_regex(text) if kind == "regex" else LLMatcher.grammar_from_lark(text)


def _wrong(what: str) -> InvalidRequest:
    separator = "" if what.startswith(".") else " "
    return InvalidRequest(f"sampling.constraint{separator}{what}", field="sampling.constraint")
