"""Texts encoded piece by piece equal texts encoded whole, whatever was asked before; memory stays within its bound."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

from kvstore.token_ids import u32
from router.segment_memo import Encoded, SegmentMemo
from router.sent_ids import SentIdsMemo
from router.tokenizer import INLINE_BYTES, PromptEncoder
from tests.router.small_tokenizers import SPECIAL, tokenizer_json, write_model_folder
from warmkv.v1 import inference_pb2

KINDS = ["bytes", "metaspace"]
texts = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, " ", "  ", "\n", "<", "|>", "</", "<mark>", "<|eot"]), st.text(max_size=8)),
    max_size=12,
).map("".join)


def made(kind: str, *added: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json(kind))
    tokenizer.no_truncation()
    tokenizer.add_tokens(list(added))
    return tokenizer


def ids(memo: SegmentMemo, text: str) -> list[int]:
    pieces = memo.pieces(text)
    known, unknown = memo.recall(pieces)
    encoded = memo.encode(unknown)
    joined = memo.joined(pieces, known | dict(zip(unknown, encoded, strict=True)))
    memo.remember(unknown, encoded)
    assert joined.largest == max(joined.ids, default=-1)
    return joined.ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "added",
    [
        (),
        (AddedToken("<mark>", lstrip=True, rstrip=True, normalized=False),),
        (AddedToken("<mark>", normalized=True),),
        (AddedToken("<|eot_id|><", normalized=False),),
    ],
    ids=["plain", "strips", "normalized", "overlaps"],
)
def test_pieces_encode_as_the_whole_does(kind: str, added: tuple[AddedToken, ...]) -> None:
    tokenizer = made(kind, *added)
    memo = SegmentMemo(tokenizer, max_bytes=4000)
    assert memo.works

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(texts)
    def check(text: str) -> None:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids(memo, text) == expected
        assert ids(memo, text) == expected
        assert memo.nbytes <= 4000

    check()


def test_a_tokenizer_whose_tokens_look_at_their_neighbours_is_asked_for_whole_texts() -> None:
    assert not SegmentMemo(made("bytes", AddedToken("word", single_word=True))).works


def test_a_tokenizer_that_does_not_keep_the_rules_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentMemo, "encode", lambda self, pieces: _one_id_off(self, pieces))
    assert not SegmentMemo(made("bytes")).works


def _one_id_off(memo: SegmentMemo, pieces: list[tuple[str, str]]) -> object:
    batch = memo._tokenizer.encode_batch([a + b for a, b in pieces], add_special_tokens=False)
    return [Encoded(u32(e.ids), 0) for e in batch]


def test_a_normalizer_that_puts_something_first_is_no_obstacle() -> None:
    tokenizer = made("metaspace")
    tokenizer.normalizer = normalizers.Prepend("x")
    memo = SegmentMemo(tokenizer)
    assert memo.works
    for text in ("a<s>b", "<s>a</s> b", "a"):
        assert ids(memo, text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_growing_chat_encodes_its_new_turn_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptEncoder.load(write_model_folder(tmp_path))
    asked: list[str] = []
    encode = SegmentMemo.encode

    def counted(self: SegmentMemo, pieces: list[tuple[str, str]]) -> object:
        asked.extend(text for _, text in pieces)
        return encode(self, pieces)

    monkeypatch.setattr(SegmentMemo, "encode", counted)
    for count, new in _growing(5):
        asked.clear()
        asyncio.run(encoder.encode(count))
        assert sum(map(len, asked)) <= len(new) + 200, asked
    asked.clear()
    asyncio.run(encoder.encode(count))
    assert asked == []


def _growing(turns: int) -> Iterator[tuple[inference_pb2.Input, str]]:
    messages: list[inference_pb2.ChatMessage] = []
    for turn in range(turns):
        new = f"question {turn} " * 40
        messages += [inference_pb2.ChatMessage(role="user", content=new)]
        yield inference_pb2.Input(chat=inference_pb2.Chat(messages=messages)), new
        messages += [inference_pb2.ChatMessage(role="assistant", content=f"answer {turn}")]


def test_a_tokenizer_without_special_tokens_still_encodes(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    written = json.loads((folder / "tokenizer.json").read_text())
    written["added_tokens"], written["post_processor"] = [], None
    (folder / "tokenizer.json").write_text(json.dumps(written))
    encoder = PromptEncoder.load(folder)
    assert not encoder._memo.works
    text = "hello there " * 3
    prompt = asyncio.run(encoder.encode(inference_pb2.Input(text=text)))
    assert list(prompt.token_ids) == encoder._tokenizer.encode(text).ids
    assert prompt.largest_id == max(prompt.token_ids)


def test_a_piece_that_is_too_large_is_not_kept() -> None:
    memo = SegmentMemo(made("bytes"), max_bytes=4000)
    assert ids(memo, "<s>" + "ab" * 2000)
    assert memo.nbytes == 0


def test_sent_ids_are_read_once_and_bounded() -> None:
    memo = SentIdsMemo(max_bytes=2000)
    message = inference_pb2.ChatMessage(role="assistant", token_ids=[3, 9, 4])
    first = memo.of(message)
    assert first == (u32([3, 9, 4]), 9, message.ByteSize())
    assert memo.of(message) is first
    assert memo.of(inference_pb2.ChatMessage(role="user", content="x"))[:2] == (u32([]), -1)
    for n in range(50):
        assert memo.of(inference_pb2.ChatMessage(token_ids=[n])).ids.tolist() == [n]
        assert memo.nbytes <= 2000
    assert memo.of(message) == first
    assert memo.of(inference_pb2.ChatMessage(token_ids=range(1000))).largest == 999
    assert memo.nbytes <= 2000


def test_a_text_of_wide_characters_is_counted_by_its_bytes() -> None:
    memo = SegmentMemo(made("bytes"))
    text = "\U0001f642" * 2000
    assert ids(memo, "<s>" + text)
    assert memo.nbytes >= 4 * len(text)


def test_what_is_forgotten_while_a_thread_encodes_is_not_missing_from_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' prompts may push out pieces between the question what is known and the joining."""
    encoder = PromptEncoder.load(write_model_folder(tmp_path))
    memo = encoder._memo
    asyncio.run(encoder.encode(inference_pb2.Input(text="<s>first piece")))
    whole = "<s>first piece</s>" + "second piece " * (INLINE_BYTES // 10)
    encode = SegmentMemo.encode

    def forgetting(self: SegmentMemo, pieces: list[tuple[str, str]]) -> object:
        memo._known.clear()
        return encode(self, pieces)

    monkeypatch.setattr(SegmentMemo, "encode", forgetting)
    prompt = asyncio.run(encoder.encode(inference_pb2.Input(text=whole)))
    assert list(prompt.token_ids) == encoder._tokenizer.encode(whole).ids


def test_what_one_group_sent_is_not_known_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long encoding takes would tell that somebody else has sent the same text."""
    encoder = PromptEncoder.load(write_model_folder(tmp_path))
    asked: list[str] = []
    encode = SegmentMemo.encode

    def counted(self: SegmentMemo, pieces: list[tuple[str, str]]) -> object:
        asked.extend(text for _, text in pieces)
        return encode(self, pieces)

    monkeypatch.setattr(SegmentMemo, "encode", counted)
    given = inference_pb2.Input(text="<s>a secret plan")
    for group, again in (("red", 1), ("red", 1), ("blue", 2)):
        asyncio.run(encoder.encode(given, group=group))
        assert asked == ["a secret plan"] * again
    message = inference_pb2.ChatMessage(role="assistant", token_ids=[3, 9, 4])
    memo = SentIdsMemo()
    first = memo.of(message, group="red")
    assert memo.of(message, group="red") is first
    assert memo.of(message, group="blue") is not first
