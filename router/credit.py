"""How much of what the index believes of a worker counts in a decision: one factor a worker, and why it is below 1.

Covers: gaps and lag in the stream of events, what probes found, the factor that they make together, and what it does to
an overlap. Does not cover: finding them out (`link`, `self_audit`). Pure and synchronous.

    factor = gap x lag x precision x recall

- gap: `AFTER_GAP` from the moment when messages were missed until a new snapshot is complete. What was believed before
  is mostly still there, but nobody knows what the missed messages removed. A credit of zero would send all that the
  worker holds to others, to be computed there again, in the very second in which its requests are sent again.
- lag: 1 / (1 + seconds) behind the worker's events, from `TOLERATED_LAG_S` on: half at one second.
- precision: the share of the probed blocks believed held that were held. Below `REFUTED` nothing counts: a prefix is
  reused as far as it is whole, and half of its blocks are no prefix.
- recall: the share of the blocks held that were believed so. In an exact worker a fall means that messages were missed,
  which carried removals, too. Of a worker without events it says nothing: others may have sent to it. Nor does it once
  the index has forgotten blocks for want of memory: a snapshot would only push out others.

Precision and recall above `NOISE` count as 1: a block may be dropped between the worker's look and its own event.
The shared tier is nobody's memory of a worker: what it holds counts in full, whoever reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.index import Overlap

AFTER_GAP = 0.5
TOLERATED_LAG_S = 0.25
REFUTED = 0.5
NOISE = 0.95


class Credit(NamedTuple):
    """What a worker's believed blocks are multiplied by, 0 to 1, and why; empty: they count in full."""

    factor: float
    why: str


FULL_CREDIT = Credit(1.0, "")


@dataclass(slots=True)
class Doubts:
    """What speaks against the belief in one worker.

    Attributes:
        gap: messages were missed and the snapshot that makes it good is not complete. behind_s: of its events.
        precision, recall: of probes; 1 while too little is known.
    """

    gap: bool = False
    behind_s: float = 0.0
    precision: float = 1.0
    recall: float = 1.0

    def credit(self) -> Credit:
        """The factor that they make together."""
        factor, whys = 1.0, []
        if self.gap:
            factor *= AFTER_GAP
            whys.append("messages were missed, a new snapshot is on its way")
        if self.behind_s > TOLERATED_LAG_S:
            factor /= 1.0 + self.behind_s
            whys.append(f"{self.behind_s:.1f} s behind")
        if self.precision < NOISE:
            factor *= self.precision if self.precision >= REFUTED else 0.0
            whys.append(f"holds {self.precision:.0%} of what is believed")
        if self.recall < NOISE:
            factor *= self.recall
            whys.append(f"{self.recall:.0%} of what it holds is known")
        return Credit(factor, "; ".join(whys)) if whys else FULL_CREDIT


class Credits:
    """The credit of every worker that is doubted; whoever is not in it counts in full.

    Attributes:
        below: the doubted ones, by name.
    """

    def __init__(self) -> None:
        self.below: dict[str, Credit] = {}
        self._doubts: dict[str, Doubts] = {}

    def of(self, worker: str) -> Credit:
        """Of one worker."""
        return self.below.get(worker, FULL_CREDIT)

    def missed_messages(self, worker: str) -> None:
        """Its stream had a gap."""
        self._of(worker).gap = True
        self._settle(worker)

    def is_behind(self, worker: str, seconds: float) -> None:
        """The age of its oldest event that has not come."""
        self._of(worker).behind_s = seconds
        self._settle(worker)

    def judged(self, worker: str, precision: float, recall: float) -> None:
        """What its probes come to now."""
        doubts = self._of(worker)
        doubts.precision, doubts.recall = precision, recall
        self._settle(worker)

    def restored(self, worker: str) -> None:
        """A whole snapshot came, or the worker is gone: what was found of the old picture says nothing any more."""
        self._doubts.pop(worker, None)
        self.below.pop(worker, None)

    def _of(self, worker: str) -> Doubts:
        return self._doubts.setdefault(worker, Doubts())

    def _settle(self, worker: str) -> None:
        credit = self._doubts[worker].credit()
        if credit is FULL_CREDIT:
            self.below.pop(worker, None)
        else:
            self.below[worker] = credit


def discounted(overlap: Overlap, factor: float, shared_run: int) -> Overlap:
    """An overlap of which the worker's own part counts by a factor. `shared_run`: blocks of the shared tier alone."""
    device, host, disk, own_and_shared = (int(depth * factor) for depth in overlap)
    shared = max(own_and_shared, min(shared_run, overlap.shared))
    return Overlap(device, host, disk, shared)
