"""The parts of `bench.peers`: what both kinds of workers simulate, the prompts, the load, the clients, the table."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.peers import environment
from bench.peers.__main__ import run
from bench.peers.callers import Answer, CallFailed, HttpCaller
from bench.peers.contenders import Contender, Own, Peer, Ports
from bench.peers.environment import NotInstalled, install
from bench.peers.load import LoadResult, closed_loop
from bench.peers.mock_worker import Connection, MockWorker, token_ids
from bench.peers.paced_engine import PacedEngine, serial_engine
from bench.peers.processes import Child, NotStarted
from bench.peers.prompts import Prompt, Shape, prompt_of, random_prompt, unique_prompts
from bench.peers.scenarios import Figures, Scenario, blind_share, scenarios
from bench.peers.service import Constants, Served, SimulatedService
from bench.peers.table import rows, unit
from kvstore.blocks import block_hashes
from kvstore.events import BlockRemoved, BlockStored
from kvstore.layout import KVLayout
from workers.protocol import EngineInfo, FinishReason, Job, Output, SamplingParams, StepReport
from workers.simulated_info import simulated_info

CONSTANTS = Constants(block_tokens=4, capacity_blocks=12, tokens_per_s=1000.0, decode_s=0.05)


def info() -> EngineInfo:
    layout = KVLayout(1, 1, 4, 4, "float32", CONSTANTS.block_tokens)
    return simulated_info(fingerprint=b"f" * 32, layout=layout, context_length=64)


class Naive:
    """The service, told as slowly as possible: prefixes of prompts are blocks, each with the time of its last use."""

    def __init__(self) -> None:
        self.used: dict[str, int] = {}
        self.ticks = 0
        self.free_at = 0.0

    def arrive(self, now: float, text: str) -> tuple[float, int]:
        """(seconds to first token, cached tokens)."""
        size = CONSTANTS.block_tokens * 4
        blocks = [text[:end] for end in range(size, len(text) + 1, size)]
        held = next((n for n, block in enumerate(blocks) if block not in self.used), len(blocks))
        tokens = -(-len(text) // 4)
        needed = -(-tokens // CONSTANTS.block_tokens) - held
        while len(self.used) + needed > CONSTANTS.capacity_blocks:
            others = {block: at for block, at in self.used.items() if block not in blocks[:held]}
            del self.used[min(others, key=lambda block: others[block])]
        for block in reversed(blocks):
            self.ticks += 1
            self.used[block] = self.ticks
        cached = min(held * CONSTANTS.block_tokens, tokens - 1)
        self.free_at = max(self.free_at, now) + (tokens - cached) / CONSTANTS.tokens_per_s
        return self.free_at - now, cached


# Up to nine blocks that begin alike, so that prompts share, repeat and evict one another: twelve fit.
WORDS = st.builds(lambda word, length: prompt_of((word,) * length), st.integers(0, 3), st.integers(1, 36))
ARRIVALS = st.lists(st.tuples(st.integers(0, 30), WORDS), min_size=1, max_size=25)


def job(number: int, prompt: Prompt) -> Job:
    root = info().scheme.root(b"")
    names = block_hashes(prompt.token_ids, root, CONSTANTS.block_tokens)
    return Job(number, prompt.token_ids, root, names, SamplingParams(max_tokens=1, ignore_eos=True))


@dataclass
class Paced:
    """A paced engine on a clock of the test's; collects what it reports and when."""

    now: float = 0.0
    wakes: list[float] = field(default_factory=list)
    told: list[tuple[float, StepReport]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = PacedEngine(
            info(), CONSTANTS, clock=lambda: self.now, wake_in=lambda s: self.wakes.append(self.now + s)
        )

    def until(self, when: float) -> None:
        """Let time pass, taking a turn when the engine asked for one."""
        for wake in sorted(wake for wake in self.wakes if wake <= when):
            self.now = max(self.now, wake)
            if self.engine.has_work():
                self.told.append((self.now, self.engine.step()))
        self.wakes = [wake for wake in self.wakes if wake > when]
        self.now = when

    @property
    def outputs(self) -> dict[object, tuple[float, Output]]:
        return {output.job_id: (at, output) for at, report in self.told for output in report.outputs}


@given(ARRIVALS)
def test_the_mock_serves_as_the_naive_model(arrivals: list[tuple[int, Prompt]]) -> None:
    service, naive, now = SimulatedService(CONSTANTS), Naive(), 0.0
    for pause_ms, prompt in arrivals:
        now += pause_ms / 1000
        served = service.arrive(now, prompt.text.encode())
        assert (pytest.approx(served.ttft_s), served.cached_tokens) == naive.arrive(now, prompt.text)
        assert served.prompt_tokens == len(prompt.token_ids)


@given(ARRIVALS)
def test_the_paced_engine_serves_as_the_mock(arrivals: list[tuple[int, Prompt]]) -> None:
    """The comparison stands on this: same prompts at the same times, same waits and same hits on both workers."""
    service, paced = SimulatedService(CONSTANTS), Paced()
    served: list[tuple[float, Served]] = []
    for number, (pause_ms, prompt) in enumerate(arrivals):
        paced.until(paced.now + pause_ms / 1000)
        served.append((paced.now, service.arrive(paced.now, prompt.text.encode())))
        paced.engine.submit(job(number, prompt))
    paced.until(paced.now + 100)
    assert len(paced.outputs) == len(arrivals)
    for number, (arrived, expected) in enumerate(served):
        at, output = paced.outputs[number]
        assert output.finish is FinishReason.LENGTH
        assert output.fates is not None
        assert output.fates["device"] == expected.cached_tokens
        assert output.worker_ttft_ms == pytest.approx(expected.ttft_s * 1000, abs=1e-6)
        assert at == pytest.approx(arrived + expected.ttft_s + CONSTANTS.decode_s)
    books = paced.engine.books
    assert books.cached_tokens == sum(each.cached_tokens for _, each in served)
    assert books.ttft_ms == pytest.approx([each.ttft_s * 1000 for _, each in served])


@given(st.lists(WORDS, min_size=1, max_size=12))
def test_the_simulated_engine_itself_serves_a_burst_as_the_mock(prompts: list[Prompt]) -> None:
    service, now = SimulatedService(CONSTANTS), [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    engine = serial_engine(info(), CONSTANTS, clock=lambda: now[0], sleep=sleep)
    for number, prompt in enumerate(prompts):
        engine.submit(job(number, prompt))
    outputs: dict[object, Output] = {}
    while engine.has_work():
        outputs |= {output.job_id: output for output in engine.step().outputs}
    for number, prompt in enumerate(prompts):
        expected, output = service.arrive(0.0, prompt.text.encode()), outputs[number]
        assert output.fates is not None
        assert output.fates["device"] == expected.cached_tokens
        assert output.worker_ttft_ms == pytest.approx(expected.ttft_s * 1000, abs=1e-6)


def test_the_paced_engine_reports_load_and_blocks_when_the_clock_gets_there() -> None:
    paced = Paced()
    first, second = prompt_of((1,) * 20), prompt_of((2,) * 10)
    paced.engine.submit(job(1, first))  # until 20 ms
    paced.engine.submit(job(2, second))  # until 30 ms
    load = paced.engine.load()
    assert (load.running, load.waiting, load.decoding, load.pending_prefill_tokens) == (1, 1, 0, 30)
    paced.until(0.012)
    assert paced.engine.load().pending_prefill_tokens == 18
    assert not paced.told
    paced.until(0.025)
    [(at, report)] = paced.told
    assert (at, report.outputs) == (pytest.approx(0.020), [])
    assert [type(event) for event in report.events] == [BlockStored]
    load = paced.engine.load()
    assert (load.running, load.waiting, load.decoding, load.pending_prefill_tokens) == (2, 0, 1, 5)
    paced.until(1.0)
    assert paced.engine.load().running == 0


def test_the_paced_engine_forgets_a_cancelled_job_and_refuses_one_that_is_too_long() -> None:
    paced = Paced()
    paced.engine.submit(job(1, prompt_of((1,) * 8)))
    paced.engine.submit(job(2, prompt_of((1,) * 100)))
    paced.engine.cancel(1)
    paced.engine.cancel(7)  # unknown
    paced.until(1.0)
    assert paced.outputs[1][1].finish is FinishReason.CANCELLED
    assert paced.outputs[2][1].error is not None
    assert paced.engine.load().running == 0


def test_evicted_blocks_are_told() -> None:
    paced = Paced()
    for number in range(3):
        paced.engine.submit(job(number, prompt_of((number,) * 24)))
    paced.until(1.0)
    events = [event for _, report in paced.told for event in report.events]
    removed = [name for event in events if isinstance(event, BlockRemoved) for name in event.hashes]
    assert len(removed) == 6, "18 blocks came, 12 fit"


def test_a_session_grows_and_depends_on_the_seed_alone() -> None:
    shape = Shape(groups=2, sessions=4, concurrency=1, turns=3, system_tokens=10, turn_tokens=5)
    prompts = list(shape.session(1))
    assert prompts == list(shape.session(1))
    assert [len(prompt.token_ids) for prompt in prompts] == [15, 20, 25]
    assert all(later.text.startswith(prompt.text) for prompt, later in pairwise(prompts))
    assert next(shape.session(3)).text[:40] == prompts[0].text[:40], "sessions 1 and 3 are of one group"
    assert next(shape.session(2)).text[:40] != prompts[0].text[:40]
    assert next(Shape(2, 4, 1, seed=1).session(1)).text[:40] != prompts[0].text[:40]


@given(st.lists(st.integers(0, 2047), max_size=40), st.lists(st.integers(0, 2047), max_size=40))
def test_texts_and_ids_share_the_same_beginnings(first: list[int], second: list[int]) -> None:
    a, b = prompt_of(tuple(first)), prompt_of(tuple(second))
    assert len(a.text) == 4 * len(a.token_ids)
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))
    assert a.text[: 4 * alike] == b.text[: 4 * alike]
    assert min(len(first), len(second)) == alike or a.text[4 * alike :][:4] != b.text[4 * alike :][:4]
    assert token_ids(a.text.encode()) == token_ids((a + b).text.encode())[: len(first)]


