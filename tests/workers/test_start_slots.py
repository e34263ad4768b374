from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from workers.start_slots import start_slot

HOLD = """
import sys
from pathlib import Path
from workers.start_slots import start_slot
with start_slot(slots=1, folder=Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_only_so_many_start_at_once(tmp_path: Path) -> None:
    inside, most, lock, go = 0, 0, threading.Lock(), threading.Barrier(6)
    two = threading.Barrier(2, timeout=30)

    def start() -> None:
        nonlocal inside, most
        go.wait()
        with start_slot(slots=2, folder=tmp_path):
            with lock:
                inside += 1
                most = max(most, inside)
            two.wait()
            threading.Event().wait(0.05)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (inside, most) == (0, 2)


def test_a_place_is_free_again_when_its_process_was_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        waiting = threading.Event()

        def wait() -> None:
            with start_slot(slots=1, folder=tmp_path):
                waiting.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not waiting.wait(0.3)
        process.kill()
        assert waiting.wait(30)
        thread.join(30)


def test_without_a_place_the_worker_starts_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with start_slot(slots=1, folder=tmp_path), start_slot(slots=1, folder=tmp_path, patience_s=0.2):
        pass
    assert "without waiting" in caplog.text


def test_a_folder_that_somebody_could_have_planted_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "planted").symlink_to(tmp_path / "theirs")
    with start_slot(slots=1, folder=tmp_path / "planted"):
        assert list((tmp_path / "theirs").iterdir()) == []
    assert "without waiting" in caplog.text
