"""The index audits itself: figures against known truths, and what follows from them over real gRPC."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstore.events import BlockStored, TierName
from router.approximate import Room
from router.beliefs import Beliefs
from router.core import Router
from router.index import PrefixIndex
from router.metrics import Metrics
from router.runs import LEAST_BYTES
from router.self_audit import HALF, LEAST, RESYNC_AFTER_S, SeenBlocks, SelfAudit
from tests.router.rig import all_ready, eventually, generate, request, rig, tokens
from warmkv.v1 import admin_pb2, worker_pb2
from workers.simulated_store import EventLog


def name(number: int) -> bytes:
    return number.to_bytes(16, "big") + b"x" * 16


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ScriptedLink:
    """A worker that holds what it is told, and answers probes at once."""

    def __init__(self, index: PrefixIndex, held: set[bytes]) -> None:
        self.name, self.whole, self.snapshots, self.hello, self.report = "w", True, 1, None, None
        self.held = held
        self.asked: list[list[bytes]] = []
        self.resyncs = 0
        self.before_answer = lambda: None
        self._index = index

    def probe(self, names: list[bytes], answered: Any) -> None:
        self.asked.append(names)
        tiers = bytes(int(each in self.held) for each in names)
        self.before_answer()
        answered(worker_pb2.Probed(probe_id=1, tiers=tiers))

    def resync(self) -> None:
        self.resyncs += 1
        self._index.distrust("w")


class Rig:
    """`believed` and `held`: numbers of blocks, of `seen` that were asked for."""

    def __init__(self, seen: range, believed: range, held: range) -> None:
        self.clock = Clock()
        self.index = PrefixIndex(self.clock)
        self.index.join("w", 1)
        self.index.begin_snapshot("w", 1)
        self.index.end_snapshot("w", 1)
        self.believe(believed)
        self.beliefs = Beliefs(self.index, self.clock)
        self.link = ScriptedLink(self.index, {name(n) for n in held})
        self.metrics = Metrics(router="r", model="m", version="1")
        self.audit = SelfAudit(
            cast("Any", None), self.beliefs, self.metrics, random.Random(1), self.clock, every_s=10.0
        )
        for n in seen:
            self.audit.seen.add(name(n))

    def believe(self, numbers: range) -> None:
        self.index.apply("w", 1, [BlockStored(TierName.DEVICE, (name(n)[:16],)) for n in numbers])

    def ask(self, times: int = 1) -> None:
        for _ in range(times):
            self.audit.ask(cast("Any", self.link))
            self.clock.now += 10

    @property
    def tally(self) -> Any:
        return self.audit.tally(cast("Any", self.link))


def test_a_right_belief_is_found_right() -> None:
    rig = Rig(range(1000), range(300), range(300))
    rig.ask(10)
    assert rig.tally.precision == 1.0
    assert rig.tally.recall == 1.0
    assert rig.beliefs.credits.of("w").factor == 1.0
    assert rig.link.resyncs == 0


@pytest.mark.parametrize(("believed", "held"), [(range(400), range(100, 400)), (range(300), range(60, 450))])
def test_the_figures_estimate_the_truth(believed: range, held: range) -> None:
    """Of 1,000 names; the second worker holds far more than is believed."""
    rig = Rig(range(1000), believed, held)
    rig.ask(40)
    both = len(set(believed) & set(held))
    assert rig.tally.precision == pytest.approx(both / len(believed), abs=0.06)
    assert rig.tally.recall == pytest.approx(both / len(held), abs=0.06)


def test_a_probe_is_bounded_and_half_of_it_is_believed() -> None:
    rig = Rig(range(5000), range(500), range(500))
    rig.ask()
    (asked,) = rig.link.asked
    assert len(asked) <= 2 * HALF
    assert sum(int.from_bytes(each[:16], "big") < 500 for each in asked) >= HALF / 2


def test_what_the_index_forgot_for_want_of_memory_is_no_sign_of_missed_messages() -> None:
    """Its recall is low by design; a snapshot would only push out others, and come again half a minute later."""
    rig = Rig(range(1000), range(300), range(900))
    rig.index = PrefixIndex(rig.clock, limit_bytes=LEAST_BYTES)
    rig.index.join("w", 1)
    rig.index.begin_snapshot("w", 1)
    rig.index.end_snapshot("w", 1)
    many = tuple(name(n)[:16] for n in range(100_000, 180_000))
    rig.index.apply("w", 1, [BlockStored(TierName.DEVICE, many)])
    rig.believe(range(300))
    assert rig.index.evicted_blocks > 0
    rig.beliefs = rig.audit._beliefs = Beliefs(rig.index, rig.clock)
    rig.ask(20)
    assert rig.tally.recall == pytest.approx(1 / 3, abs=0.1)
    assert rig.beliefs.credits.of("w").factor == 1.0
    assert rig.link.resyncs == 0


def test_lost_removals_lower_the_credit_and_refute_the_belief_in_the_end() -> None:
    rig = Rig(range(600), range(600), range(150, 600))
    rig.ask(8)
    assert 0.6 < rig.beliefs.credits.of("w").factor < 0.9
    assert "holds" in rig.beliefs.credits.of("w").why
    assert rig.link.resyncs == 0
    rig.link.held = {name(n) for n in range(500, 600)}
    rig.ask(20)
    assert rig.link.resyncs >= 1


def test_snapshots_are_not_asked_for_all_the_time_and_a_new_one_is_a_new_picture() -> None:
    rig = Rig(range(600), range(600), range(0))
    rig.index.distrust = lambda worker: None  # type: ignore[method-assign]  # as if the snapshot were as wrong
    rig.ask(3)
    assert rig.link.resyncs == 1
    rig.ask(round(RESYNC_AFTER_S / 10))
    assert rig.link.resyncs == 2
    rig.link.held = {name(n) for n in range(600)}
    rig.link.snapshots += 1
    rig.beliefs.credits.restored("w")
    assert rig.tally.precision is None
    rig.ask()
    assert rig.tally.precision == 1.0
    assert rig.beliefs.credits.of("w").factor == 1.0


def test_events_between_question_and_answer_are_no_error() -> None:
    rig = Rig(range(200), range(100), range(200))
    rig.link.before_answer = lambda: rig.believe(range(100, 200))
    rig.ask(5)
    assert rig.tally.precision == 1.0
    assert rig.tally.recall == 1.0


def test_too_few_answers_prove_nothing() -> None:
    rig = Rig(range(10), range(10), range(0))
    rig.ask()
    assert rig.tally.probed == 10 < LEAST
    assert rig.tally.precision is None
    assert rig.beliefs.credits.of("w").factor == 1.0


def test_a_wrong_answer_is_no_verdict() -> None:
    rig = Rig(range(100), range(100), range(0))
    rig.link.probe = lambda names, answered: answered(worker_pb2.Probed(probe_id=1, tiers=b"\0"))  # type: ignore[method-assign]
    rig.ask(3)
    assert rig.tally.probed == 0


def test_who_has_not_answered_is_not_asked_again_at_once_and_who_reads_a_snapshot_is_not_asked() -> None:
    rig = Rig(range(100), range(100), range(100))
    asked: list[int] = []
    rig.link.probe = lambda names, answered: asked.append(len(names))  # type: ignore[method-assign]
    rig.audit.ask(cast("Any", rig.link))
    rig.audit.ask(cast("Any", rig.link))
    assert len(asked) == 1
    rig.clock.now += 10
    rig.audit.ask(cast("Any", rig.link))
    assert len(asked) == 2
    rig.clock.now += 10
    rig.link.whole = False
    rig.audit.ask(cast("Any", rig.link))
    assert len(asked) == 2


def test_a_worker_without_events_is_corrected_and_what_others_sent_there_is_held_against_nobody() -> None:
    rig = Rig(range(400), range(0), range(100, 400))
    rig.beliefs.approximate.joined("w", 1)
    rig.beliefs.approximate.reported("w", Room(1000), Room(0))
    for n in range(200):
        rig.beliefs.approximate.used("w", [name(n)[:16]])
    rig.ask(20)
    believed = [n for n in range(200) if rig.beliefs.holds("w", name(n)[:16])]
    assert set(range(100, 200)) <= set(believed)
    assert len(believed) < 140  # of the hundred that are not there, most were found out
    assert rig.tally.recall < 0.6
    assert rig.beliefs.credits.of("w").factor > 0.5


def test_a_worker_that_is_gone_is_forgotten() -> None:
    rig = Rig(range(100), range(100), range(100))
    rig.ask()
    links = [rig.link]
    rig.audit._fleet = cast("Any", SimpleNamespace(links=lambda: links))
    rig.audit._forget_gone()
    assert rig.tally.probed
    links.clear()
    rig.audit._forget_gone()
    assert not rig.tally.probed


def test_the_table_of_names_is_bounded_and_remembers_prompts_of_long_ago() -> None:
    seen = SeenBlocks(random.Random(1), size=100)
    for n in range(150):
        seen.add(name(n) * 10)
    assert len(seen) == 100
    numbers = {int.from_bytes(each[:16], "big") for each in seen.draw(1000)}
    assert min(numbers) < 50
    assert max(numbers) == 149
    seen.add(b"")


# Over real gRPC


def trust(router: Router) -> admin_pb2.IndexTrust:
    return router.list_workers()[0].index


async def ask_many(router: Router, seeds: range) -> None:
    for seed in seeds:
        await generate(router, request(tokens(seed, 100)))


@pytest.mark.asyncio
async def test_a_worker_that_forgets_to_tell_of_removals_is_found_out_and_asked_for_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rig(1, device_blocks=64) as fleet:
        router = await fleet.start_router(audit_interval_s=0.1)
        await all_ready(router, 1)
        with monkeypatch.context() as broken:
            broken.setattr(EventLog, "removed", lambda *_: None)
            await ask_many(router, range(60))  # seven blocks each: most are evicted, and nobody says so
            assert len(router._index) > 64
            await eventually(lambda: resyncs(router) >= 1)
        await eventually(lambda: len(router._index) <= 64 and not trust(router).suspect)
        await eventually(lambda: trust(router).HasField("precision") and trust(router).precision > 0.95)
        probed = router.metrics.registry.get_sample_value
        assert probed("warmkv_index_probed_blocks_total", {"worker": "w0", "verdict": "phantom"})
        assert probed("warmkv_index_probed_blocks_total", {"worker": "w0", "verdict": "held"})


def resyncs(router: Router) -> float:
    return router.metrics.registry.get_sample_value("warmkv_index_resyncs_total", {"worker": "w0"}) or 0.0


@pytest.mark.asyncio
async def test_under_eviction_pressure_a_right_index_is_never_suspected() -> None:
    """The race of probes with events: blocks come and go all the time while the worker is asked."""
    async with rig(1, device_blocks=64) as fleet:
        router = await fleet.start_router(audit_interval_s=0.02)
        await all_ready(router, 1)
        await asyncio.gather(*(ask_many(router, range(n * 30, n * 30 + 30)) for n in range(4)))
        await eventually(lambda: trust(router).probed > 300)
        assert trust(router).precision == pytest.approx(1.0, abs=0.02)
        assert trust(router).recall == pytest.approx(1.0, abs=0.02)
        assert resyncs(router) == 0
        assert trust(router).credit == 1.0


@pytest.mark.asyncio
async def test_audits_can_be_turned_off() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router(audit_interval_s=None)
        await all_ready(router, 1)
        await ask_many(router, range(20))
        assert trust(router).probed == 0
        assert trust(router).credit == 1.0
