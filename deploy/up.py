"""`warmkv up` and `warmkv router`: from settings to a router that serves, and `warmkv down`.

Covers: the order of things, and what is said to the person who waits. Workers are detached: they stay when the router
ends, the next `up` finds them with their caches warm, and `down` ends them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deploy.cluster import ClusterProblem, end_own_ray, ray_environment, start_own_ray
from deploy.discovery import Borrowed, RayDiscovery
from deploy.kept_secret import kept_secret
from deploy.layers import Loaded, SettingsProblem
from deploy.quotas import check_tenants, group_shares
from deploy.rollout import Rollout, Say, own_secret, since
from deploy.settings import Settings
from deploy.state import ClusterRecord, lives, read_record
from router.config import RouterConfig
from router.protocol import Discovery, WorkerAddress

if TYPE_CHECKING:
    from router.app import RouterServer, Stop

log = logging.getLogger(__name__)

T = TypeVar("T")


class Interrupted(Exception):
    """A signal came before the router served."""


async def up(loaded: Loaded, state_dir: Path, *, ephemeral: bool, say: Say) -> None:
    """Start or join Ray, place the workers, serve until a signal, drain.

    Args:
        ephemeral: end workers and own Ray with the router. say: takes lines for the person who waits.

    Raises:
        SettingsProblem, ClusterProblem, StateProblem, or one of `router.app.STARTUP_ERRORS`.
    """
    settings = loaded.settings
    folder = check_model_folder(settings)
    check_router(settings)
    check_store(settings)
    check_secret(settings, state_dir)
    started_at = time.monotonic()
    stop = _listen_to_signals()
    record: ClusterRecord | None = None
    try:
        if settings.ray.address is None:
            record = await _unless(stop, asyncio.to_thread(_start_ray, settings, state_dir))
            say(f"Ray        {record.address}, own, on loopback ({since(started_at)}); logs in {record.temp_dir}")
        discovery = _ray_discovery(settings, record)
        try:
            await _unless(stop, discovery.start())
            rollout = Rollout(loaded, discovery, say, started_at, state_dir=state_dir)
            secret = await _unless(stop, rollout.begin())
            config = settings.router_config(_router_name(settings), model_dir=str(folder), fleet_secret=secret)
            if not ephemeral:
                config = replace(config, record_file=str(_record_file(settings, state_dir)))
            await _serve(config, Borrowed(discovery), stop, say, meanwhile=rollout.finish)
        finally:
            if ephemeral:
                await _end_workers(discovery, say)
            await discovery.close()
    except Interrupted:
        say("stopped before the router served")
    finally:
        if ephemeral and settings.ray.address is None:
            await asyncio.to_thread(end_own_ray, state_dir)
    if not ephemeral:
        say("The router has ended. Workers go on: `warmkv up` finds them again, `warmkv down` ends them.")


async def router(loaded: Loaded, state_dir: Path, *, workers: Sequence[WorkerAddress], say: Say) -> None:
    """Serve workers that are there already: of a fixed list, or those that Ray knows.

    Raises:
        as `up`.
    """
    settings = loaded.settings
    stop = _listen_to_signals()
    with tempfile.TemporaryDirectory(prefix="warmkv-model-") as card_dir:
        if workers:
            folder = check_model_folder(settings, weights=False)
            config = settings.router_config(
                _router_name(settings), model_dir=str(folder), fleet_secret=own_secret(settings) or ""
            )
            await _serve(config, _static(workers), stop, say)
            return
        record = _living(state_dir) if settings.ray.address is None else _record_of(settings.ray.address, state_dir)
        if record is None and settings.ray.address is None:
            raise SettingsProblem(
                "no fleet runs here; give --ray-address or --worker NAME=HOST:PORT, or run `warmkv up`"
            )
        discovery = _ray_discovery(settings, record)
        try:
            await _unless(stop, discovery.start())
            config = await _unless(stop, _learn(settings, discovery, Path(card_dir)))
            await _serve(config, discovery, stop, say)
        except Interrupted:
            say("stopped before the router served")
        finally:
            await discovery.close()


async def down(settings: Settings, state_dir: Path, *, say: Say) -> None:
    """End warmkv's workers, and the own Ray where there is one. Nothing else.

    Raises:
        ClusterProblem, StateProblem.
    """
    record = read_record(state_dir) if settings.ray.address is None else _record_of(settings.ray.address, state_dir)
    if record is None and settings.ray.address is None:
        say("Nothing to end: no fleet was started here. For a Ray that others run give --ray-address.")
        return
    if record is None or lives(record):
        discovery = _ray_discovery(settings, record)
        try:
            await discovery.start()
            await _end_workers(discovery, say)
        except ClusterProblem as problem:
            if record is None:
                raise
            log.warning("workers could not be told to end; their processes are ended", extra={"why": str(problem)})
        finally:
            await discovery.close()
    if record is not None:
        await asyncio.to_thread(end_own_ray, state_dir)
        say(f"Ray {record.address} ended")


def check_model_folder(settings: Settings, *, weights: bool = True) -> Path:
    """The model folder, absolute, looked through before anything is started.

    Raises:
        SettingsProblem: none was named. ModelFolderError: a file is missing or broken.
    """
    from router.model_folder import ModelFolderError, read_model_facts

    if settings.model.dir is None:
        raise SettingsProblem(
            "no model was named; give --model DIR, a Hugging Face model folder "
            "(to make a small one: python -m workers.tiny DIR)"
        )
    folder = settings.model.dir.resolve()
    read_model_facts(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelFolderError(f"{folder / 'tokenizer.json'} is missing. Give a complete Hugging Face model folder.")
    if weights and settings.workers.engine == "torch" and not any(folder.glob("*.safetensors")):
        raise ModelFolderError(f"{folder} has no *.safetensors. Give a complete Hugging Face model folder.")
    return folder


def check_store(settings: Settings) -> None:
    """Look at what would keep every worker's store from starting.

    Raises:
        KeyringError: the keys file cannot be used. SettingsProblem, KeysFileError: see `quotas.group_shares`.
        SettingsProblem: blocks are to be written when host evicts them, and there is no host tier.
    """
    group_shares(settings)
    _check_admission(settings)
    path = settings.store.keys_file
    if path is None:
        return
    from kvstore.crypto import Keyring
    from kvstore.errors import KeyringError

    try:
        Keyring.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise KeyringError(f"store.keys_file {path} cannot be read ({error}); name a file that this user can") from None


def check_secret(settings: Settings, state_dir: Path) -> None:
    """Look at the kept secret where it would be used: no fleet runs yet, and the settings name none.

    Raises:
        StateProblem: it cannot be read.
    """
    if settings.ray.address is None and not own_secret(settings) and _living(state_dir) is None:
        kept_secret(state_dir)


def _check_admission(settings: Settings) -> None:
    rules = {"store.admission": settings.store.admission, "redis.admission": settings.redis.admission}
    name = next((name for name, rule in rules.items() if rule == "on_eviction"), None)
    if name is not None and not settings.store.host_bytes:
        raise SettingsProblem(
            f"{name} is on_eviction, which writes what the host tier evicts, and store.host_bytes is 0; "
            "give it bytes, or choose always or second_hit"
        )


def check_router(settings: Settings) -> None:
    """Look at what would keep the router from starting, before anything is started.

    Raises:
        InvalidRequest: no such policy or weight. ListenError: a port is taken. KeysFileError, TlsFilesError: see there.
        SettingsProblem: a tenant with a weight or a quota has no key.
    """
    from router.auth import ApiKeys
    from router.config import TlsFiles
    from router.listen import check_free
    from router.policy import checked_weights, find_policy
    from router.tls import server_credentials

    chosen = settings.router
    checked_weights(find_policy(chosen.policy), chosen.weights)
    check_free(chosen.grpc_host, chosen.grpc_port, "--grpc-port")
    if chosen.http_port is not None:
        check_free(chosen.http_host, chosen.http_port, "--http-port")
    if settings.auth.api_keys_file is not None:
        ApiKeys(settings.auth.api_keys_file)
    check_tenants(settings)
    tls = settings.tls
    if tls.cert is not None and tls.key is not None:
        server_credentials(TlsFiles(str(tls.cert), str(tls.key), str(tls.client_ca) if tls.client_ca else None))


async def _serve(
    config: RouterConfig,
    discovery: Discovery,
    stop: Stop,
    say: Say,
    *,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Run the router until a signal, then drain it."""
    from router.app import serving

    async with serving(config, discovery) as server:
        say(_addresses(config, server))
        watching = asyncio.ensure_future(meanwhile()) if meanwhile is not None else None
        try:
            await _until_stopped(stop, watching)
        finally:
            if watching is not None:
                watching.cancel()
        say(f"draining: running requests may finish, for {config.drain_grace_s:g} s at most; Ctrl-C again to hurry")
        await server.drain(stop.hurry)


