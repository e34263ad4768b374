from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from kvstore.events import BlockRemoved, BlockStored, RemovalCause, TierName
from router.index import PrefixIndex
from router.misses import AnswerMemory, Changed, ChangedTurn, _digest, _digests, explain_miss, said_digests
from router.protocol import EarlierAnswer, Prompt

ROOT = b"r" * 32


def index_with(*blocks: bytes) -> PrefixIndex:
    index = PrefixIndex(lambda: 0.0)
    index.join("a", 1)
    index.begin_snapshot("a", 1)
    index.snapshot("a", 1, [BlockStored(TierName.DEVICE, blocks)])
    index.end_snapshot("a", 1)
    return index


def test_a_prompt_whose_blocks_are_all_held_misses_nothing() -> None:
    assert explain_miss(index_with(b"1", b"2"), [b"1", b"2"], None) is None


def test_the_first_missing_block_is_named_with_its_cause() -> None:
    index = index_with(b"1", b"2")
    index.apply("a", 1, [BlockRemoved(TierName.DEVICE, (b"2",), RemovalCause.EXPIRED)])
    missing = explain_miss(index, [b"1", b"2", b"3"], None)
    assert missing is not None
    assert (missing.reason, missing.block) == ("expired", 1)
    assert explain_miss(index, [b"1", b"9"], None).reason == "never_seen"  # type: ignore[union-attr]


def said(*messages: str) -> bytes:
    """Of a conversation that the user begins."""
    return list(said_digests(zip(["user", "assistant"] * len(messages), messages, strict=False)))[-1]


def turn_after(text: str, *messages: str) -> tuple[Prompt, list[EarlierAnswer]]:
    """A prompt of that text, with one earlier answer that ends it."""
    return Prompt([], text + " Q: more A:"), [EarlierAnswer(said(*messages), len(text))]


def test_an_answer_that_came_back_as_other_ids_is_recognised() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, said("hi", " hello there "), "Q: hi A:", " hello there ", [b"1", b"2", b"3"])
    prompt, answers = turn_after("Q: hi A: hello there", "hi", "hello there")
    changed = memory.changed_turn(ROOT, prompt, answers, [b"1", b"2x", b"3x", b"4x"])
    assert changed == ChangedTurn(Changed.RETOKENIZED, 2)
    missing = explain_miss(index_with(b"1", b"2", b"3"), [b"1", b"2x", b"3x", b"4x"], changed)
    assert missing is not None
    assert (missing.reason, missing.block) == ("retokenized", 1)
    assert "token_ids" in missing.detail


def test_a_template_that_writes_an_earlier_turn_otherwise_is_named() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, said("hi", "yes"), "[12:01] Q: hi A:", "yes", [b"1", b"2"])
    prompt, answers = turn_after("[12:02] Q: hi A:yes", "hi", "yes")
    changed = memory.changed_turn(ROOT, prompt, answers, [b"1x", b"2x", b"3x"])
    assert changed == ChangedTurn(Changed.TEMPLATE_BREAK, 1)
    missing = explain_miss(index_with(b"1", b"2"), [b"1x", b"2x", b"3x"], changed)
    assert missing is not None
    assert (missing.reason, missing.block) == ("template_break", 0)
    assert "warmkv doctor" in missing.detail


def test_an_answer_that_the_template_did_not_write_whole_is_its_break() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, said("hi", "<think>hm</think>yes"), "Q A", "<think>hm</think>yes", [b"1"])
    answers = [EarlierAnswer(said("hi", "<think>hm</think>yes"), None, spliced=True)]
    changed = memory.changed_turn(ROOT, Prompt([], "Q Ayes Q"), answers, [b"x", b"y"])
    assert changed == ChangedTurn(Changed.TEMPLATE_BREAK, 0)


def test_a_turn_under_the_same_ids_is_not_changed() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, said("Q", "yes"), "Q A", "yes", [b"1", b"2"])
    prompt, answers = turn_after("Q Ayes", "Q", "yes")
    assert memory.changed_turn(ROOT, prompt, answers, [b"1", b"2", b"3"]) is None


def test_the_last_turn_that_is_known_counts() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, said("a", "b"), "Qa A", "b", [b"1"])
    memory.remember(ROOT, said("a", "b", "c", "d"), "Qa Ab Qc A", "d", [b"1x", b"2"])
    answers = [EarlierAnswer(said("a", "b"), 5), EarlierAnswer(said("a", "b", "c", "d"), 11)]
    assert memory.changed_turn(ROOT, Prompt([], "Qa Ab Qc Ad Qe A"), answers, [b"1x", b"2", b"3"]) is None
    answers.append(EarlierAnswer(said("a", "b", "c", "d", "e", "f"), 17))  # never answered here
    assert memory.changed_turn(ROOT, Prompt([], "Qa Ab Qc Ad"), answers, [b"1", b"2y"]) == ChangedTurn(
        Changed.RETOKENIZED, 1
    )


def test_a_miss_behind_the_answer_is_not_its_fault() -> None:
    missing = explain_miss(index_with(b"1"), [b"1", b"2"], ChangedTurn(Changed.RETOKENIZED, 0))
    assert missing is not None
    assert missing.reason == "never_seen"


def test_another_tenants_conversation_is_not_remembered_for_this_one() -> None:
    memory = AnswerMemory()
    memory.remember(ROOT, said("Q", "yes"), "QA", "yes", [b"1"])
    prompt, answers = turn_after("QAyes", "Q", "yes")
    assert memory.changed_turn(ROOT, prompt, answers, [b"x"]) is not None
    assert memory.changed_turn(b"s" * 32, prompt, answers, [b"x"]) is None


def test_memory_is_bounded() -> None:
    memory = AnswerMemory(max_entries=2)
    for n in range(5):
        memory.remember(ROOT, said(f"Q{n}", "yes"), f"Q{n}", "yes", [b"1"])
    forgotten, kept = turn_after("Q0yes", "Q0", "yes"), turn_after("Q4yes", "Q4", "yes")
    assert memory.changed_turn(ROOT, *forgotten, [b"x"]) is None
    assert memory.changed_turn(ROOT, *kept, [b"x"]) is not None


def test_what_was_said_counts_its_roles_and_where_messages_end() -> None:
    assert said("a", "b") == said(" a", "b\n")
    assert said("a", "b") != said("ab")
    assert said("a", "bc") != said("ab", "c")
    assert list(said_digests([("user", "a")])) != list(said_digests([("system", "a")]))


@given(st.text(max_size=8), st.lists(st.text(alphabet="a \n\u00e9\ud800", max_size=4), max_size=3))
def test_a_prompt_with_its_answer_has_the_digest_of_the_whole_text(start: str, ends: list[str]) -> None:
    assert _digests(start, ends) == {_digest(start + end) for end in ends}
