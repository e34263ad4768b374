"""A lean Ray head of our own: `python -m deploy.raynode`. One process that starts Ray's and ends with them.

Covers: starting the GCS and a raylet of this machine, saying their address, ending them on SIGTERM. Does not cover:
who starts this process and where that is written down (`deploy.cluster`), joining a Ray that others run.

Why not `ray start --head`: it starts a Ray Client server, an autoscaler, a log monitor and an API server, none of which
we use, and takes 6.5 s where this takes 2.5 s (two cores). The same classes stand behind `ray start` and
`ray.cluster_utils`; they are not a stable interface, so the Ray version is pinned and a test starts this process.

Why 127.0.0.2: Ray replaces 127.0.0.1 by the machine's outer address; it leaves other loopback addresses alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

HEAD_IP = "127.0.0.2"
EXIT_RAY_DIED = 1
_WATCH_EVERY_S = 1.0


def main() -> int:
    """Run until SIGTERM (exit 0) or until a process of Ray's dies (exit 1)."""
    options = _parser().parse_args()
    ended = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        ended.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, on_signal)
    answer = _private_stdout()
    node = _start(options)
    try:
        with os.fdopen(answer, "w") as stream:
            stream.write(json.dumps({"address": node.gcs_address}) + "\n")
        while not ended.wait(_WATCH_EVERY_S):
            if dead := [kind for kind, _ in node.dead_processes()]:
                sys.stderr.write(f"Ray ends because these of its processes died: {', '.join(dead)}\n")
                return EXIT_RAY_DIED
        return 0
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=True)


def _private_stdout() -> int:
    """Our answer goes to the pipe; whatever Ray prints, and its children, go to the log."""
    answer = os.dup(1)
    os.set_inheritable(answer, False)
    os.dup2(2, 1)
    return answer


def _start(options: argparse.Namespace) -> Any:
    import ray._private.utils
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class LeanNode(Node):  # type: ignore[misc]
        """A head without an API server."""

        def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
            """Nothing calls it."""

    # The node's agent then serves no HTTP and does not take port 52365 from a Ray that others run here.
    ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("left out")
    parameters = RayParams(
        node_ip_address=HEAD_IP,
        gcs_server_port=0,
        min_worker_port=0,
        max_worker_port=0,
        num_cpus=options.num_cpus,
        object_store_memory=options.object_store_memory,
        temp_dir=options.temp_dir,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
    )
    # With a reaper the kernel ends Ray's processes when this one dies, however it dies.
    return LeanNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.raynode", description="Run a lean Ray head on loopback.")
    parser.add_argument("--num-cpus", type=int, required=True, help="CPUs that Ray hands out; they are a count only")
    parser.add_argument("--object-store-memory", type=int, required=True, help="bytes")
    parser.add_argument("--temp-dir", required=True, help="a short path of an existing folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
