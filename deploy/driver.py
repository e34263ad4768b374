"""The Ray driver of a router, in a process of its own: `python -m deploy.driver`. JSON lines on stdin and stdout.

Covers: the connection to Ray, the watch over workers, and commands about them. Does not cover: the other end of the
pipes (`deploy.discovery`), the fleet itself (`deploy.placement`).

Why a process of its own: Ray ends a driver about a minute after its GCS dies, and a router must outlive that. This
process ends when its parent does (its standard input closes), or when Ray does.

Lines in:  {"id": 1, "method": "scale", "params": {...}}
Lines out: {"event": "connected"} | {"event": "workers", "workers": [{...}]} | {"event": "failed", "message": "..."}
           {"id": 1, "result": ...} | {"id": 1, "error": "..."}
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from deploy.cluster import NAMESPACE

if TYPE_CHECKING:
    from deploy.placement import Placement

log = logging.getLogger(__name__)

POLL_S = 0.4
EXIT_CANNOT_CONNECT = 3
EXIT_RAY_LOST = 4

Method = Callable[..., Any]


class Pipe:
    """Our end of the two pipes. Lines are written whole, from any thread."""

    def __init__(self, source: TextIO, sink: TextIO) -> None:
        self.source = source
        self._sink = sink
        self._lock = threading.Lock()

    def say(self, **message: Any) -> None:
        """Write a line. A parent that has gone ends this process."""
        try:
            with self._lock:
                self._sink.write(json.dumps(message) + "\n")
                self._sink.flush()
        except (BrokenPipeError, ValueError):
            os._exit(0)


def main() -> int:
    """Connect, then watch until the parent goes or Ray does."""
    options = _parser().parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    logging.disable(logging.INFO)  # the workers' logs go elsewhere, and ours is the router's
    pipe = _open_pipe()
    from deploy.placement import Placement, PlacementProblem, Watcher, connect

    try:
        connect(options.ray_address, namespace=NAMESPACE)
    except PlacementProblem as problem:
        pipe.say(event="failed", message=str(problem))
        return EXIT_CANNOT_CONNECT
    # Of a restartable actor in a placement group it warns that it ends with the group, which is what we want.
    logging.getLogger("ray").setLevel(logging.ERROR)
    placement = Placement()
    pipe.say(event="connected")
    threading.Thread(target=_obey, args=(pipe, _methods(placement)), daemon=True).start()
    _watch(pipe, Watcher(placement))
    return EXIT_RAY_LOST


def _watch(pipe: Pipe, watcher: Any) -> None:
    """Say who the workers are whenever that changes, until Ray is lost."""
    said: list[dict[str, Any]] | None = None
    while True:
        try:
            now = [asdict(worker) for worker in watcher.poll(POLL_S)]
        except Exception as error:  # noqa: BLE001 - Ray raises many kinds when its GCS has gone
            pipe.say(event="failed", message=f"Ray was lost ({type(error).__name__}: {error}); start it again")
            return
        if now != said:
            pipe.say(event="workers", workers=now)
            said = now
        threading.Event().wait(POLL_S)


def _obey(pipe: Pipe, methods: dict[str, Method]) -> None:
    """Run the parent's commands until it closes the pipe."""
    with ThreadPoolExecutor(4, thread_name_prefix="command") as pool:
        for line in pipe.source:
            pool.submit(_run, pipe, methods, json.loads(line))
        os._exit(0)  # the parent has gone; nobody is left to answer


def _run(pipe: Pipe, methods: dict[str, Method], call: dict[str, Any]) -> None:
    try:
        pipe.say(id=call["id"], result=methods[call["method"]](**call.get("params", {})))
    except Exception as error:
        log.debug("a command failed", exc_info=True)
        pipe.say(id=call["id"], error=str(error) or type(error).__name__)


def _methods(placement: Placement) -> dict[str, Method]:
    from deploy.placement import Blueprint, node_versions
    from workers.config import WorkerConfig

    def configure(config: dict[str, Any], bundle: dict[str, float]) -> None:
        placement.set_blueprint(Blueprint(WorkerConfig(**config), bundle))

    def blueprint() -> dict[str, Any]:
        known = placement.blueprint()
        return {"config": asdict(known.config), "bundle": dict(known.bundle)}

    def model_card() -> dict[str, str]:
        return {name: base64.b64encode(data).decode() for name, data in placement.model_card().items()}

    return {
        "configure": configure,
        "blueprint": blueprint,
        "model_card": model_card,
        "names": placement.names,
        "scale": placement.scale,
        "end_all": placement.end_all,
        "missing_room": placement.missing_room,
        "gpus": placement.gpus,
        "node_versions": node_versions,
    }


def _open_pipe() -> Pipe:
    """Take standard output for ourselves; whatever else prints goes to standard error."""
    sink = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return Pipe(sys.stdin, sink)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.driver", description="Speak with Ray for a router.")
    parser.add_argument("--ray-address", required=True, help="host:port of Ray's GCS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
