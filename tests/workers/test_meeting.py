"""Prompts whose back comes from a slow tier while their front is computed: nothing is made twice, nothing waits."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.tier import Delivery, Tier
from tests.kvstore.gated_tier import FixedPace, GatedTier, until
from tests.workers.arithmetic import FIRST_TOKEN, VOCAB
from tests.workers.engine_rig import BLOCK_SIZE, SHAPE, Answer, near_ties, oracle, runner
from tests.workers.exact_rig import ExactRig, assert_exact, canonical_runner, exact_rig
from tests.workers.test_engine_machine import Rig
from workers.protocol import FinishReason

torch.set_num_threads(1)

SIZE = 4  # tokens a block, of the arithmetic model
BLOCKS = 15
PROMPT = [random.Random(5).randrange(FIRST_TOKEN, VOCAB) for _ in range(BLOCKS * SIZE + 1)]


def runs(rig: Rig) -> list[bool]:
    return [not run.future.done() for run in rig.store._promoter._tails._runs]


def come(rig: Rig, pieces: int) -> None:
    """So many reads end, what they brought is copied by the next step, and the next one has begun if there is any."""
    shared = rig.shared
    ended = shared.ended
    shared.let_go(pieces)
    until(lambda: shared.ended == ended + pieces or not any(runs(rig)))
    until(lambda: shared.begun > shared.ended or not any(runs(rig)))
    if rig.copier is not None:
        rig.store.pump()
        rig.copier.make_all()


def a_rig(*, ahead: bool) -> Rig:
    """The prompt lies in a tier that reads as fast as the model computes, and nowhere else."""
    rig = Rig(ahead=ahead, make_shared=GatedTier)
    rig.shared.is_open = True
    while len(rig.shared.held()) < BLOCKS:  # its queue is shorter than what a step makes
        rig.submit(PROMPT, max_tokens=1)
        while rig.open:
            rig.step()
            if rig.copier is not None:
                rig.copier.make_all()
        rig.step()
        assert rig.store.flush(30)
    rig.leave_below()
    rig.shared.is_open = False
    rig.meet(True)
    rig.runner.steps.clear()
    return rig


@pytest.fixture(params=["at once", "ahead"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = a_rig(ahead=request.param == "ahead")
    yield rig
    rig.shared.open()
    rig.finish()


def test_front_and_back_meet_and_neither_is_made_twice(rig: Rig) -> None:
    rig.submit(PROMPT, max_tokens=1)
    rig.step()
    come(rig, 5)
    rig.step()
    come(rig, 2)
    while rig.open:
        rig.step()
    fates = rig.last.fates
    assert fates == {"computed": 33, "redis": 28}
    assert sum(rig.runner.steps) == 33
    assert rig.shared.begun <= 8
    assert rig.engine._scheduler.preemptions == 0


def test_a_front_does_not_wait_for_what_is_being_copied_where_it_has_come_to() -> None:
    rig = a_rig(ahead=True)
    rig.submit(PROMPT, max_tokens=1)
    rig.step()
    ended = rig.shared.ended
    rig.shared.let_go(2)
    until(lambda: rig.shared.ended == ended + 2)
    for _ in range(3 * BLOCKS):
        rig.step()
    assert rig.copier is not None
    assert rig.copier.running
    assert rig.last.fates == {"computed": len(PROMPT)}
    rig.shared.open()
    rig.finish()


def test_a_tier_that_turns_out_slow_moves_the_place_back(rig: Rig) -> None:
    rig.submit(PROMPT, max_tokens=1)
    for _ in range(2):
        rig.step()
    come(rig, 1)
    while rig.open:
        rig.step()
    assert rig.last.fates == {"computed": len(PROMPT) - SIZE, "redis": SIZE}


@pytest.mark.parametrize("pieces", [0, 3])
def test_a_tier_that_hangs_for_half_a_minute_is_waited_for_by_nobody(rig: Rig, pieces: int) -> None:
    rig.submit(PROMPT, max_tokens=1)
    rig.step()
    come(rig, pieces)
    steps = 0
    while rig.open:
        rig.clock.now += 0.02
        rig.step()
        steps += 1
        assert steps < 3 * BLOCKS, "somebody waits"
    assert rig.last.fates is not None
    assert rig.last.fates["computed"] == len(PROMPT) - pieces * SIZE
    rig.clock.now += 30.0
    rig.shared.open()


@pytest.mark.parametrize("how", ["raises", "forgets"])
def test_a_tier_that_fails_half_way_costs_what_is_missing(rig: Rig, how: str) -> None:
    rig.submit(PROMPT, max_tokens=1)
    rig.step()
    come(rig, 3)
    if how == "raises":
        rig.shared.raises = RuntimeError("broken")
    else:
        rig.shared.lose(list(rig.jobs[0].block_hashes))
    come(rig, 1)
    while rig.open:
        rig.step()
    assert rig.last.fates == {"computed": len(PROMPT) - 3 * SIZE, "redis": 3 * SIZE}


@pytest.mark.parametrize("pieces", [0, 1, 4])
@pytest.mark.parametrize("how", ["cancelled", "overdue"])
def test_who_ends_while_its_back_comes_leaves_nothing(rig: Rig, pieces: int, how: str) -> None:
    deadline = rig.clock.now + 1.0
    rig.submit(PROMPT, max_tokens=1, deadline=deadline if how == "overdue" else None)
    rig.step()
    come(rig, pieces)
    rig.step()
    if how == "overdue":
        rig.clock.now += 2.0
    else:
        rig.cancelled.add(len(rig.jobs) - 1)
        rig.engine.cancel(len(rig.jobs) - 1)
    while rig.open:
        rig.step()
    assert rig.last.finish is (FinishReason.DEADLINE if how == "overdue" else FinishReason.CANCELLED)


def test_others_run_beside_it_and_who_wants_the_same_waits_for_it(rig: Rig) -> None:
    rig.submit(PROMPT, max_tokens=3)
    rig.submit([*PROMPT[:40], 21, 22], max_tokens=3)
    rig.submit([20] * 9, max_tokens=3)
    for pieces in (2, 2, 2):
        rig.step()
        come(rig, pieces)
    while rig.open:
        rig.step()
        if rig.copier is not None:
            rig.copier.make_all()


def test_the_load_that_routers_hear_of_counts_what_will_come(rig: Rig) -> None:
    rig.submit(PROMPT, max_tokens=1)
    rig.step()
    come(rig, 4)
    rig.engine.store.pump()
    pending = rig.engine.load().pending_prefill_tokens
    left = len(PROMPT) - 24
    assert pending < left - 4 * SIZE + 1
    assert pending > 0


class Gate:
    """Reads of a tier end one by one, when a test says so."""

    def __init__(self, tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read, self._permits, self.ended = tier.read, threading.Semaphore(0), 0
        monkeypatch.setattr(tier, "read", self._gated)

    def _gated(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        assert self._permits.acquire(timeout=30)
        delivery = self._read(hashes, into, deadline_s=deadline_s)
        self.ended += 1
        return delivery

    def let_go(self, count: int) -> None:
        self._permits.release(count)


def meets(rig: ExactRig, prompt: list[int], max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> tuple[object, Answer]:
    """Serve a prompt that lies on the disk, a piece of it coming after each of the first steps."""
    assert rig.lower is not None
    gate = Gate(rig.lower, monkeypatch)
    source = rig.store._promoter.sources[TierName.DISK]
    # So slow that no real clock finds a piece late.
    source.estimate = FixedPace(rig.device.block_nbytes, 5_000.0)
    rig.engine._scheduler._compute_ms = lambda first, count: 5_000.0 * count
    job, answer = rig.job("met", prompt, max_tokens=max_tokens, ignore_eos=True), Answer()
    rig.engine.submit(job)
    while rig.engine.has_work():
        for output in rig.engine.step().outputs:
            answer.add(output)
        if any(not run.future.done() for run in rig.store._promoter._tails._runs):
            ended = gate.ended
            gate.let_go(2)
            until(
                lambda before=ended: (
                    gate.ended >= before + 2 or all(run.future.done() for run in rig.store._promoter._tails._runs)
                )
            )
    gate.let_go(1000)
    monkeypatch.undo()
    return job, answer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_in_canonical_mode_what_was_met_is_what_would_be_computed_bit_for_bit(
    architecture: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = canonical_runner(architecture, dtype)
    prompt = [random.Random(1).randrange(5, SHAPE.vocab) for _ in range(20 * BLOCK_SIZE + 5)]
    with exact_rig(model, "disk", folder=tmp_path, max_batch_tokens=50) as rig:
        rig.run(rig.job("cold", prompt, max_tokens=1))
        rig.keep_only_below()
        job, answer = meets(rig, prompt, 6, monkeypatch)
        assert answer.fates is not None
        assert answer.fates["disk"] >= 5 * BLOCK_SIZE
        assert answer.fates["computed"] >= 5 * BLOCK_SIZE
        assert sum(answer.fates.values()) == len(prompt)
        assert assert_exact(rig, model, job, answer) > 20
        rig.assert_nothing_leaked()


def test_answers_are_those_of_plain_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [random.Random(2).randrange(5, SHAPE.vocab) for _ in range(20 * BLOCK_SIZE + 3)]
    (expected,) = oracle("llama").generate([prompt], max_tokens=8)
    with exact_rig(runner("llama"), "disk", folder=tmp_path, max_batch_tokens=50) as rig:
        rig.run(rig.job("cold", prompt, max_tokens=1))
        rig.keep_only_below()
        _, answer = meets(rig, prompt, len(expected.token_ids), monkeypatch)
    assert answer.fates is not None
    assert min(answer.fates["disk"], answer.fates["computed"]) >= 5 * BLOCK_SIZE
    assert near_ties([answer], [expected]) == 0


def test_what_was_taken_over_is_never_committed_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been cleared meanwhile, or been found to be wrong."""
    committed: list[int] = []
    commit = rig.store.commit
    monkeypatch.setattr(rig.store, "commit", lambda blocks, metas: committed.extend(blocks) or commit(blocks, metas))
    rig.submit(PROMPT, max_tokens=6)
    rig.step()
    come(rig, 5)
    rig.step()
    (sequence,) = rig.engine._scheduler
    assert sequence.tail is not None
    held = sequence.tail.block_ids
    while rig.open:
        rig.step()
    assert held
    assert not set(held) & set(committed)
    assert len(committed) == len(set(committed))


def test_blocks_taken_over_behind_a_step_that_is_undone_are_given_back() -> None:
    """Else a front that is computed again would write to blocks that others may find."""
    rig = a_rig(ahead=True)
    rig.gpu.fails_at_once, rig.gpu._eagerness = False, 0.0
    rig.submit(PROMPT, max_tokens=6)
    rig.submit([20] * 9, max_tokens=14)  # one alone would end
    rig.step()
    come(rig, 5)
    sequence = next(iter(rig.engine._scheduler))
    for _ in range(60):
        rig.copier.make_all()
        rig.store.pump()
        place, rest = divmod(sequence.num_computed, SIZE)
        if not rest and place in sequence.tail._held and rig.engine._pipeline.is_flying:
            break
        rig.step()
    assert place in sequence.tail._held, "the front has come up to its tail, and its last step is still running"
    rig.runner.room = 0
    rig.step()
    rig.runner.room = math.inf
    assert sequence.num_computed < place * SIZE
    to_write = sequence.block_table[-(-sequence.num_computed // SIZE) :]
    assert [rig.device.meta(block) for block in to_write] == [None] * len(to_write)
    rig.shared.open()
    rig.finish()
