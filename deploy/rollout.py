"""Brings the fleet to its number of workers, and tells the person who waits how far it is.

Covers: what workers are made from, adding to a fleet that runs, progress, failures. Does not cover: how one worker is
placed (`placement`), the router that serves meanwhile (`up`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from deploy.cluster import ClusterProblem
from deploy.discovery import KnownWorker, RayDiscovery
from deploy.doctor_engine import MOST_EXACT_THREADS
from deploy.kept_secret import keep_secret
from deploy.layers import Loaded, Origin
from deploy.settings import Settings

Say = Callable[[str], None]

# After this long a worker that has no place yet is worth a word.
_PLACING_PATIENCE_S = 20.0
_LOOK_EVERY_S = 1.0


class Rollout:
    """One run: `begin` returns as soon as the workers are on their way, `finish` when all are ready."""

    def __init__(
        self, loaded: Loaded, discovery: RayDiscovery, say: Say, started_at: float, *, state_dir: Path
    ) -> None:
        """Name the fleet.

        Args:
            started_at: on the monotonic clock; progress is told as seconds since then.
            state_dir: where the secret of a fleet is kept whose settings name none.
        """
        self._loaded = loaded
        self._state_dir = state_dir
        self._settings = loaded.settings
        self._discovery = discovery
        self._say = say
        self._started_at = started_at
        self._told: set[str] = set()
        self._wanted: list[str] = []
        self._placed_at = time.monotonic()

    async def begin(self) -> str:
        """Say what workers are made from and place them; the fleet's secret.

        Raises:
            ClusterProblem: another fleet runs there already, or Ray does not answer.
            StateProblem: the kept secret cannot be read or written.
        """
        present: list[str] = await self._discovery.call("names")
        secret = await self._secret(present)
        template = self._settings.worker_config("template", fleet_secret=secret, threads=_threads(self._settings))
        await self._discovery.configure(template, await _bundle(self._settings, self._discovery))
        self._wanted = self._names_wanted(present)
        kept = [name for name in present if name in self._wanted]
        for verb, which in (
            ("found", kept),
            ("placing", [name for name in self._wanted if name not in present]),
            ("ending", [name for name in present if name not in self._wanted]),
        ):
            if which:
                self._say(f"workers    {verb} {', '.join(which)}")
        if self._wanted != present:
            await self._discovery.scale(len(self._wanted))
        self._placed_at = time.monotonic()
        return secret

    async def finish(self) -> None:
        """Return when no worker is starting any more.

        Raises:
            ClusterProblem: no worker is ready, and none will be.
        """
        patience = self._settings.workers.start_timeout
        try:
            async with asyncio.timeout(patience):
                while not await self._is_complete():
                    pass
        except TimeoutError:
            states = {worker.name: worker.state for worker in self._discovery.workers}
            summary = ", ".join(f"{name} {states.get(name, 'waits for a place')}" for name in self._wanted)
            problem = f"workers are not ready after {patience:g} s: {summary}; look into Ray's logs"
            if "ready" not in states.values():
                raise ClusterProblem(f"{problem}, or give workers.start_timeout more") from None
            self._say(problem)

    async def _secret(self, present: list[str]) -> str:
        """That of the fleet that runs, else the one that was set, else the one that was kept."""
        if present:
            config = (await self._discovery.call("blueprint"))["config"]
            _check_same_fleet(self._settings, config)
            return str(config["fleet_secret"])
        own = own_secret(self._settings)
        return own if own else await asyncio.to_thread(keep_secret, self._state_dir)

    def _names_wanted(self, present: list[str]) -> list[str]:
        if present and self._loaded.origin("workers.count") is Origin.DEFAULT:
            return present
        return [f"w{number}" for number in range(self._settings.workers.count)]

    async def _is_complete(self) -> bool:
        """Look once; when workers are still starting, sleep until something changed."""
        known = [worker for worker in self._discovery.workers if worker.name in self._wanted]
        self._tell_progress(known)
        if sum(worker.state in ("ready", "failed") for worker in known) == len(self._wanted):
            return True
        if len(known) < len(self._wanted) and time.monotonic() - self._placed_at > _PLACING_PATIENCE_S:
            self._tell("room", f"workers wait for a place on Ray: {await self._discovery.call('missing_room')}")
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_EVERY_S):
                await self._discovery.changed()
        return False

    def _tell_progress(self, known: list[KnownWorker]) -> None:
        ready = sum(worker.state == "ready" for worker in known)
        failed = [worker for worker in known if worker.state == "failed"]
        for worker in failed:
            self._tell(worker.name, f"worker {worker.name} failed: {worker.problem}")
        if ready:
            self._tell(f"{ready}", f"workers    {ready} of {len(self._wanted)} ready ({since(self._started_at)})")
        if failed and len(failed) == len(self._wanted):
            raise ClusterProblem(f"no worker could start: {failed[0].problem}")

    def _tell(self, key: str, line: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._say(line)


def own_secret(settings: Settings) -> str | None:
    """The fleet secret that the settings name."""
    secret = settings.auth.fleet_secret
    return None if secret is None else secret.get_secret_value()


def since(started_at: float) -> str:
    """Seconds since then, for people."""
    return f"{time.monotonic() - started_at:.1f} s"


def _check_same_fleet(settings: Settings, present: dict[str, object]) -> None:
    wanted = settings.worker_config("template", fleet_secret="")
    for field in ("model_dir", "model_name", "engine"):
        if present[field] != getattr(wanted, field):
            raise ClusterProblem(
                f"workers with {field} {present[field]} run here already, and {getattr(wanted, field)} was asked for; "
                "run `warmkv down` first, or give another --state-dir"
            )
    own = own_secret(settings)
    if own is not None and own != present["fleet_secret"]:
        raise ClusterProblem("workers with another auth.fleet_secret run here already; run `warmkv down` first")


async def _bundle(settings: Settings, discovery: RayDiscovery) -> dict[str, float]:
    """Ray resources that each worker reserves."""
    workers, gpus = settings.workers, settings.workers.gpus
    if gpus is None:
        may_use = workers.engine == "torch" and workers.device != "cpu"
        gpus = float(workers.tensor_parallel) if may_use and await discovery.call("gpus") else 0.0
    if workers.device == "cuda" and not gpus:
        raise ClusterProblem("workers.device is cuda and Ray has no GPU; start Ray on a machine that has, or use cpu")
    return {"CPU": workers.cpus, "GPU": gpus}


def _threads(settings: Settings) -> int:
    """Cores shared out among the ranks of this machine's workers; on a joined Ray what each worker has reserved.

    No more than the deterministic mode can use.
    """
    ranks = settings.workers.tensor_parallel
    if settings.ray.address is None:
        found = (os.cpu_count() or 1) // max(1, settings.workers.count * ranks)
    else:
        found = int(settings.workers.cpus) // ranks
    most = MOST_EXACT_THREADS if settings.engine.deterministic else found
    return max(1, min(found, most))
