"""The doctor's findings: what is wrong is named, with a remedy; what is right is said to be."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import redis

from deploy import doctor, doctor_kv, doctor_ray, doctor_redis, doctor_room
from deploy.doctor import examine
from deploy.finding import Finding
from deploy.kept_secret import FILE, keep_secret
from deploy.layers import load_settings
from deploy.redis_server import PrivateRedis
from deploy.settings import Settings
from deploy.state import ClusterRecord, write_record
from tests.kvstore.redis.redis_fleets_for_tests import guarded
from tests.kvstore.redis.redis_for_tests import binary
from workers.tiny import make_model_folder


def _settings(**flags: object) -> Settings:
    chosen = {name.replace("__", "."): value for name, value in flags.items()}
    return load_settings(environ={}, flags={"workers.engine": "simulated", **chosen}).settings


def _levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_a_healthy_machine_has_no_failures_and_every_finding_that_is_not_ok_has_a_remedy(tmp_path: Path) -> None:
    findings = examine(_settings(router__grpc_port=0, router__http_port=0), tmp_path)
    assert "fail" not in _levels(findings)
    assert {"python", "packages", "protobuf", "ports", "memory", "shm", "redis", "ray"} <= {f.check for f in findings}
    assert [f for f in findings if f.level != "ok" and not f.remedy] == []


def test_a_taken_port_is_named_with_its_flag(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        findings = list(doctor.check_ports(_settings(router__grpc_port=port, router__http_port="none"), tmp_path))
    assert _levels(findings) == ["warn"]
    assert str(port) in findings[0].found
    assert "--grpc-port" in findings[0].remedy


def test_a_redis_that_is_down_is_a_failure_and_its_password_is_not_shown(tmp_path: Path) -> None:
    findings = list(doctor_redis.check_redis(_settings(redis__url="redis://:hunter2@127.0.0.1:1"), tmp_path))
    assert _levels(findings) == ["fail"]
    assert "hunter2" not in str(findings)
    assert "start the server" in findings[0].remedy


def test_a_redis_that_refuses_the_password_is_told_apart(tmp_path: Path) -> None:
    with PrivateRedis(password="right") as server:
        wrong = server.url.replace("right", "wrong")
        findings = list(doctor_redis.check_redis(_settings(redis__url=wrong), tmp_path))
    assert _levels(findings) == ["fail"]
    assert "refused the login" in findings[0].found
    assert "wrong" not in str(findings)


AS_DOCUMENTED = {"maxmemory-clients": "10%", "notify-keyspace-events": "Egxe"}


@pytest.mark.parametrize(
    ("directives", "remedies"),
    [
        ({}, []),
        ({"maxmemory-policy": "noeviction"}, ["maxmemory-policy"]),
        ({"maxmemory": "0"}, ["set maxmemory"]),
        ({"save": "60 1", "appendonly": "yes"}, ["set appendonly no and save ''"]),
        ({"maxmemory-policy": "volatile-lru"}, ["maxmemory-policy allkeys-lru"]),
        ({"maxmemory-clients": "0"}, ["set maxmemory-clients 10%"]),
        ({"notify-keyspace-events": '""'}, ["CONFIG SET notify-keyspace-events Egxe"]),
        ({"maxmemory": "0", "notify-keyspace-events": "x"}, ["set maxmemory", "notify-keyspace-events xEge"]),
    ],
)
def test_how_redis_is_configured_is_judged(tmp_path: Path, directives: dict[str, str], remedies: list[str]) -> None:
    with PrivateRedis(binary=binary("system"), directives={**AS_DOCUMENTED, **directives}) as server:
        findings = list(doctor_redis.check_redis(_settings(redis__url=server.url), tmp_path))
    warned = [finding for finding in findings if finding.level != "ok"]
    assert [finding.level for finding in warned] == ["warn"] * len(remedies)
    assert all(words in finding.remedy for words, finding in zip(remedies, warned, strict=True))
    assert findings[0].found.startswith("unix:///")
    assert findings[-1].check == "clock"


@pytest.mark.parametrize("watch", ["off", "configure"])
def test_who_does_not_listen_or_may_configure_is_not_told_to_notify(tmp_path: Path, watch: str) -> None:
    quiet = {**AS_DOCUMENTED, "notify-keyspace-events": '""'}
    with PrivateRedis(binary=binary("system"), directives=quiet) as server:
        findings = list(doctor_redis.check_redis(_settings(redis__url=server.url, redis__watch=watch), tmp_path))
    assert set(_levels(findings)) == {"ok"}


def test_a_login_that_may_not_ask_for_settings_is_told_what_is_known(tmp_path: Path) -> None:
    with PrivateRedis(binary=binary("system"), password="p") as server:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL", "SETUSER", "poor", "on", ">p", "~warmkv:*", "+info")
        url = server.url.replace("unix://:p@", "unix://poor:p@")
        findings = list(doctor_redis.check_redis(_settings(redis__url=url), tmp_path))
    assert _levels(findings) == ["ok", "ok", "ok"]
    assert "may not ask for its TIME" in findings[-1].found


def test_the_primary_behind_sentinel_and_each_named_node_of_a_cluster_are_judged(tmp_path: Path) -> None:
    with guarded(tmp_path) as fleet:
        findings = list(doctor_redis.check_redis(_settings(redis__url=fleet.url), tmp_path))
        assert str(fleet.servers[0].port) in findings[0].found
        assert "fail" not in _levels(findings)
    with (
        PrivateRedis(binary=binary("system"), port=0, directives=AS_DOCUMENTED) as one,
        PrivateRedis(binary=binary("system"), port=0, directives=AS_DOCUMENTED) as other,
    ):
        url = f"redis+cluster://{one.url[8:-2]},{other.url[8:-2]}"
        findings = list(doctor_redis.check_redis(_settings(redis__url=url), tmp_path))
        assert _levels(findings) == ["ok"] * 6
    findings = list(doctor_redis.check_redis(_settings(redis__url="redis+sentinel://:hunter2@127.0.0.1:1/x"), tmp_path))
    assert _levels(findings) == ["fail"]
    assert "hunter2" not in str(findings)


def test_tiers_that_do_not_fit_into_memory_are_a_warning(tmp_path: Path) -> None:
    findings = list(doctor_room.check_memory(_settings(store__host_bytes="512TiB", workers__device="cpu"), tmp_path))
    assert _levels(findings) == ["warn"]
    assert "store.host_bytes" in findings[0].remedy


def test_a_package_that_shadows_one_of_ours_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hidden_router").mkdir()
    (tmp_path / "hidden_router" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "OWN_PACKAGES", ("kvstore", "hidden_router"))
    (finding,) = doctor.check_packages(_settings(), tmp_path)
    assert finding.level == "fail"
    assert "hidden_router" in finding.found


@pytest.mark.parametrize(
    ("runtime", "level"), [("6.31.0", "fail"), ("6.33.6", "ok"), ("7.34.0", "ok"), ("8.0.0", "fail")]
)
def test_the_protobuf_runtime_must_fit_the_stubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, level: str
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: runtime)
    assert _levels(list(doctor.check_protobuf(_settings(), tmp_path))) == [level]


@pytest.mark.parametrize(
    ("device", "triton", "levels"),
    [("auto", None, ["ok", "fail"]), ("auto", object(), ["ok"]), ("cpu", None, ["ok"])],
)
def test_a_gpu_without_triton_is_a_failure_unless_workers_compute_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, triton: object, levels: list[str]
) -> None:
    settings = _settings(workers__engine="torch", workers__device=device)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: triton)
    assert _levels(list(doctor.check_torch(settings, tmp_path))) == levels


def test_an_old_python_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    (finding,) = doctor.check_python(_settings(), tmp_path)
    assert finding.level == "fail"
    assert "3.11" in finding.remedy


def test_a_broken_model_folder_is_a_failure(tmp_path: Path) -> None:
    (finding,) = doctor.check_model(_settings(model__dir=tmp_path), tmp_path)
    assert finding.level == "fail"
    assert "config.json" in finding.found


def test_a_good_model_folder_is_described(tmp_path: Path, model_dir: Path) -> None:
    (finding,) = doctor.check_model(_settings(model__dir=model_dir), tmp_path)
    assert finding.level == "ok"
    assert "context 2048" in finding.found


def test_what_k_and_v_are_stored_as_is_told_with_the_size_of_a_token(tmp_path: Path) -> None:
    assert list(doctor_kv.check_kv(_settings(), tmp_path)) == []
    folder = make_model_folder(tmp_path / "model")
    (plain,) = doctor_kv.check_kv(_settings(model__dir=folder), tmp_path)
    assert (plain.level, plain.found) == ("ok", "float32, 2.0 KiB a token")
    (quantised,) = doctor_kv.check_kv(_settings(model__dir=folder, engine__kv_dtype="int8"), tmp_path)
    assert quantised.found == "int8, 544 B a token; 2.0 KiB as float32"
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows_this"}')
    (unknown,) = doctor_kv.check_kv(_settings(model__dir=tmp_path, engine__kv_dtype="int8"), tmp_path)
    assert (unknown.level, "stored as int8" in unknown.found) == ("ok", True)
    assert list(doctor_kv.check_kv(_settings(model__dir=tmp_path / "nothing"), tmp_path)) == []


def test_another_ray_version_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "2.1.0")
    (finding,) = doctor_ray.check_ray(_settings(), tmp_path)
    assert finding.level == "fail"
    assert doctor_ray.RAY_VERSION in finding.remedy


def test_an_own_ray_that_has_died_is_a_warning(tmp_path: Path) -> None:
    write_record(tmp_path, ClusterRecord("127.0.0.2:1", 1, 0.0, "/tmp/x", "t"))
    (finding,) = doctor_ray.check_ray(_settings(), tmp_path)
    assert finding.level == "warn"
    assert "warmkv down" in finding.remedy


def test_a_check_that_breaks_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_bad(settings: Settings, state_dir: Path) -> object:
        raise RuntimeError("oh")

    monkeypatch.setattr(doctor, "CHECKS", (check_bad, doctor.check_python))
    findings = examine(_settings(), tmp_path)
    assert [(f.level, f.check) for f in findings] == [("warn", "bad"), ("ok", "python")]


def test_the_folder_of_the_disk_tier_must_be_writable_and_have_room(tmp_path: Path) -> None:
    def levels(**flags: object) -> list[str]:
        chosen = {"store__disk_dir": str(tmp_path / "blocks"), **flags}
        return _levels(list(doctor_room.check_disk(_settings(**chosen), tmp_path)))

    assert levels(store__disk_bytes="1MiB") == ["ok"]
    assert levels(store__disk_bytes="512TiB") == ["warn"]
    assert levels(store__disk_bytes=0, store__disk_dir="/proc/nowhere") == ["ok"]
    (tmp_path / "file").write_text("")
    assert levels(store__disk_dir=str(tmp_path / "file")) == ["fail"]
    assert not (tmp_path / "blocks").exists(), "a question changes nothing"


def test_what_the_fleet_that_runs_here_holds_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    chosen = _settings(store__host_bytes="2MiB", store__device_bytes="1MiB", workers__device="cpu")
    assert _levels(list(doctor_room.check_memory(chosen, tmp_path))) == ["warn"]
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as leader:
        started = psutil.Process(leader.pid).create_time()
        write_record(tmp_path, ClusterRecord("127.0.0.2:1", leader.pid, started, "/tmp/x", "t"))
        monkeypatch.setattr(psutil.Process, "memory_info", lambda _self: SimpleNamespace(rss=3 << 20))
        (finding,) = doctor_room.check_memory(chosen, tmp_path)
        leader.kill()
    assert finding.level == "ok"
    assert "3.0 MiB held by the fleet that runs here" in finding.found


def test_the_fleet_secret_is_looked_at_and_not_made(tmp_path: Path) -> None:
    def check(**flags: object) -> tuple[str, str]:
        (finding,) = doctor.check_secret(_settings(**flags), tmp_path)
        return finding.level, finding.found + finding.remedy

    assert check()[0] == "ok"
    assert list(tmp_path.iterdir()) == []
    keep_secret(tmp_path)
    assert "outlive" in check()[1]
    (tmp_path / FILE).chmod(0o644)
    assert check() == ("warn", f"{tmp_path / FILE} can be read by other userschmod 600 {tmp_path / FILE}")
    (tmp_path / FILE).write_text("damaged")
    assert check()[0] == "fail"
    assert check(auth__fleet_secret="mine") == ("ok", "auth.fleet_secret is set")


def test_a_chat_template_that_rewrites_earlier_turns_or_tells_the_time_is_a_warning(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    (said,) = [f for f in examine(_settings(model__dir=str(folder)), tmp_path) if f.check == "template"]
    assert said.level == "ok"
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%H:%M') }}"
        + template.replace("message['content']", "message['content'].split('</think>')[-1]")
    )
    findings = [f for f in examine(_settings(model__dir=str(folder)), tmp_path) if f.check == "template"]
    assert _levels(findings) == ["warn", "warn"]
    assert "answers with thoughts: turn 2 finds" in findings[0].found
    assert "each minute" in findings[1].found
    assert all(f.remedy for f in findings)
