"""A shadow policy scores what is decided and changes nothing; policies roll back; both outlive the router."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from router import record_file, service
from router.errors import InvalidRequest
from router.fleet_record import FleetRecord
from router.policy_history import Order, PolicySetting, rollback_target
from router.record_file import keeper, restored
from router.service import AdminService
from tests.router.rig import ADMIN, all_ready, eventually, generate, request, rig, tokens
from tests.router.test_fleet import SOON_S
from warmkv.v1 import admin_pb2


def policy(name: str, **weights: float) -> admin_pb2.Policy:
    return admin_pb2.Policy(name=name, weights=weights)


@pytest.mark.asyncio
async def test_a_shadow_scores_every_decision_and_changes_none() -> None:
    async with rig(2) as fleet:
        router, other = await fleet.start_router("r0"), await fleet.start_router("r1")
        await all_ready(router, 2)
        await all_ready(other, 2)
        router.set_policy(admin_pb2.SetPolicyRequest(policy=policy("sticky", first_tokens=16)), caller=ADMIN)
        await generate(router, request(tokens(1, 200)))
        assert not router.get_policy().HasField("shadow")
        router.set_shadow_policy(admin_pb2.SetShadowPolicyRequest(policy=policy("round_robin")), caller=ADMIN)
        await eventually(lambda: other.get_policy().shadow.policy.name == "round_robin", timeout_s=SOON_S)
        assert router.get_policy().shadow.decisions == 0
        answers = [await generate(router, request(tokens(1, 200))) for _ in range(6)]
        assert {(a.route.policy, a.route.worker) for a in answers} == {("sticky", answers[0].route.worker)}
        report = router.get_policy().shadow
        assert (report.decisions, report.same) == (6, 3)
        assert dict(report.in_force.workers) == {answers[0].route.worker: 6}
        assert dict(report.shadow.workers) == {"w0": 3, "w1": 3}
        # What it would have sent elsewhere would have found nothing there.
        assert report.in_force.predicted_hit > 0.9 > 0.6 > report.shadow.predicted_hit > 0.4
        assert report.shadow.predicted_ttft_ms > report.in_force.predicted_ttft_ms
        assert len(report.moved) == 3
        assert {m.shadow_worker for m in report.moved}.isdisjoint({answers[0].route.worker})
        assert 'shadow_decisions_total{policy="round_robin",same="no"} 3.0' in exported(router)
        router.set_shadow_policy(admin_pb2.SetShadowPolicyRequest(), caller=ADMIN)
        assert not router.get_policy().HasField("shadow")


@pytest.mark.asyncio
async def test_a_shadow_is_compared_with_what_is_in_force_now_and_not_with_what_was() -> None:
    async with rig(2) as fleet:
        router = await fleet.start_router()
        await all_ready(router, 2)
        router.set_shadow_policy(admin_pb2.SetShadowPolicyRequest(policy=policy("round_robin")), caller=ADMIN)
        for _ in range(4):
            await generate(router, request(tokens(1, 200)))
        assert router.get_policy().shadow.decisions == 4
        router.set_policy(admin_pb2.SetPolicyRequest(policy=policy("sticky")), caller=ADMIN)
        assert router.get_policy().shadow.decisions == 0
        await generate(router, request(tokens(1, 200)))
        router.drain_worker("w0")  # another version of the record, but nothing that is compared
        await generate(router, request(tokens(1, 200)))
        report = router.get_policy().shadow
        assert (report.decisions, sum(report.in_force.workers.values())) == (2, 2)


def exported(router: object) -> str:
    from prometheus_client import generate_latest

    return generate_latest(router.metrics.registry).decode()  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_what_a_shadow_may_not_be_changes_nothing() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        before = router.get_policy()
        for bad in (policy("magic"), policy("sticky", first_tokens=-1)):
            with pytest.raises(InvalidRequest):
                router.set_shadow_policy(admin_pb2.SetShadowPolicyRequest(policy=bad), caller=ADMIN)
        assert router.get_policy() == before


@pytest.mark.asyncio
async def test_a_rollback_holds_on_all_routers_and_is_told_with_who_and_when(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with rig(1) as fleet:
        first, second = await fleet.start_router("r0"), await fleet.start_router("r1")
        await all_ready(first, 1)
        await all_ready(second, 1)
        with pytest.raises(InvalidRequest, match="nothing to return to"):
            first.rollback_policy(admin_pb2.RollbackPolicyRequest(), caller=ADMIN)
        first.set_policy(admin_pb2.SetPolicyRequest(policy=policy("cache_aware", load=2.0)), caller=ADMIN)
        first.set_policy(admin_pb2.SetPolicyRequest(policy=policy("round_robin")), caller=ADMIN)
        await eventually(lambda: second.get_policy().version == 2, timeout_s=SOON_S)
        done = second.rollback_policy(admin_pb2.RollbackPolicyRequest(), caller=ADMIN)
        assert (done.policy.name, done.policy.weights["load"], done.version) == ("cache_aware", 2.0, 3)
        await eventually(lambda: first.get_policy().policy.weights["load"] == 2.0, timeout_s=SOON_S)
        newest, *_, oldest = first.get_policy().changes
        assert (newest.order, newest.by, newest.router, newest.to.name) == ("rollback", "ops", "r1", "cache_aware")
        assert getattr(newest, "from").name == "round_robin"
        assert (oldest.order, oldest.router, oldest.time_ms > 1_600_000_000_000) == ("set", "r0", True)
        said = [r for r in caplog.records if getattr(r, "order", "") == "policy rollback"]
        assert [(r.tenant, r.policy, r.was, r.outcome) for r in said] == [  # type: ignore[attr-defined]
            ("ops", "cache_aware load=2", "round_robin", "OK")
        ]


@pytest.mark.asyncio
async def test_setting_what_is_in_force_is_no_change() -> None:
    async with rig(1) as fleet:
        router = await fleet.start_router()
        name = router.get_policy().policy.name
        done = router.set_policy(admin_pb2.SetPolicyRequest(policy=policy(name)), caller=ADMIN)
        assert (done.version, list(router.get_policy().changes)) == (0, [])


@pytest.mark.asyncio
async def test_a_slow_disk_holds_up_nothing_and_the_last_policy_is_on_it_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, disk_goes_on, written = tmp_path / "policy.json", threading.Event(), list[str]()
    begun = threading.Event()
    whole = record_file._write_whole

    def slowly(path: Path, text: str) -> None:
        begun.set()
        assert disk_goes_on.wait(timeout=40)
        whole(path, text)
        written.append(json.loads(text)["record"]["policy"])

    async with rig(1) as fleet:
        router = await fleet.start_router(record_file=str(file))
        await all_ready(router, 1)
        monkeypatch.setattr(record_file, "_write_whole", slowly)
        rescue = threading.Timer(15.0, disk_goes_on.set)  # where the disk does hold up the event loop
        rescue.start()
        for name in ("sticky", "round_robin", "lowest_ttft"):
            router.set_policy(admin_pb2.SetPolicyRequest(policy=policy(name)), caller=ADMIN)
            await eventually(begun.is_set)
        assert (await generate(router, request(tokens(1, 40)))).route.policy == "lowest_ttft"
        assert not disk_goes_on.is_set()
        closing = asyncio.ensure_future(router.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        rescue.cancel()
        disk_goes_on.set()
        await closing
        assert written == ["sticky", "lowest_ttft"]


@pytest.mark.asyncio
async def test_who_set_a_policy_is_answered_when_it_would_outlive_the_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, disk_goes_on = tmp_path / "policy.json", threading.Event()
    whole = record_file._write_whole

    def slowly(path: Path, text: str) -> None:
        assert disk_goes_on.wait(timeout=20)
        whole(path, text)

    async with rig(1) as fleet:
        router = await fleet.start_router(record_file=str(file))
        await all_ready(router, 1)
        monkeypatch.setattr(record_file, "_write_whole", slowly)
        edge = AdminService(router)
        monkeypatch.setattr(service, "_admin", lambda: ADMIN)
        for call, change in (
            (edge.SetPolicy, admin_pb2.SetPolicyRequest(policy=policy("sticky"))),
            (edge.SetShadowPolicy, admin_pb2.SetShadowPolicyRequest(policy=policy("round_robin"))),
            (edge.RollbackPolicy, admin_pb2.RollbackPolicyRequest()),
        ):
            disk_goes_on.clear()
            answer = asyncio.ensure_future(call(change, None))  # type: ignore[operator]
            await asyncio.sleep(0.05)
            assert not answer.done()
            disk_goes_on.set()
            version = (await answer).version
            assert int(json.loads(file.read_text())["record"]["version"]) == version


CONFIGURED = FleetRecord(0, "r0", "cache_aware", {"load": 2.0})


def changed(record: FleetRecord) -> FleetRecord:
    record = record.with_setting("r0", Order.SET, PolicySetting("sticky"), by="ops", time_ms=9)
    return record.with_shadow("r0", PolicySetting("lowest_ttft"), by="ops", time_ms=10).with_drained("r0", "w0")


def test_a_kept_record_is_found_again_without_its_drains(tmp_path: Path) -> None:
    path = tmp_path / "new" / "policy.json"
    assert restored(path, CONFIGURED, time_ms=20) == CONFIGURED
    keeper(path, CONFIGURED.setting)(changed(CONFIGURED))
    found = restored(path, CONFIGURED, time_ms=20)
    assert found == replace(changed(CONFIGURED), drained=frozenset())
    assert (found.policy, found.shadow, found.version) == ("sticky", PolicySetting("lowest_ttft"), 3)
    assert [p.name for p in path.parent.iterdir()] == ["policy.json"]


def test_settings_that_were_changed_since_count_and_the_history_stays(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    keeper(path, CONFIGURED.setting)(changed(CONFIGURED))
    edited = FleetRecord(0, "r0", "round_robin")
    found = restored(path, edited, time_ms=20)
    assert (found.policy, found.version, len(found.changes)) == ("round_robin", 0, 3)
    edit = found.changes[-1]
    assert (edit.order, edit.before.name, edit.after.name) == (Order.SETTINGS, "sticky", "round_robin")
    assert (edit.version, edit.time_ms, edit.by, edit.router) == (4, 20, "", "r0")
    assert rollback_target(found.changes, 0) == PolicySetting("sticky")  # and not what was before that


def test_settings_that_say_what_is_in_force_already_are_no_change_of_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    keeper(path, CONFIGURED.setting)(changed(CONFIGURED))
    found = restored(path, FleetRecord(0, "r0", "sticky"), time_ms=20)
    assert [change.order for change in found.changes] == [Order.SET, Order.SHADOW]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"record": {}, "settings": {"name": 3}}',
        '{"record": {"policy": "magic"}}',
        '{"record": [], "settings": {}}',
        '{"record": {"policy": "sticky", "version": "NaN"}, "settings": {}}',
        '{"record": {"policy": "sticky", "changes": [3]}, "settings": {}}',
        "\x00\x01",
        "[" * 100_000,
    ],
)
def test_a_file_that_cannot_be_used_is_reported_and_the_settings_count(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    assert restored(path, CONFIGURED, time_ms=20) == CONFIGURED
    assert "cannot be read" in caplog.text
    keeper(path, CONFIGURED.setting)(CONFIGURED)  # the next change
    assert (tmp_path / "policy.json.unreadable").read_text() == text


def test_a_disk_that_fails_does_not_stop_the_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    keeper(tmp_path / "file" / "policy.json", CONFIGURED.setting)(CONFIGURED)
    assert "could not be kept" in caplog.text


def test_a_crash_in_the_middle_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    keeper(path, CONFIGURED.setting)(changed(CONFIGURED))
    before = json.loads(path.read_text())

    def crash(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", crash)
    keeper(path, CONFIGURED.setting)(CONFIGURED)
    assert json.loads(path.read_text()) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from router.fleet_record import FleetRecord
from router.record_file import keeper
Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is renamed
keeper(Path(sys.argv[1]), FleetRecord(0, "r0", "cache_aware").setting)(FleetRecord(9, "r0", "round_robin"))
"""


