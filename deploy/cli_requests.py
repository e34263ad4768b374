"""Commands that send prompts: generate, chat, explain."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from deploy.connection import Connection, Json, asks_router
from deploy.failures import USAGE, Failure, reports_failures
from deploy.lifetime_options import ExpiresAt, FixedTtl, KeepPriority, Ttl, lifetime_options
from deploy.sampling_options import Shape, asks_shape

if TYPE_CHECKING:
    from warmkv.client import GenerateOptions
    from warmkv.stream import Stream

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="The text; - reads it from standard input.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0, max=100, help="0 is greedy.", show_default="1")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Keep the likeliest tokens up to this sum.", show_default="1")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Makes sampling repeatable.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the text: say nothing of cache and route.")]


def add_to(app: typer.Typer) -> None:
    """Put the commands into the app."""
    app.command(epilog='Example: warmkv generate "Once upon a time" --max-tokens 64')(generate)
    app.command(epilog='Example: warmkv chat --system "Be brief."')(chat)
    app.command(epilog='Example: warmkv explain "You are a travel agent. Plan a day in Rome."')(explain)


@reports_failures
@asks_router
@asks_shape
def generate(
    prompt: Prompt,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    ttl: Ttl = None,
    fixed_ttl: FixedTtl = False,
    expires_at: ExpiresAt = None,
    keep_priority: KeepPriority = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")] = None,
    *,
    shape: Shape,
    connection: Connection,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt; the text comes as it is made, several answers one after the other when all are there.

    Afterwards one line on standard error says how much of the prompt was cached, where it ran and why.
    """
    from deploy.render import generation_json, generation_text

    lifetime = lifetime_options(ttl, expires_at, keep_priority, fixed_ttl=fixed_ttl)
    common = _options(max_tokens, temperature, top_p, seed, stop)
    options = cast("GenerateOptions", {**common, **shape, **lifetime})
    with connection.client(timeout=None) as client:
        stream = client.generate(_text(prompt), **options)
        if as_json:
            typer.echo(generation_json(stream.result()))
            return
        _print_stream(stream)
    if not quiet:
        typer.echo(generation_text(stream), err=True)


@reports_failures
@asks_router
def chat(
    system: Annotated[str | None, typer.Option("--system", "-s", help="What the model is told first.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    ttl: Ttl = None,
    fixed_ttl: FixedTtl = False,
    expires_at: ExpiresAt = None,
    keep_priority: KeepPriority = None,
    *,
    connection: Connection,
    quiet: Quiet = False,
) -> None:
    """Talk with the model. Each turn finds the turns before it in the cache. Ctrl-D or /exit ends it.

    Without a terminal each line of standard input is a turn.
    """
    from deploy.render import generation_text

    lifetime = lifetime_options(ttl, expires_at, keep_priority, fixed_ttl=fixed_ttl)
    options: GenerateOptions = {**_options(max_tokens, temperature, top_p, seed, None), **lifetime}
    with connection.client(timeout=None) as client:
        conversation = client.chat(system=system, **options)
        while (said := _next_turn()) is not None:
            stream = conversation.send(said)
            _print_stream(stream)
            if not quiet:
                typer.echo(generation_text(stream), err=True)


@reports_failures
@asks_router
def explain(
    prompt: Prompt,
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Say what `generate` would decide for this prompt, and why. Changes nothing.

    Shows what each worker holds, the predicted milliseconds, the choice, and why the first missing block is missing.
    """
    from deploy.render import explain_text, message_json

    with connection.client() as client:
        answer = client.explain(_text(prompt))
    typer.echo(message_json(answer) if as_json else explain_text(answer))


def _options(
    max_tokens: int, temperature: float | None, top_p: float | None, seed: int | None, stop: list[str] | None
) -> GenerateOptions:
    options: GenerateOptions = {"max_tokens": max_tokens}
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    return options


def _print_stream(stream: Stream) -> None:
    if len(stream.samples) > 1:
        for sample in stream.result().samples:
            sys.stdout.write(f"--- answer {sample.index} ({sample.finish_reason})\n{sample.text}\n")
        return
    for piece in stream:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _text(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise Failure("the prompt is empty; give some text", USAGE)
    return text


def _next_turn() -> str | None:
    """The next line that says something; None at the end."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("you> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return None
        if line.strip():
            return line.strip()
