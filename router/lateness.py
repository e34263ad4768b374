"""Workers by what they do and not by what was predicted: what no report says and no price contains.

A prediction knows of prompts that wait to be computed and of answers that keep room. It does not know of a worker that
is stuck. That shows in the requests that were sent there and have no first token yet. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_OWN_WORK = 2.0  # its own load and compute may take so many times what was predicted


@dataclass(slots=True)
class _Sent:
    at: float
    own_ms: float


class Lateness:
    """Of workers. O(1) for each thing that it is told."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._silent: dict[str, OrderedDict[int, _Sent]] = {}  # without a first token, in the order of sending

    def sent(self, key: int, worker: str, own_ms: float) -> None:
        """A request went to a worker that will take `own_ms` for it alone."""
        self._silent.setdefault(worker, OrderedDict())[key] = _Sent(self._clock(), own_ms)

    def spoke(self, key: int, worker: str) -> None:
        """It has a first token, or has ended without one. Once more is harmless."""
        if (silent := self._silent.get(worker)) is not None:
            silent.pop(key, None)

    def forget(self, worker: str) -> None:
        """The worker is gone for good; what still ends there is none of its business."""
        self._silent.pop(worker, None)

    def silent(self) -> int:
        """Requests without a first token."""
        return sum(len(silent) for silent in self._silent.values())

    def late(self, limit_s: float) -> frozenset[str]:
        """Workers that are late by more than `limit_s`."""
        return frozenset(worker for worker in self._silent if self.is_late(worker, limit_s))

    def is_late(self, worker: str, limit_s: float) -> bool:
        """Whether its oldest silent request is over its own work by more than `limit_s`."""
        silent = self._silent.get(worker)
        if not silent:
            return False
        sent = next(iter(silent.values()))
        return self._clock() - sent.at - _OWN_WORK * sent.own_ms / 1000.0 > limit_s
