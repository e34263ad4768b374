"""What is done with each router, and the figures that come of it. One function a scenario, one trial a call."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from bench.peers.contenders import Contender
from bench.peers.fleet import TrialFleet
from bench.peers.load import LoadResult, closed_loop
from bench.peers.prompts import Prompt, Shape, random_prompt, unique_prompts
from bench.peers.service import Constants, WorkerBooks
from deploy.summary import percentile

Figures = dict[str, float]
Play = Callable[[Contender, int], Awaitable[Figures]]

_VICTIM = 1
_MIB = 1 << 20
_INSTANT = Constants(tokens_per_s=1e9, decode_s=0.0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`play(contender, seed)` is one trial."""

    name: str
    play: Play
    rounds: int = 1


def scenarios(*, quick: bool) -> dict[str, Scenario]:
    """All, by name."""
    rounds = 1 if quick else 3

    def sessions(groups: int, concurrency: int) -> Play:
        shape = Shape(groups, 200, concurrency)
        return lambda contender, seed: play_sessions(contender, replace(shape, seed=seed))

    listed = [
        Scenario("hot_32", sessions(1, 32), rounds),
        Scenario("hot_96", sessions(1, 96), rounds),
        Scenario("groups_32", sessions(8, 32), rounds),
        Scenario("sequential", lambda c, seed: play_sequential(c, seed, repeats=4 if quick else 15)),
        Scenario("kill", lambda c, seed: play_kill(c, seed, KillPlan.quick() if quick else KillPlan())),
        Scenario("restart", lambda c, seed: play_restart(c, seed, sessions=80 if quick else 200)),
        Scenario("memory", lambda c, seed: play_memory(c, prompts=16_000 if quick else 180_000)),
    ]
    return {each.name: each for each in listed}


async def play_sessions(contender: Contender, shape: Shape) -> Figures:
    """Growing sessions in a closed loop."""
    async with TrialFleet(contender, Constants()) as fleet:
        sessions = (shape.session(number) for number in range(shape.sessions))
        result, cpu_s = await _measured(fleet, sessions, shape.concurrency, shape.think_s)
        return _load_figures(result, await fleet.books(), cpu_s, fleet.constants)


async def play_sequential(contender: Contender, seed: int, *, repeats: int) -> Figures:
    """Sixteen prompts that differ, again and again, one request in flight."""
    prompts = [random_prompt(500, f"{seed} prompt {number}") for number in range(16)]
    async with TrialFleet(contender, Constants()) as fleet:
        result, cpu_s = await _measured(fleet, [prompts * repeats], 1, 0.0)
        books = await fleet.books()
        used = sum(each.requests > 0 for each in books)
        return {"workers_used": used, **_load_figures(result, books, cpu_s, fleet.constants)}


@dataclass(frozen=True, slots=True)
class KillPlan:
    """Seconds from the start of the load."""

    kill_at: float = 3.0
    back_at: float = 7.0
    end_at: float = 17.0

    @classmethod
    def quick(cls) -> KillPlan:
        """The same, shorter."""
        return cls(1.5, 2.5, 8.0)


async def play_kill(contender: Contender, seed: int, plan: KillPlan) -> Figures:
    """SIGKILL to a worker under load; it comes back at the same address, empty."""
    shape = Shape(8, 0, 32, seed=seed)
    async with TrialFleet(contender, Constants()) as fleet:
        caller, started = fleet.caller(), time.monotonic()
        endless = (shape.session(number) for number in count())
        load = asyncio.create_task(
            closed_loop(
                caller, endless, concurrency=shape.concurrency, think_s=shape.think_s, until=started + plan.end_at
            )
        )
        try:
            await asyncio.sleep(plan.kill_at)
            await asyncio.to_thread(fleet.kill_worker, _VICTIM)
            await asyncio.sleep(max(0.0, started + plan.back_at - time.monotonic()))
            ready_at = await fleet.restart_worker(_VICTIM)
            result = await load
        finally:
            load.cancel()
            await caller.close()
        _tell(fleet, result)
        books, ended_at = await fleet.books_of(_VICTIM), time.time()
        # None served: what is known is that it took longer than the load lasted.
        back_s = max(0.0, (ended_at if books.first_at is None else books.first_at) - ready_at)
        figures = {"errors": float(len(result.errors)), "back_s": back_s, "back_requests": float(books.requests)}
        return {**figures, "requests_per_s": result.requests_per_s, **_client_figures(result, fleet.constants)}


