"""Ranks as processes: how they start, what happens when one is killed, and that none is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from kvstore.blocks import HashScheme, block_hashes
from tests.workers.engine_rig import Answer as CollectedAnswer
from tests.workers.engine_rig import model_folder, near_ties, oracle, prompts
from tests.workers.stream_client import SECRET, StreamClient, job
from tests.workers.test_main import start
from workers.config import WorkerConfig
from workers.protocol import Job, SamplingParams
from workers.tensor_parallel.lost import RankLost
from workers.tensor_parallel.processes import RankProcesses
from workers.tensor_parallel.rank import EXIT_ORPHANED
from workers.tensor_parallel.start import build_leading_engine

START_S = 240.0  # two processes import torch on a machine that others use, too
SOON_S = 30.0  # far below any deadline of a collective
CONFIG = WorkerConfig(
    name="w0",
    model_dir=str(model_folder()),
    model_name="tiny",
    device="cpu",
    device_bytes=4 << 20,
    host_bytes=8 << 20,
    block_size=16,
    tensor_parallel=2,
    fleet_secret=SECRET,
    default_ttl_s=None,
    peers=True,
)


def _gone(pid: int, within_s: float) -> bool:
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def _steps(engine) -> None:
    while True:
        engine.step()


def _job(engine, prompt, **sampling) -> Job:
    root = engine.info.scheme.root(b"")
    names = block_hashes(prompt, root, engine.info.scheme.block_size)
    return Job("a", prompt, root, names, SamplingParams(temperature=0.0, **sampling))


def test_a_killed_rank_ends_the_engine_at_once_and_is_named() -> None:
    engine = build_leading_engine(CONFIG)
    processes = engine._processes
    [pid] = processes.pids
    folder = processes.folder
    assert folder.stat().st_mode & 0o077 == 0, "only this user may join"
    served = engine.info.peer_address.split(",")
    assert len(set(served)) == 2, "each rank serves its share to other workers"
    for address in served:
        host, _, port = address.partition(":")
        socket.create_connection((host, int(port)), 5).close()

    prompt, answer = prompts(5)[4], CollectedAnswer()
    engine.submit(_job(engine, prompt, max_tokens=64))
    while engine.has_work():
        for output in engine.step().outputs:
            answer.add(output)
    assert near_ties([answer], oracle().generate([prompt])) == 0

    engine.submit(_job(engine, prompt, max_tokens=900, ignore_eos=True))
    for _ in range(5):
        engine.step()
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(RankLost) as told:
        _steps(engine)
    assert time.monotonic() - killed_at < SOON_S
    assert f"rank 1 (pid {pid}) was ended by SIGKILL" in str(told.value)
    with pytest.raises(RankLost):
        engine.step()
    engine.close(flush_s=5)
    assert _gone(pid, SOON_S)
    assert not folder.exists()


def test_a_rank_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "w0.rank1").write_text("no folder")
    config = replace(CONFIG, disk_bytes=8 << 20, disk_dir=str(tmp_path))
    with pytest.raises(RankLost, match=r"rank 1 \(pid \d+\) ended with exit code 1: .*w0.rank1"):
        build_leading_engine(config)
    assert _ranks_of(os.getpid()) == []


def test_a_worker_of_two_ranks_serves_flushes_restarts_and_dies_whole(tmp_path: Path) -> None:
    config = replace(CONFIG, disk_bytes=16 << 20, disk_dir=str(tmp_path))
    prompt = prompts(5)[4]

    worker, address = _serve(config)
    [rank] = _ranks_of(worker.pid)
    first = _ask(address, prompt)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(START_S) == 0
    assert _gone(rank, SOON_S), "an orderly end takes all ranks with it"
    _close(worker)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w0", "w0.rank1"]

    worker, address = _serve(config)
    [rank] = _ranks_of(worker.pid)
    os.kill(rank, signal.SIGTERM)  # as to all processes of a node at once: when a rank ends is for rank 0 to say
    second = _ask(address, prompt)
    assert [output.token_ids for output in second] == [output.token_ids for output in first]
    assert second[-1].fates.disk == 8 * 16, "both ranks had flushed, and both have found it again"
    worker.kill()
    assert worker.wait(SOON_S) == -signal.SIGKILL
    assert _gone(rank, SOON_S), "a rank must not outlive its worker"
    _close(worker)


def test_a_worker_whose_rank_is_killed_mid_stream_ends_with_exit_code_1(tmp_path: Path) -> None:
    worker, address = _serve(CONFIG)
    [rank] = _ranks_of(worker.pid)
    client = StreamClient(address)
    client.wait_for(lambda: client.mirror.complete)
    client.send(submit=job(_scheme(client), 1, prompts(1)[0], max_tokens=900, tenant=b""))
    client.wait_for(lambda: len(client.outputs[1]) > 3)
    os.kill(rank, signal.SIGKILL)
    assert worker.wait(SOON_S) == 1
    said = worker.stderr.read()
    assert f"rank 1 (pid {rank}) was ended by SIGKILL" in said
    client.drop()
    _close(worker)


def test_a_rank_ends_when_its_worker_does_also_while_it_starts() -> None:
    processes = RankProcesses(CONFIG)
    [rank] = processes._processes
    rank.stdin.close()  # what the kernel does when the worker's process ends
    assert rank.wait(SOON_S) == EXIT_ORPHANED
    assert not processes.folder.exists()
    processes.end(0.0)


def _serve(config: WorkerConfig) -> tuple[subprocess.Popen[str], str]:
    worker = start("--config", "-")
    worker.stdin.write(json.dumps(asdict(config)))
    worker.stdin.close()
    line = worker.stdout.readline()
    assert line, worker.stderr.read()
    return worker, json.loads(line)["address"]


def _ranks_of(pid: int) -> list[int]:
    children = psutil.Process(pid).children()
    return [child.pid for child in children if "workers.tensor_parallel.rank" in _command(child)]


def _command(process: psutil.Process) -> list[str]:
    """Empty: it has ended, be it that nobody has asked for its exit code yet."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _ask(address: str, prompt: list[int]):
    client = StreamClient(address)
    client.wait_for(lambda: client.mirror.complete)
    client.send(submit=job(_scheme(client), 1, prompt, max_tokens=8, tenant=b""))
    client.wait_finished(1)
    client.drop()
    return client.outputs[1]


def _scheme(client: StreamClient) -> HashScheme:
    scheme = client.messages[0].hello.scheme
    assert (scheme.tp_size, scheme.tp_rank) == (2, 0)
    return HashScheme(scheme.model_fingerprint, scheme.layout, scheme.block_size, tp_size=2)


def _close(worker: subprocess.Popen[str]) -> None:
    worker.stdout.close()
    worker.stderr.close()
