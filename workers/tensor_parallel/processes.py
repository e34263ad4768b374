"""The processes of ranks 1 and above: started by the worker's own process, and ended with it, however it ends.

They are its children and not actors of their own: the worker is one bundle on one node, and what must never happen is
that a part of it lives on. A rank reads its settings from its standard input, which it watches then: its end is that of
the worker. So nothing of the settings, which hold keys, is seen in a list of processes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from workers.config import WorkerConfig
from workers.tensor_parallel.lost import RankLost

log = logging.getLogger(__name__)

_POLL_S = 0.05
_DYING_S = 2.0  # from the end of a rank's sockets to that of its process
_KILL_S = 3.0
_MODULE = "workers.tensor_parallel.rank"


class RankProcesses:
    """Ranks 1 and above of one worker.

    Attributes:
        folder: where the ranks meet; only this user may open it. pids: by rank, from 1.
    """

    def __init__(self, config: WorkerConfig) -> None:
        """Start them. Those that cannot start are found by `await_ready`."""
        self.folder = Path(tempfile.mkdtemp(prefix="warmkv-ranks-"))  # mode 0700
        self._processes = [self._start(config, rank) for rank in range(1, config.tensor_parallel)]

    @property
    def pids(self) -> list[int]:
        """Of ranks 1, 2, ..."""
        return [process.pid for process in self._processes]

    def await_ready(self, timeout_s: float) -> None:
        """Until all are about to meet rank 0.

        Raises:
            RankLost: one ended, or the time was up.
        """
        give_up = time.monotonic() + timeout_s
        while not all(ready_file(self.folder, rank).exists() for rank in range(1, len(self._processes) + 1)):
            if any(process.poll() is not None for process in self._processes):
                raise RankLost("a rank could not start")
            if time.monotonic() > give_up:
                raise RankLost(f"ranks did not start within {timeout_s:g} s; their logs are in that of the worker")
            time.sleep(_POLL_S)

    def ended(self) -> list[str]:
        """For each rank that has ended or is about to: who, how, and why as far as it said."""
        give_up = time.monotonic() + _DYING_S
        while time.monotonic() < give_up and all(process.poll() is None for process in self._processes):
            time.sleep(_POLL_S)
        return [
            f"rank {rank} (pid {process.pid}) {_how(process.returncode)}{self._why(rank)}"
            for rank, process in enumerate(self._processes, 1)
            if process.poll() is not None
        ]

    def end(self, grace_s: float) -> None:
        """Wait so long for those that were told to end, then end them. Idempotent."""
        _await(self._processes, grace_s)
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        _await(self._processes, _KILL_S)
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is None:
                log.warning("rank %d (pid %d) did not end by itself", rank, process.pid)
                process.kill()
        _await(self._processes, _KILL_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, config: WorkerConfig, rank: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        settings = {"config": asdict(config), "rank": rank, "folder": str(self.folder)}
        if process.stdin is not None:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
        return process

    def _why(self, rank: int) -> str:
        file = problem_file(self.folder, rank)
        return f": {file.read_text(errors='replace')}" if file.exists() else ""


def ready_file(folder: Path, rank: int) -> Path:
    """Made by a rank that is about to meet the others."""
    return folder / f"rank{rank}.ready"


def problem_file(folder: Path, rank: int) -> Path:
    """Written by a rank that fails: why."""
    return folder / f"rank{rank}.problem"


def _await(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up and any(process.poll() is None for process in processes):
        time.sleep(_POLL_S)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
