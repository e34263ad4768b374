"""Workers on Ray: placing, finding, describing and ending them. Only the driver process imports this module.

Covers: the fleet's actors and placement groups. A worker is a detached actor named `warmkv-worker-NAME` in the
namespace `warmkv`, inside a detached placement group of the same name, so that it stays where it was reserved a place,
outlives whoever placed it, and is found by any router. Does not cover: who asks (`driver`).
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.util
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from workers.actor import Farewell, RayWorkerActor, WorkerDescription
from workers.config import WorkerConfig

log = logging.getLogger(__name__)

ACTOR_PREFIX = "warmkv-worker-"
_NUMBERED = re.compile(r"w(\d+)")
_CALL_TIMEOUT_S = 10.0
_GONE_TIMEOUT_S = 10.0
# Beyond what a worker may take to drain or to flush: the time that its streams and its engine take to end.
_MARGIN_S = 5.0

Bundle = Mapping[str, float]  # Ray resources that one worker reserves


class PlacementProblem(Exception):
    """The fleet cannot be changed as asked. The message ends with what to do."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What workers are made from: everything but the name."""

    config: WorkerConfig
    bundle: Bundle


class Placement:
    """The fleet on a connected Ray. Thread-safe: one change at a time."""

    def __init__(self) -> None:
        self._blueprint: Blueprint | None = None
        self._changing = threading.Lock()

    def set_blueprint(self, blueprint: Blueprint) -> None:
        """What new workers are made from; without it they are made like a worker that is there."""
        self._blueprint = blueprint

    def names(self) -> list[str]:
        """Workers that are placed or being placed, sorted as numbers."""
        found = (name.removeprefix(ACTOR_PREFIX) for name in ray.util.list_named_actors() if _is_worker(name))
        return sorted(found, key=_sort_key)

    def blueprint(self) -> Blueprint:
        """What the next worker is made from.

        Raises:
            PlacementProblem: none was given and there is no worker to learn it from.
        """
        for name in self.names():
            if self._blueprint is None:
                self._blueprint = _blueprint_of(name)
        if self._blueprint is None:
            raise PlacementProblem("no worker is there to make another one like it; start the fleet by `warmkv up`")
        return self._blueprint

    def scale(self, count: int, *, drain_s: float, flush_s: float) -> tuple[list[str], list[str]]:
        """Place the missing ones of w0 to w(count - 1), end all others; names placed, names ended.

        `drain_s` and `flush_s` hold for those that end, and for those that are placed should they get SIGTERM.

        Placing returns at once: a worker that finds no room waits for it.
        """
        with self._changing:
            present, wanted = self.names(), [f"w{number}" for number in range(count)]
            missing = [name for name in wanted if name not in present]
            surplus = [name for name in reversed(present) if name not in wanted]
            if missing:
                blueprint = self.blueprint()
                for name in missing:
                    _place(name, blueprint, Farewell(drain_s, flush_s))
            _end(surplus, drain_s=drain_s, flush_s=flush_s)
        return missing, surplus

    def end_all(self, *, drain_s: float, flush_s: float) -> list[str]:
        """End every worker; their names."""
        with self._changing:
            names = self.names()
            _end(names, drain_s=drain_s, flush_s=flush_s)
        return names

    def model_card(self) -> dict[str, bytes]:
        """The small files of the model folder, from the first worker that answers.

        Raises:
            PlacementProblem: none does.
        """
        for name in self.names():
            try:
                card: dict[str, bytes] = ray.get(_actor(name).model_card.remote(), timeout=_CALL_TIMEOUT_S)
            except (RayError, ValueError) as error:
                log.warning("a worker did not hand out its model's files", extra={"worker": name, "why": str(error)})
                continue
            return card
        raise PlacementProblem(
            "no worker can hand out the model's files; give --model a folder that this node can read"
        )

    def gpus(self) -> float:
        """GPUs of the whole cluster."""
        return float(ray.cluster_resources().get("GPU", 0.0))

    def missing_room(self) -> str:
        """Why workers that wait for a place get none: what each needs and what is free."""
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        return f"each needs {dict(self.blueprint().bundle)}, and free on {len(alive_nodes())} node(s) is {free}"


