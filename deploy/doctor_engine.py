"""Whether the settings of the engine go together: what a worker would refuse at its start, and what would be of no use.

A check of `warmkv doctor`. It goes by the settings alone: the workers' machines may have other devices than this one.
What a worker refuses is decided by `workers.build` and `workers.stepping.make`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deploy.finding import Finding
from deploy.settings import Settings
from kvstore.layout import UNQUANTISED
from workers.roles import Role, parse_roles, role_of

CHECK = "engine"
MOST_EXACT_THREADS = 2


def check_engine(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Combinations that no worker starts with, and roles that nobody can play."""
    problems = [*_exactness(settings), *_graphs(settings), *_roles(settings)]
    if problems:
        yield from problems
        return
    workers, mode = settings.workers, "deterministic" if settings.engine.deterministic else "default"
    said = f"{mode} mode, {workers.tensor_parallel} rank(s) a worker, {workers.roles or 'all prefill and decode'}"
    yield Finding("ok", CHECK, said)


def _exactness(settings: Settings) -> Iterator[Finding]:
    if not settings.engine.deterministic:
        return
    clashes = {
        "engine.kv_dtype to auto": settings.engine.kv_dtype != UNQUANTISED,
        "workers.tensor_parallel to 1": settings.workers.tensor_parallel > 1,
        "engine.compile to false": settings.engine.compile,
        "engine.cuda_graphs to auto": settings.engine.cuda_graphs == "on",
        f"workers.threads to {MOST_EXACT_THREADS} at most": settings.workers.device == "cpu"
        and (settings.workers.threads or 0) > MOST_EXACT_THREADS,
    }
    if remedies := [remedy for remedy, is_wrong in clashes.items() if is_wrong]:
        yield Finding("fail", CHECK, "engine.deterministic is not proven with these", f"set {', '.join(remedies)}")


def _graphs(settings: Settings) -> Iterator[Finding]:
    engine = settings.engine
    if engine.cuda_graphs != "on" and not engine.compile:
        return
    clashes = {
        "workers.device is cpu": settings.workers.device == "cpu",
        "workers.tensor_parallel is more than 1": settings.workers.tensor_parallel > 1,
        "engine.compile needs engine.cuda_graphs": engine.cuda_graphs == "off",
    }
    if found := [what for what, is_wrong in clashes.items() if is_wrong]:
        remedy = "set engine.cuda_graphs to auto and engine.compile to false"
        yield Finding("fail", CHECK, f"graphs were asked for, and {', '.join(found)}", remedy)


def _roles(settings: Settings) -> Iterator[Finding]:
    """Roles do no harm where nobody can read what others prefill, and no good either."""
    workers = settings.workers
    if not workers.roles:
        return
    missing = {
        "store.peers to true": not settings.store.peers,
        "store.host_bytes to more than 0": settings.store.host_bytes == 0,
        "store.keys_file and store.protection to encrypt": settings.tls.worker_cert is not None
        and not (settings.store.keys_file is not None and settings.store.protection == "encrypt"),
    }
    if remedies := [remedy for remedy, is_missing in missing.items() if is_missing]:
        found = "workers.roles is set, and workers cannot read what others prefill"
        yield Finding("warn", CHECK, found, f"set {', '.join(remedies)}, or leave workers.roles empty")
    yield from _without_counterpart(settings)


def _without_counterpart(settings: Settings) -> Iterator[Finding]:
    workers = settings.workers
    numbers = range(workers.count)
    roles = {role_of(f"w{number}", workers.roles) for number in numbers}
    if roles == {Role.PREFILL}:
        found = "every worker has the role prefill, so they answer as if they had none"
        yield Finding("warn", CHECK, found, "give some the role decode, or raise workers.count")
    if roles == {Role.DECODE}:
        found = "every worker has the role decode, so nobody prefills for them and they do it themselves"
        yield Finding("warn", CHECK, found, "give some the role prefill, or raise workers.count")
    named = sum(count for _, count in parse_roles(workers.roles))
    if named > workers.count:
        found = f"workers.roles names {named} workers and workers.count is {workers.count}: the last ones are missing"
        yield Finding("warn", CHECK, found, f"raise workers.count to {named}, or name fewer")
