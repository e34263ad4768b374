"""Looks over this machine and what the settings name, and says what to do about what it finds. Changes nothing.

Covers: Python, packages and their versions, torch and devices, ports, model folder, Redis, Ray on all nodes, memory,
clock. Each check is a function from the settings to findings and may fail on its own. Does not cover: a running router
(`warmkv status`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from deploy.doctor_template import check_template
from deploy.finding import Check, Finding
from deploy.quantities import format_size, size_text
from deploy.settings import Settings
from deploy.state import ClusterRecord, lives, read_record
from kvstore.redis.address import is_cluster, mask_url, parse_address, server_urls

OWN_PACKAGES = ("kvstore", "workers", "router", "deploy", "warmkv")
RAY_VERSION = "2.60.0"
_OLDEST_PYTHON = (3, 11)
_LEAST_SHM = 200 << 20
_CLOCK_TOLERANCE_S = 1.0
_REDIS_TIMEOUT_S = 3.0


def examine(settings: Settings, state_dir: Path) -> list[Finding]:
    """Every check's findings. A check that breaks is a finding itself."""
    findings: list[Finding] = []
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        try:
            findings += check(settings, state_dir)
        except Exception as error:  # noqa: BLE001 - a doctor must get to the end of the list
            findings.append(
                Finding("warn", name, f"could not be checked: {type(error).__name__}: {error}", "see above")
            )
    return findings


