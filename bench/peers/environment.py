"""The peers' wheels, each in a virtual environment of its own under a cache folder.

One each, because two of them bring a program of the same name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INSTALL_TIMEOUT_S = 600.0
_STAMP = "installed.txt"

# The first line is the peer; the others are what our shim before Dynamo's library and its events need.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "sglang": ("sglang-router==0.3.2",),
    "smg": ("smg==1.13.0",),
    "vllm": ("vllm-router==0.1.17",),
    "dynamo": ("ai-dynamo-runtime==1.6.1", "aiohttp>=3.10,<4", "pyzmq>=26", "msgpack>=1.1,<2"),
}


class NotInstalled(RuntimeError):
    """A peer's wheel could not be installed; the message says why."""


def cache_folder() -> Path:
    """Where the environments lie; they are kept for the next run, and may be removed at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "warmkv" / "bench-peers"


def install(peer: str, folder: Path) -> Path:
    """The Python of the peer's environment, made first where it is missing or has other versions.

    Raises:
        NotInstalled: with pip's last words.
    """
    wanted = "\n".join(REQUIREMENTS[peer])
    home = folder / peer
    python, stamp = home / "bin" / "python", home / _STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    run([sys.executable, "-m", "venv", "--clear", str(home)])
    run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS[peer]])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run(command: list[str]) -> None:
    """Run it to its end.

    Raises:
        NotInstalled: it failed, or took too long.
    """
    # Whoever runs this may have a source tree on the path; the peers must not see it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"{command[2]} took longer than {INSTALL_TIMEOUT_S:g} s; try again") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise NotInstalled(" / ".join(errors[-2:]) or f"exit {done.returncode}")
