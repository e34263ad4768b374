"""Workers that are later than was predicted: what no report says and no price contains.

A prediction of a queue knows prompts that wait to be computed. It does not know of answers that keep all places of a
batch, nor of a worker that is stuck. Both show in the same way: a request that was sent there has no first token long
after it should. Such a worker gets nothing more from this router until that one has spoken or ended. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_OWN_WORK = 2.0  # its own load and compute may take so many times what was predicted


@dataclass(slots=True)
class _Sent:
    at: float
    own_s: float


class Pace:
    """Requests without a first token, by worker, in the order in which they were sent. O(1) each."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._silent: dict[str, OrderedDict[int, _Sent]] = {}

    def sent(self, key: int, worker: str, own_ms: float) -> None:
        """A request went to a worker that will take `own_ms` for it alone."""
        self._silent.setdefault(worker, OrderedDict())[key] = _Sent(self._clock(), own_ms / 1000.0)

    def spoke(self, key: int, worker: str) -> None:
        """It has a first token, or has ended. Once more is harmless."""
        silent = self._silent.get(worker)
        if silent is None or silent.pop(key, None) is None:
            return
        if not silent:
            del self._silent[worker]

    def late(self, limit_s: float) -> frozenset[str]:
        """Workers that are late by more than `limit_s`."""
        return frozenset(worker for worker in self._silent if self.is_late(worker, limit_s))

    def is_late(self, worker: str, limit_s: float) -> bool:
        """Whether its oldest silent request is over its own work by more than `limit_s`."""
        silent = self._silent.get(worker)
        if silent is None:
            return False
        sent = next(iter(silent.values()))
        return self._clock() - sent.at - _OWN_WORK * sent.own_s > limit_s
