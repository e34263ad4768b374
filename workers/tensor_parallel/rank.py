"""Ranks 1 and above as processes: `python -m workers.tensor_parallel.rank`, started by `processes` alone.

Reads one line of settings from standard input. When that closes, the worker is gone, and so is this.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from workers.config import WorkerConfig
from workers.tensor_parallel.processes import problem_file

EXIT_FAILED, EXIT_ORPHANED = 1, 3

log = logging.getLogger(__name__)


def main() -> int:
    """Serve until rank 0 ends the worker; the exit code."""
    settings = json.loads(sys.stdin.buffer.readline())
    rank, folder, config = int(settings["rank"]), Path(settings["folder"]), WorkerConfig(**settings["config"])
    words = f"%(asctime)s %(levelname)s {config.name} rank {rank} %(name)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=words)
    for each in (signal.SIGINT, signal.SIGTERM):  # to all processes at once: rank 0 decides what it means
        signal.signal(each, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_worker, args=(folder,), name="lifeline", daemon=True).start()
    try:
        from workers.tensor_parallel.start import follow

        follow(config, rank, folder)
    except Exception as error:
        log.critical("rank %d ends because it failed", rank, exc_info=error)
        _say_why(folder, rank, error)
        return EXIT_FAILED
    return 0


def _say_why(folder: Path, rank: int, error: Exception) -> None:
    if folder.is_dir():  # else the worker has ended, and nobody asks
        problem_file(folder, rank).write_text(f"{type(error).__name__}: {error}")


def _end_with_the_worker(folder: Path) -> None:
    while sys.stdin.buffer.read(1):
        pass
    shutil.rmtree(folder, ignore_errors=True)  # where the worker had no time for it
    os._exit(EXIT_ORPHANED)  # even while a collective waits


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads of a collective that failed may never end
