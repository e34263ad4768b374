"""What a killed worker costs answers under way: tokens lost, tokens changed, the pause.

Three workers as processes of their own with a real model on CPU, 16 streams of which every other one samples with a
seed. When all of them have some tokens, the worker with the most streams is killed with SIGKILL; in the acts `drain` it
is sent SIGTERM, and its grace is shorter than the answers. In those called `no_redis` nothing is read from there. Each
answer is compared with an uninterrupted one of another tenant, whose blocks it cannot use. `gap` is the time between
the last token before a handover and the first one after it, as the caller sees it; `itl` that between two tokens of the
uninterrupted answers, of the same run; `loaded` the share of the tokens that came with a handover whose K/V was found.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from bench.handover_rig import Asked, Fleet, Stream, changed, fleet_of, lost, questions, told
from bench.report import Report, arguments
from deploy.redis_server import PrivateRedis
from router.board import percentile
from router.ledger import FATES
from router.protocol import Caller, Role
from warmkv.v1 import admin_pb2
from workers.config import WorkerConfig
from workers.tiny import ModelShape, make_model_folder

OPERATOR = Caller("bench", Role.ADMIN, "bench")
WORKERS = ("w0", "w1", "w2")
STREAMS = 16
PROMPT = 256
TOKENS = 64
KILL_AT = 20  # tokens that each stream has by then
SHAPE = ModelShape(layers=4, hidden=192, heads=6, kv_heads=2, vocab=2048, context_length=2048)
DRAIN_S = 0.2


@dataclass
class Act:
    """What some rounds gave."""

    lost: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    failed: list[float] = field(default_factory=list)
    handed_over: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)


def template(folder: Path, redis_url: str) -> WorkerConfig:
    """Of all workers."""
    return WorkerConfig(
        name="",
        model_dir=str(folder),
        model_name="bench",
        device="cpu",
        device_bytes=256 << 20,
        host_bytes=256 << 20,
        block_size=16,
        redis_url=redis_url,
        peers=True,
    )


async def play(fleet: Fleet, act: Act, asked: list[Asked], name: str, *, kill: bool) -> None:
    """One round: uninterrupted answers, and the same ones, of another tenant, whose worker goes."""
    wholes = await fleet.ask(asked, tenant=f"whole {name}")
    before = _resumed(fleet)
    streams = [Stream() for _ in asked]
    running = asyncio.ensure_future(fleet.ask(asked, tenant=name, streams=streams))
    await told(streams, KILL_AT)
    victim = fleet.busiest()
    await (fleet.kill(victim) if kill else fleet.terminate(victim))
    await running
    _note(act, streams, wholes)
    after = _resumed(fleet)
    came = {fate: after[fate] - before[fate] for fate in FATES}
    act.loaded.append(1 - came["computed"] / max(1.0, sum(came.values())))


def _resumed(fleet: Fleet) -> dict[str, float]:
    return {fate: fleet.metric("handover_tokens_total", fate=fate) for fate in FATES}


def _note(act: Act, streams: list[Stream], wholes: list[Stream]) -> None:
    pairs = list(zip(streams, wholes, strict=True))
    act.lost.append(sum(lost(*pair) for pair in pairs))
    act.changed.append(sum(changed(*pair) for pair in pairs))
    act.failed.append(sum(stream.error is not None for stream in streams))
    moved = [stream for stream in streams if stream.is_handed_over]
    act.handed_over.append(len(moved))
    act.gaps_ms += [max(stream.gaps_ms) for stream in moved]
    act.itl_ms += [gap for whole in wholes for gap in whole.gaps_ms]


async def perform(fleet: Fleet, suffix: str, *, rounds: int) -> Act:
    """All rounds of an act; missing workers are started before each but the first one."""
    act, shared = Act(), "no_redis" not in suffix
    fleet.router.set_policy(admin_pb2.SetPolicyRequest(shared_tier_reads=shared), caller=OPERATOR)
    for number in range(rounds):
        await fleet.start(*(set(WORKERS) - set(fleet.processes) if number else ()))
        asked = questions(STREAMS, prompt=PROMPT, tokens=TOKENS, vocab=SHAPE.vocab, seed=number)
        await play(fleet, act, asked, f"{suffix} {number}", kill="drain" not in suffix)
    return act


def tell(report: Report, act: Act, suffix: str) -> None:
    """The rows of an act."""
    report.add(f"tokens_lost{suffix}", act.lost, "tokens", bar="0")
    report.add(f"tokens_changed{suffix}", act.changed, "tokens", bar="0")
    report.add(f"failed{suffix}", act.failed, "answers", bar="0")
    report.add(f"handed_over{suffix}", act.handed_over, "answers")
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        report.add(f"gap_{name}_ms{suffix}", [percentile(act.gaps_ms, quantile)], "ms")
        report.add(f"itl_{name}_ms{suffix}", [percentile(act.itl_ms, quantile)], "ms")
    report.add(f"loaded{suffix}", act.loaded, "share")


async def run(*, quick: bool) -> Report:
    """All rows."""
    report = Report("handover")
    acts = ("", "_no_redis") if quick else ("", "_no_redis", "_drain", "_drain_no_redis")
    with tempfile.TemporaryDirectory(prefix="warmkv-bench-") as scratch, PrivateRedis() as server:
        folder = make_model_folder(Path(scratch) / "model", SHAPE)
        async with fleet_of(len(WORKERS), template(folder, server.url), drain_s=DRAIN_S) as fleet:
            for suffix in acts:
                if not quick:
                    await fleet.start(*(set(WORKERS) - set(fleet.processes)))
                tell(report, await perform(fleet, suffix, rounds=1 if quick else 3), suffix)
    return report


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    asyncio.run(run(quick=options.quick)).print(as_json=options.json)


if __name__ == "__main__":
    main()
