"""The renderer against transformers' own, over generated conversations, and what it does with bad ones."""

import json
import re
from datetime import datetime
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from router.chat_template import ChatTemplate, Message, load_chat_template
from router.errors import InvalidRequest
from router.model_folder import ModelFolderError
from tests.router.small_tokenizers import ENDS, FAMILIES, template, tokenizer_json

ORACLES: dict[tuple[str, str], object] = {}
PIECES = [
    "hello", " ", "\n", "\n\n", "<think>", "</think>", "<think>\nhm\n</think>\n\nyes", "<tool_response>",
    "{{ 1 }}", "{% x %}", "<&>\"'", "\t", "é", "漢", "🙂", "<|eot_id|>", "<|im_end|>", "</s>", "[INST]",
    "\x8d", "\x8d0.\x8f1\x9d", "\x8d0.\x901\x9d", "\x9d",
]  # fmt: skip
contents = st.one_of(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), st.text(max_size=20))
roles = st.sampled_from(["system", "user", "assistant", "tool"])


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    if draw(st.booleans()):  # in good order, as most are
        said = [{"role": r, "content": draw(contents)} for r in ["user", "assistant"] * draw(st.integers(1, 4))]
        said = said[: draw(st.integers(1, len(said)))]
        return [{"role": "system", "content": draw(contents)}, *said] if draw(st.booleans()) else said
    return [{"role": draw(roles), "content": draw(contents)} for _ in range(draw(st.integers(1, 5)))]


def oracle(family: str, kind: str = "bytes") -> object:
    """transformers' tokenizer over the same files."""
    if (family, kind) not in ORACLES:
        from transformers import PreTrainedTokenizerFast

        bos, eos = ENDS[family]
        ORACLES[family, kind] = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_json(kind)),
            bos_token=bos,
            eos_token=eos,
            chat_template=template(family),
        )
    return ORACLES[family, kind]


def ours(family: str) -> ChatTemplate:
    bos, eos = ENDS[family]
    return ChatTemplate(template(family), {"bos_token": bos, "eos_token": eos})


def messages(conversation: list[dict[str, str]]) -> list[Message]:
    return [Message(**message) for message in conversation]


@pytest.mark.parametrize("family", [*FAMILIES, "features"])
def test_renders_as_transformers_does(family: str) -> None:
    reference, mine = oracle(family), ours(family)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(conversations(), st.booleans())
    def check(conversation: list[dict[str, str]], cue: bool) -> None:
        try:
            expected = reference.apply_chat_template(  # type: ignore[attr-defined]
                conversation, tokenize=False, add_generation_prompt=cue
            )
        except jinja2.TemplateError as error:
            with pytest.raises(InvalidRequest, match=re.escape(str(error))):
                mine.render(messages(conversation), add_generation_prompt=cue)
            return
        rendering = mine.render(messages(conversation), add_generation_prompt=cue)
        assert rendering.text == expected
        for answer in rendering.answers:
            found = rendering.text[answer.start : answer.end]
            assert found.strip() == conversation[answer.message]["content"].strip()

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_that_came_out_is_found_where_it_stands(family: str) -> None:
    said = [Message("user", "a"), Message("assistant", "b"), Message("user", "a"), Message("assistant", "b")]
    rendering = ours(family).render([*said, Message("user", "a")])
    assert [answer.message for answer in rendering.answers] == [1, 3]
    assert all(rendering.text[answer.end - 1 : answer.end] == "b" for answer in rendering.answers)
    assert rendering.answers[0].end < rendering.answers[1].start


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_begins_where_its_prompt_ended(family: str) -> None:
    said = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    mine = ours(family)
    rendering = mine.render([*said, Message("user", "e")])
    assert len(rendering.answers) == 2
    for answer in rendering.answers:
        assert rendering.text[: answer.start] == mine.render(said[: answer.message]).text


def test_an_answer_whose_thoughts_are_dropped_is_not_claimed_and_its_neighbour_is() -> None:
    said = [Message("user", "a"), Message("assistant", "<think>\nhm\n</think>\n\nb"), Message("user", "c")]
    said += [Message("assistant", "d"), Message("user", "e")]
    rendering = ours("qwen3").render(said)
    assert "hm" not in rendering.text
    assert [answer.message for answer in rendering.answers] == [3]


def test_a_template_that_changes_or_repeats_answers_claims_none() -> None:
    said = [Message("user", "a"), Message("assistant", "be")]
    loop = "{% for m in messages %}%s;{% endfor %}"
    for body in ("{{ m.content | upper }}", "{{ m.content }}{{ m.content }}", "{{ m.content | replace('e', '') }}"):
        assert ChatTemplate(loop.replace("%s", body)).render(said).answers == ()
    assert len(ChatTemplate(loop.replace("%s", "{{ m.content }}")).render(said).answers) == 1


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{% if m.content[0] == 'b' %}B{% endif %}{{ m.content }};{% endfor %}", "a;Bb;"),
        (
            "{% for m in messages %}{{ m.content }};{% endfor %}{% if messages[-1].content == 'b' %}B{% endif %}",
            "a;b;B",
        ),
    ],
)
def test_a_template_that_looks_at_an_answers_edges_claims_none(source: str, text: str) -> None:
    """Between marks the answer looks different to it, so the marked rendering must not be trusted."""
    rendering = ChatTemplate(source).render([Message("user", "a"), Message("assistant", "b")])
    assert (rendering.text, rendering.answers) == (text, ())


def test_the_clock_is_asked_for_the_date() -> None:
    mine = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", now=lambda: datetime(2031, 5, 6))
    assert mine.render([Message("user", "a")]).text == "2031-05-06"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[9].content.x.y }}",
        "{{ 1 / 0 }}",
        "{{ messages + 'a' }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_whatever_a_template_does_wrong_is_an_answer_and_no_defect(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template refused"):
        ChatTemplate(source).render([Message("user", "a")])


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no messages"):
        ours("llama3").render([])


def test_a_template_that_is_no_jinja_is_named_at_the_start() -> None:
    with pytest.raises(ModelFolderError, match="line 2"):
        ChatTemplate("fine\n{% if %}")


def test_the_jinja_file_comes_before_the_tokenizers_settings(tmp_path: Path) -> None:
    config = {"chat_template": "old", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_chat_template(tmp_path)
    assert loaded is not None
    assert (loaded.source, loaded.tokens) == ("old", {"bos_token": "<s>"})
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}new")
    loaded = load_chat_template(tmp_path)
    assert loaded is not None
    assert loaded.render([Message("user", "a")]).text == "<s>new"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    loaded = load_chat_template(tmp_path)
    assert loaded is not None
    assert loaded.source == "plain"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    assert load_chat_template(tmp_path) is None


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None


def test_the_old_file_of_special_tokens_still_counts(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ bos_token }}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "old"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    loaded = load_chat_template(tmp_path)
    assert loaded is not None
    assert loaded.render([Message("user", "a")]).text == "</s><s>"


def test_a_broken_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFolderError, match=r"tokenizer_config\.json"):
        load_chat_template(tmp_path)
