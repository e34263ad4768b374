"""Whether workers of several ranks could start here: the model's heads, this machine's GPUs and cores.

A check of `warmkv doctor`. Devices are looked at only where `up` starts a Ray of its own, on this machine: of a Ray
that is joined the doctor knows no nodes. What a model lacks for ranks is decided by `workers.tensor_parallel.shard`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.finding import Finding
from deploy.settings import Settings

CHECK = "ranks"


def check_ranks(settings: Settings, state_dir: Path) -> Iterator[Finding]:
    """Heads that cannot be shared out, and devices that are fewer than the workers' ranks."""
    if settings.workers.engine == "simulated":
        return
    problems = [*_heads(settings), *_devices(settings)]
    ranks, count = settings.workers.tensor_parallel, settings.workers.count
    if problems:
        yield from problems
    elif ranks > 1:
        yield Finding("ok", CHECK, f"{count} worker(s) of {ranks} ranks, each with its share of the heads and the K/V")


def _heads(settings: Settings) -> Iterator[Finding]:
    """As `shard.check_heads`; a folder that cannot be read is told by the check of the model."""
    ranks = settings.workers.tensor_parallel
    if ranks == 1 or settings.model.dir is None:
        return
    try:
        config = json.loads((Path(settings.model.dir) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    heads, kv_heads = _counts(config)
    if heads and (heads % ranks or kv_heads % ranks):
        found = f"the model has {heads} heads and {kv_heads} of K/V, which {ranks} ranks cannot share out evenly"
        yield Finding("fail", CHECK, found, "set workers.tensor_parallel to 1, or to a number that divides both")


def _counts(config: dict[str, Any]) -> tuple[int, int]:
    """Heads and heads of K/V; zeros where config.json does not say."""
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads") or text.get("n_head")
    kv_heads = text.get("num_key_value_heads") or heads
    return (heads, kv_heads) if isinstance(heads, int) and isinstance(kv_heads, int) else (0, 0)


def _devices(settings: Settings) -> Iterator[Finding]:
    workers = settings.workers
    if settings.ray.address is not None:
        return
    gpus = 0 if workers.device == "cpu" else _gpus()
    if gpus:
        yield from _too_few_gpus(settings, gpus)
        return
    cores, ranks = os.cpu_count() or 1, workers.count * workers.tensor_parallel
    if workers.tensor_parallel > 1 and ranks > cores:
        found = f"{workers.count} worker(s) of {workers.tensor_parallel} ranks on {cores} core(s): ranks wait in turn"
        yield Finding("warn", CHECK, found, "set workers.tensor_parallel to 1: on a CPU ranks share what one rank has")


def _too_few_gpus(settings: Settings, gpus: int) -> Iterator[Finding]:
    workers = settings.workers
    each = float(workers.tensor_parallel) if workers.gpus is None else workers.gpus
    if each * workers.count > gpus:
        found = f"{workers.count} worker(s) reserve {each:g} GPU(s) each and Ray finds {gpus} here: the rest would wait"
        remedy = f"set workers.count to {int(gpus // each)} at most, or join a Ray with more (--ray-address)"
        yield Finding("fail", CHECK, found, remedy)
    if workers.tensor_parallel > 1 and 0 < each < workers.tensor_parallel:
        found = f"a worker reserves {each:g} GPU(s) for {workers.tensor_parallel} ranks, which then share them"
        yield Finding("warn", CHECK, found, f"set workers.gpus to {workers.tensor_parallel}, or leave it out")


def _gpus() -> int:
    try:
        import torch
    except ImportError:  # told by the check of torch
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
