"""Run a worker as a plain process: `python -m workers.main --config JSON`.

Prints one line of JSON when it serves: {"name", "address", "incarnation"}. SIGTERM and SIGINT end it in good order
(running jobs may finish for --drain-s, and are then handed back to their routers), exit 0. An engine that fails ends it
with exit 1, so that its supervisor starts it again.
In production workers are Ray actors; this is for tests, benchmarks and machines without Ray.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from dataclasses import replace
from types import FrameType
from typing import Any

from kvstore.errors import StoreError
from workers.config import WorkerConfig
from workers.protocol import Engine
from workers.server import WorkerServer
from workers.simulated_sequence import Timing
from workers.tensor_parallel.lost import RankLost

DRAIN_S = 30.0
FLUSH_S = 5.0


def build_engine(config: WorkerConfig, timing: Timing | None = None) -> Engine:
    """The engine that the settings name; torch is imported only for the real one.

    Raises:
        ValueError: an unknown engine.
    """
    if config.engine == "simulated":
        from workers.simulated import build_engine as build_simulated

        return build_simulated(config, timing=timing)
    if config.engine == "torch" and config.tensor_parallel > 1:
        from workers.tensor_parallel.processes import RankProcesses

        processes = RankProcesses(config)  # torch is imported by all ranks at once
        from workers.tensor_parallel.start import build_leading_engine

        return build_leading_engine(config, processes)
    if config.engine == "torch":
        from workers.build import build_engine as build_torch

        return build_torch(config)
    raise ValueError(f"engine {config.engine!r} is unknown; choose torch or simulated")


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal or a failure; the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        config = _config(sys.stdin.read() if options.config == "-" else options.config)
        engine = build_engine(config, _timing(options.timing))
        server = WorkerServer(config, engine)
        address = server.start()
    except (ValueError, TypeError, OSError, StoreError, RankLost) as error:
        sys.stderr.write(f"worker could not start: {error}\n")
        return 2
    ready = {"name": config.name, "address": address, "incarnation": server.incarnation}
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    return _serve(server, options.drain_s)


def _serve(server: WorkerServer, drain_s: float) -> int:
    asked_to_end = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked_to_end.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, on_signal)
    while not asked_to_end.wait(0.1):
        if server.wait_closed(0):
            return 1
    server.drain(drain_s)
    server.close(flush_s=FLUSH_S)
    return 0 if server.failure is None else 1


def _config(text: str) -> WorkerConfig:
    return WorkerConfig(**_object(text, "--config"))


def _timing(text: str | None) -> Timing | None:
    return None if text is None else replace(Timing(), **_object(text, "--timing"))


def _object(text: str, option: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{option} is not a JSON object; give the fields by name")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workers.main", description="Run one worker as a plain process.")
    parser.add_argument("--config", required=True, help="fields of WorkerConfig as JSON; - reads it from stdin")
    parser.add_argument("--timing", help="simulated engine: fields of Timing as JSON")
    parser.add_argument("--drain-s", type=float, default=DRAIN_S, help="how long running jobs may take after SIGTERM")
    return parser


if __name__ == "__main__":
    sys.exit(main())
