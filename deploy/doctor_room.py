"""What `warmkv doctor` says about room: memory, disk and shared memory of this machine for the tiers of its workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from deploy.finding import Finding
from deploy.quantities import size_text
from deploy.settings import Settings
from deploy.state import lives, read_record

_LEAST_SHM = 200 << 20


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
