"""record, replay, tune and capacity: on a real router with simulated workers, and on shipped traces."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from replay.stack_distance import curves
from replay.traces import Trace, load, shipped
from replay.workload import workload
from warmkv.client import Client

if TYPE_CHECKING:
    from conftest import Fleet, Foreground, Warmkv

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECRETS = ("Plan a secret day", "affinity-of-a-user")
SMALL = ("--first", "450", "--workers", "3", "--capacity", "20k", "--processes", "1")


def send(target: str, prompts: list[list[int]]) -> None:
    with Client(target) as client:
        for ids in prompts:
            client.generate(token_ids=ids, max_tokens=3, affinity_key=SECRETS[1]).result()
        client.generate(SECRETS[0] + " in Rome, with lunch. " * 9, max_tokens=1).result()


def wait_until(holds: Callable[[], object]) -> None:
    give_up = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < give_up, "what was waited for did not come"
        time.sleep(0.1)


def send_once_recorded(file: Path, target: str, prompts: list[list[int]]) -> None:
    """The file of a recording is made when all routers have answered: from then on nothing is missed."""
    wait_until(file.exists)
    send(target, prompts)


def ids(trace: Trace) -> list[list[int]]:
    return [[n for first, count in one.runs for n in range(first, first + count)] for one in trace.requests]


def common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_a_recording_has_the_prefixes_that_were_sent_and_nothing_else_of_them(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "live.jsonl.gz"
    trunk = [n % 300 for n in range(64)]
    prompts = [[*trunk, *[tail] * 40] for tail in (1, 2, 1, 3)] + [[9] * 100]
    target = fleet.warmkv.environment["WARMKV_ROUTER"]
    sender = threading.Thread(target=send_once_recorded, args=(file, target, prompts))
    sender.start()
    done = fleet.run("record", str(file), "--requests", str(len(prompts) + 1), "--for", "60s")
    sender.join()
    assert done.returncode == 0, done.stderr
    assert f"recording {target} to {file}" in done.stderr
    trace = load(file)
    assert trace.block_size == 16
    assert not trace.cut_off
    found = ids(trace)
    for one, a in zip(found, prompts, strict=False):
        for other, b in zip(found, prompts, strict=False):
            assert common(one, other) == common(a, b) // 16
    assert [one.input_length for one in trace.requests[: len(prompts)]] == [len(prompt) for prompt in prompts]
    assert [one.session for one in trace.requests] == ["s0"] * len(prompts) + [None]
    assert [one.think_s is not None for one in trace.requests] == [False, True, True, True, True, False]
    happened = [one.happened for one in trace.requests]
    assert all(one is not None and one.ttft_s is not None and one.worker in ("w0", "w1") for one in happened)
    assert happened[2] is not None
    assert happened[2].cached == 96  # 104 tokens, seen before
    raw = subprocess.run(["gzip", "-dc", str(file)], capture_output=True, check=True).stdout
    assert not any(word.encode() in raw for word in (*SECRETS, "default", "Rome"))
    assert "missed     0 requests" in done.stdout
    assert f"requests   {len(prompts) + 1} in" in done.stdout

    replayed = fleet.run("replay", str(file), "-p", "cache_aware", "--workers", "2", "--seeds", "1", "--json")
    answer = json.loads(replayed.stdout)
    assert answer["fleet"]["tells_sessions"] is True
    assert answer["as_recorded"]["requests"] == len(prompts) + 1
    assert answer["policies"][0]["seeds"][0]["hit"] == pytest.approx(answer["as_recorded"]["hit"])
    assert "as recorded" in fleet.run("replay", str(file), "-p", "sticky", "--workers", "2", "--seeds", "1").stdout


def started(fleet: Fleet, *arguments: str) -> tuple[Foreground, Path]:
    """A recording in a process of its own, that has begun."""
    process = fleet.warmkv.start("record", *arguments)
    file = Path(arguments[0])
    wait_until(file.exists)
    return process, file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_recording_with_a_whole_file_and_a_summary(
    fleet: Fleet, tmp_path: Path, number: signal.Signals
) -> None:
    process, file = started(fleet, str(tmp_path / "live.jsonl.gz"), "--json")
    send(fleet.warmkv.environment["WARMKV_ROUTER"], [[1] * 50, [1] * 90])
    wait_until(lambda: zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(file.read_bytes()).count(b"\n") == 3)
    process.process.send_signal(number)
    rest, _ = process.process.communicate(timeout=30)
    assert process.process.returncode == 0, process.log.read_text()[-2000:]
    summary = json.loads(rest)
    assert (summary["requests"], summary["missed"], summary["lost"]) == (3, 0, {})
    trace = load(file)
    assert (len(trace.requests), trace.cut_off) == (3, False)


def test_several_routers_are_recorded_with_one_numbering(fleet: Fleet, tmp_path: Path) -> None:
    """The same router twice stands for two: what it tells both times has equal numbers."""
    target = fleet.warmkv.environment["WARMKV_ROUTER"]
    file = tmp_path / "two.jsonl"
    sender = threading.Thread(target=send_once_recorded, args=(file, target, [[7] * 60]))
    sender.start()
    done = fleet.run("record", str(file), "--also", target, "--requests", "4", "--for", "60s")
    sender.join()
    assert done.returncode == 0, done.stderr
    one, other, *_ = ids(load(file))
    assert one == other == [0, 1, 2]


def test_text_is_refused_where_the_router_hides_it_and_no_file_is_left(fleet: Fleet, tmp_path: Path) -> None:
    done = fleet.run("record", str(tmp_path / "t.jsonl"), "--with-text", "--for", "1s")
    assert done.returncode == 1
    assert "show_prompts" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_recording_of_nothing_says_so(fleet: Fleet, tmp_path: Path) -> None:
    done = fleet.run("record", str(tmp_path / "t.jsonl"), "--for", "1s")
    assert (done.returncode, "no request ended in 1s" in done.stdout) == (0, True)
    again = fleet.run("record", str(tmp_path / "t.jsonl"), "--for", "1s")
    assert (again.returncode, "not overwritten" in again.stderr) == (2, True)


def test_replay_compares_policies_with_their_spread(warmkv: Warmkv) -> None:
    done = warmkv.invoke("replay", "ragpulse", *SMALL, "--speed", "600", "--seeds", "2", "-p", "all", "-p", "sticky")
    assert done.returncode == 0, done.stderr
    for name in ("cache_aware", "round_robin", "dynamo_cost"):
        assert re.search(rf"^{name} +0\.\d\d\d", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^sticky ", done.stdout, re.MULTILINE)) == 1
    assert "3 workers of 20,000 tokens, engine serial, 600 times as fast; 2 seeds" in done.stdout


def test_replay_is_the_same_each_time_and_with_any_number_of_processes(warmkv: Warmkv) -> None:
    arguments = ("replay", "tau_airline", "--first", "300", "-n", "3", "--capacity", "20k", "--speed", "20", "--json")
    more = ("--routers", "2", "--event-delay", "50ms", "--fail", "1@2s+3s", "--closed-loop", "-p", "cache_aware")
    one = figures(json.loads(warmkv.invoke(*arguments, *more, "--processes", "1").stdout))
    two = figures(json.loads(warmkv.invoke(*arguments, *more, "--processes", "2").stdout))
    assert one == two
    assert len({json.dumps(seed) for seed in one[0]}) == 3


def figures(answer: Any) -> list[list[dict[str, object]]]:
    """Without what measures this machine."""
    drop = ("seed", "simulated_per_s")
    return [[{k: v for k, v in s.items() if k not in drop} for s in p["seeds"]] for p in answer["policies"]]


def test_more_tiers_below_a_batched_engine_find_more(warmkv: Warmkv) -> None:
    arguments = ("replay", "mooncake_conversation", "--first", "900", "-p", "cache_aware", "--seeds", "1", "--json")
    engine = ("-n", "2", "--capacity", "200k", "--engine", "h100_8b", "--speed", "0.2")
    alone, with_host, with_all = (
        json.loads(warmkv.invoke(*arguments, *engine, *more).stdout)["policies"][0]["seeds"][0]["hit"]
        for more in ((), ("--host", "1M"), ("--host", "1M", "--redis", "20M"))
    )
    assert alone < with_host <= with_all


def test_replay_lists_what_is_shipped(warmkv: Warmkv) -> None:
    text = warmkv.invoke("replay", "--list").stdout
    assert all(name in text for name in shipped())
    assert json.loads(warmkv.invoke("replay", "--list", "--json").stdout)["traces"]["ragpulse"]["requests"] == 4541


def test_a_mooncake_file_and_several_files_are_replayed(warmkv: Warmkv, tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [
            {"timestamp": n * 500, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2]} for n in range(20)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    answer = json.loads(
        warmkv.invoke("replay", *files, "-p", "cache_aware", "-n", "2", "--seeds", "1", "--json").stdout
    )
    assert (answer["trace"], answer["requests"]) == ("a+b", 40)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replay"], "no trace was named"),
        (["replay", "nothing.jsonl"], "no shipped trace"),
        (["replay", "ragpulse", "-p", "best"], "no policy 'best'"),
        (["replay", "ragpulse", "-p", "cache_aware:load=-1"], "set it from 0 to 100"),
        (["replay", "ragpulse", "--capacity", "lots"], "write a number of tokens"),
        (["replay", "ragpulse", "--capacity", "5"], "less than a block"),
        (["replay", "ragpulse", "--speed", "0"], "above zero"),
        (["replay", "ragpulse", "--speed", "nan"], "above zero"),
        (["replay", "ragpulse", "--engine", "steam"], "no engine 'steam'"),
        (["replay", "ragpulse", "--prefill-tokens-per-s", "-1"], "more than zero"),
        (["replay", "ragpulse", "--fail", "0"], "WORKER@TIME+DOWN"),
        (["replay", "ragpulse", "--fail", "9@1m+1s"], "workers 0 to 7"),
        (["replay", "ragpulse", "--fail", "0@soon+1s"], "no duration"),
        (["replay", "ragpulse", "--event-delay", "-1s"], "no duration"),
        (["replay", "ragpulse", "--longest", "1"], "allow longer"),
        (["replay", "ragpulse", "--workers", "0"], "workers"),
        (["tune", "ragpulse", "--objective", "joy"], "choose one of"),
        (["tune", "ragpulse", "--trials", "9", "--budget", "1m"], "not both"),
        (["tune", "ragpulse", "--first", "200"], "record more"),
        (["tune", "ragpulse", "--present", "best"], "no policy 'best'"),
        (["tune", "ragpulse", "-p", "cache_aware:load=2"], "give the name alone"),
        (["tune", "ragpulse", "--host", "64k"], "has one tier"),
        (["tune", "ragpulse", "--out", "/proc/none"], "name another folder"),
        (["capacity", "ragpulse", "--out", "/proc/none"], "name another folder"),
        (["capacity", "ragpulse", "--host", "64GiB"], "give --model or --kv-bytes-per-token"),
        (["capacity", "ragpulse", "--add", "attic=4k"], "TIER one of device, host, disk, redis"),
        (["capacity", "ragpulse", "--ttl", "soon"], "no duration"),
        (["capacity", "ragpulse", "--model", "/nowhere"], "cannot be read"),
        (["capacity", "ragpulse", "--kv-bytes-per-token", "0"], "give what a token takes"),
        (["record", "x.txt"], "name it .jsonl"),
        (["record", "x.jsonl", "--for", "0s"], "records nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_is_refused_with_what_to_do(warmkv: Warmkv, arguments: list[str], said: str) -> None:
    done = warmkv.invoke(*arguments)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr


def test_a_bad_trace_is_named_with_its_line(warmkv: Warmkv, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"timestamp_ms": 1, "input_length": "many"}\n')
    for command in ("replay", "tune", "capacity"):
        done = warmkv.invoke(command, str(file))
        assert done.returncode == 2
        assert "bad.jsonl, line 1" in done.stderr
        assert "input_length is 'many'" in done.stderr


def test_prompts_that_no_worker_has_room_for_are_told(warmkv: Warmkv) -> None:
    arguments = ("replay", "tau_airline", "--first", "100", "-n", "1", "--seeds", "1", "-p", "round_robin")
    prompts = [request.input_length for request in load(shipped()["tau_airline"]).requests[:100]]
    longer = sum(tokens > 5000 for tokens in prompts)
    said = warmkv.invoke(*arguments, "--capacity", "5k").stdout
    assert f"{longer} of 100 prompts are longer than --capacity (up to {max(prompts):,} tokens)" in said
    assert "1 worker of 5,000 tokens" in said
    assert "longer than" not in warmkv.invoke(*arguments, "--capacity", "50k").stdout


def test_a_closed_loop_that_is_none_is_told(warmkv: Warmkv) -> None:
    arguments = ("--closed-loop", "--first", "100", "-n", "1", "--seeds", "1", "-p", "round_robin")
    assert "--closed-loop changed nothing" in warmkv.invoke("replay", "ragpulse", *arguments).stdout
    assert "changed nothing" not in warmkv.invoke("replay", "claude_code_sample", *arguments).stdout


def test_tune_searches_on_the_tiers_that_it_is_given(warmkv: Warmkv) -> None:
    engine = ("--engine", "h100_8b", "-n", "2", "--capacity", "40k", "--host", "200k", "--fail", "1@1m+5s")
    more = ("--first", "450", "--trials", "2", "--seeds", "2", "-p", "round_robin", "--processes", "1")
    said = warmkv.invoke("tune", "tau_airline", *engine, *more).stdout
    assert "2 workers of 40,000 tokens, 200,000 in host RAM, engine h100_8b" in said
    assert "worker 1 down 5s from 1m" in said


def test_capacity_tells_the_exact_curve_and_what_more_would_give(warmkv: Warmkv, tmp_path: Path) -> None:
    size = ("--kv-bytes-per-token", "1KiB", "--host", "10MiB", "--add", "host=40MiB", "--add", "host=1KiB")
    arguments = ("capacity", "ragpulse", *size, "--ttl", "1h")
    answer = json.loads(warmkv.invoke(*arguments, "--json").stdout)
    hour, endless = curves(workload(load(shipped()["ragpulse"])), ttls_s=(3600.0, float("inf")))
    for told, curve in zip(answer["curves"], (hour, endless), strict=True):
        assert [point["hit"] for point in told["points"]] == [
            pytest.approx(curve.hit_rate(point["tokens"])) for point in told["points"]
        ]
    assert answer["now"]["hit"] == pytest.approx(endless.hit_rate(10 * 1024))
    gain, none = answer["gains"]
    assert gain["hit"] == pytest.approx(endless.hit_rate(50 * 1024))
    assert gain["saved_prefill"] == pytest.approx((gain["hit"] - answer["now"]["hit"]) / (1 - answer["now"]["hit"]))
    text = warmkv.invoke(*arguments, "--out", str(tmp_path)).stdout
    assert re.search(r"40MiB more host: hit rate 0\.\d+ -> 0\.\d+, [\d.]+% less prefill", text)
    assert none["saved_prefill"] < 0.001
    assert "1KiB more host: nothing" in text
    assert (tmp_path / "capacity.html").is_file()


def test_capacity_with_an_engine_that_has_tiers_tells_times(warmkv: Warmkv) -> None:
    sizes = ("--device", "20k", "--host", "20k", "--add", "host=80k", "--engine", "h100_8b", "-n", "2")
    arguments = ("capacity", "tau_airline", "--speed", "3", "--first", "300", *sizes, "--processes", "1")
    said = warmkv.invoke(*arguments).stdout
    assert len(re.findall(r"^  replayed on h100_8b: hit rate 0\.\d+, TTFT mean [\d.]+ m?s$", said, re.MULTILINE)) == 2
    assert "prompts do not fit" not in said
    narrow = warmkv.invoke("capacity", "tau_airline", "--first", "300", "--host", "5k").stdout
    assert re.search(r"\d+ of 300 prompts do not fit 5k tokens of a worker", narrow)


def test_capacity_of_a_fleet_is_replayed_and_never_above_one_shared_cache(warmkv: Warmkv) -> None:
    arguments = ("capacity", "tau_airline", "--speed", "20", "--first", "500", "-n", "3", "--host", "20k", "--json")
    answer = json.loads(warmkv.invoke(*arguments, "--add", "redis=200k", "--processes", "1").stdout)
    endless = answer["curves"][-1]
    at = {point["tokens"]: point["hit"] for point in endless["points"]}
    assert len(answer["split"]) == 6
    for point in answer["split"]:
        assert 0 < point["hit"] <= at[point["tokens"]] + 0.01
    assert answer["now"]["hit"] <= answer["now"]["bound"]
    assert answer["gains"][0]["shared"] == pytest.approx(endless["most"], abs=0.001)


@pytest.fixture(scope="module")
def tuned(warmkv: Warmkv, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("tuned")
    rules = ("-p", "cache_aware", "-p", "round_robin", "--present", "round_robin", "--trials", "3", "--seeds", "2")
    done = warmkv.invoke("tune", "tau_airline", *SMALL, "--speed", "20", *rules, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "tune.html"


def test_tune_ends_with_the_line_that_sets_what_it_found(tuned: tuple[str, Path]) -> None:
    text, _ = tuned
    assert "That is beyond noise." in text
    assert re.search(r"^  warmkv policy set cache_aware", text, re.MULTILINE)
    assert re.search(r"^\* +round_robin", text, re.MULTILINE)
    assert "searched on 315 requests, table of the 135 behind" in text


def test_tune_says_when_nothing_is_better(warmkv: Warmkv) -> None:
    rules = ("-p", "round_robin", "--present", "cache_aware", "--trials", "2", "--seeds", "2")
    done = warmkv.invoke("tune", "tau_airline", *SMALL, "--speed", "20", *rules)
    assert "Nothing that was tried beats cache_aware in TTFT mean: leave it as it is." in done.stdout
    assert "policy set" not in done.stdout


def test_a_budget_becomes_a_number_of_trials_that_can_be_repeated(warmkv: Warmkv) -> None:
    rules = ("-p", "cache_aware", "--budget", "2s", "--seeds", "2", "--json")
    done = warmkv.invoke("tune", "tau_airline", *SMALL, "--speed", "20", *rules)
    trials = re.search(r"--trials (\d+)", done.stderr)
    assert trials is not None
    tried = {trial["policy"] for trial in json.loads(done.stdout)["trials"]}
    assert len(tried) == int(trials[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[[Path], Any]]:
    """Opens a file; asks nothing of anybody and complains of nothing, or the test fails."""
    context = browser.new_context(offline=True)
    problems: list[str] = []

    def open_file(path: Path) -> Any:
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield open_file
    context.close()
    assert problems == []


def test_the_picture_of_a_search_stands_alone_and_marks_what_is_in_force(
    tuned: tuple[str, Path], opened: Callable[[Path], Any]
) -> None:
    page = opened(tuned[1])
    assert page.locator("svg").count() == 4
    assert page.locator("svg text.name", has_text="in force").count() == 3
    assert page.locator("svg text.name", has_text="found").count() == 3
    assert page.locator("pre").inner_text().startswith("warmkv policy set cache_aware")
    titles = page.locator("svg title").all_text_contents()
    assert any(title.startswith("round_robin: hit rate 0.") and "TTFT mean" in title for title in titles)
    assert_drawn_within(page)


def test_the_picture_of_capacity_stands_alone(warmkv: Warmkv, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    warmkv.invoke("capacity", "ragpulse", "--kv-bytes-per-token", "1KiB", "--ttl", "10m", "--out", str(tmp_path))
    page = opened(tmp_path / "capacity.html")
    assert page.locator("svg polyline").count() == 2
    assert "hit rate (share of prompt tokens)" in page.locator("svg").inner_html()
    assert_drawn_within(page)


def assert_drawn_within(page: Any) -> None:
    """Every dot and every text lies within its drawing."""
    outside = page.evaluate(
        """() => [...document.querySelectorAll('svg circle, svg text')].filter(shape => {
            const own = shape.getBoundingClientRect(), all = shape.closest('svg').getBoundingClientRect()
            return own.left < all.left - 1 || own.right > all.right + 1 || own.top < all.top - 1 ||
                own.bottom > all.bottom + 1
        }).map(shape => shape.outerHTML)"""
    )
    assert outside == []
