"""These tests need triton, and an older numpy than the project has: `tests/workers/test_triton.py` runs them over what
`make triton` installs, once interpreted and once to compile. Elsewhere there is nothing here to collect."""

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore = ["test_compiles.py"]
else:
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_compiles.py"]


def pytest_configure(config: pytest.Config) -> None:
    """What triton's interpreter does to numpy; the reason for the older one."""
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
