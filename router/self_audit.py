"""The index audits itself: it asks workers where some blocks lie, and compares that with what it believes.

Covers: which blocks to ask for, when, what the answers come to (precision and recall of each worker), and what follows:
a lower credit, and a new snapshot where the belief is refuted. Does not cover: the question on the wire (`link`), what
a credit does (`credit`).

Which blocks: workers are asked by whole names, and the index knows halves, so names are drawn from prompts of this
router: a few of each prompt go to random places of a table of fixed size. A name stays until another one falls on its
place, so the table holds prompts of long ago, too: of the last `SEEN` names about a third are younger than 0.4 `SEEN`.
That weighs blocks as requests ask for them, and a wrong belief in a block that nobody asks for costs nothing.

The race with events: the worker answers between two steps, on the stream, behind all events that it had told and before
those that it will tell; the router compares when it reads the answer. So the two are of one moment, and the stream's
order is the sequence number up to which the answer is true. Answers that come while a snapshot is read are not used.

Believed blocks and others are drawn separately, half of a probe each, and weighed by their share of what was looked at:
a worker holds few of all blocks, and a plain sample would say little of those. Old answers count less (half after
`HALF_LIFE` blocks).

Source of the two figures: precision and recall as in information retrieval (C. J. van Rijsbergen, 1979, chapter 7).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.blocks import SHORT_HASH_BYTES
from kvstore.events import TierName
from router.beliefs import Beliefs
from router.credit import REFUTED
from router.fleet import Fleet
from router.link import WorkerLink
from router.metrics import Metrics
from warmkv.v1 import worker_pb2

SEEN = 16_384  # names; 32 bytes each, and about as much again
NAME_BYTES = 32
PER_PROMPT = 2
HALF = 32  # blocks of a probe that are believed held, and as many others
LOOKED_AT = 256  # names drawn for a probe
HALF_LIFE = 512.0
LEAST = 24.0  # judged blocks, before anything follows
RESYNC_AFTER_S = 30.0  # between two snapshots that an audit asks for
_TIER_BITS = ((1, TierName.DEVICE), (2, TierName.HOST), (4, TierName.DISK))
log = logging.getLogger(__name__)


class SeenBlocks:
    """Names of blocks of past prompts, 32 bytes each. Bounded."""

    def __init__(self, rng: random.Random, *, size: int = SEEN) -> None:
        self._rng, self._size = rng, size
        self._names: list[bytes] = []

    def __len__(self) -> int:
        return len(self._names)

    def add(self, names: bytes) -> None:
        """A prompt came; its names, joined. O(1)."""
        count = len(names) // NAME_BYTES
        for _ in range(min(PER_PROMPT, count)):
            at = NAME_BYTES * self._rng.randrange(count)
            name = names[at : at + NAME_BYTES]
            if len(self._names) < self._size:
                self._names.append(name)
            else:
                self._names[self._rng.randrange(self._size)] = name

    def draw(self, count: int) -> list[bytes]:
        """Different places' names."""
        return self._rng.sample(self._names, min(count, len(self._names)))


@dataclass(slots=True)
class Tally:
    """Weighed counts of probed blocks, by what was believed and what was so.

    Attributes:
        held: believed and held. phantom: believed only. unknown: held only. probed: answers, unweighed, ever.
    """

    held: float = 0.0
    phantom: float = 0.0
    unknown: float = 0.0
    probed: int = 0

    @property
    def precision(self) -> float | None:
        """Of the believed blocks, the share that is held; None: too few were judged."""
        judged = self.held + self.phantom
        return self.held / judged if judged >= LEAST else None

    @property
    def recall(self) -> float | None:
        """Of the held blocks, the share that is believed; None: too few were judged."""
        judged = self.held + self.unknown
        return self.held / judged if judged >= LEAST else None

    def age(self, blocks: int) -> None:
        """So many more are about to be counted."""
        keep = 0.5 ** (blocks / HALF_LIFE)
        self.held, self.phantom, self.unknown = self.held * keep, self.phantom * keep, self.unknown * keep


@dataclass(frozen=True, slots=True)
class _Question:
    """The blocks of a probe, and what each of a kind stands for."""

    names: list[bytes]
    believed: set[bytes]
    weights: tuple[float, float]  # of a believed one, of another one


@dataclass(slots=True)
class _State:
    tally: Tally = field(default_factory=Tally)
    snapshots: int = 0  # when it was tallied first: a new one makes another picture
    asked_at: float | None = None
    resynced_at: float = float("-inf")


