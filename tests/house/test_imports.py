"""The house's laws that a linter cannot see."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH_FREE = ["router.app", "router.core", "router.service", "router.http", "kvstore.blocks", "kvstore.events"]
TORCH_FREE += ["kvstore.estimate", "kvstore.directory", "workers.simulated", "warmkv.client", "deploy.cli"]
TORCH_FREE += ["kvstore.eviction.policies", "kvstore.admission", "replay.traces"]
TORCH_FREE += ["replay.recorder", "replay.comparison"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_module_starts_without_the_heavy_libraries(module: str) -> None:
    heavy = "sorted({'torch', 'transformers', 'ray'} & sys.modules.keys())"
    code = f"import sys, {module}; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{module} pulled in {done.stderr}"


def test_proto_is_a_source_root_and_never_a_package() -> None:
    """PyPI's proto-plus installs an import package `proto`; an __init__.py of ours would shadow it and break Ray."""
    assert not (ROOT / "proto" / "__init__.py").exists()


def test_the_lock_holds_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "torch==2.13.0" in lock
    assert "ray==2.60.0" in lock
