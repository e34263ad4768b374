"""A policy that scores live requests without acting: what it would have done, and what that would have meant.

Covers: counting its choices beside those of the policy in force. Does not cover: asking it (`decide`). Both are judged
by the one cost model. Each request is judged on its own, on the caches that the policy in force has made: that is what
can be known without acting. What another policy would make of the caches in the long run, a replay of recorded traffic
says.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from router.decide import Choice
from router.fleet_record import FleetRecord
from router.metrics import Metrics
from router.policies.protocol import Candidate
from router.policy import checked_weights, find_policy
from router.policy_history import PolicySetting
from warmkv.v1 import admin_pb2

_MOVED = 20
_TIMES = 4096


_Rule = tuple[str, Mapping[str, float]]  # a policy with all of its weights


@dataclass(slots=True)
class _Side:
    """What one of the two chose."""

    ttft_ms: float = 0.0
    cached_tokens: int = 0
    workers: Counter[str] = field(default_factory=Counter)
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))

    def count(self, chosen: Candidate) -> None:
        self.ttft_ms += chosen.price.ttft_ms
        self.times.append(chosen.price.ttft_ms)
        self.cached_tokens += chosen.price.cached_tokens
        self.workers[chosen.worker] += 1

    def message(self, prompt_tokens: int) -> admin_pb2.ShadowReport.Side:
        decisions = self.workers.total()
        return admin_pb2.ShadowReport.Side(
            predicted_ttft_ms=self.ttft_ms / decisions if decisions else 0.0,
            predicted_ttft_p99_ms=_p99(self.times),
            predicted_hit=self.cached_tokens / prompt_tokens if prompt_tokens else 0.0,
            workers=dict(self.workers),
        )


class Shadow:
    """Counts since the shadow was set, or the policy in force, or since this router heard of it: one side is compared
    with one other, never with a mixture. `wall_clock`: seconds since 1970.
    """

    def __init__(self, wall_clock: Callable[[], float], metrics: Metrics) -> None:
        self._wall_clock = wall_clock
        self._metrics = metrics
        self._begin(None, None)

    def scored(self, choice: Choice, request_id: str) -> None:
        """A decision was taken."""
        if choice.shadowed_by != self._setting or _rule(choice) != self._beside:
            self._begin(choice.shadowed_by, _rule(choice))
        shadow = choice.shadow
        if shadow is None or choice.shadowed_by is None:
            return
        same = shadow.chosen.worker == choice.worker
        # Alone, as the shadow's choice is priced: nobody asked who would prefill for that one.
        in_force = choice.decision.chosen
        self._metrics.count_shadow(
            choice.shadowed_by.name,
            same=same,
            ttft_ms=in_force.price.ttft_ms,
            shadow_ttft_ms=shadow.chosen.price.ttft_ms,
        )
        self._decisions += 1
        self._prompt_tokens += choice.request.prompt_tokens
        self._in_force.count(in_force)
        self._shadow.count(shadow.chosen)
        if same:
            self._same += 1
            return
        self._moved.appendleft(
            admin_pb2.ShadowReport.Moved(
                time_ms=int(self._wall_clock() * 1000),
                request_id=request_id,
                worker=choice.worker,
                shadow_worker=shadow.chosen.worker,
                shadow_reason=shadow.reason,
                predicted_ttft_ms=in_force.price.ttft_ms,
                shadow_predicted_ttft_ms=shadow.chosen.price.ttft_ms,
                prompt_tokens=choice.request.prompt_tokens,
            )
        )

    def report(self, record: FleetRecord) -> admin_pb2.ShadowReport | None:
        """What it would have done; None: the record has no shadow."""
        if record.shadow is None:
            return None
        weights = checked_weights(find_policy(record.shadow.name), record.shadow.weights)
        report = admin_pb2.ShadowReport(policy=admin_pb2.Policy(name=record.shadow.name, weights=weights))
        if record.shadow != self._setting or _rule_of(record) != self._beside:
            return report  # nothing was decided since one of them was set
        report.since_ms, report.decisions, report.same = self._since_ms, self._decisions, self._same
        report.in_force.CopyFrom(self._in_force.message(self._prompt_tokens))
        report.shadow.CopyFrom(self._shadow.message(self._prompt_tokens))
        report.moved.extend(self._moved)
        return report

    def _begin(self, setting: PolicySetting | None, beside: _Rule | None) -> None:
        self._setting, self._beside = setting, beside
        self._since_ms = int(self._wall_clock() * 1000)
        self._decisions = self._same = self._prompt_tokens = 0
        self._in_force, self._shadow = _Side(), _Side()
        self._moved: deque[admin_pb2.ShadowReport.Moved] = deque(maxlen=_MOVED)


def _rule(choice: Choice) -> _Rule:
    return choice.policy.name, choice.weights


def _rule_of(record: FleetRecord) -> _Rule:
    return record.policy, checked_weights(find_policy(record.policy), record.weights)


def _p99(times: deque[float]) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(times)
    return ordered[-(-99 * len(ordered) // 100) - 1] if ordered else 0.0
