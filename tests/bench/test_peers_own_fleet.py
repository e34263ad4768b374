"""Our side of `bench.peers` as it runs: own worker processes, the router's process, the gRPC client, real sockets."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from bench.peers.contenders import Own
from bench.peers.fleet import TrialFleet
from bench.peers.load import closed_loop
from bench.peers.prompts import VOCABULARY, Shape
from bench.peers.service import Constants
from workers.tiny import ModelShape, make_model_folder


def test_a_trial_fleet_serves_keeps_books_and_gets_a_killed_worker_back(tmp_path: Path) -> None:
    shape = Shape(groups=1, sessions=1, concurrency=1, turns=3, system_tokens=100, turn_tokens=20)

    async def scenario() -> None:
        model = make_model_folder(
            tmp_path / "model", ModelShape(layers=1, hidden=64, heads=4, kv_heads=2, vocab=VOCABULARY)
        )
        async with TrialFleet(Own(model), Constants(decode_s=0.02)) as fleet:
            caller = fleet.caller()
            result = await closed_loop(caller, [shape.session(0)], concurrency=1, think_s=0.2)
            assert result.errors == []
            assert [answer.prompt_tokens for answer in result.answers] == [120, 140, 160]
            assert [answer.cached_tokens for answer in result.answers] == [0, 112, 128]
            assert min(result.latency_s) >= 0.02
            books = await fleet.books()
            [used] = [each for each in books if each.requests]
            assert (used.requests, used.prompt_tokens, used.cached_tokens) == (3, 420, 240)
            assert used.ttft_ms[0] == pytest.approx(3.0), "120 tokens at 40,000 a second"
            assert fleet.router.cpu_s() > 0.0
            victim = books.index(used)
            fleet.kill_worker(victim)
            ready_at = await fleet.restart_worker(victim)
            assert abs(time.time() - ready_at) < 60
            assert (await fleet.books_of(victim)).first_at is None, "a new process has books of its own"
            again = await closed_loop(caller, [shape.session(0)], concurrency=1, think_s=0.0)
            assert len(again.answers) == 3
            await caller.close()

    asyncio.run(scenario())
