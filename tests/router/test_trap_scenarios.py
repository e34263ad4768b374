"""The decisions in `trap_scenarios.txt`, made by the router's own decider, index and memory of traffic."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from kvstore.events import BlockStored, TierName
from router.cost import PrefillFit, WorkerLoad
from router.decide import Choice, Decider, Question
from router.fleet import Fleet
from router.fleet_record import FleetRecord
from router.index import PrefixIndex
from router.traffic import NOTHING_KNOWN, Known, Traffic

BLOCK = 16
FIT = PrefillFit(fixed_ms=10.0, token_ms=0.125)


@dataclass
class Report:
    load: WorkerLoad
    at: float = 0.0
    known: Known = NOTHING_KNOWN


@dataclass
class Link:
    name: str
    report: Report
    hello: None = None
    owes_clear: bool = False
    role: int = 0
    joined_at: float = -1e9


@dataclass
class Workers:
    """What the decider asks a fleet for."""

    record: FleetRecord
    all: list[Link] = field(default_factory=list)

    def links(self) -> list[Link]:
        return self.all

    def is_alive(self, link: Link) -> bool:
        return True

    def takes_requests(self, link: Link) -> bool:
        return True


def chain(words: list[str]) -> list[bytes]:
    """`doc*600 q*4` -> the names of 604 blocks, each covering those before it."""
    names, before = [], b""
    for text, count in (word.split("*") for word in words):
        for number in range(int(count)):
            before = hashlib.sha256(before + f"{text}/{number}".encode()).digest()[:16]
            names.append(before)
    return names


class Scene:
    """One scenario, played line by line. `backwards`: the decider sees the workers in the other order."""

    def __init__(self, text: str, *, backwards: bool) -> None:
        self.title, rule, *lines = text.splitlines()
        policy, *weights = rule.split()
        numbers = {name: float(value) for name, value in (pair.split("=") for pair in weights)}
        self.now, self.sent = 0.0, 0
        self.index, self.traffic = PrefixIndex(self.clock), Traffic(self.clock)
        self.workers = Workers(FleetRecord(0, "test", policy, numbers))
        self.decider = Decider(cast("Fleet", self.workers), self.index, self.traffic, self.clock)
        self.events = [line.split() for line in lines if line[0].isdigit()]
        for line in lines:
            if not line[0].isdigit():
                self._worker(*line.split())
        if backwards:
            self.workers.all.reverse()

    def clock(self) -> float:
        return self.now

    def play(self) -> None:
        for at, what, *words in self.events:
            self.now = float(at)
            getattr(self, what)(words)

    def ask(self, words: list[str]) -> None:
        prompt, (worker, reason, *cached) = words[: words.index("=>")], words[words.index("=>") + 1 :]
        names = chain(prompt)
        digest = b"digest %d" % self.sent
        choice = self.decider.decide(Question(names, len(names) * BLOCK, BLOCK, digest))
        assert choice is not None
        chosen = f"{choice.worker} {choice.decision.reason}"
        assert chosen == f"{worker} {reason}", f"at {self.now}: {choice.decision.costs}"
        assert [str(choice.price.cached_tokens)] * len(cached) == cached
        self._send(choice, names)

    def first(self, words: list[str]) -> None:
        self.traffic.first_token(int(words[0]))

    def end(self, words: list[str]) -> None:
        self.traffic.ended(int(words[0]))

    def _send(self, choice: Choice, names: list[bytes]) -> None:
        self.sent += 1
        self.decider.taken()
        work_ms, price = choice.price.load_ms + choice.price.compute_ms, choice.price
        cached = min(choice.held, price.cached_tokens // BLOCK)
        self.traffic.sent(self.sent, choice.worker, names, work_ms=work_ms, cached_blocks=cached)

    def _worker(self, name: str, *facts: str) -> None:
        chains = [[word for word in part.split() if "*" in word] for part in " ".join(facts).split("holds")]
        numbers = {key: float(value) for key, value in (fact.split("=") for fact in facts if "=" in fact)}
        assert numbers.keys() <= {"pending", "decoding", "busy", "pool", "joined"}
        load = WorkerLoad(
            FIT,
            pending_tokens=int(numbers.get("pending", 0)),
            decoding=int(numbers.get("decoding", 0)),
            prefill_share=numbers.get("busy"),
            pool_blocks=int(numbers.get("pool", 0)),
        )
        self.workers.all.append(Link(name, Report(load), joined_at=numbers.get("joined", -1e9)))
        self.index.join(name, 1)
        self.index.begin_snapshot(name, 1)
        self.index.end_snapshot(name, 1)
        for held in filter(None, chains):
            self.index.apply(name, 1, [BlockStored(TierName.DEVICE, tuple(chain(held)))])


TEXT = Path(__file__).with_name("trap_scenarios.txt").read_text()
SCENARIOS = [part for part in TEXT.strip().split("\n\n") if not part.startswith("#")]


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("text", SCENARIOS, ids=lambda text: text.splitlines()[0])
def test_a_trap(text: str, backwards: bool) -> None:
    Scene(text, backwards=backwards).play()
