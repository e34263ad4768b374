"""A small model folder, free ports, and the command line as a process of its own."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from deploy.cli import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = "You are a travel agent. Plan a day in Rome with museums, lunch and a walk along the river."
WAIT_S = 90.0


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a router and a simulated worker need of a model: no weights."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    config = {"vocab_size": 512, "max_position_embeddings": 2048, "eos_token_id": 0, "model_type": "llama", **shape}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant:{% endif %}")
    return folder


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@dataclass
class Warmkv:
    """`warmkv` with a clean environment and a state folder of its own."""

    state_dir: Path
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *arguments: str, input_text: str = "", timeout: float = WAIT_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(arguments),
            env=self._environ(),
            input=input_text,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def invoke(self, *arguments: str, input_text: str = "") -> subprocess.CompletedProcess[str]:
        """The same inside this process, which is much faster."""
        clean: dict[str, str | None] = dict.fromkeys(name for name in os.environ if name.startswith("WARMKV_"))
        done = CliRunner().invoke(app, list(arguments), input=input_text, env={**clean, **self._own()})
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(list(arguments), done.exit_code, done.stdout, done.stderr)

    def start(self, *arguments: str) -> Foreground:
        return self.spawn(self._command(arguments))

    def spawn(self, command: list[str]) -> Foreground:
        with (self.state_dir / "stderr.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self._environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self.started.append(process)
        return Foreground(process, self.state_dir / "stderr.log")

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-c", "from deploy.cli import main; main()", *arguments]

    def _environ(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WARMKV_", "RAY_"))}
        return {**inherited, **self._own()}

    def _own(self) -> dict[str, str]:
        # A router that a test kills cannot remove its temporary folder.
        fixed = {
            "WARMKV_STATE_DIR": str(self.state_dir),
            "TMPDIR": str(self.state_dir),
            "COLUMNS": "120",
            "NO_COLOR": "1",
            "TERM": "dumb",
        }
        return {**fixed, **self.environment}


@dataclass
class Foreground:
    """A process whose standard output is read line by line."""

    process: subprocess.Popen[bytes]
    log: Path
    seen: str = ""

    def read_until(self, text: str, timeout: float = WAIT_S) -> str:
        """All that it has said up to the line with `text`."""
        assert self.process.stdout is not None
        give_up = time.monotonic() + timeout
        while text not in self.seen:
            left = give_up - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, left))
            piece = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                why = "ended" if ready else "is silent"
                raise AssertionError(f"{why} before {text!r}: {self.seen}\n{self.log.read_text()[-3000:]}")
            self.seen += piece.decode()
        return self.seen

    def terminate(self, timeout: float = WAIT_S) -> int:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        rest, _ = self.process.communicate(timeout=timeout)
        self.seen += rest.decode()
        return self.process.returncode


@pytest.fixture(scope="module")
def new_warmkv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Warmkv]]:
    made: list[Warmkv] = []

    def make() -> Warmkv:
        made.append(Warmkv(tmp_path_factory.mktemp("state")))
        return made[-1]

    yield make
    for warmkv in made:
        warmkv.end()


@pytest.fixture(scope="module")
def warmkv(new_warmkv: Callable[[], Warmkv]) -> Warmkv:
    return new_warmkv()


@dataclass
class Fleet:
    """A router process and two worker processes."""

    warmkv: Warmkv
    router: Foreground
    workers: list[Foreground]
    http: str

    def run(self, *arguments: str, input_text: str = "") -> subprocess.CompletedProcess[str]:
        return self.warmkv.invoke(*arguments, input_text=input_text)

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fleet(model_dir: Path, warmkv: Warmkv, free_port: Callable[[], int]) -> Iterator[Fleet]:
    workers, addresses = [], []
    for name in ("w0", "w1"):
        config = {"name": name, "model_dir": str(model_dir), "model_name": "tiny", "engine": "simulated"}
        config |= {"block_size": 16, "device_bytes": 1 << 22, "host_bytes": 1 << 22, "fleet_secret": "hush"}
        workers.append(warmkv.spawn([sys.executable, "-m", "workers.main", "--config", json.dumps(config)]))
        addresses.append(json.loads(workers[-1].read_until("\n"))["address"])
    port = free_port()
    options = ["--model", str(model_dir), "--set", "model.name=tiny", "--set", "auth.fleet_secret=hush"]
    options += [part for w, at in zip(("w0", "w1"), addresses, strict=True) for part in ("--worker", f"{w}={at}")]
    router = warmkv.start("router", *options, "--grpc-port", str(port), "--http-port", "0")
    http = re.search(r"http://([\d.:]+)/", router.read_until("Ctrl-C"))
    assert http is not None
    warmkv.environment["WARMKV_ROUTER"] = f"127.0.0.1:{port}"
    ready = Fleet(warmkv, router, workers, http[1])
    _wait_for_workers(ready)
    yield ready
    warmkv.end()


def _wait_for_workers(fleet: Fleet) -> None:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        if fleet.run("status").returncode == 0:
            return
    raise AssertionError(fleet.run("status").stdout)
