"""What the doctor says of a running router's index."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deploy import doctor_index
from deploy.doctor import check_index
from deploy.layers import load_settings
from deploy.render import explain_text, status_text
from tests.router.rig import all_ready, generate, request, rig, tokens
from warmkv.v1 import admin_pb2, inference_pb2

SETTINGS = load_settings(environ={}, flags={"workers.engine": "simulated", "router.grpc_port": 1}).settings


def stats(*trusts: admin_pb2.IndexTrust, catching_up: tuple[str, ...] = ()) -> admin_pb2.WatchStatsResponse:
    workers = [
        admin_pb2.WorkerInfo(name=f"w{n}", state=admin_pb2.WORKER_STATE_READY, index=trust)
        for n, trust in enumerate(trusts)
    ]
    return admin_pb2.WatchStatsResponse(workers=workers, catching_up=catching_up)


RIGHT = admin_pb2.IndexTrust(credit=1.0, precision=0.998, recall=1.0, probed=640)
LATE = admin_pb2.IndexTrust(credit=0.25, suspect="3.0 s behind", precision=0.9, recall=1.0, probed=640)
GUESSED = admin_pb2.IndexTrust(approximate=True, credit=1.0, precision=0.97, recall=0.6, probed=64)
UNKNOWN = admin_pb2.IndexTrust(credit=1.0)


def test_without_a_router_there_is_nothing_to_say(tmp_path: Path) -> None:
    (finding,) = check_index(SETTINGS, tmp_path)
    assert finding.level == "ok"
    assert "no router answers" in finding.found


def test_suspects_are_warned_of_and_the_others_are_told_with_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = stats(RIGHT, LATE, GUESSED, UNKNOWN, catching_up=("w9",))
    monkeypatch.setattr(doctor_index, "_stats", lambda where: told)
    waiting, right, late, guessed, unknown = check_index(SETTINGS, tmp_path)
    assert (waiting.level, "w9" in waiting.found) == ("warn", True)
    assert right.found == "w0 by events: precision 99.8%, recall 100.0%"
    assert (late.level, "3.0 s behind" in late.found, bool(late.remedy)) == ("warn", True, True)
    assert "by own decisions: precision 97.0%, recall 60.0%" in guessed.found
    assert "too few" in unknown.found


def test_status_shows_who_is_suspect_and_what_probes_found() -> None:
    text = status_text(stats(RIGHT, LATE, GUESSED, catching_up=("w9",)))
    assert "w1: suspect: 3.0 s behind; its blocks count 25%" in text
    assert "index      1 of 3 workers send no events, precision 90.0%, recall 60.0%, 1344 blocks probed" in text
    assert "catching up: it waits for what w9 hold" in text
    assert "index  " not in status_text(stats(UNKNOWN))


def test_explain_shows_why_a_candidate_counts_less() -> None:
    answer = inference_pb2.ExplainResponse(
        candidates=[inference_pb2.Candidate(worker="w0", eligible=True, suspect="3.0 s behind; blocks count 25%")]
    )
    assert "suspect: 3.0 s behind; blocks count 25%" in explain_text(answer)


def test_a_real_routers_numbers_reach_the_status_of_its_operator() -> None:
    async def watch() -> str:
        async with rig(1) as fleet:
            router = await fleet.start_router(audit_interval_s=0.05)
            await all_ready(router, 1)
            for seed in range(30):
                await generate(router, request(tokens(seed, 64)))
            async with asyncio.timeout(10):
                while not router.list_workers()[0].index.HasField("recall"):  # noqa: ASYNC110 - nothing announces it
                    await asyncio.sleep(0.02)
            return status_text(router.stats(show_prompts=False))

    assert "index      precision 100.0%, recall 100.0%" in asyncio.run(watch())