def test_unique_prompts_share_no_block() -> None:
    prompts = list(unique_prompts(3000, 100))
    assert len({prompt.text[:64] for prompt in prompts}) == 3000
    assert all(prompt_of(prompt.token_ids) == prompt and len(prompt.token_ids) == 100 for prompt in prompts[:50])


class Recorder:
    """A caller that takes its time, and fails for prompts of one token."""

    def __init__(self) -> None:
        self.asked: list[Prompt] = []
        self.running = self.most = 0

    async def ask(self, prompt: Prompt) -> Answer:
        self.asked.append(prompt)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(random.Random(prompt.text).random() / 1000)
        self.running -= 1
        if len(prompt.token_ids) == 1:
            raise CallFailed("too short")
        return Answer(len(prompt.token_ids), 0)

    async def close(self) -> None:
        return None


def test_the_load_plays_every_turn_in_order_at_its_concurrency() -> None:
    shape, caller = Shape(groups=3, sessions=9, concurrency=4, turns=3, system_tokens=4, turn_tokens=2), Recorder()
    sessions = [list(shape.session(number)) for number in range(shape.sessions)]
    result = asyncio.run(closed_loop(caller, sessions, concurrency=4, think_s=0.0))
    assert caller.most == 4
    assert len(result.answers) == len(result.latency_s) == 27
    assert sorted(p.text for p in caller.asked) == sorted(p.text for session in sessions for p in session)
    for session in sessions:
        assert [p for p in caller.asked if p in session] == session