async def play_restart(contender: Contender, seed: int, *, sessions: int) -> Figures:
    """Half of each session; the router is killed and started again; the other half. The workers stay.

    A decision is blind when a session's next prompt finds no more than its system prompt, though a worker that
    lives holds all but the last turn of it.
    """
    shape = Shape(8, sessions, 32, seed=seed)
    async with TrialFleet(contender, Constants()) as fleet:
        played = [list(shape.session(number)) for number in range(sessions)]
        half = shape.turns // 2
        before, _ = await _measured(fleet, [prompts[:half] for prompts in played], shape.concurrency, shape.think_s)
        await asyncio.to_thread(fleet.router.kill)
        killed_at = time.monotonic()
        await fleet.start_router()
        ready_s = time.monotonic() - killed_at
        after, _ = await _measured(fleet, [prompts[half:] for prompts in played], shape.concurrency, shape.think_s)
        errors = float(len(before.errors) + len(after.errors))
        shares = {"blind_share_before": blind_share(before, shape), "blind_share": blind_share(after, shape)}
        return {**shares, "ready_s": ready_s, "errors": errors, "hit": _hit(await fleet.books())}


async def play_memory(contender: Contender, *, prompts: int) -> Figures:
    """The router's growth under prompts that share nothing, before workers that answer at once.

    `late_growth_mib`: of the second half of the prompts; what is bounded does not grow any more then.
    """
    async with TrialFleet(contender, _INSTANT) as fleet:
        base, peak, peak_by_half = fleet.router.rss_bytes(), 0, 0
        sent = 0

        def sessions() -> Iterator[list[Prompt]]:
            nonlocal sent
            for sent, prompt in enumerate(unique_prompts(prompts, 1000)):  # noqa: B007 - how far it is, is read below
                yield [prompt]

        load = asyncio.create_task(_measured(fleet, sessions(), 64, 0.0))
        while not load.done():
            peak = max(peak, fleet.router.rss_bytes())
            peak_by_half = peak if sent <= prompts // 2 else peak_by_half
            await asyncio.wait([load], timeout=0.25)
        result, cpu_s = await load
        peak = max(peak, fleet.router.rss_bytes())
        return {
            "growth_mib": (peak - base) / _MIB,
            "growth_bytes_a_prompt": (peak - base) / prompts,
            "late_growth_mib": (peak - max(base, peak_by_half)) / _MIB,
            "requests_per_s": result.requests_per_s,
            "cpu_us": cpu_s * 1e6 / max(1, len(result.answers)),
            "errors": float(len(result.errors)),
        }


async def _measured(
    fleet: TrialFleet, sessions: Iterable[Iterable[Prompt]], concurrency: int, think_s: float
) -> tuple[LoadResult, float]:
    """What came of a load, and the CPU time that the router took for it."""
    caller, before = fleet.caller(), fleet.router.cpu_s()
    try:
        result = await closed_loop(caller, sessions, concurrency=concurrency, think_s=think_s)
    finally:
        await caller.close()
    fleet.router.check()
    _tell(fleet, result)
    return result, fleet.router.cpu_s() - before


def _tell(fleet: TrialFleet, result: LoadResult) -> None:
    """Errors are figures, but somebody will ask what they were."""
    if result.trouble:
        print(f"{fleet.contender.name}: {result.trouble}", file=sys.stderr, flush=True)


def _load_figures(result: LoadResult, books: list[WorkerBooks], cpu_s: float, constants: Constants) -> Figures:
    requests = [each.requests for each in books]
    ttft_ms = [ms for each in books for ms in each.ttft_ms]
    return {
        "hit": _hit(books),
        "ttft_ms": sum(ttft_ms) / max(1, len(ttft_ms)),
        "ttft_p50_ms": percentile(ttft_ms, 0.5),
        "ttft_p99_ms": percentile(ttft_ms, 0.99),
        **_client_figures(result, constants),
        "requests_per_s": result.requests_per_s,
        "busiest_share": max(requests) / max(1, sum(requests)),
        "idlest_share": min(requests) / max(1, sum(requests)),
        "cpu_us": cpu_s * 1e6 / max(1, len(result.answers)),
        "errors": float(len(result.errors)),
    }


def _client_figures(result: LoadResult, constants: Constants) -> Figures:
    """From the call to the whole answer, less the fixed time of decoding: the same measure for every protocol."""
    waits_ms = [(seconds - constants.decode_s) * 1000 for seconds in result.latency_s]
    return {
        "client_ttft_ms": sum(waits_ms) / max(1, len(waits_ms)),
        "client_ttft_p50_ms": percentile(waits_ms, 0.5),
        "client_ttft_p99_ms": percentile(waits_ms, 0.99),
    }


def blind_share(result: LoadResult, shape: Shape) -> float:
    """Of the prompts that are not their session's first, those that found no more than their system prompt."""
    first = shape.system_tokens + shape.turn_tokens
    later = [answer.cached_tokens for answer in result.answers if answer.prompt_tokens > first]
    return sum(cached <= shape.system_tokens for cached in later) / max(1, len(later))


def _hit(books: list[WorkerBooks]) -> float:
    return sum(each.cached_tokens for each in books) / max(1, sum(each.prompt_tokens for each in books))