def check_python(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """The interpreter."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < _OLDEST_PYTHON:
        yield Finding("fail", "python", version, "use Python 3.11 or 3.12")
    else:
        yield Finding("ok", "python", f"{version} at {sys.executable}")


def check_packages(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Whether `import router` and the like find ours: the names are plain, and others may use them too."""
    home = Path(__file__).resolve().parent.parent
    for name in OWN_PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found is None or home not in found.parents:
            remedy = f"another package hides ours; uninstall it, or rename {found.parent.name if found else name}"
            yield Finding("fail", "packages", f"`import {name}` finds {found}", remedy)
            return
    yield Finding("ok", "packages", f"{', '.join(OWN_PACKAGES)} from {home}")


def check_protobuf(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Whether the installed runtime loads our stubs: as new as their generator, one major version newer at most."""
    runtime = importlib.metadata.version("protobuf")
    stub = (Path(__file__).parent.parent / "proto/warmkv/v1/common_pb2.py").resolve()
    if not stub.is_file():
        stub = Path(str(_origin("warmkv.v1"))).parent / "common_pb2.py"
    made_by = re.search(r"Protobuf Python Version: (\d+)\.(\d+)\.(\d+)", stub.read_text())
    if made_by is None:
        yield Finding(
            "warn", "protobuf", f"runtime {runtime}; the stubs do not name their generator", "run: make proto"
        )
        return
    generator = tuple(int(part) for part in made_by.groups())
    installed = tuple(int(part) for part in runtime.split(".")[:3])
    said = f"runtime {runtime}, stubs made by {'.'.join(made_by.groups())}"
    if installed < generator or installed[0] > generator[0] + 1:
        yield Finding("fail", "protobuf", said, "pip install 'protobuf>=6.33.5,<8'")
    else:
        yield Finding("ok", "protobuf", said)


def check_torch(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """The build and the devices that it sees."""
    if settings.workers.engine == "simulated":
        return
    try:
        import torch
    except ImportError as error:
        yield Finding("fail", "torch", f"cannot be imported ({error})", "pip install torch, or use --engine simulated")
        return
    build = (
        f"{torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else f"{torch.__version__}, CPU build"
    )
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
        yield Finding("ok", "torch", f"{build}; {torch.cuda.device_count()} GPU(s): {', '.join(sorted(names))}")
    elif settings.workers.device == "cuda":
        yield Finding(
            "fail", "torch", f"{build}; no GPU, and workers.device is cuda", "use --device cpu, or a GPU build"
        )
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "warn", "torch", f"{build}; sees no GPU, yet nvidia-smi is here", "install the CUDA build of torch"
        )
    else:
        yield Finding("ok", "torch", f"{build}; no GPU: workers compute on the CPU")


def check_model(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """The model folder, where one is named."""
    from deploy.up import check_model_folder
    from router.model_folder import ModelFolderError, read_model_facts

    if settings.model.dir is None:
        yield Finding("ok", "model", "none named (--model DIR)")
        return
    try:
        facts = read_model_facts(check_model_folder(settings))
    except ModelFolderError as error:
        yield Finding("fail", "model", str(error), "give --model a complete Hugging Face model folder")
        return
    yield Finding("ok", "model", f"{settings.model.dir}: {facts.vocab_size} tokens, context {facts.context_length}")


def check_ports(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Whether the router could listen."""
    from router.listen import ListenError, check_free, host_port

    router = settings.router
    wanted = [(router.grpc_host, router.grpc_port, "--grpc-port")]
    if router.http_port is not None:
        wanted.append((router.http_host, router.http_port, "--http-port"))
    for host, port, flag in wanted:
        try:
            check_free(host, port, flag)
        except ListenError as error:
            remedy = f"end what listens there (a router of yours?), or choose another {flag}"
            yield Finding("warn", "ports", f"{host_port(host, port)} is taken ({error})", remedy)
        else:
            yield Finding("ok", "ports", f"{host_port(host, port)} is free")


def check_memory(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Whether the tiers of all workers of this machine fit into its RAM; what our own fleet holds now may be theirs."""
    store, count = settings.store, settings.workers.count
    on_cpu = settings.workers.device == "cpu" or not shutil.which("nvidia-smi")
    wanted = count * (store.host_bytes + (store.device_bytes if on_cpu else 0))
    free, held = psutil.virtual_memory().available, _held_by_own_fleet(state_dir)
    said = f"{size_text(free)} of RAM free"
    said += f" and {size_text(held)} held by the fleet that runs here" if held else ""
    said += f"; {count} worker(s) may fill {size_text(wanted)} with blocks"
    if wanted > free + held:
        yield Finding(
            "warn", "memory", said, "lower store.host_bytes or store.device_bytes (--set store.host_bytes=1GiB)"
        )
    else:
        yield Finding("ok", "memory", said)


def _held_by_own_fleet(state_dir: Path) -> int:
    from deploy.cluster import session_members

    record = read_record(state_dir)
    held = 0
    for process in session_members(record.pid) if record is not None and lives(record) else ():
        with suppress(psutil.NoSuchProcess):
            held += process.memory_info().rss
    return held


def check_disk(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Whether the folder of the disk tier can be written, and has room for the workers of this machine."""
    store = settings.store
    if not store.disk_bytes:
        yield Finding(
            "ok", "disk", "no disk tier (store.disk_bytes=0): blocks do not outlive their worker without Redis"
        )
        return
    folder = store.disk_dir.expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        yield Finding("fail", "disk", f"{folder} cannot be made or written", "name another: --set store.disk_dir=PATH")
        return
    used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    free, wanted = shutil.disk_usage(there).free + used, settings.workers.count * store.disk_bytes
    said = f"{folder}: {size_text(free)} for blocks; {settings.workers.count} worker(s) may fill {size_text(wanted)}"
    if wanted > free:
        yield Finding(
            "warn", "disk", said, "lower store.disk_bytes, or name another folder (--set store.disk_dir=PATH)"
        )
    else:
        yield Finding("ok", "disk", said)


def check_secret(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Under which secret blocks outlive the fleet: one that is set, or the one that is kept."""
    from deploy.kept_secret import FILE, kept_secret
    from deploy.state import StateProblem

    path = state_dir / FILE
    if settings.auth.fleet_secret is not None:
        yield Finding("ok", "secret", "auth.fleet_secret is set")
        return
    try:
        kept = kept_secret(state_dir)
    except StateProblem as problem:
        yield Finding("fail", "secret", str(problem), f"restore {path}, or remove it")
        return
    if kept is None:
        yield Finding("ok", "secret", f"none yet; the first `warmkv up` makes one and keeps it in {path}")
    elif path.stat().st_mode & 0o077:
        yield Finding("warn", "secret", f"{path} can be read by other users", f"chmod 600 {path}")
    else:
        yield Finding("ok", "secret", f"kept in {path}: blocks on disk and in Redis outlive `warmkv down`")


def check_shm(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Ray keeps its object store in shared memory."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("warn", "shm", "/dev/shm is missing", "mount it; Ray falls back to files, which is slow")
        return
    free = shutil.disk_usage(folder).free
    if free < _LEAST_SHM:
        yield Finding("fail", "shm", f"{size_text(free)} free in /dev/shm", "in Docker: --shm-size=1g")
    else:
        yield Finding("ok", "shm", f"{size_text(free)} free in /dev/shm")


def check_redis(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """The shared tier: reachable, how it is set up, and whether its clock agrees with ours."""
    if settings.redis.url is None:
        yield Finding("ok", "redis", "none named (--redis URL): workers share no tier, and read one another's RAM")
        return
    import redis

    url = settings.redis.url.get_secret_value()
    try:
        servers = server_urls(url, _REDIS_TIMEOUT_S)
    except redis.RedisError as error:  # no sentinel names the primary
        yield _redis_failure(mask_url(url), error, str(error))
        return
    for server in servers:
        yield from _redis_findings(server, settings, in_cluster=is_cluster(url))


def _redis_findings(url: str, settings: Settings, *, in_cluster: bool) -> Iterator[Finding]:
    import redis

    from kvstore.redis.inspection import inspect
    from kvstore.redis.judgement import judge, judge_events

    try:
        server = inspect(url, _REDIS_TIMEOUT_S)
    except (redis.RedisError, OSError) as error:
        yield _redis_failure(mask_url(url), error, parse_address(url).masked(str(error)))
        return
    facts = server.facts
    yield Finding("ok", "redis", f"{mask_url(url)}: {server.version}, holds {format_size(facts.used_memory)}")
    if facts.maxmemory and facts.policy != "noeviction":
        limit, share = format_size(facts.maxmemory), facts.used_memory / facts.maxmemory
        yield Finding("ok", "redis", f"limit {limit}, {share:.0%} of it in use, evicts by {facts.policy}")
    advice = judge(facts, in_cluster=in_cluster)
    if settings.redis.watch == "listen" and server.events is not None:
        advice += judge_events(server.events)
    for each in advice:
        yield Finding("warn", "redis", each.found, each.remedy)
    yield _clock_finding(server.clock_s)


def _redis_failure(shown: str, error: Exception, said: str) -> Finding:
    from kvstore.redis.facts import remedy

    found, _, what_to_do = remedy(error, shown, said).rpartition("; ")
    return Finding("fail", "redis", found, f"{what_to_do}; until then requests go on without the shared tier")


def _clock_finding(clock_s: float | None) -> Finding:
    import time

    if clock_s is None:
        return Finding("ok", "clock", "not compared with that of Redis: this login may not ask for its TIME")
    skew = abs(time.time() - clock_s)
    if skew > _CLOCK_TOLERANCE_S:
        return Finding("warn", "clock", f"differs from that of Redis by {skew:.1f} s", "let NTP set both clocks")
    return Finding("ok", "clock", f"agrees with that of Redis within {skew:.2f} s")


def check_ray(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Ray's version here and on every node of the cluster in use, and the record of an own one."""
    installed = importlib.metadata.version("ray")
    if installed != RAY_VERSION:
        yield Finding("fail", "ray", f"{installed} is installed", f"pip install 'ray[default]=={RAY_VERSION}'")
        return
    record = read_record(state_dir)
    own = record is not None and settings.ray.address in (None, record.address)
    if own and record is not None and not lives(record):
        yield Finding("warn", "ray", f"{installed}; the own Ray (process {record.pid}) has died", "run `warmkv down`")
    elif own or settings.ray.address is not None:
        yield from _node_findings(settings, record if own else None)
    else:
        yield Finding("ok", "ray", f"{installed}; `warmkv up` will start an own one")


def _node_findings(settings: Settings, record: ClusterRecord | None) -> Iterator[Finding]:
    import asyncio

    from deploy.cluster import ClusterProblem, ray_environment
    from deploy.discovery import RayDiscovery

    address = record.address if record is not None else str(settings.ray.address)

    async def ask() -> dict[str, str]:
        discovery = RayDiscovery(address, ray_environment(record, os.environ))
        await discovery.start()
        try:
            found: dict[str, str] = await discovery.call("node_versions", timeout_s=20.0)
            return found
        finally:
            await discovery.close()

    try:
        nodes = asyncio.run(ask())
    except ClusterProblem as problem:
        yield Finding("fail", "ray", f"{address}: {problem}", "check the address and that Ray runs there")
        return
    if len(set(nodes.values())) > 1:
        yield Finding("fail", "ray", f"nodes of {address} differ", "install the same environment on every node")
    for node, versions in nodes.items():
        good = "missing" not in versions and versions.startswith("Python")
        yield Finding(
            "ok" if good else "fail", "ray", f"{node}: {versions}", "" if good else "pip install warmkv there"
        )


def check_index(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Whether the router that runs here may rely on what it believes of its workers."""
    from deploy.doctor_index import findings

    yield from findings(settings)


def check_host(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """What other nodes would see of this one."""
    load = os.getloadavg()[0]
    yield Finding("ok", "host", f"{socket.gethostname()}, {os.cpu_count()} cores, load {load:.1f}")


def _origin(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return spec.origin if spec is not None else None


CHECKS: tuple[Check, ...] = (
    check_host,
    check_python,
    check_packages,
    check_protobuf,
    check_torch,
    check_model,
    check_template,
    check_ports,
    check_memory,
    check_disk,
    check_secret,
    check_shm,
    check_redis,
    check_ray,
    check_index,
)