class SelfAudit:
    """Asks every worker in turn. One per router; lives on its event loop."""

    def __init__(
        self,
        fleet: Fleet,
        beliefs: Beliefs,
        metrics: Metrics,
        rng: random.Random,
        clock: Callable[[], float],
        *,
        every_s: float | None,
    ) -> None:
        """`every_s`: between two probes of one worker; None: none are sent."""
        self.seen = SeenBlocks(rng)
        self._fleet, self._beliefs, self._metrics = fleet, beliefs, metrics
        self._clock, self._every_s = clock, every_s
        self._states: dict[str, _State] = {}

    def tally(self, link: WorkerLink) -> Tally:
        """What the probes of a worker came to since its last snapshot. A question."""
        state = self._states.get(link.name)
        return state.tally if state and state.snapshots == link.snapshots else Tally()

    async def run(self) -> None:
        """Ask until cancelled, spread over time."""
        if self._every_s is None:
            return
        turn = 0
        while True:
            self._forget_gone()
            links = [link for link in self._fleet.links() if link.whole]
            await asyncio.sleep(self._every_s / max(1, len(links)))
            if links:
                turn += 1
                self.ask(links[turn % len(links)])

    def ask(self, link: WorkerLink) -> None:
        """Probe one worker, unless it has yet to answer or nothing is known to ask for."""
        state = self._states.setdefault(link.name, _State())
        now = self._clock()
        is_open = state.asked_at is not None and now - state.asked_at < (self._every_s or 0.0)
        if is_open or not link.whole or not (question := self._question(link.name)):
            return
        state.asked_at = now
        link.probe(question.names, lambda answer: self._answered(link, state, question, answer))

    def _forget_gone(self) -> None:
        if self._states.keys() - (known := {link.name for link in self._fleet.links()}):
            self._states = {name: state for name, state in self._states.items() if name in known}

    def _question(self, worker: str) -> _Question | None:
        believed: list[bytes] = []
        others: list[bytes] = []
        drawn = list(dict.fromkeys(self.seen.draw(LOOKED_AT)))
        for name in drawn:
            (believed if self._beliefs.holds(worker, name[:SHORT_HASH_BYTES]) else others).append(name)
        if not drawn:
            return None
        names = believed[:HALF] + others[:HALF]
        # So that the weights of a probe sum to its blocks.
        scale = len(names) / len(drawn)
        weights = tuple(scale * len(kind) / max(1, len(kind[:HALF])) for kind in (believed, others))
        return _Question(names, set(believed[:HALF]), (weights[0], weights[1]))

    def _answered(self, link: WorkerLink, state: _State, question: _Question, answer: worker_pb2.Probed) -> None:
        state.asked_at = None
        if answer.error or len(answer.tiers) != len(question.names):
            why = answer.error or f"{len(answer.tiers)} answers to {len(question.names)} questions"
            log.warning("a worker did not answer a probe", extra={"worker": link.name, "why": why})
            return
        if state.snapshots != link.snapshots:
            state.snapshots, state.tally = link.snapshots, Tally(probed=state.tally.probed)
        state.tally.age(len(question.names))
        for name, held in zip(question.names, answer.tiers, strict=True):
            self._judge(link.name, state.tally, name, question, held)
        self._conclude(link, state)

    def _judge(self, worker: str, tally: Tally, name: bytes, question: _Question, held: int) -> None:
        block = name[:SHORT_HASH_BYTES]
        weight = question.weights[0] if name in question.believed else question.weights[1]
        is_believed = self._beliefs.holds(worker, block)  # now, for events came between question and answer
        verdict = ("held" if held else "phantom") if is_believed else ("unknown" if held else "absent")
        tally.probed += 1
        tally.held += weight * (verdict == "held")
        tally.phantom += weight * (verdict == "phantom")
        tally.unknown += weight * (verdict == "unknown")
        self._metrics.probed_blocks.labels(worker, verdict).inc(weight)
        if worker in self._beliefs.approximate:
            self._beliefs.approximate.located(worker, block, {tier for bit, tier in _TIER_BITS if held & bit})

    def _conclude(self, link: WorkerLink, state: _State) -> None:
        """Give credit as the figures say; where they refute the belief, ask for a snapshot, but not all the time."""
        tally = state.tally
        is_exact = link.name not in self._beliefs.approximate and not self._beliefs.forgets
        precision = 1.0 if tally.precision is None else tally.precision
        recall = 1.0 if tally.recall is None or not is_exact else tally.recall
        self._beliefs.credits.judged(link.name, precision, recall)
        now = self._clock()
        if min(precision, recall) >= REFUTED or now - state.resynced_at < RESYNC_AFTER_S:
            return
        state.resynced_at = now
        facts = {"worker": link.name, "precision": round(precision, 2), "recall": round(recall, 2)}
        log.warning("what was believed of a worker was wrong; it is asked for a snapshot", extra=facts)
        self._beliefs.refuted(link)
