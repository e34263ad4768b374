"""A worker as a plain process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.workers.serving import config, routers
from tests.workers.stream_client import PATIENCE_S, job
from warmkv import versions
from workers.simulated_info import info_for
from workers.wire import hello_to_wire

CONFIG = config(engine="simulated", model_dir="/nowhere")


def start(*arguments: str, stdin: str | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "workers.main", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_serves_serves_and_ends_in_good_order(ending: signal.Signals) -> None:
    process = start("--config", "-", "--timing", '{"decode_step_ms": 0.1}')
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asdict(CONFIG)))
    process.stdin.close()
    ready = json.loads(process.stdout.readline())
    info = info_for(CONFIG)
    with routers(ready["address"]) as (router,):
        expected = hello_to_wire(info, worker="w0", incarnation=ready["incarnation"], protocol_version=versions.NEWEST)
        hello = router.messages[0].hello
        assert (hello.scheme, hello.worker, hello.incarnation) == (expected.scheme, "w0", ready["incarnation"])
        router.send(submit=job(info.scheme, 1, list(range(100))))
        router.wait_finished(1)
    process.send_signal(ending)
    assert process.wait(PATIENCE_S) == 0
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--config", "[]"], "not a JSON object"),
        (["--config", "{"], "could not start"),
        (["--config", '{"nmae": "w0"}'], "nmae"),
        (
            ["--config", '{"name": "w", "model_dir": "", "model_name": "", "engine": "steam"}'],
            "choose torch or simulated",
        ),
    ],
)
def test_bad_settings_end_it_with_exit_code_2_and_a_reason(arguments: list[str], complaint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers.main", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert complaint in done.stderr


FAILING = """
import sys
import workers.main as program
from workers.simulated import SimulatedEngine

def step(self):
    raise RuntimeError("device lost")

SimulatedEngine.step = step
sys.exit(program.main(["--config", sys.argv[1]]))
"""


def test_an_engine_that_fails_ends_it_with_exit_code_1() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING, json.dumps(asdict(CONFIG))],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert "device lost" in done.stderr
