"""DaemonPool: calls run in order, results and errors reach who asked; a thread that hangs does not hold the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError, wait
from pathlib import Path

import pytest

from kvstore.daemon_pool import DaemonPool

HANGING_DISK = """
import sys, threading, time, torch
from pathlib import Path
from kvstore.device import DeviceTier
from kvstore.disk.tier import DiskTier
from kvstore.store import ReadTiers, TieredStore
from tests.kvstore.blocks_for_tests import LAYOUT, ROOT, chain, names, payloads
from tests.kvstore.disk.disk_for_tests import CODEC, FaultyFiles, capacity

torch.set_num_threads(1)

class HangingFiles(FaultyFiles):
    hangs = False

    def preadv(self, fd, buffers, offset):
        if self.hangs:
            threading.Event().wait()
        return super().preadv(fd, buffers, offset)

files, metas = HangingFiles(), chain(6)
disk = DiskTier(Path(sys.argv[1]), capacity(10), codec=CODEC, clock=time.monotonic, files=files)
disk.write(metas, payloads(metas))
files.hangs = True
device = DeviceTier(LAYOUT, 16 * LAYOUT.block_nbytes, clock=time.monotonic)
store = TieredStore(LAYOUT, device, None, None, disk=disk, clock=time.monotonic, default_ttl_s=None)
acquisition = store.acquire(names(metas), reads=ReadTiers(), compute_ms=lambda first, count: 1e4, root=ROOT)
while not acquisition.done:
    store.wait(1.0)
    store.pump()
assert acquisition.block_ids == []
store.close()
print("closed")
"""


def test_calls_run_in_order_and_tell_their_results_and_errors() -> None:
    pool, seen = DaemonPool(1, "test"), []
    futures = [pool.submit(seen.append, number) for number in range(50)]
    failing = pool.submit(int, "x")
    assert pool.submit(divmod, 7, 4).result(30) == (1, 3)
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(30)
    wait(futures, 30)
    assert seen == list(range(50))
    assert pool.close(30)


def test_no_more_threads_than_asked_for_run_at_once() -> None:
    pool, barrier, running, most = DaemonPool(3, "test"), threading.Barrier(3), [0], [0]
    lock = threading.Lock()

    def work() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        barrier.wait(30)
        with lock:
            running[0] -= 1

    wait([pool.submit(work) for _ in range(9)], 60)
    assert most == [3]
    assert pool.close(30)


def test_closing_cancels_what_waits_and_says_whether_the_rest_ended() -> None:
    pool, go = DaemonPool(1, "test"), threading.Event()
    started = threading.Event()
    running = pool.submit(lambda: (started.set(), go.wait(60)))
    waiting = pool.submit(int)
    assert started.wait(30)
    assert not pool.close(0.0)
    with pytest.raises(CancelledError):
        waiting.result(30)
    assert wait([waiting], 30).not_done == set()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(int)
    go.set()
    assert pool.close(30)
    assert running.result(30)


def test_a_process_whose_disk_hangs_for_ever_closes_its_store_and_ends(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", HANGING_DISK, str(tmp_path)], timeout=120, check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, "closed\n"), ended.stderr