def test_a_load_counts_errors_and_ends_in_time() -> None:
    caller = Recorder()
    sessions = ([prompt_of((1,)), prompt_of((1, 2))] for _ in range(3))
    result = asyncio.run(closed_loop(caller, sessions, concurrency=1, think_s=0.0))
    assert (result.errors, len(result.answers)) == (["too short"] * 3, 3)
    assert result.trouble == "3 x too short"
    ended = asyncio.run(closed_loop(caller, [[prompt_of((1, 2))]], concurrency=2, think_s=0.0, until=0.0))
    assert ended.answers == []


@asynccontextmanager
async def served(worker: MockWorker) -> AsyncIterator[HttpCaller]:
    """The mock on a real socket, and a client."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(worker), "127.0.0.1", 0)
    caller = HttpCaller(server.sockets[0].getsockname()[1])
    try:
        yield caller
    finally:
        await caller.close()
        server.close()
        await server.wait_closed()


def test_the_mock_answers_over_http_and_keeps_books() -> None:
    async def scenario() -> None:
        worker = MockWorker(Constants(decode_s=0.01), 3)
        prompt = random_prompt(100, "a")
        async with served(worker) as caller:
            started = time.perf_counter()
            assert await caller.ask(prompt) == Answer(100, 0)
            assert time.perf_counter() - started >= 0.0125
            assert await caller.ask(prompt + prompt_of((1, 2))) == Answer(102, 96)
            status, body = await caller.request(
                b"POST", "/v1/completions/render", json.dumps({"prompt": "abcde"}).encode()
            )
            assert (status, json.loads(body)[0]["token_ids"]) == (200, token_ids(b"abcde   "))
            books = json.loads((await caller.request(b"GET", "/books"))[1])
            assert (books["requests"], books["prompt_tokens"], books["cached_tokens"]) == (2, 202, 96)
            assert books["ttft_ms"] == pytest.approx([2.5, 0.15])
            await caller.request(b"GET", "/forget")
            assert worker.books.requests == 0
            assert (await caller.ask(prompt)).cached_tokens == 96, "books are forgotten, caches are not"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody", (200, b"body")),
        (b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", (503, b"abcde")),
    ],
)
def test_the_http_client_reads_bodies_of_known_length_and_in_chunks(raw: bytes, found: tuple[int, bytes]) -> None:
    async def scenario() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(2):  # a second time on the same connection
                await reader.readuntil(b"\r\n\r\n")
                writer.write(raw)
            await reader.read()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        caller = HttpCaller(server.sockets[0].getsockname()[1])
        for _ in range(2):
            assert await caller.request(b"GET", "/") == found
        await caller.close()
        server.close()
        with pytest.raises(CallFailed, match="Refused"):
            await HttpCaller(Ports.choose(1).router).request(b"GET", "/")

    asyncio.run(scenario())


def test_a_child_is_measured_and_ended_and_its_last_words_are_told(tmp_path: Path) -> None:
    code = "import time; print('\"serves\"', flush=True); sum(range(10**7)); time.sleep(60)"
    child = Child([sys.executable, "-c", code], tmp_path / "child.log", dict(os.environ))
    child.wait_for('"serves"')
    assert child.rss_bytes() > 1 << 20
    child.kill()
    assert (child.cpu_s(), child.rss_bytes()) == (0.0, 0)
    broken = Child([sys.executable, "-c", "raise SystemExit('no port')"], tmp_path / "broken.log", dict(os.environ))
    with pytest.raises(NotStarted, match="no port"):
        broken.wait_for('"serves"')


def test_a_peer_that_does_not_install_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pip: what it is told to do is recorded, or fails."""
    ran: list[list[str]] = []

    def run(command: list[str]) -> None:
        ran.append(command)
        (tmp_path / "smg").mkdir(exist_ok=True)
        if "pip" in command and len(ran) < 3:
            raise NotInstalled("no matching distribution")

    monkeypatch.setattr(environment, "run", run)
    with pytest.raises(NotInstalled, match="distribution"):
        install("smg", tmp_path)
    python = install("smg", tmp_path)
    assert ran[-1][:3] == [str(python), "-m", "pip"]
    assert ran[-1][-1] == "smg==1.13.0", "the next run tries again"
    assert install("smg", tmp_path) == python
    assert len(ran) == 4, "what is installed is not installed again"
    monkeypatch.setitem(environment.REQUIREMENTS, "smg", ("smg==2.0",))
    install("smg", tmp_path)
    assert len(ran) == 6


