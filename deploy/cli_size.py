"""The command `warmkv size`: what a store of given sizes would hold of a model, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.connection import Json
from deploy.failures import USAGE, Failure, reports_failures
from deploy.setting_options import Assignments, ConfigFile

if TYPE_CHECKING:
    from kvstore.layout import KVLayout

TIERS = ("device", "host", "disk", "redis")


def _bytes_option(tier: str, default: str) -> Any:
    return typer.Option(f"--{tier}-bytes", metavar="SIZE", help=f"Of the {tier} tier.", show_default=default)


DeviceBytes = Annotated[str | None, _bytes_option("device", "store.device_bytes")]
HostBytes = Annotated[str | None, _bytes_option("host", "store.host_bytes")]
DiskBytes = Annotated[str | None, _bytes_option("disk", "store.disk_bytes")]
RedisBytes = Annotated[
    str | None,
    typer.Option("--redis-bytes", metavar="SIZE", help="The server's maxmemory, for the whole fleet."),
]


def add_to(app: typer.Typer) -> None:
    """Put the command into the app."""
    app.command(epilog="Example: warmkv size --model ./Qwen3-0.6B --host-bytes 64GiB --prefill-tokens-per-s 30000")(
        size
    )


@reports_failures
def size(
    model: Annotated[
        Path | None, typer.Option("--model", "-m", metavar="PATH", help="Model folder, or its config.json alone.")
    ] = None,
    device_bytes: DeviceBytes = None,
    host_bytes: HostBytes = None,
    disk_bytes: DiskBytes = None,
    redis_bytes: RedisBytes = None,
    prefill_tokens_per_s: Annotated[
        float | None,
        typer.Option(
            "--prefill-tokens-per-s",
            metavar="N",
            help="Of one worker: 1,000,000 / the `ms/1k prefill` that `warmkv status` shows.",
        ),
    ] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option("--bandwidth", metavar="TIER=SIZE", help="Bytes a second of a tier, as redis=1GB; repeatable."),
    ] = None,
    conversation_tokens: Annotated[
        int, typer.Option("--conversation-tokens", min=1, help="How long a conversation is.")
    ] = 10_000,
    workers: Annotated[
        int | None, typer.Option("--workers", "-n", min=1, help="How many.", show_default="workers.count")
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: Json = False,
) -> None:
    """Tell how much of a model's K/V the tiers hold, and how fast a tier must be to beat computing.

    Reads config.json only, no weights; sizes that are not given are those of the settings. Models whose K/V is no plain
    pair for each head and layer (latent attention, hybrid layers) are refused, and so are types that were never
    compared with a running model.
    """
    from deploy.layers import load_settings, parse_assignments
    from deploy.render_size import size_json, size_text
    from deploy.size import plan_sizes

    store_sizes = {"store.device_bytes": device_bytes, "store.host_bytes": host_bytes, "store.disk_bytes": disk_bytes}
    flags = {"model.dir": model, "workers.count": workers, **store_sizes}
    given = {key: value for key, value in flags.items() if value is not None}
    settings = load_settings(file=config, flags={**parse_assignments(assignments or []), **given}).settings
    store = settings.store
    if prefill_tokens_per_s is not None and not 0 < prefill_tokens_per_s < float("inf"):
        raise Failure(f"--prefill-tokens-per-s {prefill_tokens_per_s}: give tokens a second, more than zero", USAGE)
    speeds = dict(_bandwidth(text) for text in bandwidth or ())
    redis_nbytes = 0 if redis_bytes is None else _size("--redis-bytes", redis_bytes)
    capacities = dict(zip(TIERS, (store.device_bytes, store.host_bytes, store.disk_bytes, redis_nbytes), strict=True))
    plan = plan_sizes(
        layout_of_model(settings.model.dir, settings.model.dtype, store.block_size, settings.engine.kv_dtype),
        capacities,
        workers=max(1, settings.workers.count),
        conversation_tokens=conversation_tokens,
        prefill_tokens_per_s=prefill_tokens_per_s,
        bandwidths=speeds,
    )
    typer.echo(size_json(plan) if as_json else size_text(plan))


def layout_of_model(path: Path | None, dtype: str, block_size: int | None, kv_dtype: str = "auto") -> KVLayout:
    """The layout of a model folder, or of its config.json alone. Raises Failure."""
    from dataclasses import replace

    from deploy.model_shape import ModelShapeError, layout_of_config

    if path is None:
        raise Failure("no model was named; give --model DIR, or --model config.json", USAGE)
    try:
        layout = layout_of_config(_config(path), dtype=dtype, kv_dtype=kv_dtype)
    except ModelShapeError as error:
        raise Failure(str(error), USAGE) from None
    return layout if block_size is None else replace(layout, block_size=block_size)


def _config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Failure(
            f"{file} cannot be read ({error}); give --model a model folder or its config.json", USAGE
        ) from None
    if not isinstance(config, dict):
        raise Failure(f"{file} holds no JSON object; give --model a model folder or its config.json", USAGE)
    return config


def _size(option: str, text: str) -> int:
    from deploy.quantities import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise Failure(f"{option}: {error}", USAGE) from None


def _bandwidth(text: str) -> tuple[str, float]:
    tier, _, speed = text.partition("=")
    if tier not in TIERS:
        raise Failure(f"--bandwidth {text}: write it as TIER=SIZE, TIER one of {', '.join(TIERS)}", USAGE)
    return tier, float(_size(f"--bandwidth {tier}", speed))
