"""The whole engine over real tiers, driven at random, against a model that can be worked out by hand.

Arrivals, jobs that go on with an earlier answer, jobs that end with their prompt, stop tokens, deadlines, cancels,
priorities, preemptions, prompts whose back comes while their front is computed, a shared tier that hangs, fails,
forgets and cuts short, steps without memory, logits that are no numbers, clears, time. Whatever happens: every job ends
once, an answer is the model's or ends in one of the errors that were caused, no block leaks and none is free and in
use. The same once more with steps that run ahead of a late device, whose blocks are copied beside them.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.blocks import HashScheme, block_hashes
from kvstore.device import DeviceTier
from kvstore.estimate import TransferEstimate
from kvstore.events import TierName
from kvstore.host.tier import HostTier
from kvstore.lifetime import Lifetime
from kvstore.peer.promises import Progress, PromiseBoard, PromiseState
from kvstore.store import TieredStore
from kvstore.tier import Clock
from tests.kvstore.blocks_for_tests import ManualClock
from tests.kvstore.fake_tier import FakeSharedTier
from tests.kvstore.gated_tier import FixedPace
from tests.kvstore.late_copier import LateCopier
from tests.workers.arithmetic import FIRST_TOKEN, LAYOUT, VOCAB, ArithmeticRunner, answer, info_fields
from tests.workers.engine_rig import Answer
from tests.workers.stepping.late_device import GARBAGE, LateDevice, LateEvent
from workers.device.interface import Work
from workers.engine import TorchEngine
from workers.protocol import EngineInfo, FinishReason, Job, SamplingParams
from workers.stepping.buffers import Capacity
from workers.stepping.launch import BufferedLauncher

torch.set_num_threads(1)

DEVICE_BLOCKS = 18
SCHEME = HashScheme(b"f" * 32, LAYOUT.describe(), LAYOUT.block_size)
ROOT = SCHEME.root(b"")
PROMPT = list(range(500, 530))
BLOCK_MS = 50.0
CONTEXT_LENGTH = info_fields()["context_length"]
TOO_LONG = {"CONTEXT_LENGTH_EXCEEDED", "PROMPT_TOO_LARGE_FOR_WORKER"}


class Failing(ArithmeticRunner):
    """Keeps what it did wrong, by the reason that jobs are then told, and in which of the engine's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.wrong = 0, set[tuple[str, int]]()

    def forward(self, *step: object) -> torch.Tensor:
        if self.not_finite:
            self.wrong.add(("MODEL_OUTPUT_NOT_FINITE", self.step))
        try:
            return super().forward(*step)  # type: ignore[arg-type]
        except RuntimeError:
            self.wrong.add(("OUT_OF_MEMORY", self.step))
            raise


class GpuLike(LateDevice):
    """Where `fails_at_once`, a step that was computed by the time it is launched fails there, as kernels do for want of
    memory; else all are heard of when they are waited for."""

    fails_at_once = True

    def queue(self, work: Work) -> LateEvent:
        event = super().queue(work)
        if self.fails_at_once and event.done and event.error is not None:
            raise event.error
        return event


