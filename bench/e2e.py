"""What cache-aware routing and a persistent store are worth, end to end: gRPC client, router, Ray workers, Redis.

Four workers, growing chats of eight turns and document questions, closed loop, fixed seed: the demo's workload and
acts. Every round runs round_robin and cache_aware over the same requests with all tiers emptied before each, so that
each ratio compares two neighbours in time. Rounds with reads from Redis off give `computed_ratio` and
`ttft_p50_ratio`, with reads on the rows that end in `_shared`. At the end all workers are killed and known prefixes are
asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

import psutil

from bench.report import Report, arguments
from deploy.closed_loop import Driver
from deploy.demo import DemoOptions, demo_shape, settle
from deploy.local_fleet import ADMIN, LocalFleet
from deploy.summary import Act
from deploy.workload import Workload, WorkloadShape, make_workload
from warmkv.client import AsyncClient
from warmkv.v1 import admin_pb2

WORKERS = 4


async def act(operator: AsyncClient, driver: Driver, workload: Workload, policy: str, *, shared: bool) -> Act:
    """One act from empty tiers."""
    await operator.set_policy(policy, shared_tier_reads=shared)
    await operator.clear_cache(admin_pb2.ClearCacheRequest(all=True))
    played = await driver.run(policy, workload)
    if played.failed:
        raise RuntimeError(
            f"{policy}: {played.failed} requests failed: {next(r.error for r in played.results if r.error)}"
        )
    return played


async def compare(
    report: Report, operator: AsyncClient, driver: Driver, workload: Workload, *, rounds: int, shared: bool
) -> None:
    """Rounds of both policies; their ratios as rows."""
    suffix, pairs = "_shared" if shared else "", []
    for _ in range(rounds):
        before = await act(operator, driver, workload, "round_robin", shared=shared)
        after = await act(operator, driver, workload, "cache_aware", shared=shared)
        pairs.append((before, after))
    computed = [after.tokens("computed") / before.tokens("computed") for before, after in pairs]
    ttft = [after.ttft_ms(0.5) / before.ttft_ms(0.5) for before, after in pairs]
    report.add(f"computed_ratio{suffix}", computed, "ratio", bar="" if shared else "<= 0.5")
    report.add(f"ttft_p50_ratio{suffix}", ttft, "ratio", bar="" if shared else "<= 0.6")
    for name, acts in (("round_robin", [p[0] for p in pairs]), ("cache_aware", [p[1] for p in pairs])):
        report.add(f"{name}_hit_rate{suffix}", [a.hit_rate for a in acts], "share")
        for tier in ("device", "host", "redis"):
            report.add(f"{name}_{tier}_share{suffix}", [a.share(tier) for a in acts], "share")
        report.add(f"{name}_ttft_p50{suffix}", [a.ttft_ms(0.5) for a in acts], "ms")
        report.add(f"{name}_ttft_p95{suffix}", [a.ttft_ms(0.95) for a in acts], "ms")
        report.add(f"{name}_requests_per_s{suffix}", [a.requests_per_s for a in acts], "1/s")


async def restart(report: Report, fleet: LocalFleet, operator: AsyncClient, driver: Driver, *, wait_for: int) -> None:
    """Kill every worker, wait until so many are back, ask again for one session of each prefix."""
    await settle(operator)
    await operator.set_policy(shared_tier_reads=True)
    killed = time.perf_counter()
    await fleet.wait_ready(wait_for, newer_than=await fleet.kill_workers())
    report.add("restart_s", [time.perf_counter() - killed], "s")
    replayed = await driver.replay("after restart", one_each=True)
    shares = [result.fates.get("redis", 0) / result.prompt_tokens for result in replayed.answered]
    total = replayed.share("redis")
    row = report.add("restart_redis_share", [total], "share", bar=">= 0.9")
    report.rows[-1] = replace(row, min=min(shares), max=max(shares), n=len(shares))
    report.add("restart_ttft_p50", [replayed.ttft_ms(0.5)], "ms")


async def run(*, quick: bool) -> Report:
    """All rows."""
    report = Report("e2e")
    workload = make_workload(replace(WorkloadShape(), chats_per_tenant=2) if quick else None)
    async with LocalFleet(demo_shape(DemoOptions(workers=WORKERS))) as fleet, contextlib.AsyncExitStack() as stack:
        await fleet.wait_ready(1)
        clients = {name: await stack.enter_async_context(fleet.client(name)) for name in fleet.keys}
        await clients[ADMIN].generate("Hello", max_tokens=1).result()
        report.add("first_token_s", [time.time() - psutil.Process().create_time()], "s", bar="<= 25")
        await fleet.wait_ready()
        driver = Driver(clients)
        await compare(report, clients[ADMIN], driver, workload, rounds=1 if quick else 3, shared=False)
        if fleet.redis is not None:
            if not quick:
                await compare(report, clients[ADMIN], driver, workload, rounds=3, shared=True)
            await restart(report, fleet, clients[ADMIN], driver, wait_for=1 if quick else WORKERS)
    return report


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    asyncio.run(run(quick=options.quick)).print(as_json=options.json)


if __name__ == "__main__":
    main()
