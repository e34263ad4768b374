"""Runs every shell line of a Markdown file, verbatim and in order; fails at the first one that fails.

A fenced block marked `sh` is run by bash in the repository's root. One marked `sh background` is started and left
running until the end (what a reader would do in a second terminal); the next block starts once it prints the text of
`ready="..."`. Blocks of other languages are not run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```sh(?P<options>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
READY_TIMEOUT_S = 120.0
BLOCK_TIMEOUT_S = 3600.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    body: str
    background: bool
    ready: str


def blocks(markdown: str) -> list[Block]:
    """The `sh` blocks of a Markdown text."""
    found = []
    for match in FENCE.finditer(markdown):
        ready = re.search(r'ready="([^"]*)"', match["options"])
        found.append(Block(match["body"], "background" in match["options"], ready[1] if ready else ""))
    return found


def start(block: Block, running: list[subprocess.Popen[str]]) -> None:
    """Start a background block, put it among those that run, and wait until it is ready."""
    process = subprocess.Popen(
        ["bash", "-ec", block.body], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    running.append(process)
    is_ready = threading.Event()

    def copy_output() -> None:
        for line in process.stdout or ():
            print(f"  | {line}", end="", flush=True)
            if block.ready in line:
                is_ready.set()

    threading.Thread(target=copy_output, daemon=True).start()
    give_up = time.monotonic() + READY_TIMEOUT_S
    while not is_ready.wait(0.2):
        if process.poll() is not None or time.monotonic() > give_up:
            print(f"never printed {block.ready!r} (exit {process.poll()}):\n{block.body}", file=sys.stderr)
            raise SystemExit(1)


def stop(process: subprocess.Popen[str]) -> None:
    """Ctrl-C, as a reader would; the exit status must be clean."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    code = process.wait(STOP_TIMEOUT_S)
    if code not in (0, -signal.SIGINT, 128 + signal.SIGINT):
        raise SystemExit(f"a background block ended with {code}")


def end_fleet() -> None:
    """Workers outlive their router: leave none behind when a block failed before the one that ends them."""
    subprocess.run(["warmkv", "down"], timeout=STOP_TIMEOUT_S, check=True)


def main() -> int:
    """Run the file's blocks."""
    os.environ["PATH"] = f"{Path('.venv/bin').resolve()}:{os.environ['PATH']}"
    running: list[subprocess.Popen[str]] = []
    try:
        for block in blocks(Path(sys.argv[1]).read_text(encoding="utf-8")):
            print(f"$ {block.body}", end="", flush=True)
            if block.background:
                start(block, running)
                continue
            done = subprocess.run(["bash", "-ec", block.body], timeout=BLOCK_TIMEOUT_S, check=False)
            if done.returncode:
                print(f"failed with {done.returncode}:\n{block.body}", file=sys.stderr)
                return 1
    finally:
        try:
            for process in reversed(running):
                stop(process)
        finally:
            if running:
                end_fleet()
    return 0


if __name__ == "__main__":
    sys.exit(main())
