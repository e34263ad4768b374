"""The command line against a real router and simulated workers, without Ray: what it prints and how it exits."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from deploy import discovery
from deploy.cli import app
from deploy.connection import WAIT_TIMEOUT_S
from deploy.local_fleet import FleetProblem
from deploy.redis_server import RedisServerError
from deploy.settings import Settings
from router.cache_orders import ANSWER_TIMEOUT_S
from router.fleet_clears import CLEAR_TIMEOUT_S
from router.warming import COMPUTE_TIMEOUT_S
from warmkv import versions

if TYPE_CHECKING:
    from conftest import Fleet, Warmkv

COMMANDS = [
    ["demo"],
    ["up"],
    ["down"],
    ["router"],
    ["status"],
    ["scale"],
    ["drain"],
    ["undrain"],
    ["generate"],
    ["chat"],
    ["explain"],
    ["record"],
    ["replay"],
    ["tune"],
    ["capacity"],
    ["policy", "show"],
    ["policy", "set"],
    ["policy", "shadow"],
    ["policy", "rollback"],
    ["policy", "history"],
    ["cache", "ls"],
    ["cache", "stats"],
    ["cache", "warm"],
    ["cache", "pin"],
    ["cache", "unpin"],
    ["cache", "clear"],
    ["cache", "check"],
    ["config", "show"],
    ["doctor"],
]
PROMPT = "You are a travel agent. Plan a day in Rome with museums, lunch and a walk along the river. " * 4


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_gives_an_example(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"], terminal_width=200)
    assert done.exit_code == 0
    assert f"Example: warmkv {' '.join(command)}" in done.output or "config show" in done.output
    assert len(done.output) > 200


def test_help_names_every_command_and_the_exit_codes() -> None:
    done = CliRunner().invoke(app, ["--help"], terminal_width=200)
    assert "3 no router can be reached" in done.output
    assert [c[0] for c in COMMANDS if c[0] not in done.output] == []


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"warmkv {versions.VERSION}\n")


def test_the_command_line_starts_without_torch_ray_or_grpc() -> None:
    script = (
        "import sys, deploy.cli; bad = {'torch', 'ray', 'grpc', 'transformers', 'pydantic'} & set(sys.modules); "
        "sys.exit(f'imported: {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["scale"],
        ["scale", "-n", "-1"],
        ["generate"],
        ["generate", "x", "--max-tokens", "0"],
        ["cache", "clear"],
        ["cache", "clear", "--all", "--tenant", "x"],
        ["cache", "clear", "--all", "--prefix", "x"],
        ["cache", "clear", "--tenant", ""],
        ["cache", "ls", "--tier", "attic"],
        ["cache", "ls", "--limit", "-1"],
        ["cache", "ls", "--prefix", "x", "--messages", "y"],
        ["cache", "warm"],
        ["cache", "warm", "x", "--ttl", "soon"],
        ["cache", "warm", "x", "--ttl", "0s"],
        ["cache", "warm", "x", "--fixed-ttl"],
        ["cache", "warm", "x", "--expires-at", "next week"],
        ["generate", "x", "--ttl", "5m", "--expires-at", "2100-01-01T00:00Z"],
        ["generate", "x", "--keep-priority", "101"],
        ["generate", "x", "--json-object", "--regex", "a+"],
        ["generate", "x", "--logit-bias", "7:3"],
        ["generate", "x", "--grammar", "nowhere.lark"],
        ["generate", "x", "--n", "65"],
        ["cache", "warm", "--messages", "/does/not/exist.json"],
        ["cache", "pin"],
        ["cache", "pin", "--tenant", "x", "--for", "a while"],
        ["cache", "unpin"],
        ["status", "--tls-cert", __file__],
        ["status", "--tls-key", __file__],
        ["policy", "set", "cache_aware", "--weight", "load"],
        ["up"],
        ["up", "--model", "/does/not/exist"],
        ["up", "--model", ".", "--set", "nodots"],
        ["config", "show", "--set", "store.host_bites=1"],
        ["config", "show", "--config", "/does/not/exist.toml"],
        ["router", "--worker", "w0"],
        ["router", "--worker", "w0=h:1", "--ray-address", "h:2"],
        ["router"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_no_traceback(new_warmkv: Callable[[], Warmkv], arguments: list[str]) -> None:
    done = new_warmkv().invoke(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_chat_that_nests_too_deeply_is_wrong_usage(new_warmkv: Callable[[], Warmkv], tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text("[" * 100_000)
    done = new_warmkv().invoke("cache", "warm", "--messages", str(tmp_path / "chat.json"))
    assert (done.returncode, "JSON list of messages" in done.stderr) == (2, True)
    assert done.stderr.strip()


def test_a_process_exits_with_the_same_codes_and_one_line(new_warmkv: Callable[[], Warmkv]) -> None:
    done = new_warmkv().run("up", "--model", "/does/not/exist")
    assert done.returncode == 2
    assert done.stderr == "warmkv: /does/not/exist is no folder. Give the path of a Hugging Face model folder.\n"
    assert new_warmkv().run("frobnicate").returncode == 2


def test_a_defect_is_one_line_too(new_warmkv: Callable[[], Warmkv], monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(**_: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr("deploy.layers.load_settings", break_down)
    done = new_warmkv().invoke("config", "show")
    assert done.returncode == 1
    assert "this is a defect: KeyError: 'gone'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("problem", [FleetProblem("no port is free; free one"), RedisServerError("no; install one")])
def test_a_fleet_or_a_redis_that_does_not_come_up_is_no_defect(
    new_warmkv: Callable[[], Warmkv], monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def break_down(_options: object) -> int:
        raise problem

    monkeypatch.setattr("deploy.demo.run_demo", break_down)
    done = new_warmkv().invoke("demo")
    assert (done.returncode, done.stderr) == (1, f"warmkv: {problem}\n")


def test_commands_that_wait_for_workers_outlast_the_bounds_of_the_router() -> None:
    settings = Settings()
    scaling_s = discovery._CALL_TIMEOUT_S + settings.router.drain_grace + settings.workers.flush
    assert max(scaling_s, CLEAR_TIMEOUT_S, COMPUTE_TIMEOUT_S, 2 * ANSWER_TIMEOUT_S) < WAIT_TIMEOUT_S


def test_status_gives_a_router_up_that_takes_the_call_and_says_nothing(
    new_warmkv: Callable[[], Warmkv], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.cli_fleet.ASK_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        done = new_warmkv().invoke("status", "--router", f"127.0.0.1:{mute.getsockname()[1]}")
    assert done.returncode == 3
    assert "no router answers" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["generate", "x"],
        ["policy", "show"],
        ["drain", "w0"],
        ["scale", "-n", "1"],
        ["cache", "clear", "--all"],
        ["cache", "ls"],
        ["cache", "stats"],
        ["cache", "warm", "x"],
        ["cache", "pin", "--tenant", "x"],
        ["cache", "check"],
        ["record", "never-made.jsonl"],
    ],
    ids=" ".join,
)
def test_without_a_router_commands_exit_with_3_and_say_how_to_start_one(
    new_warmkv: Callable[[], Warmkv], free_port: Callable[[], int], arguments: list[str]
) -> None:
    target = f"127.0.0.1:{free_port()}"
    done = new_warmkv().invoke(*arguments, "--router", target)
    assert done.returncode == 3
    assert (
        done.stderr == f"warmkv: no router answers at {target}; start one by `warmkv up`, or give --router HOST:PORT\n"
    )


def test_generate_streams_the_text_and_says_where_the_prompt_was_found(fleet: Fleet) -> None:
    arguments = ["generate", PROMPT, "--max-tokens", "5", "--temperature", "0", "--seed", "1"]
    cold, warm = fleet.run(*arguments), fleet.run(*arguments)
    assert cold.returncode == warm.returncode == 0, cold.stderr
    assert cold.stdout == warm.stdout
    assert "0% of" in cold.stderr
    assert re.search(
        r"\[[89]\d% of \d+ tokens cached \(device \d+\); 5 generated, length; w\d because prefix", warm.stderr
    )
    assert fleet.run(*arguments, "--quiet").stderr == ""


def test_generate_prints_several_answers_one_after_the_other(fleet: Fleet) -> None:
    done = fleet.run("generate", "hi", "--max-tokens", "3", "--seed", "5", "-n", "2", "--presence-penalty", "0.5")
    assert re.fullmatch(r"--- answer 0 \(length\)\n.+\n--- answer 1 \(length\)\n.+\n", done.stdout)
    assert "6 generated, length" in done.stderr
    whole = fleet.json("generate", "hi", "--max-tokens", "3", "-n", "2", "--logprobs", "1", "--logit-bias", "3=-5")
    assert len(whole["samples"]) == 2
    assert whole["text"] == whole["samples"][0]["text"]
    assert len(whole["samples"][1]["logprobs"]) == 3


def test_what_a_simulated_worker_cannot_do_is_an_error_and_so_is_a_wrong_regex(fleet: Fleet) -> None:
    assert "NOT_SUPPORTED" in fleet.run("generate", "hi", "--regex", "yes|no").stderr
    assert "unclosed group" in fleet.run("generate", "hi", "--regex", "(").stderr
    (schema := fleet.warmkv.state_dir / "schema.json").write_text('{"type": "nonsense"}')
    assert "nonsense" in fleet.run("generate", "hi", "--json-schema", str(schema)).stderr


def test_generate_as_json_has_the_whole_answer_and_reads_standard_input(fleet: Fleet) -> None:
    done = fleet.run("generate", "-", "--max-tokens", "3", "--json", input_text="What is a day in Rome?")
    answer = json.loads(done.stdout)
    assert len(answer["token_ids"]) == 3
    assert sum(answer["usage"]["prompt_tokens_by_fate"].values()) == answer["usage"]["prompt_tokens"]
    assert answer["route"]["worker"] in ("w0", "w1")


def test_an_empty_prompt_from_standard_input_is_wrong_usage(fleet: Fleet) -> None:
    assert fleet.run("generate", "-").returncode == 2


def test_chat_takes_a_turn_a_line_and_finds_earlier_turns_again(fleet: Fleet) -> None:
    done = fleet.run("chat", "--system", PROMPT, "--max-tokens", "4", input_text="one\n\ntwo\n/exit\nthree\n")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "cached" in line]
    assert len(lines) == 2
    assert "tokens cached (device" in lines[1]


def test_explain_shows_candidates_choice_and_miss_and_changes_nothing(fleet: Fleet) -> None:
    text = "A prompt that nobody has sent before, long enough for more than one block of sixteen tokens each."
    first, second = fleet.run("explain", text), fleet.run("explain", text)
    assert first.returncode == 0, first.stderr
    assert "would go to w" in first.stdout
    assert "w0" in first.stdout
    assert "w1" in first.stdout
    assert "first missing block: 0 (never_seen)" in second.stdout
    assert fleet.json("explain", text)["policy"] == "cache_aware"


def test_a_policy_scores_in_the_shadow_and_is_rolled_back(fleet: Fleet) -> None:
    assert "no policy scores" in fleet.run("policy", "shadow").stdout
    assert fleet.run("policy", "set", "round_robin").returncode == 0
    assert "scores the live requests" in fleet.run("policy", "set", "lowest_ttft", "--shadow").stdout
    assert "in force: round_robin" in fleet.run("policy", "show").stdout
    assert "scored no request" in fleet.run("policy", "shadow").stdout
    assert fleet.run("generate", "--max-tokens", "1", "a prompt for the shadow").returncode == 0
    assert "1 requests since" in fleet.run("policy", "shadow").stdout
    assert fleet.json("policy", "shadow")["decisions"] == "1"
    refused = fleet.run("policy", "set", "lowest_ttft", "--shadow", "--no-shared-tier-reads")
    assert (refused.returncode, "leave --shared-tier-reads out" in refused.stderr) == (2, True)
    fleet.run("policy", "shadow", "--stop")
    assert "no policy scores" in fleet.run("policy", "shadow").stdout
    assert "cache_aware" in fleet.run("policy", "rollback").stdout
    header, newest, *_ = fleet.run("policy", "history").stdout.splitlines()
    assert header.split() == ["version", "when", "(UTC)", "by", "router", "order", "from", "to"]
    assert "rollback" in newest
    assert [change["order"] for change in fleet.json("policy", "history")["changes"]][:4] == [
        "rollback",
        "unshadow",
        "shadow",
        "set",
    ]
    assert "choose one of" in fleet.run("policy", "rollback", "--to", "999").stderr


def test_a_policy_is_set_and_shown_with_its_weights(fleet: Fleet) -> None:
    assert fleet.run("policy", "set", "round_robin").stdout.strip() == "round_robin"
    assert "in force: round_robin" in fleet.run("policy", "show").stdout
    done = fleet.run("policy", "set", "cache_aware", "-w", "load=2.5", "--no-shared-tier-reads")
    assert "load=2.5" in done.stdout
    shown = fleet.json("policy", "show")
    assert shown["policy"]["weights"]["load"] == 2.5
    assert shown["shared_tier_reads"] is False
    assert fleet.run("policy", "set", "cache_aware", "-w", "load=1", "--shared-tier-reads").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["policy", "set", "astrology"], "cache_aware"),
        (["policy", "set", "cache_aware", "-w", "lode=1"], "load"),
        (["drain", "w9"], "w9"),
        (["scale", "-n", "3"], "warmkv up"),
    ],
    ids=str,
)
def test_what_the_router_refuses_is_one_line_with_a_remedy_and_exit_1(
    fleet: Fleet, arguments: list[str], said: str
) -> None:
    done = fleet.run(*arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_drained_worker_is_shown_as_such_and_gets_nothing(fleet: Fleet) -> None:
    assert "w0 is drained" in fleet.run("drain", "w0").stdout
    assert re.search(r"^w0 +drained", fleet.run("status").stdout, re.M)
    assert fleet.json("generate", PROMPT, "--max-tokens", "1")["route"]["worker"] == "w1"
    assert fleet.run("undrain", "w0").returncode == 0
    assert re.search(r"^w0 +ready", fleet.run("status").stdout, re.M)


def test_drain_with_a_handover_says_when_what_runs_goes_on_elsewhere(fleet: Fleet) -> None:
    for options, said in ([], "other workers now"), (["--after", "1m30s"], "other workers after 1m30s"):
        assert said in fleet.run("drain", "w0", "--hand-over", *options).stdout
    for options in ["--after", "5s"], ["--hand-over", "--after", "soon"]:
        assert fleet.run("drain", "w0", *options).returncode == 2
    assert fleet.run("undrain", "w0").returncode == 0


def test_status_shows_workers_tiers_policy_and_hit_rate(fleet: Fleet) -> None:
    fleet.run("generate", PROMPT, "--max-tokens", "1")
    done = fleet.run("status")
    assert done.returncode == 0
    assert re.search(r"^w1 +ready +127\.0\.0\.1:\d+ .* device \d+/4 MiB +host \d+/4 MiB", done.stdout, re.M)
    assert re.search(r"^prompts +\d+% of \d+ tokens cached", done.stdout, re.M)
    assert len(fleet.json("status")["workers"]) == 2


def test_clearing_reports_what_each_worker_dropped(fleet: Fleet) -> None:
    fleet.run("generate", PROMPT, "--max-tokens", "1")
    done = fleet.run("cache", "clear", "--prefix", PROMPT)
    assert done.returncode == 0, done.stderr
    assert re.search(r"w\d: dropped device \d+", done.stdout)
    assert "0% of" in fleet.run("generate", PROMPT, "--max-tokens", "1").stderr
    assert fleet.run("cache", "clear", "--all").returncode == 0


def test_clearing_a_prefix_of_another_tenant_leaves_ours(fleet: Fleet) -> None:
    fleet.run("generate", PROMPT, "--max-tokens", "1")
    done = fleet.run("cache", "clear", "--prefix", PROMPT, "--tenant", "somebody-else")
    assert done.returncode == 0, done.stderr
    assert not re.search(r"dropped device [1-9]", done.stdout)
    assert "(device 80)" in fleet.run("generate", PROMPT, "--max-tokens", "1").stderr
    assert fleet.run("cache", "clear", "--prefix", "-", input_text=PROMPT).returncode == 0
    assert "(device 64)" in fleet.run("generate", PROMPT, "--max-tokens", "1").stderr, "the last full block is gone"


def test_a_port_in_use_is_named_with_the_flag_that_changes_it(fleet: Fleet) -> None:
    port = fleet.warmkv.environment["WARMKV_ROUTER"].rpartition(":")[2]
    options = ["--worker", "w0=127.0.0.1:1", "--model", str(_model_of(fleet)), "--http-port", "0"]
    done = fleet.run("router", *options, "--grpc-port", port)
    assert done.returncode == 1
    assert port in done.stderr
    assert "--grpc-port" in done.stderr
    assert "Traceback" not in done.stderr


def test_log_lines_of_a_router_without_a_terminal_are_json(fleet: Fleet) -> None:
    lines = fleet.router.log.read_text().splitlines()
    joined = [json.loads(line) for line in lines if line.startswith("{") and "a worker joined" in line]
    assert {line["worker"] for line in joined} >= {"w0", "w1"}


def test_status_exits_with_4_when_a_worker_is_lost_and_the_router_ends_with_0(fleet: Fleet) -> None:
    fleet.workers[0].process.kill()
    fleet.workers[0].process.wait()
    done = fleet.run("status")
    assert done.returncode == 4
    assert re.search(r"^w0 +lost", done.stdout, re.M)
    assert fleet.json("generate", PROMPT, "--max-tokens", "1")["route"]["worker"] == "w1"
    assert fleet.router.terminate() == 0


def test_config_show_names_the_origin_of_every_value(new_warmkv: Callable[[], Warmkv], tmp_path: Path) -> None:
    file = tmp_path / "warmkv.toml"
    file.write_text('[store]\nhost_bytes = "1GiB"\n')
    warmkv = new_warmkv()
    warmkv.environment["WARMKV_REDIS__URL"] = "redis://:hunter2@h:1"
    done = warmkv.invoke("config", "show", "--config", str(file), "--set", "workers.count=3", "--explain")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^store\.host_bytes +1GiB +file +Capacity", done.stdout, re.M)
    assert re.search(r"^redis\.url +redis://\*\*\*@h:1 +env", done.stdout, re.M)
    assert re.search(r"^workers\.count +3 +flag", done.stdout, re.M)
    assert re.search(r"^workers\.cpus +1\.0 +default", done.stdout, re.M)
    shown = json.loads(warmkv.invoke("config", "show", "--json").stdout)
    assert shown["redis.url"] == {"value": "redis://***@h:1", "origin": "env", "help": shown["redis.url"]["help"]}


def test_down_without_a_fleet_says_so_and_exits_with_0(new_warmkv: Callable[[], Warmkv]) -> None:
    done = new_warmkv().invoke("down")
    assert done.returncode == 0
    assert "Nothing to end" in done.stdout


def _model_of(fleet: Fleet) -> str:
    command = fleet.router.process.args
    assert isinstance(command, list)
    return str(command[command.index("--model") + 1])
