"""Workers by what they do and not by what was predicted: what no report says and no price contains.

A prediction of a queue knows prompts that wait to be computed. It does not know of answers that keep all places of a
batch, nor of a worker that is stuck. Both show in the requests that were sent there and have no first token yet. Pure.

Covers: how long those will take at the rate at which first tokens came lately, and workers that are late. The rate is
measured twice: in first tokens and in predicted work, a second. Requests that wait for places in a batch take equally
long whatever their prompts, prompts that are computed do not; where both rates were wrong for what is asked now, it
would be in opposite directions, so the shorter time is believed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from router.drain_rate import DrainRate

_OWN_WORK = 2.0  # its own load and compute may take so many times what was predicted


@dataclass(slots=True)
class _Sent:
    at: float
    own_ms: float


@dataclass(slots=True)
class _Worker:
    """`silent`: requests without a first token, in the order in which they were sent. `own_ms`: the sum of theirs."""

    firsts: DrainRate
    work: DrainRate
    silent: OrderedDict[int, _Sent] = field(default_factory=OrderedDict)
    own_ms: float = 0.0


class Pace:
    """Of workers. O(1) for each thing that it is told."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._workers: dict[str, _Worker] = {}

    def sent(self, key: int, worker: str, own_ms: float) -> None:
        """A request went to a worker that will take `own_ms` for it alone."""
        known = self._workers.get(worker)
        if known is None:
            known = self._workers[worker] = _Worker(DrainRate(self._clock), DrainRate(self._clock))
        if not known.silent:
            known.firsts.began()
            known.work.began()
        known.silent[key] = _Sent(self._clock(), own_ms)
        known.own_ms += own_ms

    def spoke(self, key: int, worker: str) -> None:
        """It has a first token. Once more is harmless."""
        if (sent := self._pop(key, worker)) is not None:
            self._workers[worker].firsts.served(1.0)
            self._workers[worker].work.served(sent.own_ms)
            self._rest(worker)

    def left(self, key: int, worker: str) -> None:
        """It has ended, with or without one. Once more is harmless."""
        if self._pop(key, worker) is not None:
            self._rest(worker)

    def forget(self, worker: str) -> None:
        """The worker is gone for good; what still ends there is none of its business."""
        self._workers.pop(worker, None)

    def queue_ms(self, worker: str) -> float:
        """Until all that were sent have their first token; zero: not known, or there are none."""
        known = self._workers.get(worker)
        if known is None or not known.silent:
            return 0.0
        firsts, work = known.firsts.per_second(), known.work.per_second()
        if firsts is None or work is None:
            return 0.0
        return 1000.0 * min(len(known.silent) / firsts, known.own_ms / work)

    def silent(self) -> int:
        """Requests without a first token."""
        return sum(len(worker.silent) for worker in self._workers.values())

    def late(self, limit_s: float) -> frozenset[str]:
        """Workers that are late by more than `limit_s`."""
        return frozenset(worker for worker in self._workers if self.is_late(worker, limit_s))

    def is_late(self, worker: str, limit_s: float) -> bool:
        """Whether its oldest silent request is over its own work by more than `limit_s`."""
        known = self._workers.get(worker)
        if known is None or not known.silent:
            return False
        sent = next(iter(known.silent.values()))
        return self._clock() - sent.at - _OWN_WORK * sent.own_ms / 1000.0 > limit_s

    def _pop(self, key: int, worker: str) -> _Sent | None:
        known = self._workers.get(worker)
        sent = known.silent.pop(key, None) if known is not None else None
        if known is not None and sent is not None:
            known.own_ms = known.own_ms - sent.own_ms if known.silent else 0.0  # no rounding errors are kept
        return sent

    def _rest(self, worker: str) -> None:
        known = self._workers[worker]
        if not known.silent:
            known.firsts.ended()
            known.work.ended()
