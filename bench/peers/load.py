"""Sessions in a closed loop: so many at a time, the next turn when the answer has come and was thought about."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from bench.peers.callers import Answer, Caller, CallFailed
from bench.peers.prompts import Prompt


@dataclass(slots=True)
class LoadResult:
    """What a client saw.

    Attributes:
        answers: in order of arrival. latency_s: of each, from the call to the whole answer.
        errors: what failed, one text each. seconds: from first to last.
    """

    answers: list[Answer] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def trouble(self) -> str:
        """The commonest errors, counted; empty: none."""
        return "; ".join(f"{n} x {text[:300]}" for text, n in Counter(self.errors).most_common(3))

    @property
    def requests_per_s(self) -> float:
        """Answers a second."""
        return len(self.answers) / self.seconds


async def closed_loop(
    caller: Caller,
    sessions: Iterable[Iterable[Prompt]],
    *,
    concurrency: int,
    think_s: float,
    until: float = float("inf"),
) -> LoadResult:
    """Play sessions until there are no more, or `time.monotonic()` is `until`: then no new prompt is sent."""
    result, waiting, started = LoadResult(), iter(sessions), time.monotonic()
    await asyncio.gather(*(_player(caller, waiting, think_s, until, result) for _ in range(concurrency)))
    result.seconds = time.monotonic() - started
    return result


async def _player(
    caller: Caller, sessions: Iterator[Iterable[Prompt]], think_s: float, until: float, result: LoadResult
) -> None:
    for session in sessions:
        for prompt in session:
            if time.monotonic() >= until:
                return
            await _ask(caller, prompt, result)
            await asyncio.sleep(think_s)


async def _ask(caller: Caller, prompt: Prompt, result: LoadResult) -> None:
    started = time.perf_counter()
    try:
        answer = await caller.ask(prompt)
    except CallFailed as failure:
        result.errors.append(f"{failure}")
        return
    result.latency_s.append(time.perf_counter() - started)
    result.answers.append(answer)
