"""Build the ranks of one worker: this process's engine as rank 0, the others in processes of their own."""

from __future__ import annotations

import logging
import time
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from kvstore.tier import Clock
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.peers import address_of
from workers.tensor_parallel.agreement import TensorParallel
from workers.tensor_parallel.follower import Follower
from workers.tensor_parallel.group import RankGroup
from workers.tensor_parallel.leader import LeadingEngine
from workers.tensor_parallel.lost import RankLost
from workers.tensor_parallel.processes import RankProcesses, ready_file

START_TIMEOUT_S = 300.0  # for a process to begin
JOIN_TIMEOUT_S = 60.0
# Rank 0 steps ten times a second at least; this is for ranks that hang, one that ends is noticed at once.
COLLECTIVE_TIMEOUT_S = 60.0
# While they start one may read its weights long after the other.
LOAD_TIMEOUT_S = 1800.0

log = logging.getLogger(__name__)


def build_leading_engine(
    config: WorkerConfig, processes: RankProcesses | None = None, *, clock: Clock = time.monotonic
) -> LeadingEngine:
    """Lead the other ranks.

    Args:
        config: of the worker. clock: seconds.
        processes: of the other ranks, started already; ended with the engine. None: start them.

    Raises:
        RankLost: a rank could not start. Else as `workers.build.build_engine`.
    """
    processes = processes or RankProcesses(config)
    try:
        processes.await_ready(START_TIMEOUT_S)
        group, ranks, engine = _build(config, 0, processes.folder, clock)
    except RankLost as error:
        ended = "; ".join(processes.ended())
        processes.end(0.0)
        raise RankLost(f"{ended or error}") from error
    except BaseException:
        processes.end(0.0)
        raise
    log.info("worker of %d ranks, the others are processes %s", config.tensor_parallel, processes.pids)
    return LeadingEngine(engine, group, ranks, processes, clock=clock)


def follow(config: WorkerConfig, rank: int, folder: Path) -> None:
    """Be a rank above 0 until rank 0 ends the worker.

    Raises:
        RankLost: another rank is gone. Else as `workers.build.build_engine`.
    """
    ready_file(folder, rank).touch()
    group, ranks, engine = _build(config, rank, folder, time.monotonic)
    Follower(engine, group, ranks).run()


def _build(
    config: WorkerConfig, rank: int, folder: Path, clock: Clock
) -> tuple[RankGroup, TensorParallel, TorchEngine]:
    device = torch.device("cuda", rank % max(1, torch.cuda.device_count())) if _on_gpu(config) else None
    group = RankGroup(
        folder,
        rank,
        config.tensor_parallel,
        join_timeout_s=JOIN_TIMEOUT_S,
        timeout_s=LOAD_TIMEOUT_S,
        device=device,
    )
    ranks = TensorParallel(group)
    engine = build_engine(config, clock=clock, group=group, ranks=ranks)
    try:
        _compare(group, engine)
        _share_addresses(group, engine)
    except BaseException:
        engine.close(flush_s=0.0)
        raise
    group.set_timeout(COLLECTIVE_TIMEOUT_S)
    return group, ranks, engine


def _share_addresses(group: RankGroup, engine: TorchEngine) -> None:
    """Let routers hear where each rank serves its share."""
    ranks = [address.decode() for address in group.messages_of_all(engine.info.peer_address.encode())]
    engine.info = replace(engine.info, peer_address=address_of(ranks))


def _on_gpu(config: WorkerConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _compare(group: RankGroup, engine: TorchEngine) -> None:
    """What the schedule follows from must be equal.

    Raises:
        RankLost: it is not.
    """
    info = engine.info
    said = (
        info.scheme.digest().hex(),
        info.tokenizer_sha256.hex(),
        info.context_length,
        engine.store.device.num_blocks,
    )
    digest = zlib.crc32(repr(said).encode())
    low, high = group.least([digest, -digest])
    if low != -high:
        raise RankLost("the ranks of this worker have loaded different models or settings; give all nodes the same")