async def _until_stopped(stop: Stop, watching: asyncio.Future[None] | None) -> None:
    stopped = asyncio.create_task(stop.stop.wait())
    waited: list[asyncio.Future[Any]] = [stopped] if watching is None else [stopped, watching]
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if watching is not None and watching.done():
        try:
            watching.result()  # raises what kept the workers from starting
        except BaseException:
            stopped.cancel()
            raise
    await stopped


def _record_file(settings: Settings, state_dir: Path) -> Path:
    """Where the fleet's policy is kept: one file for the own Ray, and one for each that was joined."""
    address = settings.ray.address
    name = "policy" if address is None else f"policy-{hashlib.sha256(address.encode()).hexdigest()[:12]}"
    return state_dir / f"{name}.json"


async def _learn(settings: Settings, discovery: RayDiscovery, card_dir: Path) -> RouterConfig:
    """A router's configuration from the workers that run: the fleet's secret, the model's name and small files."""
    present = (await discovery.call("blueprint"))["config"]
    if settings.model.dir is None:
        for name, data in (await discovery.model_card()).items():
            await asyncio.to_thread((card_dir / name).write_bytes, data)
    folder = card_dir if settings.model.dir is None else check_model_folder(settings, weights=False)
    secret = own_secret(settings) or present["fleet_secret"]
    config = settings.router_config(_router_name(settings), model_dir=str(folder), fleet_secret=secret)
    return replace(config, model_name=settings.model.name or present["model_name"])


