"""The documentation says what the code does: generated tables are fresh, and everything that it names exists."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperCommand, TyperGroup

from deploy.cli import app
from deploy.failures import EXIT_CODES
from deploy.layers import known_keys, load_settings
from deploy.reference import TABLES, metrics_table, rewritten
from router.auth import ApiKeys
from workers.config import WorkerConfig
from workers.job_wire import Refusal

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = [ROOT / "docs" / f"{name}.md" for name in ("errors", "metrics", "operations", "tuning")]
CLI = typer.main.get_command(app)
SECTIONS = {key.partition(".")[0] for key in known_keys()}
FOREIGN_FILES = {"redis.conf"}
# At the beginning of a line or command, behind variables and folders.
CALL = re.compile(r"(?:^\s*|[;&|(]\s*|\b[A-Z_]+=\S+\s+|/bin/)warmkv((?: +[^\s|&;<>)]+)+)", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


def block_with(page: str, language: str, text: str) -> str:
    return next(block for block in blocks(ROOT / "docs" / page, language) if text in block)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def calls(page: Path) -> Iterator[list[str]]:
    """The words behind `warmkv` in shell blocks and in code spans, up to the end of the command."""
    shell = [re.sub(r'"[^"]*"', "TEXT", block.replace("\\\n", " ")) for block in blocks(page, "sh")]
    for text in (*shell, *spans(page)):
        for found in CALL.findall(text):
            yield found.split()


def options(command: TyperCommand | TyperGroup) -> set[str]:
    named = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return named | {"--help", "-h"}


def unknown_words(words: list[str]) -> list[str]:
    """What the command line does not know of these."""
    command = CLI
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return words[:1]
        command, words = command.commands[words[0]], words[1:]
    flags = (word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word))
    return [flag for flag in flags if flag not in options(command)]


def all_options(command: TyperCommand | TyperGroup = CLI) -> set[str]:
    children = command.commands.values() if isinstance(command, TyperGroup) else ()
    return options(command).union(*(all_options(child) for child in children))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_fresh(page: Path) -> None:
    text = page.read_text()
    assert rewritten(text) == text, "run: python -m deploy.reference"


def test_every_table_stands_in_some_page() -> None:
    placed = {name for page in PAGES for name in re.findall(r"<!-- generated: (\w+) -->", page.read_text())}
    assert placed == set(TABLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    assert [(words, unknown) for words in calls(page) if (unknown := unknown_words(words))] == []


def test_a_command_or_flag_that_does_not_exist_would_be_found() -> None:
    assert unknown_words(["policy", "get"]) == ["get"]
    assert unknown_words(["up", "--model", "DIR", "--wokers=2"]) == ["--wokers"]
    assert unknown_words(["generate", "-q", "--max-tokens", "1", "TEXT"]) == []


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.name)
def test_flags_named_alone_exist(page: Path) -> None:
    assert [span for span in spans(page) if re.fullmatch(r"--[a-z-]+", span) and span not in all_options()] == []


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.name)
def test_settings_named_in_prose_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_]+)\b", page.read_text())
    known = {*known_keys(), *FOREIGN_FILES}
    assert [key for key in named if key not in known and importlib.util.find_spec(key) is None] == []


def exported_names() -> set[str]:
    names = set()
    for name, kind in re.findall(r"^\| `(\w+)` \| (\w+) \|", metrics_table(), re.MULTILINE):
        names |= {f"{name}_{end}" for end in ("bucket", "sum", "count")} if kind == "histogram" else set()
        names.add(name)
    return names


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.name)
def test_metrics_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"\bwarmkv_[a-z0-9_]+\b(?!\*)", page.read_text())) - {"warmkv_kv_"}
    assert named - exported_names() == set()


def test_queries_use_labels_that_their_metric_has() -> None:
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| \w* \| (.*?) \|", metrics_table(), re.MULTILINE)
    labels = {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in rows}
    for query in blocks(ROOT / "docs" / "metrics.md", "promql"):
        for name, matchers in re.findall(r"(warmkv_\w+)\{([^}]*)\}", query):
            used = set(re.findall(r"(\w+)\s*[!=]", matchers))
            assert used <= labels[name.removesuffix("_bucket")], query


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_queries_are_valid_promql(tmp_path: Path) -> None:
    queries = blocks(ROOT / "docs" / "metrics.md", "promql")
    rules = [{"record": f"q:{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "docs", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(queries)} rules found" in done.stdout


def test_example_files_are_what_their_readers_take(tmp_path: Path) -> None:
    settings = tmp_path / "warmkv.toml"
    settings.write_text(block_with("operations.md", "toml", "# warmkv.toml"))
    assert load_settings(file=settings, environ={}).settings.store.default_ttl == 7200.0
    keys = tmp_path / "keys.toml"
    keys.write_text(block_with("operations.md", "toml", "# keys.toml"))
    assert ApiKeys(keys).authenticate("wk-operator").role == "admin"
    assert ApiKeys(keys).authenticate("wk-mail").trust_group == "company"
    assert WorkerConfig(**json.loads(block_with("operations.md", "json", "fleet_secret"))).port == 7001


def test_every_reason_of_a_worker_is_explained() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "workers").glob("*.py"))
    given = {*re.findall(r'JobError\(\s*"([A-Z_]+)"', sources), *Refusal}
    page = (ROOT / "docs" / "errors.md").read_text()
    section = page[page.index("## Reasons that workers give") :].partition("\n## ")[0]
    explained = set(re.findall(r"^\| `([A-Z_]+)`", section, re.MULTILINE))
    assert explained == given


def test_exit_codes_are_those_of_the_command_line() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page[page.index("## Exit codes") :].partition("\n## ")[0]
    assert re.findall(r"^\| (\d) \|", table, re.MULTILINE) == re.findall(r"\d", EXIT_CODES)
