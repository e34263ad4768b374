"""The router's end of discovery, against a scripted child: lists, calls, restarts, and never a word of Ray."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.cluster import ClusterProblem
from deploy.discovery import RayDiscovery
from router.errors import NotSupported
from router.protocol import WorkerAddress
from workers.config import WorkerConfig

CONFIG = WorkerConfig(name="template", model_dir="/m", model_name="m")
DEADLINE_S = 20.0

# A driver that says what the test wrote into it. `asked` keeps what it was asked, across restarts.
CHILD = """
import json, os, sys, time
asked = open(sys.argv[1], "a", buffering=1)
def say(**message):
    print(json.dumps(message), flush=True)
def worker(name, port, state="ready"):
    address = f"127.0.0.1:{port}" if port else ""
    return dict(name=name, state=state, address=address, incarnation=port, pid=1, node="n", problem="")
def calls():
    for line in sys.stdin:
        asked.write(line)
        yield json.loads(line)
"""


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return tmp_path / "asked"


@pytest.fixture
def discovery_of(tmp_path: Path, asked: Path) -> Callable[[str], RayDiscovery]:
    def make(script: str, start_timeout_s: float = 60.0) -> RayDiscovery:
        path = tmp_path / "child.py"
        path.write_text(CHILD + textwrap.dedent(script))
        command = [sys.executable, str(path), str(asked)]
        return RayDiscovery("h:1", os.environ, start_timeout_s=start_timeout_s, command=command)

    return make


@pytest.mark.asyncio
async def test_each_new_list_comes_once_and_workers_without_an_address_are_left_out(
    discovery_of: Callable[[str], RayDiscovery],
) -> None:
    discovery = discovery_of("""
        say(event="connected")
        for call in calls():
            say(event="workers", workers=[worker(*each) for each in call["params"]["workers"]])
            say(id=call["id"], result=None)
    """)
    await discovery.start()
    lists: list[list[WorkerAddress]] = []

    async def watch() -> None:
        async for workers in discovery.watch():
            lists.append(workers)  # noqa: PERF401 - it must be seen while it grows

    watching = asyncio.create_task(watch())
    starting, failed = ["w0", 0, "starting"], ["w0", 0, "failed"]
    for workers in ([starting], [starting, ["w1", 7001]], [failed, ["w1", 7001]], [["w0", 7000], ["w1", 7001]]):
        await discovery.call("say", workers=workers)
        await asyncio.sleep(0)
    w0, w1 = WorkerAddress("w0", "127.0.0.1:7000"), WorkerAddress("w1", "127.0.0.1:7001")
    assert lists == [[], [w1], [w0, w1]]
    assert [worker.state for worker in discovery.workers] == ["ready", "ready"]
    await discovery.close()
    await asyncio.wait_for(watching, DEADLINE_S)


@pytest.mark.asyncio
async def test_answers_find_their_calls_whatever_their_order(discovery_of: Callable[[str], RayDiscovery]) -> None:
    discovery = discovery_of("""
        say(event="connected")
        waiting = []
        for call in calls():
            waiting.append(call)
            if len(waiting) == 3:
                for each in reversed(waiting): say(id=each["id"], result=each["params"]["x"])
    """)
    await discovery.start()
    async with asyncio.timeout(DEADLINE_S):
        assert await asyncio.gather(*(discovery.call("echo", x=n) for n in range(3))) == [0, 1, 2]
    await discovery.close()


@pytest.mark.asyncio
async def test_scaling_that_fails_says_why_in_the_routers_own_terms(
    discovery_of: Callable[[str], RayDiscovery],
) -> None:
    discovery = discovery_of("""
        say(event="connected")
        for call in calls(): say(id=call["id"], error="no worker to copy; start the fleet by `warmkv up`")
    """)
    await discovery.start()
    with pytest.raises(NotSupported, match="warmkv up"):
        await discovery.scale(3)
    await discovery.close()
    with pytest.raises(NotSupported):
        await discovery.scale(3)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('say(event="failed", message="Ray at h:1 cannot be joined"); sys.exit(3)', "cannot be joined"),
        ("sys.exit(1)", "does not answer"),
        ("time.sleep(60)", "does not answer"),
    ],
)
async def test_a_ray_that_cannot_be_joined_is_a_problem_at_once(
    discovery_of: Callable[..., RayDiscovery], script: str, said: str
) -> None:
    discovery = discovery_of(script, 2.0 if "sleep" in script else 60.0)
    with pytest.raises(ClusterProblem, match=said):
        await discovery.start()


@pytest.mark.asyncio
async def test_a_child_that_dies_is_started_again_and_told_what_workers_are_made_from(
    discovery_of: Callable[[str], RayDiscovery], asked: Path
) -> None:
    discovery = discovery_of("""
        say(event="connected")
        say(event="workers", workers=[worker("w0", 7000)])
        for call in calls():
            if call["method"] == "die": os._exit(9)
            if call["id"]: say(id=call["id"], result=os.getpid())
    """)
    await discovery.start()
    await discovery.configure(CONFIG, {"CPU": 1.0})
    first = await discovery.call("pid")
    with pytest.raises(ClusterProblem, match="try it again"):
        await discovery.call("die")
    assert [worker.name for worker in discovery.workers] == ["w0"], "the last list stays"
    async with asyncio.timeout(DEADLINE_S):
        while not discovery.connected:  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.05)
    assert await discovery.call("pid") != first
    await discovery.close()
    lines = await asyncio.to_thread(asked.read_text)
    configured = [json.loads(line)["params"] for line in lines.splitlines() if "configure" in line]
    assert len(configured) == 2
    assert configured[0] == configured[1]
    assert configured[0]["bundle"] == {"CPU": 1.0}


@pytest.mark.asyncio
async def test_closing_ends_the_child_even_one_that_does_not_listen(
    discovery_of: Callable[[str], RayDiscovery],
) -> None:
    discovery = discovery_of("""
        say(event="connected")
        say(event="workers", workers=[worker("w0", os.getpid())])
        while True: time.sleep(1)
    """)
    await discovery.start()
    async with asyncio.timeout(DEADLINE_S):
        while not discovery.workers:
            await discovery.changed()
    pid = discovery.workers[0].incarnation
    os.kill(pid, 0)
    await discovery.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.asyncio
async def test_what_a_child_prints_besides_its_messages_does_not_reach_its_pipe(tmp_path: Path) -> None:
    """The real driver, with nothing to connect to."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import deploy.driver as d; p = d._open_pipe(); print('noise'); p.say(event='connected')",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await child.communicate()
    assert json.loads(out) == {"event": "connected"}
    assert err == b"noise\n"


def test_a_router_with_ray_discovery_imports_no_ray_and_no_torch() -> None:
    script = (
        "import sys, deploy.discovery, deploy.up, router.app; "
        "sys.exit(' '.join({'ray', 'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