class Rig:
    """`compute_ms`: what computing blocks is said to take; endless: whatever is cached is read.

    `ahead`: steps run ahead of a device that computes late, and blocks are copied late and beside them.
    """

    def __init__(
        self,
        compute_ms: float = math.inf,
        *,
        ahead: bool = False,
        make_shared: Callable[[Clock], FakeSharedTier] = FakeSharedTier,
    ) -> None:
        self.clock = ManualClock()
        self.shared = make_shared(self.clock)
        clocks = {"clock": self.clock, "wall_clock": self.clock}
        nbytes = LAYOUT.block_nbytes
        self.copier = LateCopier() if ahead else None
        self.device = DeviceTier(LAYOUT, DEVICE_BLOCKS * nbytes, **clocks, poison=True, copier=self.copier)
        if self.copier is not None:
            self.copier.device = self.device
        host = HostTier(LAYOUT, 10 * nbytes, **clocks)
        self.store = TieredStore(LAYOUT, self.device, host, self.shared, **clocks, default_ttl_s=500.0)
        self.runner, self.ahead = Failing(), ahead
        self.engine = TorchEngine(
            self.runner,  # type: ignore[arg-type]
            self.store,
            [self.device.kv(0)],
            EngineInfo(scheme=SCHEME, **info_fields()),
            num_blocks=DEVICE_BLOCKS,
            max_batch_tokens=24,
            max_running=5,
            default_ttl_s=500.0,
            clock=self.clock,
            launcher=self._late_launcher() if ahead else None,
        )
        self.engine._scheduler._compute_ms = lambda first, count: compute_ms
        self.board = PromiseBoard()
        self.engine._prefill_only._board = self.board
        self.jobs: dict[Hashable, Job] = {}
        self.answers: dict[Hashable, Answer] = {}
        self.cancelled: set[Hashable] = set()

    def meet(self, meets: bool) -> None:
        """Whether what is in the shared tier comes from its back from now on."""
        source = self.store._promoter.sources[TierName.REDIS]
        source.estimate = FixedPace(LAYOUT.block_nbytes, BLOCK_MS) if meets else TransferEstimate()
        price = BLOCK_MS if meets else math.inf
        self.engine._scheduler._compute_ms = lambda first, count: price * count

    def leave_below(self) -> None:
        """What is near goes to the shared tier, and is gone here."""
        if self.copier is not None:
            self.copier.make_all()
            self.store.pump()
        self.store.flush(30)
        self.store.pump()
        self.device.clear()
        self.store.host.clear()

    def _late_launcher(self) -> BufferedLauncher:
        self.gpu = GpuLike()
        capacity = Capacity(24, 5, DEVICE_BLOCKS, LAYOUT.block_size)
        kv = [self.device.kv(0)]
        launcher = BufferedLauncher(self.runner, kv, self.gpu, capacity, runs_ahead=True)  # type: ignore[arg-type]
        self.gpu.after_work = lambda: launcher.buffers.memory.fill_(GARBAGE)
        return launcher

    def submit(
        self, prompt: list[int], *, max_tokens: int, resumed: int = 0, sampling: object = None, **options: object
    ) -> None:
        """`resumed`: so many tokens of the answer were made elsewhere. `sampling`: further parameters."""
        name = len(self.jobs)
        params = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **(sampling or {})}
        tokens = prompt + answer(prompt, resumed)
        names = block_hashes(tokens, ROOT, LAYOUT.block_size)
        job = Job(name, tokens, ROOT, names, SamplingParams(**params), resumed=resumed, **options)  # type: ignore[arg-type]
        self.jobs[name] = job
        self.answers[name] = Answer(resumed=resumed)
        self.engine.submit(job)

    def step(self) -> bool:
        """Whether it made an output."""
        self.runner.step += 1
        outputs = self.engine.step().outputs
        for output in outputs:
            self.answers[output.job_id].add(output)
            if output.error is not None:
                self.assert_caused(self.jobs[output.job_id], output.error.reason)
        return bool(outputs)

    def assert_caused(self, job: Job, reason: str) -> None:
        """No error without a cause: a job that does not fit, or a step just now that went wrong."""
        if reason in TOO_LONG:
            assert not self.fits(job)
            return
        since = self.runner.step - (1 if self.ahead else 0)
        assert any(each == reason and at >= since for each, at in self.runner.wrong), f"{reason} for no reason"

    def fits(self, job: Job) -> bool:
        return len(job.token_ids) < CONTEXT_LENGTH and len(job.token_ids) <= DEVICE_BLOCKS * LAYOUT.block_size

    @property
    def open(self) -> list[Hashable]:
        return [name for name in self.jobs if self.answers[name].finish is None]

    @property
    def last(self) -> Answer:
        return self.answers[len(self.jobs) - 1]

    def finish(self) -> None:
        self.shared.reads_open.set()
        self.shared.raises, self.shared.read_limit, self.shared.healthy = None, None, True
        self.runner.room = math.inf
        for _ in range(3000):
            if not self.engine.has_work():
                break
            if not self.step():
                if self.copier is not None:
                    self.copier.make_all()
                self.engine.wait(0.2)
        assert not self.open, "a job did not end"
        for name in self.jobs:
            self.judge(name)
        if self.copier is not None:  # a block on its way to host is held till it is there
            self.copier.make_all()
            self.store.pump()
        self.store.check()
        assert [block for block in range(DEVICE_BLOCKS) if self.device.refs(block)] == [], "a block leaked"
        assert len(self.engine._scheduler) == 0
        self.engine.close(flush_s=5)
        assert len(self.board) == 0, "others wait for what nobody makes"

    def judge(self, name: Hashable) -> None:
        job, got = self.jobs[name], self.answers[name]
        assert self.fits(job) or got.finish is FinishReason.ERROR
        wanted = self._wanted(job)
        if got.finish in (FinishReason.LENGTH, FinishReason.STOP):
            assert got.token_ids == wanted
            stopped = bool(wanted) and wanted[-1] in job.sampling.stop_token_ids
            assert (got.finish is FinishReason.STOP) == stopped
            assert got.fates is not None
            assert sum(got.fates.values()) == job.num_prompt
            assert not job.no_read or set(got.fates) == {"computed"}
            return
        assert got.token_ids == wanted[: len(got.token_ids)], "what came before its end is right"
        if got.finish is FinishReason.CANCELLED:
            assert name in self.cancelled
        elif got.finish is FinishReason.DEADLINE:
            assert job.deadline is not None
            assert job.deadline <= self.clock.now
        else:
            assert got.finish is FinishReason.ERROR
            assert got.error is not None, "`step` has looked at what it was"

    def _wanted(self, job: Job) -> list[int]:
        """What it shall answer here, if nothing befalls it: a token at least, which need not be stored."""
        if job.prefill_only:
            return []
        room = min(CONTEXT_LENGTH, DEVICE_BLOCKS * LAYOUT.block_size) - job.num_prompt
        whole = answer(job.token_ids[: job.num_prompt], min(job.sampling.max_tokens, max(room, 1)))[job.resumed :]
        ends = [place for place, token in enumerate(whole, 1) if token in job.sampling.stop_token_ids]
        return whole[: ends[0]] if ends else whole


