from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests.workers.engine_rig import model_folder
from workers.detokenize import StopMatcher, TextStream

TEXT = "A naïve café: 你好, 世界! 😀👍🏽 — done."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_folder() / "tokenizer.json"))


def _pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*[stream.push(token) for token in ids], stream.flush()]


def test_pieces_add_up_to_the_text_and_hold_no_half_character(tokenizer: Tokenizer):
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) > len(TEXT) // 2  # several tokens a character among them
    pieces = _pieces(TextStream(tokenizer, [], []), ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_whole(tokenizer: Tokenizer):
    stream = TextStream(tokenizer, [], [])
    shown = ""
    for count, token in enumerate(tokenizer.encode("plain words in a row").ids, 1):
        shown += stream.push(token)
        assert shown == tokenizer.decode(tokenizer.encode("plain words in a row").ids[:count])


def test_an_unfinished_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer):
    ids = tokenizer.encode("ok 😀").ids[:-1]
    pieces = _pieces(TextStream(tokenizer, [], []), ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1] == "\ufffd"


def test_special_tokens_give_no_text(tokenizer: Tokenizer):
    ids = [1, *tokenizer.encode("hello").ids, 2, *tokenizer.encode(" you").ids, 2]
    assert "".join(_pieces(TextStream(tokenizer, [], []), ids)) == "hello you"


def test_the_prompt_is_context_and_not_text(tokenizer: Tokenizer):
    prompt = tokenizer.encode("Once upon a time").ids
    assert "".join(_pieces(TextStream(tokenizer, prompt, []), tokenizer.encode(" there was").ids)) == " there was"


def test_a_decoder_that_strips_the_first_space_keeps_that_of_the_answer():
    words = Tokenizer(models.WordLevel({"▁Once": 0, "▁upon": 1, "▁a": 2}, unk_token="▁a"))
    words.decoder = decoders.Metaspace()
    assert words.decode([1, 2]) == "upon a"
    assert "".join(_pieces(TextStream(words, [0], []), [1, 2])) == " upon a"


@given(st.lists(st.integers(0, 1023), max_size=60), st.lists(st.integers(0, 1023), max_size=10))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int], prompt: list[int]):
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    whole = tokenizer.decode(prompt[-6:] + ids)
    before = tokenizer.decode(prompt[-6:])
    if before.endswith("\ufffd"):
        return  # the prompt ends within a character, which the answer completes
    assert "".join(_pieces(TextStream(tokenizer, prompt, []), ids)) == whole[len(before) :]


@pytest.mark.parametrize("stop", ["café", "好, 世", "😀", "👍🏽", "ne.", "A"])
def test_the_text_ends_before_a_stop_string_whatever_tokens_it_spans(tokenizer: Tokenizer, stop: str):
    stream = TextStream(tokenizer, [], [stop])
    shown = ""
    for token in tokenizer.encode(TEXT).ids:
        shown += stream.push(token)
        assert TEXT.partition(stop)[0].startswith(shown)  # nothing that would have to be taken back
        if stream.stopped:
            break
    assert stream.stopped
    assert shown + stream.flush() == TEXT.partition(stop)[0]


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end(tokenizer: Tokenizer):
    stream = TextStream(tokenizer, [], ["row row your boat"])
    text = "".join(stream.push(token) for token in tokenizer.encode("row row").ids)
    assert text == ""
    assert stream.flush() == "row row"
    assert not stream.stopped


def test_the_earliest_of_several_stop_strings_counts():
    matcher = StopMatcher(["three", "two"])
    assert matcher.push("one two three") == "one "
    assert matcher.stopped
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_matcher_agrees_with_a_search_over_the_whole_text(text: str, stops: list[str], data: st.DataObject):
    matcher, shown, rest = StopMatcher(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += matcher.push(rest[:size])
        rest = rest[size:]
    shown += matcher.flush()
    # As the text comes, the match that ends first wins; of those that end at one place, the one that begins first.
    first = next((end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)), None)
    assert matcher.stopped == (first is not None)
    if first is None:
        assert shown == text
    else:
        assert len(shown) <= first
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)


def _byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Gemma have it: a token a byte, besides words."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257, "▁": 258, "é": 259}
    made = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


@given(st.lists(st.sampled_from([0x41, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xFF, 256, 257, 258, 259]), max_size=40))
def test_bytes_that_are_no_character_break_nothing_but_themselves(ids: list[int]):
    tokenizer = _byte_fallback()
    text, whole = "".join(_pieces(TextStream(tokenizer, [], []), ids)), tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert text == whole
    words = [token for token in ids if token in (256, 257, 258)]
    assert [letter for letter in text if letter in " ab"] == list(tokenizer.decode(words))


def test_text_goes_on_behind_a_byte_that_spoils_a_character_already_shown():
    stream = TextStream(_byte_fallback(), [256], [])
    assert "".join(_pieces(stream, [0xC3, 0xA9, 0xFF, 257, 256, 0xC3, 0xA9])) == "é\ufffdb aé"
