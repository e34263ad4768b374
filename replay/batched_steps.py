"""Steps of a simulated engine that are taken in one jump: when each of them is done."""

from __future__ import annotations

from dataclasses import dataclass

from replay.batched_sequence import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Steps under way, all alike but that each takes `growth_s` longer than the one before.

    Attributes:
        chunks: of the only step, if any. steps: how many. prefill_s: of the time, what is prefill.
    """

    chunks: list[tuple[Sequence, int]]
    steps: int
    started: float
    first_s: float
    growth_s: float
    prefill_s: float

    def after(self, steps: int) -> float:
        """When so many of them are done."""
        return self.started + steps * self.first_s + self.growth_s * (steps * (steps - 1) / 2)

    def done_by(self, now: float) -> int:
        """How many are done, the last one never: its end is an event of its own."""
        steps = min(self.steps - 1, int((now - self.started) / self.first_s))
        while steps > 0 and self.after(steps) > now:  # those that grow are fewer
            low = int(steps * (now - self.started) / (self.after(steps) - self.started))
            steps = min(steps - 1, low)
        while steps < self.steps - 1 and self.after(steps + 1) <= now:
            steps += 1
        return steps