class EngineMachine(RuleBasedStateMachine):
    ahead = False

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(ahead=self.ahead)

    @rule(
        stem=st.integers(0, 2),
        shared=st.integers(0, 30),
        own=st.integers(1, 12),
        max_tokens=st.integers(1, 14),
        priority=st.sampled_from([0, 0, 0, 1]),
        flags=st.sampled_from(["", "", "", "no_store", "no_read", "prefill_only"]),
        ttl_s=st.sampled_from([None, 5.0]),
        resumed=st.sampled_from([0, 0, 0, 1, 5, 9]),
        stops=st.sampled_from([0, 0, 0, 1, 3]),
        due_s=st.sampled_from([None, None, None, 0.005, 3.0]),
        sampling=st.sampled_from([{}, {}, {"presence_penalty": 0.25}, {"logit_bias": ((3, 1.0),)}, {"logprobs": 2}]),
    )
    def submit(self, stem, shared, own, max_tokens, priority, flags, ttl_s, resumed, stops, due_s, sampling):
        draw = random.Random(len(self.rig.jobs))
        prompt = [FIRST_TOKEN + stem] * shared + [draw.randrange(FIRST_TOKEN, VOCAB) for _ in range(own)]
        options = {flags: True} if flags else {}
        options["lifetime"] = None if ttl_s is None else Lifetime(ttl_s)
        options["deadline"] = None if due_s is None else self.rig.clock.now + due_s
        resumed = min(resumed, max_tokens - 1) if flags != "prefill_only" else 0
        if stops:
            sampling = {**sampling, "stop_token_ids": frozenset(answer(prompt, resumed + stops)[resumed:][-1:])}
        self.rig.submit(prompt, max_tokens=max_tokens, priority=priority, resumed=resumed, sampling=sampling, **options)

    @rule(length=st.sampled_from([71, 72, 73, CONTEXT_LENGTH - 1, CONTEXT_LENGTH]))
    def submit_what_hardly_fits(self, length):
        self.rig.submit([FIRST_TOKEN] * length, max_tokens=3)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.rig.step()

    @rule()
    def whatever_is_on_its_way_comes(self):
        if self.rig.shared.reads_open.is_set():
            self.rig.engine.wait(0.05)
            self.rig.step()

    # Which jobs are open depends on when threads read; what is drawn must not.
    @precondition(lambda self: self.rig.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(list(self.rig.jobs)))
        self.rig.cancelled.add(name)
        self.rig.engine.cancel(name)

    @rule(hangs=st.booleans())
    def the_shared_tier_hangs(self, hangs):
        (self.rig.shared.reads_open.clear if hangs else self.rig.shared.reads_open.set)()

    @rule(meets=st.booleans())
    def the_shared_tier_is_as_slow_as_computing(self, meets):
        self.rig.meet(meets)

    @rule()
    def another_worker_made_everything(self):
        """What is near goes to the shared tier, and is gone here."""
        if self.rig.shared.reads_open.is_set() and self.rig.shared.raises is None:
            self.rig.leave_below()

    @rule(how=st.sampled_from(["raises", "cuts", "breaker", "well"]))
    def the_shared_tier_fails(self, how):
        shared = self.rig.shared
        shared.raises = RuntimeError("broken") if how == "raises" else None
        shared.read_limit = 1 if how == "cuts" else None
        shared.healthy = how != "breaker"

    @rule(share=st.integers(2, 4))
    def the_shared_tier_forgets(self, share):
        self.rig.shared.lose(list(self.rig.shared.held())[::share])

    @rule(seconds=st.sampled_from([0.01, 1.0, 7.0]))
    def time_passes(self, seconds):
        self.rig.clock.now += seconds

    @rule()
    def local_tiers_are_cleared(self):
        self.rig.engine.cache.clear()

    @rule()
    def a_step_gives_no_numbers(self):
        self.rig.runner.not_finite = True

    @rule(room=st.sampled_from([0, 3, 17, math.inf]), at_once=st.booleans())
    def memory_is_short(self, room, at_once):
        self.rig.runner.room = room
        if self.ahead:
            self.rig.gpu.fails_at_once = at_once

    @invariant()
    def the_books_are_right(self):
        self.rig.store.check()
        held = [block for sequence in self.rig.engine._scheduler for block in sequence.block_table]
        tails = [each.tail for each in self.rig.engine._scheduler if each.tail is not None]
        held += [block for tail in tails for block in tail.block_ids]
        assert all(self.rig.device.refs(block) for block in held), "a block is free and in use"
        # What will be written belongs to one sequence.
        for sequence in self.rig.engine._scheduler:
            fresh = sequence.block_table[sequence.num_computed // LAYOUT.block_size :]
            assert all(held.count(block) == 1 for block in fresh)
            to_write = sequence.block_table[-(-sequence.num_computed // LAYOUT.block_size) :]
            assert not any(self.rig.device.meta(block) for block in to_write), "what others may find is written again"
        if (flight := self.rig.engine._pipeline._flight) is not None:
            used = [block for span in flight.work.spans for block in span.block_table]
            assert all(self.rig.device.refs(block) for block in used), "a block is free that a step in flight uses"

    def teardown(self):
        self.rig.finish()


class RunningAheadMachine(EngineMachine):
    ahead = True

    @rule(count=st.integers(1, 3))
    def copies_are_made(self, count):
        for _ in range(min(count, len(self.rig.copier.running))):
            self.rig.copier.make_one()


EngineMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase
RunningAheadMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestRunningAheadMachine = RunningAheadMachine.TestCase


def test_the_arithmetic_of_a_cached_prefix_is_that_of_a_cold_one() -> None:
    rig = Rig()
    prompt = list(range(20, 41))
    for _ in range(2):
        rig.submit(prompt, max_tokens=5)
        while rig.open:
            rig.step()
    assert rig.answers[1].fates == {"device": 20, "computed": 1}
    rig.finish()


def target(rig: Rig) -> int:
    rig.submit(PROMPT, max_tokens=14)
    return len(rig.jobs) - 1


def queued(rig: Rig) -> int:
    """Behind others that take all slots."""
    for seed in range(5):
        rig.submit([20 + seed] * 4, max_tokens=14)
    rig.step()
    return target(rig)


def loading(rig: Rig) -> int:
    """Its blocks are on their way from a tier that does not answer."""
    rig.submit(PROMPT, max_tokens=1)
    made(rig)
    assert rig.store.flush(30)
    rig.engine.cache.clear()
    rig.shared.reads_open.clear()
    return target(rig)


def copied(rig: Rig) -> int:
    """Its blocks are being copied from host."""
    rig.submit(PROMPT, max_tokens=1)
    made(rig)
    rig.device.clear()
    return target(rig)


def awaiting(rig: Rig) -> int:
    """Another job is computing the same prompt."""
    rig.submit([*PROMPT, 11], max_tokens=9)
    rig.step()
    return target(rig)


def preempted(rig: Rig) -> int:
    """A job of higher priority takes its blocks."""
    name = target(rig)
    while len(rig.answers[name].token_ids) < 3:
        rig.step()
    rig.submit(list(range(600, 642)), max_tokens=9, priority=1)
    return name


def meeting(rig: Rig) -> int:
    """Its back is on its way from a tier that does not answer, and it computes its front."""
    rig.submit(PROMPT, max_tokens=1)
    made(rig)
    rig.leave_below()
    rig.shared.reads_open.clear()
    rig.meet(True)
    return target(rig)


def made(rig: Rig) -> None:
    """All jobs so far have ended, and all copies are made."""
    for _ in range(300):
        if not rig.open and not rig.engine._pipeline.is_flying:
            break
        if not rig.step():
            if rig.copier is not None:
                rig.copier.make_all()
            rig.engine.wait(0.2)
    assert not rig.open
    if rig.copier is not None:
        rig.copier.make_all()
    rig.store.pump()


def where(rig: Rig, name: Hashable) -> set[str]:
    """The states that a job is in."""
    sequence, scheduler = rig.engine._sequences[name], rig.engine._scheduler
    flight = rig.engine._pipeline._flight
    is_loading = sequence in scheduler._loading and not sequence.acquisition.done
    is_waiting, runs = sequence in scheduler._waiting, sequence in scheduler.running
    tokens = len(rig.answers[name].token_ids)
    found = {
        "queued": is_waiting and len(scheduler.running) == 5,
        "awaiting": is_waiting and sequence.awaited in scheduler._in_the_making,
        "preempted": is_waiting and scheduler.preemptions > 0 and tokens > 0,
        "loading": is_loading and not rig.shared.reads_open.is_set(),
        "copied": is_loading and rig.copier is not None and len(rig.copier.running) > 0,
        "prefilling": runs and 0 < sequence.num_computed < sequence.num_prompt,
        "meeting": runs and sequence.tail is not None and not rig.shared.reads_open.is_set(),
        "decoding": runs and sequence.remaining <= 1 < tokens,
        "in flight": flight is not None and sequence in [chunk.sequence for chunk in flight.work.chunks],
    }
    return {state for state, holds in found.items() if holds}


def assert_refs(rig: Rig) -> None:
    """Each block is referenced by those who hold it, and by nobody else."""
    held = Counter(rig.engine._pipeline.store.given_back or ())
    for sequence in rig.engine._scheduler:
        held.update(sequence.block_table)
        held.update([] if sequence.acquisition is None else sequence.acquisition.block_ids)
        held.update([] if sequence.tail is None else sequence.tail.block_ids)
    assert {block: rig.device.refs(block) for block in range(DEVICE_BLOCKS) if rig.device.refs(block)} == held


STATES = [("queued", queued), ("awaiting", awaiting), ("preempted", preempted), ("loading", loading)]
STATES += [("meeting", meeting), ("prefilling", target), ("decoding", target)]
AHEAD = [("in flight", target), ("copied", copied)]


@pytest.mark.parametrize(
    ("state", "begin", "ahead"),
    [(*each, False) for each in STATES] + [(*each, True) for each in (*STATES, *AHEAD)],
)
def test_a_job_cancelled_in_any_state_ends_at_once_and_holds_nothing(
    state: str, begin: Callable[[Rig], int], ahead: bool
) -> None:
    rig = Rig(ahead=ahead)
    name = begin(rig)
    for _ in range(60):
        if name not in rig.engine._sequences or state in where(rig, name):
            break
        if not rig.step():
            rig.engine.wait(0.2)
    assert state in where(rig, name)
    before = list(rig.answers[name].token_ids)
    rig.cancelled.add(name)
    rig.engine.cancel(name)
    assert name not in rig.engine._sequences
    rig.step()
    assert rig.answers[name].finish is FinishReason.CANCELLED
    assert rig.answers[name].token_ids == before
    rig.shared.reads_open.set()
    if state == "loading":
        rig.engine.wait(1.0)
    made(rig)
    assert_refs(rig)
    rig.finish()


def test_a_tier_that_hangs_for_half_a_minute_costs_nobody_an_answer() -> None:
    rig = Rig(compute_ms=5.0)
    rig.submit(PROMPT, max_tokens=4)
    while rig.open:
        rig.step()
    assert rig.store.flush(30)
    rig.engine.cache.clear()
    rig.shared.reads_open.clear()
    for seed in range(4):
        rig.submit(PROMPT if seed % 2 else [20 + seed] * 9, max_tokens=10)
    rounds, others = 0, {1, 3}
    while rig.open:
        rig.clock.now += 0.02
        rig.step()
        rounds += 1
        assert rounds < 100, "two seconds of half a minute are over, and somebody still waits for the tier"
        assert rounds < 15 or not others & set(rig.open), "a job waits for a tier from which it wants nothing"
    rig.shared.reads_open.set()  # what was asked for comes after all, to nobody
    rig.finish()


def test_blocks_made_for_another_worker_are_told_when_host_has_them_and_not_before() -> None:
    """They are served from host, and come there by copies that run beside the steps."""
    rig = Rig(ahead=True)
    rig.submit(PROMPT[:28], max_tokens=1, prefill_only=True)
    names = rig.jobs[0].block_hashes

    def progress() -> Progress:
        (found,) = rig.board.wait([names[-1]], [(-1, -1)], 0.0)
        return found

    while rig.open:
        rig.step()
        assert progress().made <= rig.store.host.match(names)
    assert progress() == (PromiseState.UNDER_WAY, 0, 0)
    assert rig.engine.has_work(), "a step must follow soon, to tell of them"
    rig.copier.make_one()
    rig.step()
    assert progress() == (PromiseState.UNDER_WAY, 6, 0)
    rig.copier.make_all()
    rig.step()
    assert progress() == (PromiseState.ENDED, 7, 0)
    assert rig.store.host.match(names) == 7
    assert not rig.engine.has_work()
    rig.finish()
