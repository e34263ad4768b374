"""A whole router as a process, with a simulated worker behind it, through the public client."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from router.app import STARTUP_ERRORS, Stop, serving
from router.config import RouterConfig
from router.discovery import StaticDiscovery
from tests.router.small_tokenizers import write_model_folder
from warmkv import errors
from warmkv.client import Client, Stream

ROOT = Path(__file__).resolve().parents[2]
ROUTER = """
import json, sys
from router.app import run
from router.config import RouterConfig
from router.discovery import StaticDiscovery
from router.jsonlog import log_as_json
from router.protocol import WorkerAddress

log_as_json("INFO")
config, workers = json.loads(sys.argv[1])
def ready(server):
    print(json.dumps([server.grpc_port, server.http_port]), flush=True)
sys.exit(run(RouterConfig(**config), StaticDiscovery(WorkerAddress(*w) for w in workers), on_ready=ready))
"""


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[object] | dict[str, str]]]:
    """A Python process and the JSON of its first line. Ended, if it still runs, at the end of the block."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
    ) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line, child.stderr.read() if child.stderr else ""
            yield child, json.loads(line)
        finally:
            if child.poll() is None:
                child.kill()


def ended(child: subprocess.Popen[str]) -> tuple[int, list[dict[str, object]]]:
    """Exit code and log lines."""
    _, log = child.communicate(timeout=20)
    return child.returncode, [json.loads(line) for line in log.splitlines() if line.startswith("{")]


@contextmanager
def fleet(folder: Path, timing: dict[str, float], **settings: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A router process and its address; one simulated worker."""
    write_model_folder(folder)
    worker = {"name": "w0", "model_dir": str(folder), "model_name": "tiny", "engine": "simulated"}
    config = {"name": "r0", "model_dir": str(folder), "model_name": "tiny", "grpc_port": 0, "http_port": 0}
    with ExitStack() as stack:
        arguments = ("-m", "workers.main", "--config", json.dumps(worker), "--timing", json.dumps(timing))
        _, joined = stack.enter_context(process(*arguments))
        assert isinstance(joined, dict)
        told = json.dumps([config | settings, [[joined["name"], joined["address"]]]])
        router, ports = stack.enter_context(process("-c", ROUTER, told))
        assert isinstance(ports, list)
        yield router, f"127.0.0.1:{ports[0]}"


def refusal(client: Client) -> errors.Unavailable:
    """Ask until the router refuses, since a signal takes a moment."""
    while True:
        try:
            client.tokenize("x")
        except errors.Unavailable as error:
            return error


def computed(stream: Stream) -> int:
    return stream.result().usage.prompt_tokens_by_fate.computed


def test_a_chat_finds_its_own_answers_and_sigterm_lets_it_finish(tmp_path: Path) -> None:
    with fleet(tmp_path, {"decode_step_ms": 20.0}) as (router, target), Client(target) as client:
        chat = client.chat(system="You are brief. " * 20, max_tokens=40, temperature=0.0, ignore_eos=True)
        cold = chat.send("What is a prefix cache?").result()
        assert cold.usage.prompt_tokens_by_fate.computed == cold.usage.prompt_tokens > 64
        warm = chat.send("And who fills it?").result()
        block = client.explain("x" * 100).block_size
        said = cold.usage.prompt_tokens + cold.usage.completion_tokens
        assert warm.usage.prompt_tokens - computed(warm) >= (said - 1) // block * block

        last = client.generate("one more", max_tokens=40, ignore_eos=True)
        next(last)
        router.send_signal(signal.SIGTERM)
        assert refusal(client).reason == "DRAINING"
        assert (len(last.result().token_ids), last.finish_reason) == (40, "length")
        code, log = ended(router)
    assert code == 0
    assert [line["message"] for line in log if line["logger"] == "router.app"] == [
        "the router drains",
        "the router ended",
    ]
    assert not [line for line in log if line["level"] in ("ERROR", "CRITICAL")]


def test_a_drain_that_takes_too_long_ends_what_runs_and_still_exits_with_zero(tmp_path: Path) -> None:
    with fleet(tmp_path, {"decode_step_ms": 50.0}, drain_grace_s=0.3) as (router, target), Client(target) as client:
        stream = client.generate("hi", max_tokens=1500, ignore_eos=True)
        next(stream)
        router.send_signal(signal.SIGINT)
        with pytest.raises(errors.Unavailable) as caught:
            stream.result()
        code, log = ended(router)
    assert (caught.value.reason, code) == ("DRAINING", 0)
    assert "requests outlived the drain and will be ended" in [line["message"] for line in log]


def test_the_second_signal_hurries() -> None:
    async def check() -> None:
        until = Stop()
        until.signalled()
        assert (until.stop.is_set(), until.hurry.is_set()) == (True, False)
        until.signalled()
        assert until.hurry.is_set()

    asyncio.run(check())


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model_dir": "/nowhere"}, "no folder"),
        ({"api_keys_file": "/nowhere.toml"}, "cannot be read"),
        ({"worker_ca": "/nowhere.pem"}, "cannot be read"),
        ({"policy": "clever"}, "clever"),
        ({"grpc_host": "203.0.113.7"}, "--grpc-port"),
    ],
)
async def test_what_keeps_a_router_from_starting_is_said_with_its_remedy(
    tmp_path: Path, settings: dict[str, str], says: str
) -> None:
    folder = str(write_model_folder(tmp_path))
    plain = {"name": "r0", "model_dir": folder, "model_name": "tiny", "grpc_port": 0, "http_port": 0}
    config = RouterConfig(**(plain | settings))  # type: ignore[arg-type]
    with pytest.raises(STARTUP_ERRORS, match=says) as caught:
        async with serving(config, StaticDiscovery([])):
            pass
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("module", ["router.app", "router.server", "router.service", "router.tokenizer"])
def test_the_router_starts_without_the_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