def test_a_command_that_fails_says_why() -> None:
    code = "import sys; sys.exit('WARNING: an old mirror\\nERROR: no matching distribution')"
    with pytest.raises(NotInstalled, match=r"^ERROR: no matching distribution$"):
        environment.run([sys.executable, "-c", code])


def test_rows_have_bars_for_ours_only_and_compare_with_the_best_peer_of_each_round() -> None:
    def played(*ttft_ms: float) -> list[dict[str, float]]:
        return [{"hit": 0.88, "ttft_ms": each} for each in ttft_ms]

    trials = {
        ("warmkv", "hot_32"): played(6.0, 8.0),
        ("smg", "hot_32"): played(12.0, 4.0),
        ("sglang", "hot_32"): played(6.0, 16.0),
        ("vllm", "hot_32"): played(1.0),  # failed in the second round
    }
    report = {row.name: row for row in rows(trials).rows}
    assert report["warmkv_hot_32_hit"].is_met is True
    assert report["smg_hot_32_hit"].is_met is None
    compared = report["warmkv_hot_32_ttft_by_best_peer"]
    assert (compared.min, compared.max, compared.is_met) == (1.0, 2.0, False)
    assert [unit(name) for name in ("hit", "ttft_ms", "cpu_us", "back_s", "errors", "requests_per_s")] == [
        "share",
        "ms",
        "us",
        "s",
        "requests",
        "1/s",
    ]


