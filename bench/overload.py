"""Overload: what late binding, fair turns and refusals at once are worth. On a virtual clock, exact for a seed.

`python -m bench.overload [--quick] [--json]`. Conversations come in an open loop at so many times what the fleet
would serve if every turn found its history cached. Four simulated workers, each with room for its share of the
conversations and little more. Every request has a deadline for its answer. `at_once` sends everything to a worker the
moment it comes (`router.max_worker_queue = never`); `late` is the default. In the rows: `hit` is the share of prompt
tokens that were not computed; `good` the share of requests whose answer came before their deadline; `ttft_p99_s` of
those; `refused` those that were told to come back, `refused_late` those of them that had waited before; `died` those
that were let in and missed their deadline.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field

from bench.report import Report, arguments
from bench.virtual_fleet import VirtualRouter, question, run_virtually
from router.config import OverloadConfig
from router.errors import RouterError
from router.protocol import Caller, RequestContext, Role
from workers.simulated_sequence import Timing

TIMING = Timing(prefill_fixed_ms=4.0, prefill_token_ms=0.8, prefill_pair_ms=0.0, decode_step_ms=6.0)
WORKERS = 4
SESSIONS = 96
HISTORY, TURN, ANSWER = 1024, 64, 4
DEADLINE_S = 5.0
DEVICE_BLOCKS, MAX_RUNNING, MAX_BATCH_TOKENS = 560, 8, 128
WARM_S = 20.0
_AT_ONCE_S = 0.05
LATE = OverloadConfig()
AT_ONCE = OverloadConfig(max_worker_queue_s=None)


@dataclass(slots=True)
class Outcome:
    """Of one run. Times in seconds."""

    asked: int = 0
    good: int = 0
    refused: int = 0
    died: int = 0
    prompt_tokens: int = 0
    computed: int = 0
    ttft: list[float] = field(default_factory=list)
    refused_after: list[float] = field(default_factory=list)
    retry_after: list[float] = field(default_factory=list)

    @property
    def hit(self) -> float:
        """Share of the prompt tokens of answered requests that were not computed."""
        return 1.0 - self.computed / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def refused_late(self) -> int:
        """Refused after they had waited."""
        return sum(seconds > _AT_ONCE_S for seconds in self.refused_after)

    def ttft_at(self, quantile: float) -> float:
        """Of the answered."""
        ordered = sorted(self.ttft)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of an open loop."""

    at: float
    ids: Sequence[int]
    tenant: str = "t"
    priority: int = 0
    deadline_s: float | None = DEADLINE_S
    max_tokens: int = ANSWER


def capacity_per_s(workers: int = WORKERS) -> float:
    """Requests a second if all but the last turn is cached, and a decode step is shared by few."""
    own_ms = TIMING.prefill_ms(TURN, HISTORY) + ANSWER * TIMING.decode_step_ms / 4
    return workers * 1000.0 / own_ms


def conversations(load: float, seconds: float, seed: int) -> Iterator[Arrival]:
    """Poisson arrivals of turns of random sessions; every turn is new behind a history that the session keeps."""
    rng = random.Random(seed)
    histories = [[rng.randrange(1000) for _ in range(HISTORY)] for _ in range(SESSIONS)]
    at = WARM_S
    for number, history in enumerate(rng.sample(histories, len(histories))):
        yield Arrival(number * WARM_S / 2 / SESSIONS, history, "warm-up", deadline_s=None, max_tokens=1)
    while True:
        at += rng.expovariate(load * capacity_per_s())
        if at > WARM_S + seconds:
            return
        yield Arrival(at, [*rng.choice(histories), *(rng.randrange(1000) for _ in range(TURN))])


async def offer(router: VirtualRouter, arrivals: Sequence[Arrival]) -> dict[str, Outcome]:
    """Send them in an open loop; what became of them, by tenant."""
    outcomes: dict[str, Outcome] = {}
    async with asyncio.TaskGroup() as group:
        for number, each in enumerate(arrivals):
            await asyncio.sleep(max(0.0, each.at - asyncio.get_running_loop().time()))
            group.create_task(_ask(router, each, f"q{number}", outcomes.setdefault(each.tenant, Outcome())))
    return outcomes