async def _end_workers(discovery: RayDiscovery, say: Say) -> None:
    try:
        if names := await discovery.end_all():
            say(f"workers ended: {', '.join(names)}")
    except ClusterProblem as problem:
        log.warning("workers could not be told to end", extra={"why": str(problem)})


def _start_ray(settings: Settings, state_dir: Path) -> ClusterRecord:
    least = int(settings.workers.count * max(1.0, settings.workers.cpus))
    return start_own_ray(settings.ray, state_dir, least_cpus=least)


def _ray_discovery(settings: Settings, record: ClusterRecord | None) -> RayDiscovery:
    address = record.address if record is not None else str(settings.ray.address)
    return RayDiscovery(
        address,
        ray_environment(record, os.environ),
        drain_s=settings.router.drain_grace,
        flush_s=settings.workers.flush,
        start_timeout_s=settings.ray.start_timeout,
    )


def _record_of(address: str, state_dir: Path) -> ClusterRecord | None:
    """The record, where the address is that of an own Ray: joining it needs its token."""
    record = read_record(state_dir)
    return record if record is not None and record.address == address else None


def _living(state_dir: Path) -> ClusterRecord | None:
    record = read_record(state_dir)
    return record if record is not None and lives(record) else None


def _static(workers: Sequence[WorkerAddress]) -> Discovery:
    from router.discovery import StaticDiscovery

    return StaticDiscovery(workers)


def _router_name(settings: Settings) -> str:
    """The same after a restart, different for two routers of one machine."""
    return f"{socket.gethostname()}-{settings.router.grpc_port or os.getpid()}"


def _listen_to_signals() -> Stop:
    from router.app import Stop

    stop, loop = Stop(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.signalled)
    return stop


async def _unless(stop: Stop, work: Awaitable[T]) -> T:
    """The work's result, if no signal comes first.

    Raises:
        Interrupted: one did. Work in a thread goes on to its end, so that what it started is recorded.
    """
    task = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stop.stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        return task.result()
    with suppress(Exception):
        await task
    raise Interrupted


def _addresses(config: RouterConfig, server: RouterServer) -> str:
    target = f"{config.grpc_host}:{server.grpc_port}"
    lines = [f"router     gRPC {target}"]
    if server.http_port is not None:
        lines.append(f"dashboard  http://{config.http_host}:{server.http_port}/ (also /metrics, /healthz, /readyz)")
    where = "" if server.grpc_port == 50051 else f" --router {target}"
    lines.append(f'try        warmkv generate{where} "Once upon a time"        (in another terminal)')
    lines.append("           Ctrl-C ends this router")
    return "\n".join(lines)


def print_line(line: str) -> None:
    """The usual `say`."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
