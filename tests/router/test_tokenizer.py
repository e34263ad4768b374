"""Inputs to ids: equal to transformers, answers spliced in exactly, and every bad input refused by name."""

import asyncio
import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.token_ids import u32
from router.errors import InvalidRequest
from router.model_folder import ModelFolderError
from router.protocol import Encoder, Prompt
from router.segment_memo import Encoded
from router.tokenizer import INLINE_BYTES, MAX_MESSAGES, PromptEncoder
from tests.router.small_tokenizers import FAMILIES, write_model_folder
from tests.router.test_chat_template import contents, conversations, oracle
from warmkv.v1 import inference_pb2

Message = tuple[str, str] | tuple[str, str, list[int]]


def chat(*messages: Message, cue: bool | None = None) -> inference_pb2.Input:
    said = [inference_pb2.ChatMessage(role=m[0], content=m[1], token_ids=m[2] if len(m) > 2 else ()) for m in messages]
    return inference_pb2.Input(chat=inference_pb2.Chat(messages=said, add_generation_prompt=cue))


def ids(*token_ids: int) -> inference_pb2.Input:
    return inference_pb2.Input(token_ids=inference_pb2.TokenIds(ids=token_ids))


def encode(encoder: PromptEncoder, input: inference_pb2.Input) -> Prompt:
    return asyncio.run(encoder.encode(input))


@pytest.fixture
def encoder(tmp_path: Path) -> PromptEncoder:
    return PromptEncoder.load(write_model_folder(tmp_path), max_prompt_bytes=100_000)


KINDS = [("llama3", "bytes"), ("qwen3", "bytes"), ("mistral", "metaspace"), ("gemma", "metaspace")]


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_chats_encode_as_transformers_encodes_them(tmp_path: Path, family: str, kind: str) -> None:
    reference, mine = oracle(family, kind), PromptEncoder.load(write_model_folder(tmp_path, family, kind))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(conversations())
    def check(conversation: list[dict[str, str]]) -> None:
        sent = chat(*((m["role"], m["content"]) for m in conversation))
        try:
            expected = reference.apply_chat_template(  # type: ignore[attr-defined]
                conversation, tokenize=True, return_dict=False, add_generation_prompt=True
            )
        except Exception:  # noqa: BLE001 - whatever it refuses, so must we
            with pytest.raises(InvalidRequest):
                encode(mine, sent)
            return
        assert list(encode(mine, sent).token_ids) == expected

    check()


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_texts_encode_as_transformers_encodes_them_special_tokens_first(tmp_path: Path, kind: str) -> None:
    reference, mine = oracle("mistral", kind), PromptEncoder.load(write_model_folder(tmp_path, "mistral", kind))
    for text in ("hello", " hello  world\n", "</s>[INST] é漢🙂", "x" * 5000):
        prompt = encode(mine, inference_pb2.Input(text=text))
        assert list(prompt.token_ids) == reference(text)["input_ids"]  # type: ignore[operator]
        assert prompt.rendered == text
    assert prompt.token_ids[0] == mine._tokenizer.token_to_id("<s>")


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_a_prompt_and_its_answer_are_a_prefix_of_the_next_turn(tmp_path: Path, family: str, kind: str) -> None:
    """Whatever ids were sampled: they need not be what their text encodes to, nor valid UTF-8, nor end well."""
    mine = PromptEncoder.load(write_model_folder(tmp_path, family, kind))
    plain = st.lists(st.integers(20, mine.vocab_size - 20), min_size=1, max_size=12)
    ending = st.sampled_from([[], list(mine.eos_token_ids)])

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(contents, plain, ending), min_size=1, max_size=4))
    def check(turns: list[tuple[str, list[int], list[int]]]) -> None:
        said: list[Message] = []
        before: list[int] = []
        for question, body, end in turns:
            said.append(("user", question))
            prompt = list(encode(mine, chat(*said)).token_ids)
            assert prompt[: len(before)] == before
            before = prompt + body + end
            said.append(("assistant", mine.decode(body), body + end))

    check()


