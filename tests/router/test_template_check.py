"""Templates that append find their turns again; those that rewrite earlier turns are told, with what they change."""

import asyncio
from datetime import datetime
from pathlib import Path

import pytest

from router.template_check import Break, breaks, changes_with_time
from router.tokenizer import PromptEncoder
from tests.router.small_tokenizers import write_model_folder
from workers.tiny import make_model_folder


def found(folder: Path, template: str | None = None) -> list[Break]:
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    encoder = PromptEncoder.load(folder)
    try:
        return asyncio.run(breaks(encoder))
    finally:
        encoder.close()


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_templates_that_append_have_no_break(tmp_path: Path, family: str) -> None:
    assert found(write_model_folder(tmp_path, family)) == []


def test_the_projects_own_model_has_no_break(tmp_path: Path) -> None:
    assert found(make_model_folder(tmp_path)) == []


def test_a_template_that_drops_thoughts_breaks_where_the_thought_stood(tmp_path: Path) -> None:
    (broken,) = found(write_model_folder(tmp_path, "qwen3"))
    assert broken.what == "answers with thoughts"
    assert broken.was.startswith("<think>")
    assert "<think>" not in broken.now
    assert 0 < broken.kept < broken.of


def test_a_template_that_numbers_its_messages_from_the_end_breaks_every_chat(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ messages | length - loop.index }} "
        "{{ message['content'] }}<|im_end|>{% endfor %}<|im_start|>"
    )
    write_model_folder(tmp_path)
    broken = found(tmp_path, template)
    assert [b.what for b in broken] == [
        "a plain chat", "a chat with a system prompt", "answers with thoughts", "answers with spaces around them",
    ]  # fmt: skip
    assert (broken[0].turn, broken[0].was[:3], broken[0].now[:3]) == (2, "0 N", "2 N")


@pytest.mark.parametrize(("form", "period"), [("%Y-%m-%d", "day"), ("%H:%M", "minute"), (None, "")])
def test_a_template_that_tells_the_time_is_found_out(tmp_path: Path, form: str | None, period: str) -> None:
    write_model_folder(tmp_path)
    said = f"{{{{ strftime_now('{form}') }}}}" if form else ""
    (tmp_path / "chat_template.jinja").write_text(said + "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert changes_with_time(tmp_path, now=lambda: datetime(2026, 3, 1, 9, 30)) == period


def test_kinds_that_a_template_refuses_are_left_out(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    assert found(tmp_path, refuses + (tmp_path / "chat_template.jinja").read_text()) == []
