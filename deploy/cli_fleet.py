"""Commands about a running fleet: status, scale, drain, undrain, policy. They ask a router over gRPC."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.connection import ASK_TIMEOUT_S, WAIT_TIMEOUT_S, Connection, Json, asks_router
from deploy.failures import UNHEALTHY, USAGE, Failure, reports_failures

policy_app = typer.Typer(help="Show or change how requests are routed.", no_args_is_help=True)

WorkerName = Annotated[str, typer.Argument(metavar="WORKER", help="Its name, for example w0.")]


def add_to(app: typer.Typer) -> None:
    """Put the commands into the app."""
    app.command(epilog="Example: warmkv status --json")(status)
    app.command(epilog="Example: warmkv scale --workers 4")(scale)
    app.command(epilog="Example: warmkv drain w2")(drain)
    app.command(epilog="Example: warmkv undrain w2")(undrain)
    app.add_typer(policy_app, name="policy")


@reports_failures
@asks_router
def status(
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Show the workers, how full their tiers are, the policy and the hit rate.

    Exits with 4 when no worker is ready, or one is lost, silent or refused.
    """
    from deploy.render import is_healthy, message_json, status_text

    with connection.client() as client:
        stats = next(iter(client.watch_stats(period_ms=1000, timeout=ASK_TIMEOUT_S)), None)
    if stats is None:
        raise Failure(f"the router at {connection.router} ended before it answered; try it again")
    typer.echo(message_json(stats) if as_json else status_text(stats))
    if not is_healthy(stats):
        raise typer.Exit(UNHEALTHY)


@reports_failures
@asks_router
def scale(
    workers: Annotated[int, typer.Option("--workers", "-n", min=0, max=1024, help="How many there should be.")],
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Start or end workers until there are that many; the highest numbers end first.

    Does not wait until started workers are ready; waits until ended ones have finished what they ran and are gone.
    """
    from deploy.render import message_json

    with connection.client(timeout=WAIT_TIMEOUT_S) as client:
        answer = client.scale(workers)
    if as_json:
        typer.echo(message_json(answer))
        return
    typer.echo(f"starting {', '.join(answer.started)}" if answer.started else "started none")
    typer.echo(f"ended {', '.join(answer.stopped)}" if answer.stopped else "ended none")


@reports_failures
@asks_router
def drain(
    worker: WorkerName,
    *,
    hand_over: Annotated[
        bool, typer.Option("--hand-over", help="What runs there goes on at other workers, without a token lost.")
    ] = False,
    after: Annotated[
        str, typer.Option("--after", metavar="DURATION", help="With --hand-over: so long it may still finish there.")
    ] = "0s",
    connection: Connection,
) -> None:
    """Send a worker nothing new, on all routers; what runs there goes on. `undrain` takes it back."""
    after_s = _after(after, hand_over=hand_over)
    with connection.client() as client:
        running = client.drain(worker, hand_over_after_s=after_s)
    then = "" if after_s is None else f" and go on at other workers {f'after {after}' if after_s else 'now'}"
    typer.echo(f"{worker} is drained; {running} requests still run there{then}")


@reports_failures
@asks_router
def undrain(
    worker: WorkerName,
    *,
    connection: Connection,
) -> None:
    """Send requests to a drained worker again."""
    with connection.client() as client:
        client.undrain(worker)
    typer.echo(f"{worker} takes requests again")


@policy_app.command("show", epilog="Example: warmkv policy show")
@reports_failures
@asks_router
def policy_show(
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Show the policy in force, its weights, and the policies that can be set."""
    from deploy.render import message_json, policy_text

    with connection.client() as client:
        answer = client.get_policy()
    typer.echo(message_json(answer) if as_json else policy_text(answer))


@policy_app.command("set", epilog="Example: warmkv policy set cache_aware --weight load=2 --weight tie_ms=5")
@reports_failures
@asks_router
def policy_set(
    name: Annotated[str, typer.Argument(metavar="NAME", help="See `warmkv policy show`.")],
    weight: Annotated[list[str] | None, typer.Option("--weight", "-w", metavar="KEY=VALUE", help="Repeatable.")] = None,
    shared_tier_reads: Annotated[
        bool | None,
        typer.Option("--shared-tier-reads/--no-shared-tier-reads", help="Whether workers read blocks from Redis."),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Only score the live requests with it; see `warmkv policy shadow`.")
    ] = False,
    *,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Change the policy: from the next request on, on all routers within a second.

    `warmkv policy rollback` returns to what was in force before.
    """
    from deploy.render import message_json, weights_text

    weights = dict(_weight(text) for text in weight or ())
    if shadow:
        _set_shadow(connection, name, weights, shared_tier_reads)
        return
    with connection.client() as client:
        answer = client.set_policy(name, weights, shared_tier_reads=shared_tier_reads)
    typer.echo(
        message_json(answer) if as_json else f"{answer.policy.name} {weights_text(answer.policy.weights)}".strip()
    )


@policy_app.command("shadow", epilog="Example: warmkv policy shadow")
@reports_failures
@asks_router
def policy_shadow(
    *,
    stop: Annotated[bool, typer.Option("--stop", help="End the shadow.")] = False,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Show what the shadow policy would have done with the requests of this router, or end it."""
    from deploy.render import message_json
    from deploy.render_policy import shadow_text

    with connection.client() as client:
        if stop:
            client.set_shadow_policy()
        answer = client.get_policy()
    if stop:
        typer.echo("no policy scores beside the one in force")
    elif as_json:
        typer.echo(message_json(answer.shadow))
    else:
        typer.echo(shadow_text(answer))


@policy_app.command("rollback", epilog="Example: warmkv policy rollback --to 7")
@reports_failures
@asks_router
def policy_rollback(
    *,
    to: Annotated[
        int, typer.Option("--to", metavar="VERSION", min=0, help="A version of `policy history`; 0: before the last.")
    ] = 0,
    connection: Connection,
    as_json: Json = False,
) -> None:
    """Return to the policy before the last change; once more returns to where you were."""
    from deploy.render import message_json, weights_text

    with connection.client() as client:
        answer = client.rollback_policy(to)
    text = f"{answer.policy.name} {weights_text(answer.policy.weights)}".strip()
    typer.echo(message_json(answer) if as_json else f"version {answer.version}: {text}")


@policy_app.command("history", epilog="Example: warmkv policy history")
@reports_failures
@asks_router
def policy_history(*, connection: Connection, as_json: Json = False) -> None:
    """Show the last changes of the policy: when, by whom, from what to what."""
    from deploy.render_policy import history_json, history_text

    with connection.client() as client:
        answer = client.get_policy()
    typer.echo(history_json(answer) if as_json else history_text(answer))


def _set_shadow(connection: Connection, name: str, weights: dict[str, float], shared_tier_reads: bool | None) -> None:
    if shared_tier_reads is not None:
        raise Failure("--shadow scores decisions only; leave --shared-tier-reads out", USAGE)
    with connection.client() as client:
        client.set_shadow_policy(name, weights)
    typer.echo(f"{name} scores the live requests; `warmkv policy shadow` shows what it would have done")


def _after(text: str, *, hand_over: bool) -> float | None:
    from deploy.quantities import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise Failure(f"--after {text}: {error}", USAGE) from None
    if seconds and not hand_over:
        raise Failure("--after is for --hand-over; add that, or leave it out", USAGE)
    return seconds if hand_over else None


def _weight(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        return key, float(value)
    except ValueError:
        raise Failure(f"--weight {text}: write it as KEY=NUMBER, for example load=2", USAGE) from None