def test_a_router_that_does_not_start_is_tried_again_and_then_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    played: list[tuple[str, int]] = []

    async def trial(contender: Contender, seed: int) -> Figures:
        played.append((contender.name, seed))
        if contender.name == "smg" or played.count(("warmkv", 0)) == 1:
            raise NotStarted("port in use")
        return {"hit": 0.5}

    found = [Own(Path("model")), Peer("smg", Path("python"), (), "cache_aware")]
    trials = asyncio.run(run(found, [Scenario("hot_32", trial, rounds=2)]))
    assert played == [("warmkv", 0), ("warmkv", 0), ("smg", 0), ("smg", 0), ("warmkv", 1)]
    assert trials == {("warmkv", "hot_32"): [{"hit": 0.5}, {"hit": 0.5}]}
    assert "smg is left out of hot_32" in capsys.readouterr().err


def test_the_decision_of_a_restarted_router_is_blind_when_only_the_system_prompt_was_found() -> None:
    shape = Shape(groups=1, sessions=1, concurrency=1, system_tokens=100, turn_tokens=20)
    first, found, only_system, nothing = Answer(120, 96), Answer(140, 112), Answer(140, 96), Answer(160, 0)
    result = LoadResult(answers=[first, found, only_system, nothing, found])
    assert blind_share(result, shape) == 0.5, "a session's first prompt has no history to find"


def test_quick_and_full_runs_have_the_same_scenarios() -> None:
    assert list(scenarios(quick=True)) == list(scenarios(quick=False))
    assert OrderedDict.fromkeys(each.rounds for each in scenarios(quick=True).values()).keys() == {1}
