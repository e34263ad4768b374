"""The options that shape an answer, as people write them: filters, penalties, bias, constraints, how many answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from deploy.failures import USAGE, Failure
from deploy.option_groups import asks_for

R = TypeVar("R")
Shape = dict[str, Any]  # a part of `warmkv.client.GenerateOptions`, which is not imported before it is needed

TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Keep so many of the likeliest tokens; 0: all.")]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Drop tokens less likely than this share of the likeliest one.")
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1: against tokens of prompt and answer.", show_default="1"),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option("--presence-penalty", help="-2 to 2: against tokens that the answer has.", show_default="0"),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option("--frequency-penalty", help="-2 to 2: likewise, for each time it has them.", show_default="0"),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", metavar="ID=BIAS", help="Added to a token's logit, -100 to 100; repeatable."),
]
JsonObject = Annotated[bool, typer.Option("--json-object", help="The answer is a JSON object.")]
JsonSchema = Annotated[
    str | None,
    typer.Option("--json-schema", metavar="FILE", help="The answer is JSON that is valid under this schema; -: stdin."),
]
Regex = Annotated[str | None, typer.Option("--regex", help="The whole answer matches this regular expression.")]
Grammar = Annotated[
    str | None,
    typer.Option("--grammar", metavar="FILE", help="The answer is in the language of this Lark grammar; -: stdin."),
]
Count = Annotated[int | None, typer.Option("--n", "-n", min=1, max=64, help="So many answers.", show_default="1")]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", min=0, max=20, help="With --json: log-probabilities, with so many alternatives."),
]

Adapter = Annotated[str | None, typer.Option("--adapter", help="A LoRA adapter; none are served yet.")]


def asks_shape(command: Callable[..., R]) -> Callable[..., R]:
    """Gives a command these options in the place of its argument `shape`, which gets a `Shape`."""
    return asks_for("shape", shape_options, command)


def shape_options(
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    json_object: JsonObject = False,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    n: Count = None,
    logprobs: Logprobs = None,
    adapter: Adapter = None,
) -> Shape:
    """What the client takes.

    Raises:
        Failure: a value or a file cannot be read, or several constraints were given.
    """
    given: Shape = {
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "n": n,
        "logprobs": logprobs,
        "adapter": adapter,
        "regex": regex,
        "json_object": json_object or None,
        "json_schema": None if json_schema is None else _content("--json-schema", json_schema),
        "grammar": None if grammar is None else _content("--grammar", grammar),
        "logit_bias": dict(map(_biased, logit_bias)) if logit_bias else None,
    }
    if sum(given[kind] is not None for kind in ("regex", "json_object", "json_schema", "grammar")) > 1:
        raise Failure("give one of --json-object, --json-schema, --regex and --grammar at most", USAGE)
    return {name: value for name, value in given.items() if value is not None}


def _biased(entry: str) -> tuple[int, float]:
    token, _, bias = entry.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise Failure(f"--logit-bias {entry}: write it as ID=BIAS, for example 42=-100", USAGE) from None


def _content(option: str, file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.read()
        with open(file, encoding="utf-8") as content:
            return content.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{option} {file} cannot be read ({error}); give a text file in UTF-8, or -", USAGE) from None
