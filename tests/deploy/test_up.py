"""`warmkv up` with real Ray and simulated workers, from the first line to the last process.

One own Ray and one foreign Ray of two nodes serve the whole module: starting one takes seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from deploy.cluster import session_members
from deploy.state import read_record

if TYPE_CHECKING:
    from conftest import Foreground, Warmkv

HERE = Path(__file__).parent
PROMPT = "You are a travel agent. Plan a day in Rome with museums, lunch and a walk along the river. " * 4
LEAN = ["--engine", "simulated", "--set", "store.device_bytes=4MiB", "--set", "store.host_bytes=4MiB"]
LEAN += ["--set", "store.block_size=16", "--set", "ray.object_store_memory=80MiB", "--http-port", "0"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def foreign(new_warmkv: Callable[[], Warmkv]) -> Iterator[dict[str, Any]]:
    """Somebody else's Ray on this machine."""
    owner = new_warmkv()
    owner.environment["RAY_AUTH_MODE"] = "disabled"
    process = owner.spawn([sys.executable, str(HERE / "two_ray_nodes.py")])
    facts = json.loads(process.read_until("\n"))
    yield {**facts, "process": process}
    assert process.process.stdin is not None
    process.process.stdin.close()
    process.process.wait(30)


@pytest.fixture(scope="module")
def port(free_port: Callable[[], int]) -> int:
    return free_port()


@pytest.fixture(scope="module")
def up(warmkv: Warmkv, model_dir: Path, port: int) -> Iterator[Foreground]:
    """Two workers and a router, on a Ray of their own."""
    warmkv.environment["WARMKV_ROUTER"] = f"127.0.0.1:{port}"
    running = warmkv.start("up", "--model", str(model_dir), "--workers", "2", *LEAN, "--grpc-port", str(port))
    running.read_until("2 of 2 ready")
    _until(lambda: warmkv.invoke("status").returncode == 0)
    yield running
    if running.process.poll() is None:
        running.terminate()
    warmkv.run("down")


def _until(true: Callable[[], object], timeout: float = 60.0) -> None:
    give_up = time.monotonic() + timeout
    while not true():
        if time.monotonic() > give_up:
            raise AssertionError("it did not come to pass")
        time.sleep(0.2)


def _workers(warmkv: Warmkv) -> dict[str, dict[str, Any]]:
    stats = json.loads(warmkv.invoke("status", "--json").stdout)
    return {worker["name"]: worker for worker in stats["workers"]}


def _ready(warmkv: Warmkv) -> set[str]:
    return {name for name, w in _workers(warmkv).items() if w["state"] == "WORKER_STATE_READY"}


def _actor_pids(warmkv: Warmkv) -> set[int]:
    record = read_record(warmkv.state_dir)
    assert record is not None
    return {p.pid for p in session_members(record.pid) if "WorkerActor" in " ".join(p.cmdline())}