async def _ask(router: VirtualRouter, each: Arrival, name: str, outcome: Outcome) -> None:
    began = asyncio.get_running_loop().time()
    deadline = None if each.deadline_s is None else began + each.deadline_s
    caller = Caller(each.tenant, Role.USER, "all")
    body = question(each.ids, max_tokens=each.max_tokens, priority=each.priority)
    outcome.asked += 1
    try:
        answers = router.generate(body, caller=caller, context=RequestContext(name, "", deadline))
        async with aclosing(answers) as parts:  # type: ignore[type-var]
            async for part in parts:
                last = part
    except RouterError as error:
        if error.code.name == "RESOURCE_EXHAUSTED":
            outcome.refused += 1
            outcome.refused_after.append(asyncio.get_running_loop().time() - began)
            outcome.retry_after.append(error.retry_after_s or 0.0)
        else:
            outcome.died += 1
        return
    outcome.good += 1
    outcome.ttft.append(last.route.ttft_ms / 1000.0)
    outcome.prompt_tokens += last.usage.prompt_tokens
    outcome.computed += last.usage.prompt_tokens_by_fate.computed


def run(overload: OverloadConfig, arrivals: Sequence[Arrival], *, seed: int = 1, **fleet: int) -> dict[str, Outcome]:
    """One run on a clock of its own."""
    shape = {
        "workers": WORKERS,
        "device_blocks": DEVICE_BLOCKS,
        "max_running": MAX_RUNNING,
        "max_batch_tokens": MAX_BATCH_TOKENS,
    }
    shape |= fleet

    async def main() -> dict[str, Outcome]:
        router = VirtualRouter(
            timing=TIMING,
            seed=seed,
            overload=overload,
            max_in_flight=100_000,
            max_in_flight_per_tenant=100_000,
            **shape,
        )
        try:
            return await offer(router, arrivals)
        finally:
            await router.close()

    return run_virtually(main)


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the table."""

    load: float
    seconds: float
    seed: int
    rule: str

    @property
    def name(self) -> str:
        """Of its rows."""
        return f"x{self.load:g}_{self.rule}"


def play(case: Case) -> Outcome:
    """Run it."""
    overload = AT_ONCE if case.rule == "at_once" else LATE
    return run(overload, list(conversations(case.load, case.seconds, case.seed)), seed=case.seed)["t"]


def main() -> None:
    """Print the table."""
    given, report = arguments(__doc__), Report("overload")
    loads, seconds, seeds = ((2.0,), 6.0, (1,)) if given.quick else ((0.75, 1.5, 2.0), 12.0, (1, 2, 3))
    cases = [Case(load, seconds, seed, rule) for load in loads for rule in ("at_once", "late") for seed in seeds]
    outcomes: dict[str, list[Outcome]] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for case, outcome in zip(cases, pool.map(play, cases), strict=True):
            outcomes.setdefault(case.name, []).append(outcome)
    for name, each in outcomes.items():
        _add(report, name, each)
    report.print(as_json=given.json)


def _add(report: Report, name: str, outcomes: Sequence[Outcome]) -> None:
    report.add(f"{name}_hit", [o.hit for o in outcomes], "share")
    report.add(f"{name}_good", [o.good / o.asked for o in outcomes], "share")
    report.add(f"{name}_refused", [o.refused / o.asked for o in outcomes], "share")
    report.add(f"{name}_refused_late", [o.refused_late / o.asked for o in outcomes], "share")
    report.add(f"{name}_died", [o.died / o.asked for o in outcomes], "share")
    report.add(f"{name}_ttft_p50_s", [o.ttft_at(0.5) for o in outcomes], "s")
    report.add(f"{name}_ttft_p99_s", [o.ttft_at(0.99) for o in outcomes], "s")


if __name__ == "__main__":
    main()
