"""The command line `warmkv`. Every import that takes time happens inside the command that needs it.

Covers: commands that start, end and inspect a fleet on this machine or on Ray. Does not cover: commands that ask a
running router (`cli_fleet`, `cli_cache`, `cli_requests`), what commands do (`up`, `doctor`, `demo`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy import cli_cache, cli_capacity, cli_fleet, cli_record, cli_replay, cli_requests, cli_size, cli_tune
from deploy.connection import Json
from deploy.failures import EXIT_CODES, UNHEALTHY, Failure, reports_failures
from deploy.setting_options import Assignments, ConfigFile

if TYPE_CHECKING:
    from deploy.layers import Loaded
    from router.protocol import WorkerAddress

app = typer.Typer(
    name="warmkv",
    help="Cache-aware router and persistent tiered K/V store for self-hosted language models. "
    "New here? Run: warmkv demo",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Show the settings and who set them.", no_args_is_help=True)
app.add_typer(config_app, name="config")

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="WARMKV_STATE_DIR",
        help="Where the own Ray is recorded.",
        show_default="~/.local/state/warmkv",
    ),
]
ModelDir = Annotated[Path | None, typer.Option("--model", "-m", metavar="DIR", help="Hugging Face model folder.")]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", metavar="HOST:PORT", help="Join this Ray; without it an own one is used.")
]
GrpcHost = Annotated[str | None, typer.Option(help="Where gRPC listens; 0.0.0.0 for all.", show_default="127.0.0.1")]
GrpcPort = Annotated[int | None, typer.Option(help="0: any free port.", show_default="50051")]
HttpHost = Annotated[str | None, typer.Option(help="Where HTTP listens.", show_default="127.0.0.1")]
HttpPort = Annotated[int | None, typer.Option(help="0: any free port.", show_default="8080")]
RedisUrl = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", help="Shared tier: a redis, redis+sentinel, redis+cluster or unix URL."),
]


def _print_version(asked: bool) -> None:
    if asked:
        from warmkv.versions import VERSION

        typer.echo(f"warmkv {VERSION}")
        raise typer.Exit


@app.callback()
def warmkv(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the whole program."""


@app.command(epilog="Example: warmkv demo --workers 2 --duration 30")
@reports_failures
def demo(
    duration: Annotated[float, typer.Option(min=1, help="About how many seconds the acts take.")] = 60.0,
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="How many workers.")] = 4,
    grpc_port: Annotated[int, typer.Option("--port", "--grpc-port", help="Of the router's gRPC.")] = 50051,
    http_port: Annotated[int, typer.Option(help="Of the dashboard.")] = 8080,
    as_json: Json = False,
) -> None:
    """See it work on this machine: a small model, real chats, three acts, live numbers. Downloads nothing."""
    from deploy.demo import DemoOptions, run_demo

    options = DemoOptions(duration_s=duration, workers=workers, as_json=as_json, ports=(grpc_port, http_port))
    raise typer.Exit(run_demo(options))


@app.command(epilog="Example: warmkv up --model ./Qwen3-0.6B --workers 2 --redis redis://localhost:6379")
@reports_failures
def up(
    model: ModelDir = None,
    workers: Annotated[int | None, typer.Option("--workers", "-n", min=0, help="How many.", show_default="1")] = None,
    redis: RedisUrl = None,
    config: ConfigFile = None,
    ray_address: RayAddress = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.", show_default="auto")] = None,
    engine: Annotated[str | None, typer.Option(help="torch or simulated.", show_default="torch")] = None,
    policy: Annotated[str | None, typer.Option(help="Routing policy at first.", show_default="cache_aware")] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="TOML of API keys.")] = None,
    grpc_host: GrpcHost = None,
    grpc_port: GrpcPort = None,
    http_host: HttpHost = None,
    http_port: HttpPort = None,
    assignments: Assignments = None,
    state_dir: StateDir = None,
    ephemeral: Annotated[bool, typer.Option("--ephemeral", help="End workers and own Ray with the router.")] = False,
) -> None:
    """Start workers and run a router in the foreground, until Ctrl-C or SIGTERM.

    Workers outlive the router: the next `warmkv up` finds them, caches warm, and `warmkv down` ends them.
    """
    from deploy.up import print_line
    from deploy.up import up as run

    loaded = _load(
        config,
        assignments,
        {
            "model.dir": model,
            "workers.count": workers,
            "workers.device": device,
            "workers.engine": engine,
            "redis.url": redis,
            "ray.address": ray_address,
            "router.policy": policy,
            "auth.api_keys_file": api_keys_file,
            "router.grpc_host": grpc_host,
            "router.grpc_port": grpc_port,
            "router.http_host": http_host,
            "router.http_port": http_port,
        },
    )
    _set_up_logging(loaded)
    asyncio.run(run(loaded, _state_dir(state_dir), ephemeral=ephemeral, say=print_line))