def _generate(warmkv: Warmkv) -> dict[str, Any]:
    done = warmkv.invoke("generate", PROMPT, "--max-tokens", "2", "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_up_serves_and_says_what_to_try_next(up: Foreground, warmkv: Warmkv, port: int) -> None:
    assert "Ray        127.0.0.2:" in up.seen
    assert "workers    placing w0, w1" in up.seen
    assert f"router     gRPC 127.0.0.1:{port}" in up.seen
    assert re.search(r"dashboard  http://127\.0\.0\.1:\d+/", up.seen)
    assert f"warmkv generate --router 127.0.0.1:{port}" in up.seen
    assert _ready(warmkv) == {"w0", "w1"}
    first, second = _generate(warmkv), _generate(warmkv)
    assert first["usage"]["prompt_tokens_by_fate"]["computed"] == first["usage"]["prompt_tokens"]
    assert second["usage"]["prompt_tokens_by_fate"]["device"] > 0


def test_the_router_does_not_import_ray(up: Foreground) -> None:
    maps = Path(f"/proc/{up.process.pid}/maps").read_text()
    assert "/grpc/" in maps, "the test looks at the right process"
    assert "/ray/" not in maps
    assert "/torch/" not in maps


def test_scaling_adds_the_next_name_and_ends_the_highest(up: Foreground, warmkv: Warmkv) -> None:
    assert warmkv.invoke("scale", "-n", "3").stdout == "starting w2\nended none\n"
    _until(lambda: _ready(warmkv) == {"w0", "w1", "w2"})
    pids = _actor_pids(warmkv)
    assert len(pids) == 3
    assert warmkv.invoke("scale", "-n", "2").stdout == "started none\nended w2\n"
    _until(lambda: _ready(warmkv) == {"w0", "w1"})
    _until(lambda: len(_actor_pids(warmkv)) == 2)
    assert _actor_pids(warmkv) < pids


def test_a_drained_worker_gets_nothing_new(up: Foreground, warmkv: Warmkv) -> None:
    warmkv.invoke("drain", "w0")
    assert {_generate(warmkv)["route"]["worker"] for _ in range(3)} == {"w1"}
    warmkv.invoke("undrain", "w0")
    assert _ready(warmkv) == {"w0", "w1"}


def test_a_killed_worker_comes_back_with_a_new_incarnation_and_port(up: Foreground, warmkv: Warmkv) -> None:
    before, pids = _workers(warmkv), _actor_pids(warmkv)
    killed = min(pids)
    os.kill(killed, signal.SIGKILL)
    assert _generate(warmkv)["route"]["worker"] in ("w0", "w1"), "the other one serves meanwhile"

    def restarted() -> list[str]:
        now = _workers(warmkv)
        grown = [name for name in before if int(now[name]["incarnation"]) > int(before[name]["incarnation"])]
        return [name for name in grown if now[name]["state"] == "WORKER_STATE_READY"]

    _until(restarted)
    (name,) = restarted()
    assert _workers(warmkv)[name]["address"] != before[name]["address"]
    assert len(_actor_pids(warmkv)) == 2
    assert killed not in _actor_pids(warmkv)


def test_the_router_serves_on_while_its_ray_driver_is_dead_and_finds_ray_again(up: Foreground, warmkv: Warmkv) -> None:
    (driver,) = _drivers(up)
    driver.kill()
    assert _generate(warmkv)["finish_reason"] == "length"
    _until(lambda: [process.pid for process in _drivers(up)] not in ([], [driver.pid]))
    _until(lambda: warmkv.invoke("scale", "-n", "2").returncode == 0)


def test_doctor_compares_the_nodes_of_the_ray_in_use(up: Foreground, warmkv: Warmkv) -> None:
    done = warmkv.invoke("doctor", "--set", "workers.engine=simulated", "--json")
    findings = json.loads(done.stdout)["findings"]
    (ray,) = [finding for finding in findings if finding["check"] == "ray"]
    assert ray["level"] == "ok"
    assert re.search(r"127\.0\.0\.2 .*ray 2\.60\.0.*warmkv", ray["found"])


def test_a_second_router_learns_the_model_and_the_secret_from_the_workers(
    up: Foreground, warmkv: Warmkv, free_port: Callable[[], int]
) -> None:
    port = free_port()
    second = warmkv.start("router", "--grpc-port", str(port), "--http-port", "0")
    second.read_until("Ctrl-C")
    target = f"127.0.0.1:{port}"
    _until(lambda: warmkv.invoke("status", "--router", target).returncode == 0)
    done = warmkv.invoke("generate", PROMPT, "--max-tokens", "1", "--router", target, "--json")
    assert json.loads(done.stdout)["usage"]["prompt_tokens_by_fate"]["device"] > 0
    (driver,) = _drivers(second)
    second.process.kill()
    second.process.wait()
    psutil.wait_procs([driver], timeout=20)
    assert not driver.is_running(), "the driver ends with the router that it belongs to"


def test_workers_outlive_the_router_and_the_next_up_finds_them(
    up: Foreground, warmkv: Warmkv, model_dir: Path, port: int
) -> None:
    pids, before = _actor_pids(warmkv), _workers(warmkv)
    assert up.terminate() == 0
    assert "`warmkv down` ends them" in up.seen
    assert _actor_pids(warmkv) == pids
    again = warmkv.start("up", "--model", str(model_dir), *LEAN, "--grpc-port", str(port))
    again.read_until("2 of 2 ready")
    assert "workers    found w0, w1" in again.seen
    _until(lambda: _ready(warmkv) == {"w0", "w1"})
    assert _workers(warmkv)["w0"]["incarnation"] == before["w0"]["incarnation"]
    assert _generate(warmkv)["usage"]["prompt_tokens_by_fate"]["device"] > 0
    assert again.terminate() == 0


@pytest.mark.parametrize(
    ("options", "said"), [(["--policy", "astrology"], "cache_aware"), (["--grpc-port", "1"], "--grpc-port")]
)
def test_what_keeps_the_router_from_starting_is_found_before_anything_is_started(
    new_warmkv: Callable[[], Warmkv], model_dir: Path, free_port: Callable[[], int], options: list[str], said: str
) -> None:
    warmkv = new_warmkv()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = [str(taken.getsockname()[1]) if option == "1" else option for option in options]
        done = warmkv.invoke("up", "--model", str(model_dir), "--engine", "simulated", "--http-port", "0", *options)
    assert done.returncode == 1
    assert said in done.stderr
    assert read_record(warmkv.state_dir) is None


def test_up_refuses_to_mix_two_models_in_one_fleet(up: Foreground, warmkv: Warmkv, model_dir: Path) -> None:
    done = warmkv.run("up", "--model", str(model_dir), *LEAN, "--set", "model.name=other", "--grpc-port", "0")
    assert done.returncode == 1
    assert "warmkv down" in done.stderr
    assert "Traceback" not in done.stderr


def test_down_leaves_no_process_and_no_file_behind_and_does_not_touch_another_ray(
    up: Foreground, warmkv: Warmkv, foreign: dict[str, Any]
) -> None:
    if up.process.poll() is None:
        up.terminate()
    record = read_record(warmkv.state_dir)
    assert record is not None
    ours = session_members(record.pid)
    assert len(ours) >= 5
    done = warmkv.run("down")
    assert done.returncode == 0, done.stderr
    assert "workers ended: w0, w1" in done.stdout or "workers ended: w1, w0" in done.stdout
    assert [process for process in ours if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    assert not Path(record.temp_dir).exists()
    assert read_record(warmkv.state_dir) is None
    assert [pid for pid in foreign["pids"] if not psutil.pid_exists(pid)] == []
    assert "Nothing to end" in warmkv.invoke("down").stdout


def test_a_killed_own_ray_is_cleaned_up_by_down(new_warmkv: Callable[[], Warmkv], model_dir: Path) -> None:
    warmkv = new_warmkv()
    running = warmkv.start("up", "--model", str(model_dir), "--workers", "0", *LEAN, "--grpc-port", "0")
    running.read_until("Ctrl-C")
    record = read_record(warmkv.state_dir)
    assert record is not None
    ours = session_members(record.pid)
    os.kill(record.pid, signal.SIGKILL)
    running.terminate()
    assert warmkv.run("down").returncode == 0
    assert [p.name() for p in ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert read_record(warmkv.state_dir) is None


def test_an_engine_that_raises_or_is_stuck_comes_back_in_a_new_process_with_a_new_incarnation(
    foreign: dict[str, Any],
) -> None:
    root = HERE.parents[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{root}{os.pathsep}{root / 'proto'}"}
    done = subprocess.run(
        [sys.executable, str(HERE / "failing_workers.py"), foreign["address"]],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["name"] for each in said] == ["raises", "stuck"]
    for each in said:
        first, second = each["incarnations"]
        assert first < second
        assert len(set(each["pids"])) == 2


def test_on_a_joined_ray_of_two_nodes_one_is_killed_and_requests_go_on(
    new_warmkv: Callable[[], Warmkv], model_dir: Path, free_port: Callable[[], int], foreign: dict[str, Any]
) -> None:
    warmkv = new_warmkv()
    port = free_port()
    warmkv.environment |= {"WARMKV_ROUTER": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}
    options = ["--ray-address", foreign["address"], "--workers", "2", "--grpc-port", str(port)]
    running = warmkv.start("up", "--model", str(model_dir), *LEAN, *options)
    running.read_until("2 of 2 ready")
    _until(lambda: len(_ready(warmkv)) == 2)
    hosts = {worker["address"].rpartition(":")[0] for worker in _workers(warmkv).values()}
    assert hosts == {"127.0.0.2", "127.0.0.3"}, "workers advertise their node's address"

    owner = foreign["process"]
    assert owner.process.stdin is not None
    owner.process.stdin.write(b"second\n")
    owner.process.stdin.flush()
    _until(lambda: len(_ready(warmkv)) == 1)
    assert [_generate(warmkv)["finish_reason"] for _ in range(3)] == ["length"] * 3
    owner.read_until('"killed"')

    assert running.terminate() == 0
    done = warmkv.run("down", "--ray-address", foreign["address"])
    assert done.returncode == 0, done.stderr
    assert "workers ended: w" in done.stdout

    options = ["--ray-address", foreign["address"], "--workers", "1", "--grpc-port", str(port), "--ephemeral"]
    brief = warmkv.start("up", "--model", str(model_dir), *LEAN, *options)
    brief.read_until("1 of 1 ready")
    assert brief.terminate() == 0
    assert "workers ended: w0" in brief.seen, "an ephemeral fleet ends with its router"
    assert "workers ended" not in warmkv.run("down", "--ray-address", foreign["address"]).stdout
    head = [pid for pid in foreign["pids"] if psutil.pid_exists(pid)]
    assert any("gcs_server" in psutil.Process(pid).name() for pid in head), "their Ray goes on"


def _drivers(router: Foreground) -> list[psutil.Process]:
    children = psutil.Process(router.process.pid).children()
    return [child for child in children if "deploy.driver" in " ".join(child.cmdline())]
