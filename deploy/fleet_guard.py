"""Ends a local fleet whose owner has died: `python -m deploy.fleet_guard FOLDER`.

Covers: a shell that waits for the end of the owner, however the owner ends, and what is then ended and removed: the
processes of our interpreter that were started with a path in the fleet's folder, the fleet's own Ray, the folder. Does
not cover: the private Redis, which has a guard of its own, and an owner that ends its fleet itself, which dismisses
the guard.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from deploy.cluster import end_own_ray

END_TIMEOUT_S = 45.0
# The pipe closes when the owner is gone. Waiting costs a shell; Python starts only when there is something to end.
_WAIT_THEN_RUN = 'read -r _; exec "$@"'


def state_dir_of(folder: Path) -> Path:
    """Where a local fleet in that folder records its Ray."""
    return folder / "state"


def start_guard(folder: Path) -> subprocess.Popen[bytes]:
    """A guard that sweeps the folder's fleet when this process is gone. The pipe to it is not inherited by others."""
    command = [sys.executable, "-m", "deploy.fleet_guard", str(folder)]
    return subprocess.Popen(
        ["/bin/sh", "-c", _WAIT_THEN_RUN, "sh", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def dismiss_guard(guard: subprocess.Popen[bytes]) -> None:
    """Send the guard away; nothing is left to end."""
    guard.kill()
    guard.wait()
    if guard.stdin is not None:
        guard.stdin.close()


def sweep(folder: Path) -> None:
    """End what runs out of the folder, then its own Ray with the workers, then remove the folder.

    Raises:
        ClusterProblem: processes of the own Ray cannot be ended. StateProblem: its record cannot be read.
    """
    running = _processes_of(folder)
    for process in running:
        process.terminate()
    _, left = psutil.wait_procs(running, timeout=END_TIMEOUT_S)
    for process in left:
        process.kill()
    end_own_ray(state_dir_of(folder))
    shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Processes of our interpreter with a path in the folder among their arguments, this one excepted."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        ours = bool(command) and command[0] == sys.executable and process.pid != os.getpid()
        if ours and any(Path(argument).is_relative_to(folder) for argument in command[1:]):
            found.append(process)
    return found


if __name__ == "__main__":
    sweep(Path(sys.argv[1]))
