"""What a check of `warmkv doctor` finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.settings import Settings

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at, one word. found: what is there. remedy: what to do; empty where nothing is.
    """

    level: Level
    check: str
    found: str
    remedy: str = ""


Check = Callable[[Settings, Path], Iterator[Finding]]