def test_ids_that_do_not_reencode_are_spliced_and_their_text_alone_is_not(encoder: PromptEncoder) -> None:
    answer = [encoder._tokenizer.token_to_id(c) for c in "hello"]
    text = encoder.decode(answer)
    with_ids = encode(encoder, chat(("user", "a"), ("assistant", text, answer), ("user", "b")))
    without = encode(encoder, chat(("user", "a"), ("assistant", text), ("user", "b")))
    assert _contains(with_ids.token_ids, answer)
    assert not _contains(without.token_ids, answer)
    assert with_ids.rendered == without.rendered


def test_earlier_answers_are_found_in_the_text_and_recognised_by_what_was_said(encoder: PromptEncoder) -> None:
    answer = [encoder._tokenizer.token_to_id(c) for c in "hello"]
    first, text = chat(("user", "a")), encoder.decode(answer)
    for message, spliced in ((("assistant", text), False), (("assistant", "", answer), True)):
        second = chat(("user", "a"), message, ("user", "b"))
        prompt = encode(encoder, second)
        (found,) = asyncio.run(encoder.earlier_answers(second, prompt))
        assert (found.said, found.spliced) == (encoder.said(first, text), spliced)
        assert prompt.rendered[: found.end].endswith("\n\nhello")
    assert asyncio.run(encoder.earlier_answers(ids(1, 2), Prompt([1, 2]))) == ()


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma"])
def test_an_end_token_stands_once_whether_the_answer_brought_it_or_not(tmp_path: Path, family: str) -> None:
    mine = PromptEncoder.load(write_model_folder(tmp_path, family))
    (end,) = mine.eos_token_ids
    answer = list(encode(mine, inference_pb2.Input(text="yes")).token_ids[1:])
    with_end = encode(mine, chat(("user", "a"), ("assistant", "yes", [*answer, end]), ("user", "b"))).token_ids
    without = encode(mine, chat(("user", "a"), ("assistant", "yes", answer), ("user", "b"))).token_ids
    assert with_end == without
    plain = encode(mine, chat(("user", "a"), ("assistant", "yes"), ("user", "b"))).token_ids
    assert list(with_end).count(end) == list(plain).count(end)


def test_a_thought_that_the_template_drops_is_not_spliced(tmp_path: Path) -> None:
    mine = PromptEncoder.load(write_model_folder(tmp_path, "qwen3"))
    thought = "<think>\nhm\n</think>\n\nyes"
    answer = list(encode(mine, inference_pb2.Input(text=thought)).token_ids[1:])
    spliced = encode(mine, chat(("user", "a"), ("assistant", thought, answer), ("user", "b")))
    plain = encode(mine, chat(("user", "a"), ("assistant", thought), ("user", "b")))
    assert spliced.token_ids == plain.token_ids
    assert "hm" not in spliced.rendered


def test_an_answer_sent_by_its_ids_alone_is_rendered_by_their_text(encoder: PromptEncoder) -> None:
    answer = [encoder._tokenizer.token_to_id(c) for c in "hey"]
    prompt = encode(encoder, chat(("user", "a"), ("assistant", "", answer), ("user", "b")))
    assert _contains(prompt.token_ids, answer)
    assert "hey" in prompt.rendered


def test_the_cue_is_there_unless_it_is_refused(encoder: PromptEncoder) -> None:
    with_cue = encode(encoder, chat(("user", "a"))).rendered
    assert encode(encoder, chat(("user", "a"), cue=True)).rendered == with_cue
    without = encode(encoder, chat(("user", "a"), cue=False)).rendered
    assert with_cue.startswith(without)
    assert len(with_cue) > len(without)


def test_ready_ids_come_back_as_they_are(encoder: PromptEncoder) -> None:
    last = encoder.vocab_size - 1
    assert encode(encoder, ids(5, 0, last)) == Prompt(u32([5, 0, last]), largest_id=last)