def test_a_router_that_is_killed_between_writing_and_renaming_leaves_the_old_record(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    keeper(path, CONFIGURED.setting)(changed(CONFIGURED))
    before = path.read_bytes()
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    (left,) = tmp_path.glob("*.new")
    keeper(path, CONFIGURED.setting)(changed(CONFIGURED))
    assert left.exists()  # another router may just be writing it
    os.utime(left, (time.time() - 61,) * 2)
    keeper(path, CONFIGURED.setting)(changed(CONFIGURED))
    assert [p.name for p in tmp_path.iterdir()] == ["policy.json"]


@pytest.mark.asyncio
async def test_an_edit_of_the_settings_is_noted_once(tmp_path: Path) -> None:
    file = str(tmp_path / "policy.json")
    async with rig(1) as fleet:
        router = await fleet.start_router(record_file=file)
        await all_ready(router, 1)
        router.set_policy(admin_pb2.SetPolicyRequest(policy=policy("sticky")), caller=ADMIN)
    noted_at = set()
    for _ in range(2):
        async with rig(1) as fleet:
            router = await fleet.start_router(record_file=file, policy="round_robin")
            await all_ready(router, 1)
            answer = router.get_policy()
            assert (answer.policy.name, [c.order for c in answer.changes]) == ("round_robin", ["settings", "set"])
            noted_at.add(answer.changes[0].time_ms)
    assert len(noted_at) == 1  # when it was, and not when a router started last
    assert router.rollback_policy(admin_pb2.RollbackPolicyRequest(), caller=ADMIN).policy.name == "sticky"


@pytest.mark.asyncio
async def test_two_operators_in_the_same_moment_both_stand_in_the_history_of_all_routers() -> None:
    async with rig(1) as fleet:
        first, second = await fleet.start_router("r0"), await fleet.start_router("r1")
        await all_ready(first, 1)
        await all_ready(second, 1)
        first.set_policy(admin_pb2.SetPolicyRequest(policy=policy("sticky")), caller=ADMIN)
        second.set_policy(admin_pb2.SetPolicyRequest(policy=policy("round_robin")), caller=ADMIN)
        await eventually(lambda: len(first.get_policy().changes) == 2, timeout_s=SOON_S)
        await eventually(lambda: first.get_policy() == second.get_policy(), timeout_s=SOON_S)
        answer = first.get_policy()
        assert (answer.policy.name, answer.version) == ("round_robin", 1)
        assert [(c.version, c.router, c.to.name) for c in answer.changes] == [
            (1, "r1", "round_robin"),
            (1, "r0", "sticky"),
        ]


@pytest.mark.asyncio
async def test_the_policy_outlives_all_workers_and_routers(tmp_path: Path) -> None:
    file = str(tmp_path / "policy.json")
    async with rig(1) as fleet:
        router = await fleet.start_router(record_file=file)
        await all_ready(router, 1)
        router.set_policy(admin_pb2.SetPolicyRequest(policy=policy("sticky")), caller=ADMIN)
    async with rig(1) as fleet:
        router = await fleet.start_router(record_file=file)
        second = await fleet.start_router("r1")
        await all_ready(router, 1)
        assert (router.get_policy().policy.name, router.get_policy().version) == ("sticky", 1)
        await eventually(lambda: second.get_policy().policy.name == "sticky", timeout_s=SOON_S)
        assert [c.order for c in second.get_policy().changes] == ["set"]
