"""The options by which operators name blocks: a prompt's, a tenant's; and what a client's call takes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.failures import USAGE, Failure

if TYPE_CHECKING:
    from warmkv.client import Client, PromptOptions
    from warmkv.v1 import admin_pb2

OfTenant = Annotated[
    str | None, typer.Option("--tenant", help="Whose blocks; with a prompt: yours when left out.", show_default=False)
]
Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix", metavar="TEXT", help="A prompt's text, as `warmkv generate` takes it; - reads standard input."
    ),
]
Messages = Annotated[
    str | None,
    typer.Option(
        "--messages",
        metavar="FILE",
        help='A chat instead of a text, as JSON: [{"role": "system", "content": "..."}]; - reads standard input.',
    ),
]


def prompt_options(
    tenant: str | None, text: str | None, messages: str | None, *, name: str = "--prefix"
) -> PromptOptions:
    """What a client's call takes. A chat ends without the cue for an answer, so that longer chats begin with it.

    Raises:
        Failure: both a text and a chat are given, or the file holds no chat. `name`: what the text's option is called.
    """
    if text is not None and messages is not None:
        raise Failure(f"give either {name} or --messages, not both", USAGE)
    options: PromptOptions = {}
    if tenant:
        options["tenant"] = tenant
    if text is not None:
        options["text"] = sys.stdin.read() if text == "-" else text
    elif messages is not None:
        options["messages"] = _chat(messages)
        options["add_generation_prompt"] = False
    return options


def scope_options(tenant: str | None, prefix: str | None, messages: str | None) -> PromptOptions:
    """The same, where something must be named. Raises Failure."""
    options = prompt_options(tenant, prefix, messages)
    if not options:
        raise Failure("give a prompt by --prefix TEXT or --messages FILE, or --tenant TENANT, or both", USAGE)
    return options


def _chat(file: str) -> list[dict[str, str]]:
    try:
        chat = json.loads(sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Failure(f"--messages {file}: {error}; give a file with a JSON list of messages", USAGE) from None
    keys = {"role", "content"}
    if not isinstance(chat, list) or not all(isinstance(each, dict) and each.keys() == keys for each in chat):
        raise Failure(
            f'--messages {file}: it is no list of messages; write [{{"role": "system", "content": "..."}}]', USAGE
        )
    return chat


def clear_request(client: Client, given: PromptOptions) -> admin_pb2.ClearCacheRequest:
    """A prompt's blocks, else a tenant's, else all."""
    from warmkv.v1 import admin_pb2

    tenant = given.pop("tenant", "")
    if not given:
        return admin_pb2.ClearCacheRequest(tenant=tenant) if tenant else admin_pb2.ClearCacheRequest(all=True)
    text = given.pop("text", None)
    ids = client.tokenize(text, **given).token_ids  # type: ignore[misc]
    return admin_pb2.ClearCacheRequest(prefix=admin_pb2.ClearCacheRequest.Prefix(token_ids=ids, tenant=tenant))
