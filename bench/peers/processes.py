"""Child processes of the comparison: started with a log of their own, measured, ended by their own ids."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

START_TIMEOUT_S = 120.0
_POLL_S = 0.05


class NotStarted(RuntimeError):
    """A process ended or did not serve in time; the message ends with its last words."""


class Child:
    """A process and what it started."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name, self._log = log.stem, log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(environment)
            )
        self._process = psutil.Process(self._popen.pid)

    @property
    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Raise NotStarted if it has ended."""
        if self._popen.poll() is not None:
            raise NotStarted(f"{self.name} ended with {self._popen.returncode}; its last words: {self.last_words()}")

    def wait_for(self, text: str) -> None:
        """Until its log has that text.

        Raises:
            NotStarted: it ended, or two minutes passed.
        """
        give_up = time.monotonic() + START_TIMEOUT_S
        while text not in self.log:
            self.check()
            if time.monotonic() > give_up:
                raise NotStarted(f"{self.name} does not serve; its last words: {self.last_words()}")
            time.sleep(_POLL_S)

    def last_words(self) -> str:
        """The end of its log."""
        return " / ".join(self.log.splitlines()[-5:])[-1000:]

    def cpu_s(self) -> float:
        """User and system time of it and of what it started."""
        return sum(sum(process.cpu_times()[:2]) for process in self._family())

    def rss_bytes(self) -> int:
        """Resident memory of the same."""
        return sum(process.memory_info().rss for process in self._family())

    def kill(self) -> None:
        """SIGKILL to it and to what it started; returns when it is gone."""
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._popen.wait()

    def _family(self) -> list[psutil.Process]:
        try:
            return [*self._process.children(recursive=True), self._process]
        except psutil.NoSuchProcess:
            return []
