"""Runs tests/triton, which need triton and an older numpy than ours, over what `make triton` installs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workers.attention.choice import TritonMissing, backend_for
from workers.attention.torch_backend import TorchBackend

ROOT = Path(__file__).parents[2]
OVERLAY = Path(os.environ.get("WARMKV_TRITON", ROOT / ".venv-triton"))

needs_triton = pytest.mark.skipif(
    not (OVERLAY / "triton").is_dir(), reason=f"no triton in {OVERLAY}; run make triton (make test does it)"
)


def _run(tests: str, **environment: str) -> None:
    path = os.pathsep.join([str(OVERLAY), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", tests],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    # 5: nothing was collected, which would be no test at all.
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.timeout(1800)
def test_the_kernels_compute_what_they_should_under_the_interpreter():
    _run("tests/triton", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.timeout(900)
def test_the_kernels_compile_for_a_gpu(tmp_path: Path):
    _run("tests/triton", TRITON_CACHE_DIR=str(tmp_path))


def test_a_cpu_takes_the_torch_backend_and_knows_nothing_of_triton():
    assert isinstance(backend_for(torch.device("cpu")), TorchBackend)
    program = "import sys, workers.models; sys.exit('workers.attention.triton_backend' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_gpu_without_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "workers.attention.triton_backend", raising=False)
    monkeypatch.delitem(sys.modules, "workers.attention.triton_launching", raising=False)
    with pytest.raises(TritonMissing, match=r"pip install 'triton>=3\.6'"):
        backend_for(torch.device("cuda"))