@pytest.mark.parametrize(
    ("input", "field", "says"),
    [
        (inference_pb2.Input(), "input", "not set"),
        (inference_pb2.Input(text=""), "input.text", "empty"),
        (ids(), "input.token_ids.ids", "empty"),
        (chat(), "input.chat.messages", "no messages"),
        (ids(1, 2, 4_000_000, 9_000_000), "input.token_ids.ids", "4000000 at position 2"),
        (chat(("user", "a"), ("assistant", "b", [7, 70_000])), "input.chat.messages[1].token_ids", "position 1"),
        (inference_pb2.Input(text="x" * 100_001), "input.text", "100001 bytes"),
        (inference_pb2.Input(text="é" * 50_001), "input.text", "100002 bytes"),
        (chat(("user", "x" * 60_000), ("assistant", "y" * 60_000)), "input.chat.messages", "bytes"),
        (chat(("user", "a"), ("assistant", "b", [300] * 60_000)), "input.chat.messages", "bytes"),
        (ids(*[1] * 25_001), "input.token_ids.ids", "100004 bytes"),
        (chat(*[("user", "")] * (MAX_MESSAGES + 1)), "input.chat.messages", "messages"),
        (chat(("system", "a"), ("user", "b"), ("system", "c")), "input.chat.messages", "must come first"),
    ],
)
def test_bad_inputs_are_refused_with_their_field(
    encoder: PromptEncoder, input: inference_pb2.Input, field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says.replace("[", r"\[")) as caught:
        encode(encoder, input)
    assert caught.value.metadata["field"] == field
    assert caught.value.message.endswith(".")


def test_a_prompt_as_long_as_allowed_is_encoded(encoder: PromptEncoder) -> None:
    assert len(encode(encoder, inference_pb2.Input(text="é" * 50_000)).token_ids) > 1
    assert len(encode(encoder, ids(*[1] * 25_000)).token_ids) == 25_000


def test_the_vocabularys_size_is_named(encoder: PromptEncoder) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(encoder, ids(encoder.vocab_size))
    assert caught.value.metadata["vocab_size"] == str(encoder.vocab_size)
    assert str(encoder.vocab_size) in caught.value.message


def test_a_chat_without_a_template_is_refused_and_text_is_not(tmp_path: Path) -> None:
    (write_model_folder(tmp_path) / "chat_template.jinja").unlink()
    mine = PromptEncoder.load(tmp_path)
    with pytest.raises(InvalidRequest, match="no chat template"):
        encode(mine, chat(("user", "a")))
    assert encode(mine, inference_pb2.Input(text="a")).token_ids


@pytest.mark.asyncio
async def test_long_inputs_leave_the_loop_alone_and_short_ones_start_no_thread(
    encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []
    encode_pieces = encoder._memo.encode

    def watched(pieces: Sequence[tuple[str, str]]) -> list[Encoded]:
        where.append(threading.current_thread().name)
        return encode_pieces(pieces)

    monkeypatch.setattr(encoder._memo, "encode", watched)
    for size in (INLINE_BYTES, INLINE_BYTES + 1):
        await encoder.encode(inference_pb2.Input(text="a" * size))
    await encoder.encode(chat(("user", "a" * INLINE_BYTES)))
    assert [name.startswith("tokenize") for name in where] == [False, True, True]
    encoder.close()


def test_facts_come_from_the_folder(tmp_path: Path) -> None:
    write_model_folder(tmp_path, text_config={"vocab_size": 999, "max_position_embeddings": 64})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    mine: Encoder = PromptEncoder.load(tmp_path)
    assert isinstance(mine, PromptEncoder)
    assert (mine.vocab_size, mine.context_length, mine.eos_token_ids) == (999, 64, (3, 4))
    assert mine.tokenizer_sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).digest()


def _break(folder: Path, name: str, text: str | None) -> None:
    (folder / name).unlink() if text is None else (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"max_position_embeddings": 5}'),
        ("config.json", '{"vocab_size": 5}'),
        ("config.json", '{"vocab_size": "5", "max_position_embeddings": 5}'),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\ufeff"),
        ("tokenizer_config.json", "nope"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_broken_model_folder_is_named_with_a_remedy(tmp_path: Path, name: str, text: str | None) -> None:
    _break(write_model_folder(tmp_path), name, text)
    with pytest.raises(ModelFolderError) as caught:
        PromptEncoder.load(tmp_path)
    said = str(caught.value)
    assert name in said or (name == "generation_config.json" and "eos_token_id" in said)
    assert said.endswith(".")


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no folder"):
        PromptEncoder.load(tmp_path / "nowhere")


def test_every_family_has_a_template() -> None:
    assert {family for family, _ in KINDS} == set(FAMILIES)


def _contains(whole: Sequence[int], part: list[int]) -> bool:
    return any(list(whole[i : i + len(part)]) == part for i in range(len(whole)))
