"""How much memory this process may still take: the machine's, and that of every control group above it.

Covers: cgroup v1 and v2 limits, the machine's available memory. Does not cover: what other processes will take later.

A limit that is found out by the kernel ends the process without a word; one that is found out here is an error with a
remedy. File pages count as free, since the kernel drops them under pressure.
"""

from __future__ import annotations

import logging
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")

logger = logging.getLogger(__name__)


def available_bytes(cgroups: Path = CGROUP_ROOT, own: Path = OWN_CGROUPS, meminfo: Path = MEMINFO) -> int:
    """Bytes that can be taken before the system swaps, or ends a process for lack of memory.

    Args:
        cgroups: where control groups are mounted. own: names those of this process, as `/proc/self/cgroup`.
        meminfo: what the machine has, as `/proc/meminfo`.
    """
    return max(0, min([_machine_room(meminfo), *cgroup_rooms(cgroups, own)]))


def _machine_room(meminfo: Path) -> int:
    """Bytes that the kernel says new processes may take; where none says so, what psutil makes of it."""
    try:
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            name, _, told = line.partition(":")
            if name == "MemAvailable":
                return int(told.split()[0]) << 10
    except (OSError, ValueError, IndexError) as error:
        logger.debug("the machine's memory was not read", extra={"file": str(meminfo), "reason": str(error)})
    import psutil  # here: on Linux nothing else is needed

    return int(psutil.virtual_memory().available)


def cgroup_rooms(cgroups: Path, own: Path) -> list[int]:
    """Limit less use of every control group that holds this process and has a limit; empty where there are none."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []  # no Linux
    rooms = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            rooms += _rooms(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        elif number == "0":
            for root in (cgroups, cgroups / "unified"):
                rooms += _rooms(root, path, "memory.max", "memory.current", "")
    return rooms


def _rooms(root: Path, path: str, limit_file: str, use_file: str, prefix: str) -> list[int]:
    """The room of a group and of each one above it. In a container the path may be one of the host, or just `/`."""
    group = root / path.lstrip("/")
    folders = [folder for folder in (group, *group.parents) if folder == root or root in folder.parents]
    rooms = []
    for folder in folders:
        limit = _number(folder / limit_file)
        use = _number(folder / use_file)
        if limit is not None and use is not None:
            rooms.append(limit - use + _file_bytes(folder / "memory.stat", prefix))
    return rooms


def _number(file: Path) -> int | None:
    """What a one-number file says; None: there is none, or it says `max`."""
    try:
        text = file.read_text(encoding="utf-8").strip()
        return int(text) if text != "max" else None
    except (OSError, ValueError) as error:
        logger.debug("a control group was not read", extra={"file": str(file), "reason": str(error)})
        return None


def _file_bytes(stat: Path, prefix: str) -> int:
    """Bytes of pages that belong to files, which the kernel gives back when memory is short."""
    try:
        fields = dict(line.split(" ", 1) for line in stat.read_text(encoding="utf-8").splitlines())
        return int(fields[f"{prefix}inactive_file"]) + int(fields[f"{prefix}active_file"])
    except (OSError, ValueError, KeyError) as error:
        logger.debug("a control group's pages were not counted", extra={"file": str(stat), "reason": str(error)})
        return 0
