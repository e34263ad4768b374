"""Which workers have room for one more request: their predicted queue is short, and they keep to predictions.

Covers: the limit on a worker's queue, workers that are late or stuck, when one will have room. Does not cover: who
waits for room (`waiting_room`) or what a worker's queue is (`cost`). A question changes nothing.
"""

from __future__ import annotations

from router.decide import Choice, Decider, Question
from router.fleet import Fleet
from router.lateness import Lateness
from router.policies.protocol import Candidate

SOONEST_S = 0.01  # between two looks
_ROOM_AGAIN_S = 0.05  # predictions of room are that wrong at times, and others must not take it
_STUCK_AFTER_S = 10.0  # a worker that is so late is not waited for: others are chosen


class Headroom:
    """`max_queue_s`: the longest queue that a worker is given, by prediction; None: any."""

    def __init__(self, max_queue_s: float | None, fleet: Fleet, decider: Decider, lateness: Lateness) -> None:
        self._limit_s = max_queue_s
        self._fleet = fleet
        self._decider = decider
        self._lateness = lateness

    def decide(self, question: Question) -> Choice | None:
        """What the decider says, of workers that are not stuck; None: there is none."""
        stuck = self.stuck()
        return self._decider.decide(question.avoiding(question.avoid | stuck) if stuck else question)

    def stuck(self) -> frozenset[str]:
        """Workers that are not to be waited for."""
        return frozenset() if self._limit_s is None else self._lateness.late(max(self._limit_s, _STUCK_AFTER_S))

    def has(self, choice: Choice) -> bool:
        """Whether the chosen worker has room."""
        return self._is_short(choice.decision.chosen)

    def anybody_has(self, choice: Choice) -> bool:
        """Whether any worker that could have been chosen has."""
        return any(self._is_short(candidate) for candidate in choice.candidates)

    def first_token_ms(self, choice: Choice) -> float:
        """From now on at the chosen worker, with the queue of the one that prefills for it."""
        return choice.price.ttft_ms

    def in_s(self, choice: Choice) -> float:
        """When to ask again: a queue is predicted to shrink by a second in a second."""
        over_s = choice.decision.chosen.price.queue_ms / 1000.0 - (self._limit_s or 0.0)
        return min(_ROOM_AGAIN_S, max(SOONEST_S, over_s))

    def is_measured(self, worker: str) -> bool:
        """Whether the worker has measured its prefill, so that predictions of it are more than a guess."""
        report = self._fleet.link(worker).report
        return report is not None and report.load.fit is not None

    def _is_short(self, candidate: Candidate) -> bool:
        """Whether its queue is, by prediction and by what it has yet to answer."""
        if self._limit_s is None:
            return True
        short = candidate.price.queue_ms <= self._limit_s * 1000.0
        return short and not self._lateness.is_late(candidate.worker, self._limit_s)
