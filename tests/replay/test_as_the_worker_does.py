"""The oracle is the worker itself: a `SimulatedEngine` on a virtual clock, beside the simulator's engine."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstore.blocks import block_hashes
from kvstore.layout import KVLayout
from replay.batched_profile import BatchedProfile
from replay.simulated_router import RouterSettings
from replay.simulation import Setup, Simulation, simulate
from replay.workload import Workload, workload
from router.cost import PrefillFit
from tests.replay.made import BLOCK, made
from workers.protocol import Job, Load, SamplingParams
from workers.simulated import SimulatedEngine
from workers.simulated_info import simulated_info
from workers.simulated_sequence import Timing

INFO = simulated_info(fingerprint=b"f" * 32, layout=KVLayout(1, 1, 4, 4, "float32", BLOCK), context_length=100_000)
ROOT = INFO.scheme.root(b"tenant")
TIMING = Timing(3.0, 1.0, 0.001, 7.0)
POOL, BUDGET, RUNNING = 40, 60, 5
PROFILE = BatchedProfile(
    PrefillFit(0.0, TIMING.prefill_token_ms, TIMING.prefill_pair_ms),
    decode_ms=TIMING.decode_step_ms,
    chunk_ms=TIMING.prefill_fixed_ms,
    mixed_ms=TIMING.decode_step_ms,
    max_batch_tokens=BUDGET,
    max_running=RUNNING,
    pool_tokens=POOL * BLOCK,
    reserves_prompt=True,
)
Prompt = tuple[float, list[int], int]  # arrival, contents, tokens of the answer


class VirtualTime:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def sleep(self, seconds: float) -> None:
        self.s += seconds


def work_of(prompts: list[Prompt]) -> Workload:
    prompts = sorted(prompts)
    trace = made([(at + n * 1e-4, blocks) for n, (at, blocks, _) in enumerate(prompts)], extra=3)
    outputs = zip(trace.requests, prompts, strict=True)
    return workload(replace(trace, requests=tuple(replace(r, output_length=output) for r, (_, _, output) in outputs)))


def token_ids(work: Workload, number: int) -> list[int]:
    """Equal where the chains are."""
    found: list[int] = []
    for block in work.chains[number]:
        rng = random.Random(block)
        found += [rng.randrange(INFO.vocab_size) for _ in range(BLOCK)]
    return found + [number] * (work.requests[number].input_length - len(found))


def served(work: Workload) -> tuple[list[float], list[int], Load]:
    """By the worker's engine: when first tokens came, tokens cached, its last report."""
    now = VirtualTime()
    engine = SimulatedEngine(
        INFO,
        device_blocks=POOL,
        timing=TIMING,
        max_batch_tokens=BUDGET,
        max_running=RUNNING,
        clock=now,
        wall_clock=now,
        sleep=now.sleep,
    )
    coming = sorted(range(len(work.requests)), key=lambda n: work.arrivals_s[n])
    first: dict[int, float] = {}
    cached: dict[int, int] = {}
    while coming or engine.has_work():
        while coming and work.arrivals_s[coming[0]] <= now.s:
            number = coming.pop(0)
            tokens = token_ids(work, number)
            sampling = SamplingParams(work.requests[number].output_length, ignore_eos=True)
            engine.submit(Job(number, tokens, ROOT, block_hashes(tokens, ROOT, BLOCK), sampling))
        if not engine.has_work():
            now.s = work.arrivals_s[coming[0]]
            continue
        for output in engine.step().outputs:
            assert isinstance(output.job_id, int)
            if output.token_ids:
                first.setdefault(output.job_id, now.s)
            if output.fates:
                cached[output.job_id] = output.fates["device"]
    numbers = range(len(work.requests))
    return [first[n] for n in numbers], [cached[n] for n in numbers], engine.load()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 30)),
        min_size=1,
        max_size=10,
    )
)
def test_times_and_hits(prompts: list[Prompt]) -> None:
    work = work_of(prompts)
    fates = simulate(work, Setup(1, RouterSettings("round_robin"), PROFILE)).fates
    first, cached, load = served(work)
    assume(not load.preemptions)  # which of several idle blocks goes then may differ
    assert [fate.cached for fate in fates] == cached
    assert [fate.first_token_s for fate in fates] == pytest.approx(first)


def test_a_burst_over_one_document_computes_it_once() -> None:
    work = work_of([(n * 0.001, list(range(9)), 3) for n in range(4)])
    fates = simulate(work, Setup(1, RouterSettings("round_robin"), PROFILE)).fates
    assert [fate.cached for fate in fates] == served(work)[1] == [0, 90, 90, 90]


def test_reports_tell_the_same_of_answers() -> None:
    work = work_of([(n * 0.05, [0, 0, n], 9 + 4 * n) for n in range(5)])
    simulation = Simulation(work, Setup(1, RouterSettings("round_robin"), PROFILE))
    simulation.run()
    (engine,) = simulation._engines.values()
    told, load = engine.reported(engine.report_time(simulation._timeline.now)), served(work)[2]
    assert not load.preemptions
    assert (told.answer_ms, told.freed_blocks) == pytest.approx((load.answer_ms, load.freed_blocks))
    assert (told.slots, told.answer_blocks) == (load.slots, load.answer_blocks) == (RUNNING, 0)
    assert told.freed_blocks > 0
