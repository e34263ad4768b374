"""Looks over this machine and what the settings name, and says what to do about what it finds. Changes nothing.

Covers: the list of checks; Python, packages and their versions, torch and devices, ports, model folder, secret. Each
check is a function from the settings to findings and may fail on its own. Does not cover: room (`doctor_room`), Redis,
Ray, K/V, the engine, ranks, templates, the index (modules of their own), a running router (`warmkv status`).
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
from pathlib import Path

from deploy.doctor_engine import check_engine
from deploy.doctor_kv import check_kv
from deploy.doctor_ranks import check_ranks
from deploy.doctor_ray import check_ray
from deploy.doctor_redis import check_redis
from deploy.doctor_room import check_disk, check_memory, check_shm
from deploy.doctor_template import check_template
from deploy.finding import Check, Finding
from deploy.settings import Settings

OWN_PACKAGES = ("kvstore", "workers", "router", "deploy", "warmkv")
_OLDEST_PYTHON = (3, 11)


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
        if settings.workers.device != "cpu" and importlib.util.find_spec("triton") is None:
            remedy = "pip install 'triton>=3.6', or use --device cpu"
            yield Finding("fail", "triton", "not installed, and attention on a GPU needs it", remedy)
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
    check_kv,
    check_engine,
    check_ranks,
    check_ports,
    check_memory,
    check_disk,
    check_secret,
    check_shm,
    check_redis,
    check_ray,
    check_index,
)
