"""What `warmkv doctor` says about Ray: its version here and on every node, and the record of an own one."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

from deploy.finding import Finding
from deploy.settings import Settings
from deploy.state import ClusterRecord, lives, read_record

RAY_VERSION = "2.60.0"


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