@app.command(epilog="Example: warmkv router --grpc-port 50052 --http-port 8081")
@reports_failures
def router(
    ray_address: RayAddress = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(
            "--worker", metavar="NAME=HOST:PORT", help="A worker at a fixed address; repeatable, without Ray."
        ),
    ] = None,
    model: ModelDir = None,
    config: ConfigFile = None,
    grpc_host: GrpcHost = None,
    grpc_port: GrpcPort = None,
    http_host: HttpHost = None,
    http_port: HttpPort = None,
    assignments: Assignments = None,
    state_dir: StateDir = None,
) -> None:
    """Run one more router for workers that are there already. Routers share policy, weights and drains.

    Finds the workers through Ray (that of --ray-address, or the one that `warmkv up` started here), and learns model
    and secret from them.
    """
    from deploy.up import print_line
    from deploy.up import router as run

    if worker and ray_address:
        raise Failure("give either --ray-address or --worker, not both", 2)
    loaded = _load(
        config,
        assignments,
        {
            "model.dir": model,
            "ray.address": ray_address,
            "router.grpc_host": grpc_host,
            "router.grpc_port": grpc_port,
            "router.http_host": http_host,
            "router.http_port": http_port,
        },
    )
    _set_up_logging(loaded)
    addresses = [_worker_address(text) for text in worker or ()]
    asyncio.run(run(loaded, _state_dir(state_dir), workers=addresses, say=print_line))


@app.command(epilog="Example: warmkv down")
@reports_failures
def down(
    ray_address: RayAddress = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    state_dir: StateDir = None,
) -> None:
    """End the workers, and the Ray that `warmkv up` started. Other programs' Ray is never touched.

    With --ray-address only warmkv's workers and their places on that Ray end.
    """
    from deploy.up import down as run
    from deploy.up import print_line

    loaded = _load(config, assignments, {"ray.address": ray_address})
    asyncio.run(run(loaded.settings, _state_dir(state_dir), say=print_line))


@app.command(epilog="Example: warmkv doctor --redis redis://localhost:6379")
@reports_failures
def doctor(
    redis: RedisUrl = None,
    model: ModelDir = None,
    ray_address: RayAddress = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    state_dir: StateDir = None,
    as_json: Json = False,
) -> None:
    """Check this machine and what the settings name; each line says what to do about it. Changes nothing."""
    from deploy.doctor import examine
    from deploy.render import findings_json, findings_text

    loaded = _load(config, assignments, {"redis.url": redis, "model.dir": model, "ray.address": ray_address})
    findings = examine(loaded.settings, _state_dir(state_dir))
    typer.echo(findings_json(findings) if as_json else findings_text(findings))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(UNHEALTHY)


@config_app.command("show", epilog="Example: WARMKV_STORE__HOST_BYTES=8GiB warmkv config show --config warmkv.toml")
@reports_failures
def config_show(
    config: ConfigFile = None,
    assignments: Assignments = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each setting means.")] = False,
    as_json: Json = False,
) -> None:
    """Print every setting, its value and its origin: default, file, env or flag. Secrets are masked.

    In a file: [store] host_bytes = "4GiB". In the environment: WARMKV_STORE__HOST_BYTES=4GiB. As a flag:
    --set store.host_bytes=4GiB. Each beats those before it.
    """
    from deploy.render import settings_json, settings_text

    rows = _load(config, assignments, {}).rows()
    typer.echo(settings_json(rows) if as_json else settings_text(rows, explain=explain))


def main() -> None:
    """What the script `warmkv` calls."""
    app()


def _load(config: Path | None, assignments: list[str] | None, flags: dict[str, object]) -> Loaded:
    from deploy.layers import load_settings, parse_assignments

    given = {key: value for key, value in flags.items() if value is not None}
    return load_settings(file=config, flags={**parse_assignments(assignments or []), **given})


def _state_dir(given: Path | None) -> Path:
    from deploy.state import default_state_dir

    return given if given is not None else default_state_dir()


def _set_up_logging(loaded: Loaded) -> None:
    import logging
    import sys

    from router.jsonlog import log_as_json

    settings = loaded.settings.router
    if settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty()):
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    else:
        log_as_json(settings.log_level)


def _worker_address(text: str) -> WorkerAddress:
    from router.protocol import WorkerAddress

    name, equals, address = text.partition("=")
    if not equals or not name or not address.rpartition(":")[2].isdigit():
        raise Failure(f"--worker {text}: write it as NAME=HOST:PORT, for example w0=10.0.0.7:7001", 2)
    return WorkerAddress(name, address)


cli_fleet.add_to(app)
cli_cache.add_to(app)
cli_requests.add_to(app)
cli_size.add_to(app)
cli_record.add_to(app)
cli_replay.add_to(app)
cli_tune.add_to(app)
cli_capacity.add_to(app)
