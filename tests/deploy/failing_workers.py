"""Two workers under a Ray that runs already, whose engines fail in their first process: one raises, one is stuck.

`python failing_workers.py ADDRESS`. Lines out, of each: {"name": ..., "incarnations": [...], "pids": [...]}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0


def main(address: str) -> None:
    import ray

    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}})
    with tempfile.TemporaryDirectory() as folder:
        marks = [Path(folder) / name for name in ("raises", "stuck")]
        actors = [_place(ray, mark) for mark in marks]
        for actor, mark in zip(actors, marks, strict=True):
            said = _lives(ray, actor, mark)
            ray.kill(actor, no_restart=True)
            say.write(json.dumps({"name": mark.name, **said}) + "\n")
    ray.shutdown()


def _place(ray: Any, mark: Path) -> Any:
    from workers.actor import WorkerActor
    from workers.config import WorkerConfig

    sizes = {"block_size": 16, "device_bytes": 1 << 22, "host_bytes": 0}
    config = WorkerConfig(mark.name, "", "m", engine="simulated", watchdog_s=1.0, **sizes)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(WorkerActor).options(**options).remote(config, build_engine=_failing(mark))


def _lives(ray: Any, actor: Any, mark: Path) -> dict[str, list[int]]:
    """What each of its processes said of itself: the one before the failure, and a ready one after it."""
    found: dict[int, Any] = {}
    give_up = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up:
        said = ray.get(actor.describe.remote(), timeout=DEADLINE_S)
        found[said.pid] = said
        if said.state.value == "ready":
            mark.with_suffix(".seen").touch()
            if len(found) == 2:
                break
        time.sleep(0.05)
    return {"incarnations": [each.incarnation for each in found.values()], "pids": list(found)}


def _failing(mark: Path) -> Any:
    """An engine that raises, or hangs, once the first process of its worker was seen ready."""
    name, seen = mark.name, mark.with_suffix(".seen")

    def build(config: Any) -> Any:
        from workers.main import build_engine

        engine = build_engine(config)
        if seen.exists():
            return engine
        step = engine.step

        def fails() -> Any:
            if not seen.exists():
                return step()
            if name == "raises":
                raise MemoryError("the pool is corrupt")
            return threading.Event().wait()  # for ever

        engine.step = fails
        return engine

    return build


if __name__ == "__main__":
    main(sys.argv[1])