def connect(address: str, *, namespace: str) -> None:
    """Make this process a driver of the Ray at `address`.

    Raises:
        PlacementProblem: there is none, it is of another version, or this machine is not one of its nodes.
    """
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
            logging_config=ray.LoggingConfig(encoding="JSON", log_level="INFO"),  # of the workers placed from here
        )
    except (RuntimeError, ConnectionError, ValueError, RayError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlacementProblem(
            f"Ray at {address} cannot be joined ({first}); check the address, that this machine is a node of it "
            "(ray start --address=...), its version and its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)"
        ) from error


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's own records of the nodes that live."""
    return [node for node in ray.nodes() if node["Alive"]]


def node_versions(timeout_s: float) -> dict[str, str]:
    """By node, `Python 3.11.2, ray 2.60.0, torch 2.13.0, warmkv 0.2.0`, or what is wrong with it."""

    def versions() -> str:  # sent by value: a node without our package must be able to say so
        import importlib.metadata
        import platform

        found = [f"Python {platform.python_version()}"]
        for package in ("ray", "torch", "warmkv"):
            try:
                found.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                found.append(f"{package} missing")
        return ", ".join(found)

    task, asked = ray.remote(num_cpus=0, max_retries=0)(versions), {}
    for node in alive_nodes():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"] = task.options(scheduling_strategy=there).remote()
    return {node: _answer(reference, timeout_s) for node, reference in asked.items()}


class Watcher:
    """Asks every worker who it is, again and again, without waiting for those that do not answer."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._asked: dict[str, Any] = {}  # object references of calls under way, at most one for a worker
        self._known: dict[str, WorkerDescription] = {}

    def poll(self, wait_s: float) -> list[WorkerDescription]:
        """One round that lasts `wait_s` at most. Workers that never answered yet are left out."""
        names = self._placement.names()
        self._known = {name: known for name, known in self._known.items() if name in names}
        self._asked = {name: asked for name, asked in self._asked.items() if name in names}
        for name in names:
            if name not in self._asked:
                self._ask(name)
        references = list(self._asked.values())
        if references:
            ray.wait(references, num_returns=len(references), timeout=wait_s)
        else:
            time.sleep(wait_s)
        for name, reference in list(self._asked.items()):
            self._hear(name, reference)
        return [self._known[name] for name in names if name in self._known]

    def _ask(self, name: str) -> None:
        try:
            self._asked[name] = _actor(name).describe.remote()
        except ValueError:  # it has gone since we saw its name
            self._known.pop(name, None)

    def _hear(self, name: str, reference: Any) -> None:
        ready, _ = ray.wait([reference], timeout=0)
        if not ready:
            return
        del self._asked[name]
        try:
            self._known[name] = ray.get(reference)
        except RayActorError as error:
            # What we know of it may still hold: routers judge by their own streams.
            log.debug("a worker did not say who it is", extra={"worker": name, "why": str(error)})


def _answer(reference: Any, timeout_s: float) -> str:
    try:
        return str(ray.get(reference, timeout=timeout_s))
    except GetTimeoutError:
        return f"no answer within {timeout_s:g} s"
    except RayError as error:
        return f"failed: {str(error).strip().splitlines()[0]}"


def _is_worker(actor_name: str) -> bool:
    return actor_name.startswith(ACTOR_PREFIX)


def _sort_key(name: str) -> tuple[int, str]:
    found = _NUMBERED.fullmatch(name)
    return (int(found[1]) if found is not None else 1 << 30, name)


def _actor(name: str) -> Any:
    return ray.get_actor(ACTOR_PREFIX + name)


def _blueprint_of(name: str) -> Blueprint | None:
    try:
        config = ray.get(_actor(name).template.remote(), timeout=_CALL_TIMEOUT_S)
        group = ray.util.get_placement_group(ACTOR_PREFIX + name)
    except (RayError, ValueError) as error:
        log.warning("a worker did not say what it is made from", extra={"worker": name, "why": str(error)})
        return None
    return Blueprint(config, dict(placement_group_table(group)["bundles"][0]))


def _place(name: str, blueprint: Blueprint, farewell: Farewell) -> None:
    _remove_group(name)  # of an earlier worker of that name whose end was cut short
    bundle = {resource: amount for resource, amount in blueprint.bundle.items() if amount}
    group = placement_group(
        [bundle or {"CPU": 0.001}], strategy="STRICT_PACK", name=ACTOR_PREFIX + name, lifetime="detached"
    )
    options = {
        "name": ACTOR_PREFIX + name,
        "lifetime": "detached",
        "max_restarts": -1,
        "max_task_retries": 0,  # a job that was half sent must not run twice
        "num_cpus": bundle.get("CPU", 0.0),
        "num_gpus": bundle.get("GPU", 0.0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=False),
    }
    config = replace(blueprint.config, name=name)
    ray.remote(RayWorkerActor).options(**options).remote(config, farewell=farewell)
    log.info("worker placed", extra={"worker": name, "bundle": bundle})


def _end(names: list[str], *, drain_s: float, flush_s: float) -> None:
    """Let their jobs finish, stop them, end their processes and give back their places; all of them at once."""
    actors: dict[str, Any] = {}
    for name in names:
        try:
            actors[name] = _actor(name)
        except ValueError:  # it has gone already
            _remove_group(name)
    _await_all([actor.drain.remote(drain_s) for actor in actors.values()], drain_s)
    _await_all([actor.stop.remote(flush_s) for actor in actors.values()], flush_s)
    for name in actors:
        try:
            ray.kill(_actor(name), no_restart=True)
        except ValueError:
            log.info("worker had gone before it was ended", extra={"worker": name})
        _remove_group(name)
    _await_gone(names)


def _await_all(references: list[Any], timeout_s: float) -> None:
    if references:
        ray.wait(references, num_returns=len(references), timeout=timeout_s + _MARGIN_S)


def _remove_group(name: str) -> None:
    try:
        remove_placement_group(ray.util.get_placement_group(ACTOR_PREFIX + name))
    except ValueError:  # there is none
        return


def _await_gone(names: list[str]) -> None:
    """A name is free again a moment after its actor ended."""
    give_up = time.monotonic() + _GONE_TIMEOUT_S
    while time.monotonic() < give_up:
        left = {name.removeprefix(ACTOR_PREFIX) for name in ray.util.list_named_actors()} & set(names)
        if not left:
            return
        time.sleep(0.05)
    raise PlacementProblem(f"workers {', '.join(names)} did not end within {_GONE_TIMEOUT_S:g} s; try it again")
