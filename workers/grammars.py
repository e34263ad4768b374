"""Constraints on answers, compiled: which tokens may come next, and when an answer may end.

Covers: compiling beside the engine's thread, a bounded cache of what was compiled, the state of one answer. Does not
cover: applying a mask (`logits`), when a sequence may run (`anteroom`). The grammars are llguidance's: it follows a
grammar with a lazy lexer and an Earley parser, so that to compile takes milliseconds where an automaton over the whole
vocabulary would take seconds, and a mask some 50 us.

The state of an answer follows from its tokens alone: `Grammar.begin` replays them, wherever they were generated.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.deep_threads import deep_threads
from workers.protocol import Constraint

if TYPE_CHECKING:  # loaded by whoever compiles a grammar: an engine without any does not need it
    from llguidance import LLMatcher, LLTokenizer

_MOST_CACHED = 64
_THREADS = 2  # one that takes seconds does not hold up all others
# Routers refuse larger ones. The library recurses over rules that name rules: so much of them, nested as deeply as it
# allows, takes nearly 60 MiB of its thread's stack; masks take none of it.
_MOST_BYTES = 64 << 10
_STACK_BYTES = 256 << 20
# A run of blanks is a form of JSON that weak models never leave: one space, or a line break with its indentation.
_JSON_WHITESPACE = r"( |\n[ \t]{0,40})"
_ANY_OBJECT = '{"type": "object"}'
# Bounds of one grammar's memory (1 to 2 kB a state) and of the time of one mask; errors go to callers, so no internals.
_MOST_STATES = 50_000
# Steps of building a lexer: 0.1 s for one that needs more, where the library's own bound allows 1 s, and a tenth of
# it for the mask that finds that it cannot go on. Schemas and expressions of 16 KiB need far fewer.
_MOST_FUEL = 200_000
_WORDS = {
    "NoExtensionBias": "no answer can begin under it: its rules or references lead back to themselves without an end",
    "too many expressions constructed": "it stands for too many alternatives; use smaller repetitions, or none within"
    " others",
}


class ConstraintError(ValueError):
    """A constraint cannot be compiled, or grew beyond its bounds. Says what is wrong with it."""


class Progress:
    """How far one answer is in its grammar. Owned by one thread."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing can follow but its end."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def may_end(self) -> bool:
        """Whether the answer is whole as it is."""
        return self._matcher.is_accepting()

    def mask(self) -> bytes:
        """One bit for each row of the vocabulary, the lowest bit of a byte first: which tokens may come next.

        Raises:
            ConstraintError: the grammar is too complex to go on.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise ConstraintError(_in_one_line(self._matcher.get_error()))
        return mask

    def append(self, token_id: int) -> None:
        """A token was sampled from the mask. One that is not in it makes the next `mask` raise."""
        self._matcher.consume_token(token_id)


class Grammar:
    """A compiled constraint. Never changed, so any number of answers may begin from it."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def begin(self, generated_ids: Sequence[int] = ()) -> Progress:
        """The state of an answer of which these tokens are there already."""
        matcher = self._matcher.deep_copy()
        matcher.consume_tokens(list(generated_ids))
        return Progress(matcher)


class Grammars:
    """Compiles constraints for one tokenizer, in threads of its own. Owned by the engine's thread.

    Args:
        tokenizer_file: tokenizer.json. vocab_size: rows of the logits; those beyond the tokenizer are never allowed.
        end_tokens: those that end an answer, allowed when it is whole.
    """

    def __init__(self, tokenizer_file: Path, *, vocab_size: int, end_tokens: Sequence[int]) -> None:
        self._file, self._vocab_size, self._end_tokens = tokenizer_file, vocab_size, list(end_tokens)
        self._pool: ThreadPoolExecutor | None = None
        self._tokenizer: Future[LLTokenizer] | None = None
        self._compiled: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()

    def prepare(self) -> None:
        """Begin to read the tokenizer, which takes a second for a large vocabulary: else the first constraint does."""
        if self._tokenizer is None:
            self._tokenizer = self._threads().submit(self._read_tokenizer)

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """The compiled constraint, of the cache if it was asked for lately; the future's error is a ConstraintError."""
        known = self._compiled.get(constraint)
        if known is None:
            self.prepare()
            known = self._compiled[constraint] = self._threads().submit(self._compile, constraint)
            while len(self._compiled) > _MOST_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return known

    def close(self) -> None:
        """Compile nothing more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = deep_threads(_THREADS, stack_bytes=_STACK_BYTES, name="grammar")
        return self._pool

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = self._file.read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._end_tokens or None)

    def _compile(self, constraint: Constraint) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        if self._tokenizer is None:  # pragma: no cover - compile has just asked for it
            raise ConstraintError("the tokenizer was not read")
        tokenizer = self._tokenizer.result()
        source = source_of(constraint)
        limits = LLParserLimits(initial_lexer_fuel=_MOST_FUEL, max_lexer_states=_MOST_STATES, verbose_errors=False)
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # builds the lexer's first states, which all that begin from it share, here
        if matcher.is_error():
            raise ConstraintError(_in_one_line(matcher.get_error()))
        return Grammar(matcher)


def source_of(constraint: Constraint) -> str:
    """The library's form of a constraint.

    Raises:
        ConstraintError: it is no JSON, or of an unknown kind, or too large.
    """
    if len(constraint.text.encode()) > _MOST_BYTES:
        raise ConstraintError(f"a worker takes {_MOST_BYTES:,} bytes of a constraint at most")
    make = _SOURCES.get(constraint.kind)
    if make is None:
        raise ConstraintError(f"there is no constraint of the kind {constraint.kind!r}")
    try:
        return make(constraint.text)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(str(error)) from error


def _schema_source(text: str) -> str:
    from llguidance import LLMatcher

    if not isinstance(json.loads(text), dict):  # the library takes the schema `true` for an object's default
        raise ValueError("the schema is no JSON object")
    return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _JSON_WHITESPACE})


def _regex_source(text: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(text)


def _lark_source(text: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(text)


_SOURCES: dict[str, Callable[[str], str]] = {
    "json_schema": _schema_source,
    "json_object": lambda _: _schema_source(_ANY_OBJECT),
    "regex": _regex_source,
    "grammar": _lark_source,
}


def _in_one_line(message: str) -> str:
    """Of the library's message what helps its caller."""
    text = " ".join(message.split("\n<state>")[0].replace("<non-verbose/>", "").split())
    return next((words for internal, words in _WORDS.items() if internal in text), text)[:500]
