"""Commands about cached blocks: ls, stats, warm, pin, unpin, clear, check. They ask a router over gRPC.

Covers: options, and which exit code an answer means. Does not cover: how prompts are named (`named_prompts`), what is
printed (`render_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from deploy.connection import WAIT_TIMEOUT_S, Connection, Json, asks_router
from deploy.failures import FAILED, UNHEALTHY, USAGE, Failure, reports_failures
from deploy.lifetime_options import ExpiresAt, FixedTtl, KeepPriority, Ttl, lifetime_options, whole_seconds
from deploy.named_prompts import Messages, OfTenant, Prefix, clear_request, prompt_options, scope_options

if TYPE_CHECKING:
    from warmkv.client import Client, PromptOptions
    from warmkv.v1 import admin_pb2

T = TypeVar("T")
PAGE = 1000  # the most that the router gives in one answer

cache_app = typer.Typer(
    help="Look into the cache, and change what is in it. Blocks are runs of tokens (16 by default) whose K/V is kept.",
    no_args_is_help=True,
)


class TierChoice(StrEnum):
    """Where blocks may lie."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REDIS = "redis"


OnWorkers = Annotated[
    list[str] | None,
    typer.Option("--worker", "-w", metavar="WORKER", help="Only there; repeatable.", show_default="all"),
]


def add_to(app: typer.Typer) -> None:
    """Put the commands into the app."""
    app.add_typer(cache_app, name="cache")


