"""`warmkv cache ...` against a real router and simulated workers: what it prints and how it exits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Fleet

SYSTEM = "You are a travel agent. Plan a day in Rome with museums, lunch and a walk along the river. " * 4


@pytest.fixture(autouse=True)
def _empty(fleet: Fleet) -> None:
    assert fleet.run("cache", "clear", "--all").returncode == 0


def warm(fleet: Fleet, *arguments: str, text: str = SYSTEM) -> None:
    done = fleet.run("cache", "warm", text, "--compute", *arguments)
    assert done.returncode == 0, done.stderr


def test_warming_computes_a_prompt_and_the_next_request_finds_it(fleet: Fleet) -> None:
    done = fleet.run("cache", "warm", "-", "--compute", "--worker", "w1", input_text=SYSTEM)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"(\d+) tokens, (\d+) full blocks\nw1: (\d+) tokens computed\n", done.stdout)
    assert found is not None, done.stdout
    assert (int(found[1]) // 16, found[3]) == (int(found[2]), found[1])
    fleet.run("drain", "w0")
    answer = fleet.json("generate", SYSTEM, "--max-tokens", "1")
    fleet.run("undrain", "w0")
    assert answer["usage"]["prompt_tokens_by_fate"]["device"] == int(found[2]) * 16
    again = fleet.json("cache", "warm", SYSTEM, "--compute", "--worker", "w1")
    assert again["workers"][0]["fates"]["device"] == int(found[2]) * 16


def test_lifetimes_are_taken_as_people_write_them(fleet: Fleet) -> None:
    warm(fleet, "--worker", "w0", "--expires-at", "2099-01-01T00:00Z", "--keep-priority", "70")
    (row, *_) = fleet.run("cache", "ls").stdout.splitlines()[1:]
    assert re.search(r" fixed .* 70 ", row), row
    warm(fleet, "--worker", "w0", "--ttl", "24h", "--fixed-ttl", text="Another prompt, of some length. " * 4)
    ttls = {(each["ttl_seconds"], each["priority"]) for each in fleet.json("cache", "ls")["blocks"]}
    assert ttls == {(0.0, 70), (0.0, 0)}
    done = fleet.run("generate", "A third prompt, again of some length. " * 4, "--max-tokens", "1", "--ttl", "30m")
    assert done.returncode == 0, done.stderr
    assert 1800.0 in {each["ttl_seconds"] for each in fleet.json("cache", "ls")["blocks"]}
    past = fleet.run("generate", "x", "--expires-at", "2001-01-01")
    assert past.returncode != 0
    assert "in the past" in past.stderr


def test_without_compute_nothing_that_nobody_holds_is_made(fleet: Fleet) -> None:
    done = fleet.run("cache", "warm", SYSTEM)
    assert re.search(r"^w\d: nothing to look for: it is in RAM already,", done.stdout, re.M), done.stdout
    assert "no such blocks" in fleet.run("cache", "ls").stdout


def test_blocks_are_listed_chain_by_chain_with_all_that_is_known(fleet: Fleet) -> None:
    warm(fleet, "--worker", "w0", "--ttl", "30m")
    done = fleet.run("cache", "ls")
    assert done.returncode == 0, done.stderr
    header, *rows, total = done.stdout.splitlines()
    assert header.split() == [
        "worker",
        "block",
        "after",
        "tokens",
        "tenant",
        "tiers",
        "TTL",
        "left",
        "pinned",
        "prio",
        "size",
    ]
    cells = [row.split() for row in rows]
    assert [row[3] for row in cells] == [f"{at}-{at + 15}" for at in range(0, 16 * len(rows), 16)]
    assert [row[2] for row in cells] == ["-", *(row[1] for row in cells[:-1])]
    assert {(row[0], row[4], row[5], row[6], row[7]) for row in cells} == {("w0", "default", "device", "host", "30m")}
    assert total == f"{len(rows)} blocks (device {len(rows)}, host {len(rows)})"


def test_a_list_is_cut_at_its_limit_and_goes_on_by_its_token(fleet: Fleet) -> None:
    warm(fleet)
    whole = fleet.json("cache", "ls", "--limit", "0")
    assert len(whole["blocks"]) == 5
    assert whole["next_page_token"] == ""
    cut = fleet.run("cache", "ls", "--limit", "2")
    token = re.search(r"more follow: raise --limit, or go on with --page-token (\S+)$", cut.stdout, re.M)
    assert token is not None, cut.stdout
    rest = fleet.json("cache", "ls", "--page-token", token[1])
    assert [block["hash"] for block in rest["blocks"]] == [block["hash"] for block in whole["blocks"][2:]]
    refused = fleet.run("cache", "ls", "--page-token", "nonsense")
    assert (refused.returncode, "page_token is damaged" in refused.stderr) == (1, True)


def test_a_prompt_selects_its_last_block_and_says_who_holds_how_much(fleet: Fleet) -> None:
    warm(fleet, "--worker", "w0")
    found = fleet.json("cache", "ls", "--prefix", SYSTEM)
    assert [block["first_token"] for block in found["blocks"]] == [64]
    held = {each["worker"]: each["device_tokens"] for each in found["prompt_held"]["held"]}
    assert held == {"w0": 80, "w1": 0}
    text = fleet.run("cache", "ls", "--prefix", "-", "--limit", "0", input_text=SYSTEM).stdout
    assert re.search(r"of the prompt's 80 tokens", text)
    assert "no such blocks" in fleet.run("cache", "ls", "--prefix", SYSTEM, "--tenant", "somebody-else").stdout
    assert "no such blocks" in fleet.run("cache", "ls", "--tier", "disk").stdout


def test_a_chat_is_named_by_its_messages(fleet: Fleet, tmp_path: Path) -> None:
    chat = [{"role": "system", "content": SYSTEM}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(chat))
    warm(fleet, "--worker", "w0")  # as a text it is another prompt
    assert fleet.json("cache", "ls", "--messages", str(file))["blocks"] == []
    done = fleet.run("cache", "warm", "--messages", str(file), "--compute", "--worker", "w0")
    assert done.returncode == 0, done.stderr
    listed = json.loads(fleet.run("cache", "ls", "--messages", "-", "--json", input_text=json.dumps(chat)).stdout)
    assert len(listed["blocks"]) == 1
    fleet.run("drain", "w1")
    said = fleet.run("chat", "--system", SYSTEM, "--max-tokens", "1", input_text="one\n")
    fleet.run("undrain", "w1")
    assert "cached (device" in said.stderr, "a chat that begins with it finds it"
    dropped = fleet.run("cache", "clear", "--messages", str(file))
    assert re.search(r"^w0: dropped device \d", dropped.stdout, re.M), dropped.stdout
    file.write_text('{"role": "system"}')
    assert "it is no list of messages" in fleet.run("cache", "pin", "--messages", str(file)).stderr


def test_pinned_blocks_are_shown_as_such_until_they_are_unpinned(fleet: Fleet) -> None:
    warm(fleet, "--worker", "w0")
    done = fleet.run("cache", "pin", "--prefix", SYSTEM, "--for", "30m")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "w0: pinned host 5\nw1: pinned nothing\n"
    assert {block["pinned"] for block in fleet.json("cache", "ls")["blocks"]} == {True}
    assert re.search(r" yes +0 ", fleet.run("cache", "ls").stdout)
    done = fleet.run("cache", "unpin", "--tenant", "default", "--worker", "w0")
    assert done.stdout == "w0: unpinned host 5\n"
    assert {block["pinned"] for block in fleet.json("cache", "ls")["blocks"]} == {False}
    nothing = fleet.run("cache", "pin", "--tenant", "nobody", "--for", "ever")
    assert nothing.returncode == 0
    assert "bring it there by `warmkv cache warm --compute`" in nothing.stdout


def test_stats_show_every_tier_of_every_worker(fleet: Fleet) -> None:
    warm(fleet, "--worker", "w0")
    done = fleet.run("cache", "stats", "--worker", "w0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:8] == ["worker", "tier", "fill", "blocks", "pinned", "hits", "misses", "stored"]
    assert re.search(r"^w0 +device +[\d.]+ KiB \(\d%\) +\d+ +0 +\d+ ", done.stdout, re.M), done.stdout
    assert "w1" not in done.stdout
    tiers = {(w["worker"], tier["tier"]) for w in fleet.json("cache", "stats")["workers"] for tier in w["tiers"]}
    assert tiers == {(w, tier) for w in ("w0", "w1") for tier in ("TIER_DEVICE", "TIER_HOST")}


def test_a_sound_store_is_ok(fleet: Fleet) -> None:
    done = fleet.run("cache", "check")
    assert (done.returncode, done.stdout) == (0, "w0: OK\nw1: OK\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls", "--worker", "w9"], "w9"),
        (["stats", "--worker", "w9"], "w9"),
        (["warm", "a", "--compute"], "shorter than a block"),
        (["pin", "--prefix", "a"], "shorter than a block"),
        (["check", "--worker", "w9"], "w9"),
    ],
    ids=str,
)
def test_what_the_router_refuses_is_one_line_and_exit_1(fleet: Fleet, arguments: list[str], said: str) -> None:
    done = fleet.run("cache", *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_every_order_is_in_the_routers_log(fleet: Fleet) -> None:
    assert fleet.run("cache", "pin", "--tenant", "acme", "--for", "5m").returncode == 0
    lines = [json.loads(line) for line in fleet.router.log.read_text().splitlines() if "gave an order" in line]
    (pin,) = [line for line in lines if line["order"] == "pin" and line["of_tenant"] == "acme"]
    assert (pin["seconds"], pin["outcome"], pin["workers"]) == (300, "OK", {"w0": "OK", "w1": "OK"})
    assert pin["request_id"]


def test_a_lost_worker_is_told_of_and_the_exit_code_says_that_something_is_missing(fleet: Fleet) -> None:
    warm(fleet, "--worker", "w1")
    fleet.workers[0].process.kill()
    fleet.workers[0].process.wait()
    listed = fleet.run("cache", "ls")
    assert (listed.returncode, "5 blocks" in listed.stdout) == (4, True)
    assert re.match(r"w0: it is lost.*; try again when it is back\n", listed.stderr), listed.stderr
    checked = fleet.run("cache", "check")
    assert (checked.returncode, checked.stdout) == (4, "w1: OK\n")
    pinned = fleet.run("cache", "pin", "--tenant", "default")
    assert (pinned.returncode, "w1: pinned host 5" in pinned.stdout) == (1, True)
    assert "w0: it is lost" in pinned.stderr
    assert re.search(r"^w0: lost: ", fleet.run("cache", "stats").stderr, re.M)