@cache_app.command("ls", epilog="Example: warmkv cache ls --tenant search --tier host --limit 20")
@reports_failures
@asks_router
def cache_ls(
    tenant: OfTenant = None,
    prefix: Prefix = None,
    messages: Messages = None,
    worker: Annotated[
        str | None, typer.Option("--worker", "-w", metavar="WORKER", help="Only blocks of this worker.")
    ] = None,
    tier: Annotated[TierChoice | None, typer.Option("--tier", help="Only blocks that lie there.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Show at most so many blocks; 0: all.")] = 100,
    page_token: Annotated[
        str,
        typer.Option("--page-token", metavar="TOKEN", help="Go on where an earlier list ended.", show_default=False),
    ] = "",
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """List cached blocks: whose they are, where they lie, how long they still live.

    With a prompt: its last full block and all that follow it, and how much of the prompt each worker holds. A block
    that several workers hold is listed once for each. Exits with 4 when a worker did not answer.
    """
    from deploy.render import message_json
    from deploy.render_cache import print_blocks

    prompt = prompt_options(tenant, prefix, messages)
    with connection.client(timeout=WAIT_TIMEOUT_S) as client:
        found = _pages(client, prompt, worker=worker or "", tier=tier or "", limit=limit, token=page_token)
    _show(found, message_json, print_blocks, as_json=as_json)
    if found.problems:
        raise typer.Exit(UNHEALTHY)


@cache_app.command("stats", epilog="Example: warmkv cache stats --worker w0")
@reports_failures
@asks_router
def cache_stats(
    worker: Annotated[
        str, typer.Option("--worker", "-w", metavar="WORKER", help="Only of this.", show_default=False)
    ] = "",
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Show every tier of every worker: how full it is, hits, misses with their reasons, what was stored and removed.

    Counts are of blocks, since the worker started.
    """
    from deploy.render import message_json
    from deploy.render_cache import print_stats

    with connection.client() as client:
        answer = client.cache_stats(worker)
    _show(answer, message_json, print_stats, as_json=as_json)


@cache_app.command("warm", epilog="Example: warmkv cache warm --compute - < system_prompt.txt")
@reports_failures
@asks_router
def cache_warm(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The text; - reads it from standard input.", show_default=False),
    ] = None,
    messages: Messages = None,
    compute: Annotated[
        bool, typer.Option("--compute", help="Compute what no tier holds; waits until it is done.")
    ] = False,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Whose prompt it is.", show_default="yours")] = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(
            "--worker", "-w", metavar="WORKER", help="There; repeatable.", show_default="where the prompt would be sent"
        ),
    ] = None,
    ttl: Ttl = None,
    fixed_ttl: FixedTtl = False,
    expires_at: ExpiresAt = None,
    keep_priority: KeepPriority = None,
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Bring a prompt's blocks up before it is asked for, so that the first request is fast already.

    Without --compute blocks that only slow tiers (disk, Redis) hold begin to be read into host RAM. With it, what
    nobody holds is computed, by a request of one token at the lowest priority.
    """
    from deploy.render import message_json
    from deploy.render_cache import print_warmed

    lifetime = lifetime_options(ttl, expires_at, keep_priority, fixed_ttl=fixed_ttl)
    options = prompt_options(tenant, prompt, messages, name="PROMPT")
    if not options.keys() - {"tenant"}:
        raise Failure("give a PROMPT, or --messages FILE", USAGE)
    with connection.client(timeout=WAIT_TIMEOUT_S) as client:
        answer = client.warm(workers=worker or (), compute=compute, **options, **lifetime)
    _show(answer, message_json, print_warmed, as_json=as_json)
    _fail_on_problems(each.problem for each in answer.workers)


@cache_app.command("pin", epilog="Example: warmkv cache pin --tenant search --prefix - --for 24h < system_prompt.txt")
@reports_failures
@asks_router
def cache_pin(
    tenant: OfTenant = None,
    prefix: Prefix = None,
    messages: Messages = None,
    duration: Annotated[
        str, typer.Option("--for", metavar="DURATION", help="From now: 5m, 30m, 1h, 24h, ...; or `ever`: until unpin.")
    ] = "1h",
    worker: OnWorkers = None,
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Keep blocks: neither eviction nor their time to live drops them. `clear` does.

    With a prompt: its own full blocks; with --tenant alone: all that the tenant has now. Blocks that come later are
    not pinned, and Redis promises nothing. Pins on disk outlive a restart of their worker, those in host RAM do not. To
    pin what nobody holds yet, run `warmkv cache warm --compute` first.
    """
    from deploy.render import message_json
    from deploy.render_cache import print_pinned

    seconds = None if duration == "ever" else whole_seconds("--for", duration)
    options = scope_options(tenant, prefix, messages)
    with connection.client(timeout=WAIT_TIMEOUT_S) as client:
        answer = client.pin(seconds=seconds, workers=worker or (), **options)
    _show(answer, message_json, print_pinned, as_json=as_json)
    _fail_on_problems(each.problem for each in answer.workers)


@cache_app.command("unpin", epilog="Example: warmkv cache unpin --tenant search")
@reports_failures
@asks_router
def cache_unpin(
    tenant: OfTenant = None,
    prefix: Prefix = None,
    messages: Messages = None,
    worker: OnWorkers = None,
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Keep blocks no longer than others: ends what `pin` began.

    With a prompt: its own full blocks; with --tenant alone: all that the tenant has now.
    """
    from deploy.render import message_json
    from deploy.render_cache import print_unpinned

    options = scope_options(tenant, prefix, messages)
    with connection.client(timeout=WAIT_TIMEOUT_S) as client:
        answer = client.unpin(workers=worker or (), **options)
    _show(answer, message_json, print_unpinned, as_json=as_json)
    _fail_on_problems(each.problem for each in answer.workers)


@cache_app.command("clear", epilog="Example: warmkv cache clear --tenant search --prefix - < prompt.txt")
@reports_failures
@asks_router
def cache_clear(
    everything: Annotated[bool, typer.Option("--all", help="Every block of every tenant.")] = False,
    tenant: Annotated[
        str | None, typer.Option(help="Every block of one tenant; with a prompt: whose.", show_default=False)
    ] = None,
    prefix: Prefix = None,
    messages: Messages = None,
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Drop cached blocks from all tiers, pinned ones too; returns when every worker has confirmed.

    --prefix takes text of at least one block of tokens, --messages a chat; the last full block of it and all that
    follow it are dropped, of your tenant unless --tenant names another. Prompts sent as chats do not match a text,
    since the chat template writes around each message.
    """
    from deploy.render import message_json
    from deploy.render_cache import print_cleared

    given = prompt_options(tenant, prefix, messages)
    if everything == bool(given):
        raise Failure("give --all, or --tenant TENANT, or a prompt by --prefix TEXT or --messages FILE", USAGE)
    with connection.client(timeout=WAIT_TIMEOUT_S) as client:
        answer = client.clear_cache(clear_request(client, given))
    _show(answer, message_json, print_cleared, as_json=as_json)


@cache_app.command("check", epilog="Example: warmkv cache check")
@reports_failures
@asks_router
def cache_check(
    worker: OnWorkers = None,
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Audit the stores of the workers: what their indexes say against the blocks that they hold.

    A worker's decoding stands still meanwhile, some 25 ms for every 1,000 blocks that it holds. Exits with 4 when a
    store is wrong, which is a defect to report, or a worker could not be asked.
    """
    from deploy.render import message_json
    from deploy.render_cache import print_checked

    with connection.client(timeout=WAIT_TIMEOUT_S) as client:
        answer = client.check_store(worker or ())
    _show(answer, message_json, print_checked, as_json=as_json)
    if any(each.wrong or each.problem for each in answer.workers):
        raise typer.Exit(UNHEALTHY)


def _pages(
    client: Client, prompt: PromptOptions, *, worker: str, tier: str, limit: int, token: str
) -> admin_pb2.ListBlocksResponse:
    """Pages until there are `limit` blocks (0: all), as one answer."""
    from warmkv.v1 import admin_pb2

    found = admin_pb2.ListBlocksResponse(next_page_token=token)
    while True:
        size = PAGE if not limit else min(PAGE, limit - len(found.blocks))
        page = client.list_blocks(worker=worker, tier=tier, page_size=size, page_token=found.next_page_token, **prompt)
        found.next_page_token = ""
        found.ClearField("prompt_held")  # every page has the whole of it
        found.MergeFrom(page)
        if not found.next_page_token or len(found.blocks) == limit:
            return found


def _show(answer: T, as_text: Callable[[T], str], show: Callable[[T], None], *, as_json: bool) -> None:
    if as_json:
        typer.echo(as_text(answer))
    else:
        show(answer)


def _fail_on_problems(problems: Iterable[str]) -> None:
    if any(problems):
        raise typer.Exit(FAILED)
